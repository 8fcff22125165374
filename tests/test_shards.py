"""Tests of support/shards.py: what is a shard, what is data, and how everything else is named."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, some_tokens, write_bin

from support.command import UserError
from support.shards import open_data, open_shard

IDS = some_tokens(3000, 1)
ROW = IDS.tobytes()
ROW_32 = IDS.astype(np.uint32).tobytes()
OTHER = "is not a shard of GPT-2's tokens: it"
DAMAGED = "is not a whole shard of tokens .*; make or copy it again"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def header(magic, version):
    return np.array([magic, version, 3000] + [0] * 253, np.int32).tobytes()


def test_what_is_whole_is_not_said_to_be_damaged():
    """Files of llm.c, of nanoGPT's kin, and of none."""
    write_bin(Path("x.bin"), IDS)
    np.save("x.npy", IDS)
    llm_c, numpy = Path("x.bin").read_bytes(), Path("x.npy").read_bytes()
    for content, says in {
        header(20240520, 7) + ROW_32: f"x.bin {OTHER} is version 7 of llm.c's format, for Llama 3",
        header(20240520, 2) + ROW: f"x.bin {OTHER} is version 2 of llm.c",
        header(20240522, 1) + ROW: f"x.bin {OTHER} has no header, .* 55434",
        ROW_32: f"x.bin {OTHER}s ids have 32 bits",
        (ROOT / "input.txt").read_bytes(): f"x.bin {OTHER} is a text",
        b"PK\x03\x04" + ROW: f"x.bin {OTHER} looks like a zip archive",
        **dict.fromkeys((llm_c[:-1], llm_c[:99], llm_c + b"\0\0"), f"x.bin {DAMAGED}"),
        **dict.fromkeys((ROW[:-1], b""), f"x.bin {DAMAGED}"),
        **dict.fromkeys((numpy[:-1], numpy[:50], numpy + b"\0\0"), f"x.npy {DAMAGED}"),
        **dict.fromkeys((ROW, pickle.dumps(IDS)), f"x.npy {DAMAGED}"),
    }.items():
        path = Path(says[:5])
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{says}"):
            open_shard(path)
    for array in (IDS.astype(np.int64), IDS.reshape(10, 300)):
        np.save("x.npy", array)
        with pytest.raises(UserError, match=rf"^x.npy {OTHER} has {array.dtype} of shape"):
            open_shard(Path("x.npy"))


def test_nanogpts_row_without_a_header():
    """It is read, unless nanoGPT's meta.pkl says that its tokens are not GPT-2's."""
    Path("train.bin").write_bytes(ROW)
    assert open_shard(Path("train.bin")).tolist() == IDS.tolist()
    Path("meta.pkl").touch()
    with pytest.raises(UserError, match="another vocabulary"):
        open_shard(Path("train.bin"))


def test_data_that_is_no_text():
    for name, says in {
        "corp.jsonl": "fineweb.py --input corp.jsonl --out NEW",
        "corp.JSON": "fineweb.py --input FILE.jsonl",
        "val.npy": "one shard; give its folder",
        "texts": r"fineweb.py --input 'texts/\*.txt' --out NEW",
    }.items():
        path = Path(name if "." in name else f"{name}/a.txt")
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "a record"}\n' * 99)
        with pytest.raises(UserError, match=f"^--data {name}.*{says}"):
            open_data(name, 16)


def test_validation_begins_beside_an_end_of_text():
    """The last tenth of these texts would begin at each character of an <|endoftext|>."""
    for length in range(0, 130, 10):
        Path("a.txt").write_text("a" * length + "<|endoftext|>" * 20)
        (train,), (val,) = open_data("a.txt", 1)
        assert [*train, *val].count(50256) == 20

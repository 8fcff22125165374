"""fineweb.py as users run it. `plain_loop` knows nothing of pieces, processes or restarts."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import ROOT, TINY, one_line
from night import wait_for, workers

import fineweb
import train_gpt2
from support import texts
from support.shards import list_shards, open_data, open_shard, read_manifest

ENCODING = fineweb.gpt2_tokenizer()
TEXT = (ROOT / "input.txt").read_text("utf-8")
DOCUMENTS = [TEXT[i : i + 700 + i % 2900] for i in range(0, 900_000, 2500)]  # 360 of unequal length
EOT = "<|endoftext|>"
QUIET = {"script": "fineweb.py", "TQDM_DISABLE": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*flags):
    return helpers.run(Path.cwd(), *flags, **QUIET)


def make(*flags) -> str:
    """Run the command, which must succeed -> what it says."""
    done = run(*flags)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def plain_loop(documents):
    """Tokenize all documents with the simplest code there is."""
    tokens = [[50256, *ENCODING.encode_ordinary(document)] for document in documents]
    return np.concatenate(tokens).astype(np.uint16)


def plain_shards(tokens, shard_tokens):
    """Make the shards with np.save, name -> bytes."""
    files = {}
    for i, first in enumerate(range(0, len(tokens), shard_tokens)):
        np.save("shard.npy", tokens[first : first + shard_tokens])
        name = f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy"
        files[name] = Path("shard.npy").read_bytes()
    return files


def contents(folder, names="*"):
    return {p.name: p.read_bytes() for p in Path(folder).glob(names) if p.name != "lock"}


def tokens_of(folder):
    shards = [open_shard(path) for split in ("val", "train") for path in list_shards(folder, split)]
    return np.concatenate(shards).tolist()


def write(name, content):
    """Write a file, and the folder that it is in, with line ends as they are."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def write_jsonl(name, values, field="text"):
    write(name, "".join(json.dumps({"id": 1, field: value}) + "\n" for value in values))


def write_parquet(name, values):
    write(name, "")
    pyarrow.parquet.write_table(pa.table({"text": values}), name, row_group_size=50)


def change_manifest(folder, **changes):
    write(f"{folder}/manifest.json", json.dumps(read_manifest(folder) | changes))


# --------------------------------------------------------------------------------------------------
# The same bytes as the plain loop


def test_hub_equals_plain_loop():
    """Call the real load_dataset on a local folder with the hub's layout."""
    hub = "HuggingFaceFW/fineweb-edu"
    for i in range(3):
        write_parquet(f"{hub}/sample/10BT/{i:03d}_00000.parquet", DOCUMENTS[i * 120 :][:120])
    config = "- config_name: sample-10BT\n  data_files: sample/10BT/*\n"
    write(f"{hub}/README.md", f"---\nconfigs:\n{config}---\n")
    flags = ["--shard_tokens", 40_000, "--out", "out"]
    tokens = plain_loop(DOCUMENTS)
    assert f"out is complete: 360 documents, {len(tokens):,} tokens in 1 validation" in make(*flags)
    before, manifest = contents("out"), read_manifest("out")
    expected = plain_shards(tokens, 40_000)
    assert before == expected | {"manifest.json": before["manifest.json"]}
    assert manifest["complete"] is True and manifest["documents"] == 360
    for i, shard in enumerate(manifest["shards"]):
        part = tokens[40_000 * i :][:40_000].tolist()
        text = ENCODING.decode_bytes(part).replace(EOT.encode(), b"")
        assert (shard["tokens"], shard["bytes"]) == (len(part), len(text))
        assert shard["sha256"] == hashlib.sha256(expected[shard["name"]]).hexdigest()
    # After a kill in this source it continues, and asks load_dataset for the later files only.
    change_manifest("out", complete=False, shards=manifest["shards"][:3])
    make(*flags)
    assert contents("out") == before
    write_parquet(f"{hub}/sample/10BT/001_00000.parquet", DOCUMENTS[:120])
    one_line(run(*flags), "out was started with other contents of HuggingFaceFW")


@pytest.mark.parametrize("count, limit", [(1, 10**9), (2, 29_999), (2, 30_000), (4, 30_001)])
def test_files_workers_and_limits(count, limit):
    """Three kinds of files and a pattern, in the user's order, in both formats. The limit is
    before, at or after the end of a shard."""
    write_parquet("p/b.parquet", DOCUMENTS[40:60])
    write_parquet("p/a.parquet", DOCUMENTS[:40])
    write_jsonl("z.jsonl", DOCUMENTS[60:90])
    write("first.TXT", DOCUMENTS[90])
    flags = ["--input", "first.TXT", "p/*.parquet", "z.jsonl", "--shard_tokens", 30_000]
    flags += ["--workers", count, "--max_tokens", limit]
    tokens = plain_loop([DOCUMENTS[90], *DOCUMENTS[:90]])[:limit]
    make(*flags, "--out", "npy")
    assert contents("npy", "edufineweb_*") == plain_shards(tokens, 30_000)
    make(*flags, "--out", "bin", "--format", "bin")
    helpers.write_bin(Path("by_hand.bin"), tokens[:30_000])
    assert contents("bin")["edufineweb_val_000000.bin"] == Path("by_hand.bin").read_bytes()
    assert tokens_of("bin") == tokens.tolist()


def test_cutting_long_documents(monkeypatch):
    """Cut random text at every kind of gap; the tokens are the same, of a record and of a .txt.

    nanoGPT#308, gpt-2#33: in a .txt, <|endoftext|> is what transformers reads; in a record, text.
    """
    alphabet = [*"a! \n\t\x1c\u00a0\u3000漢", "b ", "\r\n", "'s", EOT]
    rng = random.Random(0)
    theirs = helpers.their_tokenizer()._tokenizer
    monkeypatch.setattr(fineweb, "PIECE_CHARS", 7)
    for _ in range(300):
        text = rng.choice(["a", EOT]) + "".join(rng.choices(alphabet, k=rng.randrange(8, 60)))
        write("a.txt", text)
        file = text.replace("\r\n", "\n")
        begun = file if file.startswith(EOT) else EOT + file
        ids = theirs.encode(begun, add_special_tokens=False).ids
        for documents, expected in (
            ([text], plain_loop([text]).tolist()),
            (texts.read_file(Path("a.txt"), "text"), ids),
        ):
            pieces = list(fineweb.pieces([lambda found=documents: found], fineweb.START))
            tokens = [piece.tokens for piece in fineweb.encode_batch(pieces)]
            assert np.concatenate(tokens).tolist() == expected, repr(text)


def test_a_damaged_shard_is_named_and_mended():
    """The first shard ends as a document does."""
    tokens, shard_tokens = plain_loop(DOCUMENTS[:9]), len(plain_loop(DOCUMENTS[:3]))
    write_jsonl("a.jsonl", DOCUMENTS[:9])
    flags = ["--input", "a.jsonl", "--shard_tokens", shard_tokens, "--out", "out"]
    make(*flags)
    before = contents("out")
    assert contents("out", "edufineweb_*") == plain_shards(tokens, shard_tokens)
    said = make("--verify", "--out", "out")
    assert "sizes and ids are right, SHA-256 too" in said and repr(DOCUMENTS[0][:60]) in said
    path = Path("out/edufineweb_train_000001.npy")
    whole = path.read_bytes()
    for damaged, says in {
        whole[:-2] + b"\x01\x00": "does not have the SHA-256 in manifest.json",
        whole[:-2] + b"\xff\xff": "has the id 65535",
        whole[:-1]: "is not a whole shard",
    }.items():
        path.write_bytes(damaged)
        one_line(run("--verify", "--out", "out"), says)
    make(*flags)
    assert contents("out") == before


# --------------------------------------------------------------------------------------------------
# Interruptions


def test_kills_at_random_moments():
    """Kill it again and again; each time, all shards are those of an undisturbed run."""
    blank = [" \n", None] * 20  # each counts once, however often the run is killed
    write_jsonl("a.jsonl", [*DOCUMENTS, *blank, TEXT[:300_000], *DOCUMENTS, *blank])
    flags = ["--input", "a.jsonl", "--shard_tokens", 10_000]
    make(*flags, "--out", "calm")
    calm = contents("calm")
    names = sorted(name for name in calm if "_train_" in name)
    rng, kills = random.Random(1), 0
    for part in range(12):
        process = helpers.start(Path.cwd(), *flags, "--out", "out", **QUIET)
        awaited = Path("out", names[len(names) * part // 16])
        while process.poll() is None and not awaited.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        kills += process.wait() == -signal.SIGKILL  # or it was at its end
        for name, content in contents("out", "edufineweb_*.npy").items():
            assert content == calm[name]
    make(*flags, "--out", "out")
    assert kills >= 6 and contents("out") == calm


@pytest.mark.skipif(sys.platform != "linux", reason="children are found by /proc")
@pytest.mark.parametrize(
    "who, number, status, says",
    [
        ("all", signal.SIGINT, 130, "fineweb.py: stopped; the same command continues"),
        ("parent", signal.SIGKILL, -signal.SIGKILL, ""),
        ("worker", signal.SIGKILL, 2, "fineweb.py: a tokenizer process was killed"),
    ],
)
def test_no_process_is_left_behind(who, number, status, says):
    """However it ends, it does so in one line, and with all its processes."""
    write_jsonl("a.jsonl", DOCUMENTS * 40)
    flags = ["--input", "a.jsonl", "--shard_tokens", 20_000, "--out", "out", "--workers", 2]
    process = helpers.start(Path.cwd(), *flags, **QUIET)
    wait_for(Path("out/edufineweb_train_000002.npy").exists, process)
    one_line(run(*flags), f"out belongs to a run that is not over: process {process.pid} on ")
    children = workers(process.pid)
    os.kill({"all": -process.pid, "parent": process.pid, "worker": children[0]}[who], number)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == status and "Traceback" not in said, said
    assert says in said.splitlines()[-1]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --------------------------------------------------------------------------------------------------
# All sorts of documents and files; the numbers are bug reports of other projects


def test_no_document_ends_the_job():
    """What cannot be text is skipped; what only JSON proper lacks is read. Writers
    other than Arrow may leave bytes in a column that are not UTF-8."""
    odd = [f"{EOT} is text here", "lone \ud800 surrogates \udfff", "\ufeff\x00 marks \u202e"]
    values = ["", " \n\t\u00a0", None, 17, ["a", "list"], *odd]
    lines = [json.dumps({"text": value}) for value in values]
    lines += ['{"text": "deep", "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "", '{"text": NaN}']
    lines += ['{"text": ' + "9" * 10**4 + "}", '{"other": 1}', '{"text": "raw\t\x01"}']
    lines += ['{"text": "an integer", "n": ' + "9" * 10**4 + "}", '{"text": "caf\udce9"}']
    write("a.jsonl", "\n".join(lines).encode(errors="surrogateescape"))
    buffers = pa.array([b"one", b"caf\xe9", None, b"", b"two"]).buffers()
    write_parquet("a.parquet", pa.Array.from_buffers(pa.string(), 5, buffers))
    write_parquet("b.parquet", [1, 2, 3])
    files = ["--input", "a.jsonl", "a.parquet", "b.parquet"]
    said = make(*files, "--out", "out")
    assert "skipped 4 empty and 11 that were not text; replaced broken unicode in 3" in said
    others = ["raw\t\x01", "an integer", "caf\ufffd", "one", "caf\ufffd", "two"]
    assert tokens_of("out") == plain_loop([*odd, *others]).tolist()


UNICODE = "Ein Straßenschild, 漢字, 😀.\r\n" * 400


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_byte_order_marks(encoding):
    """nanoGPT#429: what PowerShell and Notepad write is decoded by both commands."""
    mark = "" if encoding in ("utf-8-sig", "utf-32") else "\ufeff"
    write("a.txt", (mark + UNICODE).encode(encoding))
    record = json.dumps({"text": UNICODE}, ensure_ascii=False)
    write("a.jsonl", (mark + record).encode(encoding))
    make("--input", "a.txt", "a.jsonl", "--out", "out")
    read = UNICODE.replace("\r\n", "\n")
    assert tokens_of("out") == plain_loop([read, UNICODE]).tolist()
    (first,), (last,) = open_data("a.txt", 16)
    assert ENCODING.decode([*first, *last]) == read


def test_bad_files_are_named(folder):
    """In one line. Stray bytes in a text are replaced by fineweb.py, and refused by the trainer."""
    write_parquet("d.parquet", DOCUMENTS)
    whole = Path("d.parquet").read_bytes()
    write_jsonl("c.jsonl", ["a"], "body")
    for name, content, says in (
        ("a.jsonl", '{"text": "whole"}\n\n{"text": "half a li\n', "a.jsonl, line 3: "),
        ("c.jsonl", None, "no column text; give --text_field, of id, body"),
        ("d.parquet", whole[:9_000] + bytes(9_000) + whole[18_000:], "d.parquet cannot be read "),
        ("nothing/*.txt", None, r"nothing/\*.txt is not a file that ends in .txt, .jsonl"),
        ("b.txt", UNICODE.encode("utf-16-le"), "b.txt is not a text.*UTF-16 without a byte order"),
        ("b.txt", gzip.compress(b"text"), "b.txt is not a text.*gzip"),
        ("b.txt", np.arange(9999).tobytes(), "b.txt is not a text.*binary data"),
    ):
        if content:
            write(name, content)
        one_line(run("--input", name, "--out", "out"), says)
    one_line(helpers.run(folder, *TINY, "--data", "b.txt"), "b.txt is not a text.*binary data")
    write("b.txt", b"caf\xe9 au lait")
    assert "replaced broken unicode in 1" in make("--input", "b.txt", "--out", "out")
    one_line(helpers.run(folder, *TINY, "--data", "b.txt"), "b.txt cannot be read as UTF-8")
    one_line(run("--shard_tokens", 0), "--shard_tokens 0")
    one_line(run("--out", "new"), "does not answer")  # the hub


def test_the_trainer_finds_the_shards(folder, monkeypatch, capsys):
    """nanoGPT#532: they lie beside the scripts. It says if they are not complete."""
    assert str(fineweb.parse_arguments([]).out) == train_gpt2.TrainConfig().data
    write("a.txt", TEXT[:20_000])
    make("--input", "a.txt", "--shard_tokens", 1000, "--out", "edu_fineweb10B")
    monkeypatch.setattr(train_gpt2, "HERE", folder)
    assert train_gpt2.make_config({}, {}, ()).preset == "gpt2"
    change_manifest("edu_fineweb10B", complete=False)
    open_data("edu_fineweb10B", 16)
    assert "edu_fineweb10B is incomplete" in capsys.readouterr().out


def test_a_name_is_no_pattern(folder):
    """CIL#1207. Each file is read once, by whatever names."""
    for name in ("a[1].txt", "a1.txt", "b[1]/c.txt", "b1/c.txt"):
        write(name, name)
    for names, expected in (
        (["a1.txt", "a[1].txt", "./a1.txt", folder / "a1.txt"], ["a1.txt", "a[1].txt"]),
        (["b[1]/*.txt"], ["b[1]/c.txt"]),
        (["**/c.txt", "a?.txt"], ["b1/c.txt", "b[1]/c.txt", "a1.txt"]),
    ):
        assert [path.read_text() for path in texts.find_files(names)] == expected


def test_contents_and_settings_decide_what_has_changed(folder):
    write_jsonl("a.jsonl", DOCUMENTS[:30])
    flags = ["--input", "a.jsonl", "--shard_tokens", 9_000, "--out", "out"]
    make(*flags)
    before = contents("out")
    write("b.jsonl", Path("a.jsonl").read_text().replace("e", "i"))
    shutil.copy("a.jsonl", "same.jsonl")
    make(*flags, "--input", folder / "same.jsonl")
    other = [*flags, "--input", "b.jsonl"]
    one_line(run(*other), "other contents of a.jsonl; give another --out")
    one_line(run(*flags, "--shard_tokens", 8_000), "shard_tokens = 9000, not 8000;")
    assert contents("out") == before

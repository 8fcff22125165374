"""fineweb.py as users run it. `plain_loop` knows nothing of pieces, processes or restarts."""

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
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
from support.shards import list_shards, open_data, open_shard, read_manifest, token_bytes

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


def broken(code, *flags):
    """Run the command in a process in which `code` breaks something."""
    code = f"import fineweb; from fineweb import *\n{code}\nrun_command('fineweb.py', main)"
    options = dict(env=os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}, timeout=100)
    command = [sys.executable, "-c", code, *map(str, flags)]
    return subprocess.run(command, **options, capture_output=True, text=True, check=False)


def plain_loop(documents):
    """Tokenize all documents with the simplest code there is."""
    tokens = [[50256, *ENCODING.encode_ordinary(document)] for document in documents]
    return np.concatenate(tokens).astype(np.uint16)


def plain_shards(documents, shard_tokens):
    """Make the shards with np.save, name -> bytes."""
    tokens, files = plain_loop(documents), {}
    for i, first in enumerate(range(0, len(tokens), shard_tokens)):
        np.save("shard.npy", tokens[first : first + shard_tokens])
        name = f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy"
        files[name] = Path("shard.npy").read_bytes()
    return files


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "lock"}


def shards_of(folder):
    return {name: data for name, data in contents(folder).items() if name != "manifest.json"}


def tokens_of(folder):
    shards = [open_shard(path) for split in ("val", "train") for path in list_shards(folder, split)]
    return np.concatenate(shards).tolist()


def write(name, content):
    """Write a file, and the folder that it is in, with line ends as they are."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def write_jsonl(name, values, field="text"):
    write(name, "".join(json.dumps({"id": 1, field: value}) + "\n" for value in values))


def write_parquet(name, values, field="text"):
    write(name, "")
    table = pa.table({field: values, "id": list(range(len(values)))})
    pyarrow.parquet.write_table(table, name, row_group_size=50)


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
    tokens = len(plain_loop(DOCUMENTS))
    assert f"out is complete: 360 documents, {tokens:,} tokens in 1 validation" in make(*flags)
    expected = plain_shards(DOCUMENTS, 40_000)
    assert shards_of("out") == expected
    before, manifest = contents("out"), read_manifest("out")
    assert manifest["complete"] is True and manifest["documents"] == 360
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256(expected[shard["name"]]).hexdigest()
        tokens = open_shard(Path("out", shard["name"]))
        text = ENCODING.decode_bytes(tokens.tolist()).replace(EOT.encode(), b"")
        assert shard["tokens"] == len(tokens)
        assert shard["bytes"] == len(text) == token_bytes()[tokens].sum()
    # After a kill in this source it continues, and asks load_dataset for the later files only.
    change_manifest("out", complete=False, shards=manifest["shards"][:3])
    make(*flags)
    assert contents("out") == before
    write_parquet(f"{hub}/sample/10BT/001_00000.parquet", DOCUMENTS[:120])
    one_line(run(*flags), "out was started with other contents of HuggingFaceFW")


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.parametrize("count", [1, 4])
def test_files_workers_and_ways_to_start_them(method, count):
    """Three kinds of files and a pattern, in the user's order; without a __main__ guard, too."""
    write_parquet("p/b.parquet", DOCUMENTS[40:60])
    write_parquet("p/a.parquet", DOCUMENTS[:40])
    write_jsonl("z.jsonl", DOCUMENTS[60:90])
    write("first.TXT", DOCUMENTS[90])
    flags = ["--shard_tokens", 30_000, "--workers", count, "--out", "out"]
    files = ["--input", "first.TXT", "p/*.parquet", "z.jsonl"]
    broken(f"multiprocessing.set_start_method('{method}')", *files, *flags)
    assert shards_of("out") == plain_shards([DOCUMENTS[90], *DOCUMENTS[:90]], 30_000)


@pytest.mark.parametrize("limit", [29_999, 30_000, 30_001])
def test_max_tokens(limit):
    """Before, at and after the end of a shard, which is llm.c's to the byte."""
    write_jsonl("a.jsonl", DOCUMENTS[:60])
    flags = ["--input", "a.jsonl", "--shard_tokens", 30_000, "--format", "bin", "--out", "out"]
    make(*flags, "--max_tokens", limit)
    expected = plain_loop(DOCUMENTS[:60])[:limit]
    assert tokens_of("out") == expected.tolist()
    helpers.write_bin(Path("by_hand.bin"), expected[:30_000])
    assert contents("out")["edufineweb_val_000000.bin"] == Path("by_hand.bin").read_bytes()


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
            (fineweb.texts.read_file(Path("a.txt"), "text"), ids),
        ):
            pieces = list(fineweb.pieces([lambda found=documents: found], fineweb.START))
            tokens = [piece.tokens for piece in fineweb.encode_batch(pieces)]
            assert np.concatenate(tokens).tolist() == expected, repr(text)


def test_a_damaged_shard_is_named_and_mended():
    """The first shard ends as a document does."""
    shard_tokens = len(plain_loop(DOCUMENTS[:3]))
    write_jsonl("a.jsonl", DOCUMENTS[:9])
    flags = ["--input", "a.jsonl", "--shard_tokens", shard_tokens, "--out", "out"]
    make(*flags)
    before = contents("out")
    assert shards_of("out") == plain_shards(DOCUMENTS[:9], shard_tokens)
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
    Path("out/manifest.json").unlink()
    assert "no manifest.json" in make("--verify", "--out", "out")
    one_line(run(*flags), "no manifest.json")


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
        for name, content in shards_of("out").items():
            assert name.endswith(".tmp") or content == calm[name]
    make(*flags, "--out", "out")
    assert kills >= 6 and contents("out") == calm


@pytest.mark.skipif(sys.platform != "linux", reason="children are found by /proc")
@pytest.mark.parametrize(
    "who, number, status, says",
    [
        ("all", signal.SIGINT, 130, "fineweb.py: stopped; the same command continues"),
        ("parent", signal.SIGTERM, 130, "fineweb.py: stopped; the same command continues"),
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


def test_a_process_killed_while_it_sends():
    """Nobody waits for the other half of its result."""
    write("a.txt", TEXT)
    code = "def encode_batch(batch):\n  pipe = sys._getframe(1).f_locals['result_queue']._writer\n"
    code += "  os.write(pipe.fileno(), b'\\0\\0\\1\\0half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "multiprocessing.set_start_method('fork'); fineweb.encode_batch = encode_batch"
    done = broken(code, "--input", "a.txt", "--workers", 2, "--out", "out")
    one_line(done, "a tokenizer process was killed")


# --------------------------------------------------------------------------------------------------
# All sorts of documents


def test_columns():
    """A null, numbers, and bytes that are not UTF-8, which writers other than Arrow may leave."""
    buffers = pa.array([b"one", b"caf\xe9", None, b"", b"two"]).buffers()
    write_parquet("a.parquet", pa.Array.from_buffers(pa.string(), 5, buffers), "body")
    write_parquet("b.parquet", [1, 2, 3], "body")
    said = make("--input", "a.parquet", "b.parquet", "--text_field", "body", "--out", "out")
    assert shards_of("out") == plain_shards(["one", "caf\ufffd", "two"], 10**8)
    assert "skipped 1 empty and 4 that were not text; replaced broken unicode in 1" in said
    done = run("--input", "b.parquet", "--text_field", "body", "--out", "numbers")
    one_line(done, "no text: 0 empty documents, 3")


def test_broken_files_are_named():
    write("a.jsonl", '{"text": "whole"}\n\n{"text": "half a li\n')
    write_jsonl("c.jsonl", ["a"], "body")
    write_parquet("d.parquet", DOCUMENTS)
    whole = Path("d.parquet").read_bytes()
    write("d.parquet", whole[:9_000] + bytes(9_000) + whole[18_000:])
    for name, says in {
        "a.jsonl": "a.jsonl, line 3: ",
        "c.jsonl": "no column text; give --text_field, of id, body",
        "d.parquet": r"d.parquet cannot be read \(",
        "nothing/*.txt": r"nothing/\*.txt is not a file that ends in .txt, .jsonl, .parquet",
    }.items():
        one_line(run("--input", name, "--out", "out"), says)
    one_line(run("--shard_tokens", 0), "--shard_tokens 0")
    one_line(run("--out", "out"), "does not answer")


# --------------------------------------------------------------------------------------------------
# What bug reports of other projects broke, and what else is of the same kinds


def test_no_document_ends_the_job():
    """tiktoken#245. What cannot be text is skipped; what only JSON proper lacks is read."""
    texts = [f"{EOT} is text here", "lone \ud800 surrogates \udfff", "\ufeff\x00 marks \u202e"]
    spaces = "hello" + " " * 1_100_000 + "world"
    values = ["", " \n\t\u00a0", None, 17, ["a", "list"], *texts, spaces]
    lines = [json.dumps({"text": value}) for value in values]
    lines += ['{"text": "deep", "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "", '{"text": NaN}']
    lines += ['{"text": ' + "9" * 10**4 + "}", '{"other": 1}', '{"text": "raw\t\x01"}']
    lines += ['{"text": "an integer", "n": ' + "9" * 10**4 + "}", '{"text": "caf\udce9"}']
    write("a.jsonl", "\n".join(lines).encode(errors="surrogateescape"))
    said = make("--input", "a.jsonl", "--shard_tokens", 500_000, "--out", "out")
    assert "skipped 3 empty and 7 that were not text; replaced broken unicode in 2" in said
    hello, space, world = ENCODING.encode_ordinary("hello  world")
    others = plain_loop(["raw\t\x01", "an integer", "caf\ufffd"])
    expected = [*plain_loop(texts), 50256, hello, *[space] * 1_099_999, world, *others]
    assert tokens_of("out") == expected


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


def test_what_is_no_text_is_named(folder):
    """Both commands refuse it; stray bytes fineweb.py counts, and an odd one ends UTF-16."""
    for content, says in {
        UNICODE.encode("utf-16-le"): "UTF-16 without a byte order mark",
        gzip.compress(b"text"): "gzip",
        np.arange(9999).tobytes(): "binary data",
    }.items():
        write("a.txt", content)
        flags = ["--input", ROOT / "input.txt", "a.txt", "--out", "out"]
        one_line(run(*flags), f"a.txt is not a text.*{says}")
        one_line(helpers.run(folder, *TINY, "--data", "a.txt"), f"a.txt is not a text.*{says}")
        assert not Path("out").exists()
    write("a.txt", b"caf\xe9 au lait")
    write("b.txt", "\ufefftext".encode("utf-16-le") + b"x")
    assert "replaced broken unicode in 2" in make("--input", "a.txt", "b.txt", "--out", "out")
    assert tokens_of("out") == plain_loop(["caf\ufffd au lait", "text\ufffd"]).tolist()
    one_line(helpers.run(folder, *TINY, "--data", "a.txt"), "a.txt cannot be read as UTF-8")


def test_the_trainer_finds_the_shards(folder, monkeypatch):
    """nanoGPT#532: they lie beside the scripts. Other files there are left alone."""
    shutil.copytree(ROOT / "support", "project/support")
    for name in ("fineweb.py", "train_gpt2.py", "hellaswag.py"):
        shutil.copy(ROOT / name, "project")
    monkeypatch.setattr(helpers, "ROOT", folder / "project")
    write("a.txt", TEXT[:20_000])
    make("--input", "a.txt", "--shard_tokens", 1000)
    shards = "project/edu_fineweb10B"
    assert list_shards(shards, "val") and not Path("edu_fineweb10B").exists()
    for name in ("x_train_9.npy.123.tmp", "training_notes.npy"):
        write(f"{shards}/{name}", "other")
    flags = [*TINY[2:], "--hellaswag_every", 0, "--micro_batch", 8]
    done = helpers.run(folder, *flags)
    assert "preset gpt2 (without --preset" in done.stdout and done.returncode == 0, done.stderr
    assert "incomplete" not in done.stdout
    change_manifest(shards, complete=False)
    assert "edu_fineweb10B is incomplete" in helpers.run(folder, *flags, "--resume").stdout


def test_a_name_is_no_pattern(folder):
    """CIL#1207. Each file is read once, by whatever names."""
    for name in ("a[1].txt", "a1.txt", "b[1]/c.txt", "b1/c.txt"):
        write(name, name)
    for names, expected in (
        (["a1.txt", "a[1].txt", "./a1.txt", folder / "a1.txt"], ["a1.txt", "a[1].txt"]),
        (["b[1]/*.txt"], ["b[1]/c.txt"]),
        (["**/c.txt", "a?.txt"], ["b1/c.txt", "b[1]/c.txt", "a1.txt"]),
    ):
        make("--input", *names, "--out", f"from_{len(names)}")
        assert tokens_of(f"from_{len(names)}") == plain_loop(expected).tolist()


def test_contents_and_settings_decide_what_has_changed(folder):
    write_jsonl("a.jsonl", DOCUMENTS[:30])
    flags = ["--input", "a.jsonl", "--shard_tokens", 9_000, "--out", "out"]
    make(*flags)
    before = contents("out")
    shutil.copy("a.jsonl", "a.txt")
    write("b.jsonl", Path("a.jsonl").read_text().replace("e", "i"))
    make(*flags, "--input", folder / "a.jsonl")
    for change, says in {
        ("--input", "a.txt"): "other contents of a.jsonl; give another --out",
        ("--input", "b.jsonl"): "other contents of a.jsonl; give another --out",
        ("--shard_tokens", 8_000): "shard_tokens = 9000, not 8000;",
    }.items():
        one_line(run(*flags, *change), says)
    assert contents("out") == before

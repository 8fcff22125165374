"""Tests of fineweb.py: the commands that users run, on small files and without internet.

The expected bytes come from `plain_loop`, which knows nothing of pieces, processes or restarts.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import night
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import fineweb

COMMAND = [sys.executable, str(HERE / "fineweb.py")]
ENCODING = fineweb.gpt2_tokenizer()
TEXT = (HERE / "input.txt").read_text("utf-8")
DOCUMENTS = [TEXT[i : i + 700 + i % 2900] for i in range(0, 900_000, 2500)]  # 360 of unequal length


def run(*arguments, cwd, code=0, **environment):
    """Run the command; (stdout, stderr). A traceback is never right."""
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in result.stderr, result.stderr
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr


def error(*arguments, cwd, **environment):
    """Run the command; return the one line in which the user's mistake ends."""
    _, stderr = run(*arguments, cwd=cwd, code=2, **environment)
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if "fineweb.py: " in line]
    assert len(lines) == 1 and stderr.rstrip().endswith(lines[0]), stderr
    return lines[0]


def plain_loop(documents):
    """Tokenize all documents with the simplest code there is."""
    tokens = []
    for document in documents:
        if isinstance(document, str) and document.strip():
            tokens.append(fineweb.END_OF_TEXT)
            tokens.extend(ENCODING.encode_ordinary(document))
    return np.array(tokens, dtype=np.uint16)


def plain_shards(documents, shard_tokens, ending):
    """Make the shards, name -> bytes, with np.save or by llm.c's description of its header."""
    tokens, files = plain_loop(documents), {}
    for i, start in enumerate(range(0, len(tokens), shard_tokens)):
        shard = tokens[start : start + shard_tokens]
        name = f"edufineweb_{'train' if i else 'val'}_{i:06d}.{ending}"
        if ending == "npy":
            np.save("shard.npy", shard)
            files[name] = Path("shard.npy").read_bytes()
        else:
            header = [20240520, 1, len(shard)] + [0] * 253
            files[name] = np.array(header, dtype=np.int32).tobytes() + shard.tobytes()
    return files


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shards_of(folder):
    return {name: data for name, data in contents(folder).items() if name != "manifest.json"}


def write_jsonl(path, values, field="text"):
    path.write_text("".join(json.dumps({"id": 1, field: value}) + "\n" for value in values))


def write_parquet(path, values, field="text"):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({field: values, "id": list(range(len(values)))})
    pq.write_table(table, path, row_group_size=50)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------
# The same bytes as the plain loop


@pytest.mark.parametrize("ending", ["npy", "bin"])
def test_hub_equals_plain_loop(folder, ending):
    """Call the real load_dataset on a local folder with the hub's layout."""
    hub = folder / "HuggingFaceFW" / "fineweb-edu"
    for i in range(3):
        write_parquet(
            hub / f"sample/10BT/{i:03d}_00000.parquet", DOCUMENTS[i * 120 : i * 120 + 120]
        )
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files: sample/10BT/*\n---\n"
    )
    output, _ = run("--shard_tokens", 40_000, "--format", ending, cwd=folder)
    expected = plain_shards(DOCUMENTS, 40_000, ending)
    assert shards_of("edu_fineweb10B") == expected
    tokens = len(plain_loop(DOCUMENTS))
    assert output.splitlines()[-1].startswith(
        f"edu_fineweb10B is complete: {len(DOCUMENTS)} documents, {tokens:,} tokens in 1 "
        f"validation shard and {len(expected) - 1} training shards (the last has the remaining"
    )
    manifest = fineweb.read_manifest("edu_fineweb10B")
    assert manifest["complete"] is True and manifest["documents"] == len(DOCUMENTS)
    assert manifest["settings"]["source"] == ["HuggingFaceFW/fineweb-edu", "sample-10BT"]
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256(expected[shard["name"]]).hexdigest()
        tokens = fineweb.open_shard(folder / "edu_fineweb10B" / shard["name"])
        assert shard["tokens"] == len(tokens)
        text = ENCODING.decode_bytes(tokens.tolist()).replace(b"<|endoftext|>", b"")
        assert shard["bytes"] == len(text) == fineweb.token_bytes()[tokens].sum()
    # After a kill in this source it continues, and asks load_dataset for the later files only.
    manifest["complete"], manifest["shards"] = False, manifest["shards"][:3]
    before = contents("edu_fineweb10B")
    Path("edu_fineweb10B/manifest.json").write_text(json.dumps(manifest))
    run("--shard_tokens", 40_000, "--format", ending, cwd=folder)
    assert contents("edu_fineweb10B") == before


def test_workers_and_formats_of_input(folder):
    """Try 1, 2 and 4 workers on three kinds of files, a glob, and the user's order."""
    write_parquet(folder / "p" / "b.parquet", DOCUMENTS[100:200])
    write_parquet(folder / "p" / "a.parquet", DOCUMENTS[:100])
    write_jsonl(folder / "z.jsonl", DOCUMENTS[200:300])
    (folder / "first.txt").write_text(DOCUMENTS[300], "utf-8")
    expected = plain_shards([DOCUMENTS[300], *DOCUMENTS[:300]], 30_000, "npy")
    inputs = ["--input", "first.txt", "p/*.parquet", "z.jsonl", "--shard_tokens", 30_000]
    for workers in (1, 2, 4):
        run(*inputs, "--workers", workers, "--out", f"out{workers}", cwd=folder)
        assert shards_of(f"out{workers}") == expected
    assert contents("out1") == contents("out2") == contents("out4")


def in_child(folder):
    os.chdir(folder)
    fineweb.main(["--input", "a.jsonl", "--shard_tokens", "30000", "--out", "out"])


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_start_methods(folder, method):
    """Run in a child of every start method, and in a script without a __main__ guard."""
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:60])
    expected = plain_shards(DOCUMENTS[:60], 30_000, "npy")
    child = multiprocessing.get_context(method).Process(target=in_child, args=(folder,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and shards_of("out") == expected
    script = f"import multiprocessing as m; m.set_start_method('{method}'); import fineweb; "
    script += "fineweb.main('--input a.jsonl --shard_tokens 30000 --out script'.split())"
    subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": HERE}, check=True
    )
    assert shards_of("script") == expected


@pytest.mark.parametrize("limit", [1, 29_999, 30_000, 30_001])
def test_max_tokens(folder, limit):
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:60])
    arguments = ["--input", "a.jsonl", "--shard_tokens", 30_000, "--max_tokens", limit]
    run(*arguments, "--out", "out", cwd=folder)
    tokens = [
        fineweb.open_shard(p) for s in ("val", "train") for p in fineweb.list_shards("out", s)
    ]
    assert np.array_equal(np.concatenate(tokens), plain_loop(DOCUMENTS[:60])[:limit])
    before = contents("out")
    run(*arguments, "--out", "out", cwd=folder)
    assert contents("out") == before


def test_cutting_long_documents(folder, monkeypatch):
    """Cut random text of awkward characters at every kind of gap; the tokens are the same."""
    rng = random.Random(0)
    alphabet = [
        "a",
        "b ",
        " ",
        "\n",
        "\r\n",
        "\t",
        "\x1c",
        "\u00a0",
        "\u3000",
        "!",
        "'s",
        "7",
        "漢",
        "😀",
    ]
    monkeypatch.setattr(fineweb, "PIECE_CHARS", 7)
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(8, 60)))
        pieces = list(fineweb.pieces([lambda text=text: [text]], fineweb.START))
        if text.strip():
            assert "".join(piece.text for piece in pieces) == text
        tokens = [t for piece in fineweb.encode_batch(pieces) for t in piece.tokens.tolist()]
        assert tokens == plain_loop([text]).tolist()


# --------------------------------------------------------------------------------------------------
# Interruptions


def test_kills_at_random_moments(folder):
    """Kill it again and again; each time, all shards are those of an undisturbed run."""
    blank = [" \n", None] * 20  # each counts once, however often the run is killed
    long = TEXT[:300_000]  # spans several shards
    write_jsonl(folder / "a.jsonl", [*DOCUMENTS, *blank, long, *DOCUMENTS, *blank])
    arguments = ["--input", "a.jsonl", "--shard_tokens", 10_000]
    run(*arguments, "--out", "calm", cwd=folder)
    names = sorted(path.name for path in Path("calm").glob("*_train_*.npy"))
    rng, kills = random.Random(1), 0
    for part in range(12):
        awaited = Path("out", names[len(names) * part // 16])
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments), "--out", "out"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not awaited.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL  # or it was at its end
        for split in ("val", "train"):
            for path in fineweb.list_shards("out", split):
                assert path.read_bytes() == (folder / "calm" / path.name).read_bytes()
    run(*arguments, "--out", "out", cwd=folder)
    assert kills >= 6 and contents("out") == contents("calm")


def test_restart_keeps_whole_shards_and_mends_damaged_ones(folder):
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:100])
    arguments = ["--input", "a.jsonl", "--shard_tokens", 10_000, "--out", "out"]
    run(*arguments, cwd=folder)
    before = contents("out")
    names = sorted(shards_of("out"))
    times = {name: (folder / "out" / name).stat().st_mtime_ns for name in names}
    Path("out", "edufineweb_train_000003.npy").write_bytes(b"damaged")
    run(*arguments, cwd=folder)
    assert contents("out") == before
    kept = [n for n in names if (folder / "out" / n).stat().st_mtime_ns == times[n]]
    assert kept == ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy", names[-1]]


def test_does_not_tokenize_again(folder, monkeypatch):
    """A restart tokenizes only what comes after the last whole shard."""
    write_jsonl(folder / "a.jsonl", DOCUMENTS)
    arguments = ["--input", "a.jsonl", "--shard_tokens", "50000", "--out", "out"]
    fineweb.main(arguments)
    manifest = json.loads(Path("out/manifest.json").read_text())
    manifest.update(complete=False, shards=manifest["shards"][:-1])
    Path("out/manifest.json").write_text(json.dumps(manifest))
    sent = []
    encode_all = fineweb.encode_all
    monkeypatch.setattr(
        fineweb,
        "encode_all",
        lambda source, *rest: encode_all((sent.append(p) or p for p in source), *rest),
    )
    fineweb.main(arguments)
    assert [piece.number for piece in sent] == list(
        range(manifest["shards"][-1]["after"]["piece"], len(DOCUMENTS))
    )


def test_restart_where_a_shard_ends_with_a_document(folder):
    shard_tokens = len(plain_loop(DOCUMENTS[:3]))
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:9])
    arguments = ["--input", "a.jsonl", "--shard_tokens", str(shard_tokens), "--out", "out"]
    fineweb.main(arguments)
    before = contents("out")
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["shards"][0]["after"]["documents"] == 3
    manifest.update(complete=False, shards=manifest["shards"][:1])
    Path("out/manifest.json").write_text(json.dumps(manifest))
    fineweb.main(arguments)
    assert contents("out") == before
    assert shards_of("out") == plain_shards(DOCUMENTS[:9], shard_tokens, "npy")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found by /proc")
@pytest.mark.parametrize("who", ["parent", "worker"])
def test_a_killed_process_takes_the_others_with_it(folder, who):
    """Workers end with a killed parent; a killed worker ends the command in one line."""
    write_jsonl(folder / "a.jsonl", DOCUMENTS * 40)
    command = [*COMMAND, "--input", "a.jsonl", "--shard_tokens", "20000", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--out", "out"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (folder / "out" / "edufineweb_train_000002.npy").exists():
        time.sleep(0.01)
    workers = night.workers(process.pid)
    assert len(workers) == 2
    os.kill(process.pid if who == "parent" else workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=20)
    if who == "worker":
        assert process.returncode == 2 and "Traceback" not in stderr
        assert "fineweb.py: a tokenizer process was killed" in stderr.splitlines()[-1]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_ends_in_one_line(folder):
    write_jsonl(folder / "a.jsonl", DOCUMENTS * 20)
    process = subprocess.Popen(
        [*COMMAND, "--input", "a.jsonl", "--shard_tokens", "20000", "--out", "out"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "out" / "edufineweb_train_000002.npy").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("fineweb.py: stopped; the same command continues")
    assert not list(folder.glob("out/*.tmp"))


def test_full_disk_ends_in_one_line(folder):
    """A limit on the size of files acts as the full disk: it, too, makes write() fail."""
    documents = DOCUMENTS * 6
    write_jsonl(folder / "a.jsonl", documents)
    script = "import resource as r, signal as s, runpy, sys; s.signal(s.SIGXFSZ, s.SIG_IGN); "
    script += "r.setrlimit(r.RLIMIT_FSIZE, (1_200_000, 1_200_000)); sys.argv.pop(0); "
    script += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"  # 1.2 MB: room for the tokenizer
    arguments = ["--input", "a.jsonl", "--shard_tokens", "700000", "--out", "out"]
    result = subprocess.run(
        [sys.executable, "-c", script, COMMAND[1], *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert set(contents("out")) == {"manifest.json"}
    run(*arguments, cwd=folder)
    assert shards_of("out") == plain_shards(documents, 700_000, "npy")


def test_changed_settings_are_refused(folder):
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:60])
    write_jsonl(folder / "b.jsonl", DOCUMENTS[:60])
    arguments = ["--input", "a.jsonl", "--shard_tokens", 10_000, "--out", "out"]
    run(*arguments, cwd=folder)
    before = contents("out")
    for change, named in {
        ("--shard_tokens", 20_000): "shard_tokens = 10000;",
        ("--format", "bin"): "format = npy;",
        ("--input", "b.jsonl"): "source = ['a.jsonl (",
        ("--input", "a.jsonl", "b.jsonl"): "source = ['a.jsonl (",
        ("--max_tokens", 5): "max_tokens = None;",
    }.items():
        assert named in error(*arguments, *change, cwd=folder)
    (folder / "a.jsonl").write_bytes((folder / "a.jsonl").read_bytes() + b"\n")
    assert "source = ['a.jsonl (" in error(*arguments, cwd=folder)
    assert contents("out") == before
    np.save("edufineweb_val_000000.npy", np.zeros(9, np.uint16))
    assert "no manifest.json" in error("--input", "b.jsonl", "--out", ".", cwd=folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing to fail")
def test_a_process_that_cannot_start_ends_in_one_line(folder):
    """The third of four processes fails to start; the command must not wait for the first two."""
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:60])
    script = """
import multiprocessing, os, sys
sys.path.insert(0, sys.argv.pop(1))
import fineweb
multiprocessing.set_start_method("fork")
fork, calls = os.fork, []
def fails():
    calls.append(1)
    if len(calls) == 3:
        raise BlockingIOError(11, "no more processes")
    return fork()
os.fork = fails
fineweb.run_command("fineweb.py", fineweb.main)
"""
    arguments = ["--input", "a.jsonl", "--workers", "4", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(HERE), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "no more processes; the same command continues" in done.stderr
    assert not Path("out").exists()


# --------------------------------------------------------------------------------------------------
# All sorts of documents


def test_odd_documents(folder):
    documents = [
        "plain",
        "",
        " \n\t\u00a0",
        None,
        17,
        ["a", "list"],
        "<|endoftext|> is text here",
        "lone \ud800 surrogates \udfff",
        "\ufeff\x00 nulls and marks \u202e",
        TEXT[:60_000],  # longer than several shards
    ]
    write_jsonl(folder / "a.jsonl", documents)
    output, _ = run("--input", "a.jsonl", "--shard_tokens", 5_000, "--out", "out", cwd=folder)
    assert shards_of("out") == plain_shards(documents, 5_000, "npy")
    assert output.splitlines()[-1].endswith(
        "skipped 2 empty and 3 that were not text; replaced broken unicode in 1"
    )
    assert ": 5 documents," in output
    tokens = np.concatenate(
        [fineweb.open_shard(folder / "out" / n) for n in sorted(shards_of("out"))]
    )
    assert np.count_nonzero(tokens == fineweb.END_OF_TEXT) == 5


def test_files_that_are_not_utf8(folder):
    """Bytes that are not UTF-8 are replaced and counted; a byte order mark is dropped."""
    (folder / "latin.txt").write_bytes("caf\u00e9 au lait".encode("latin-1"))
    (folder / "mark.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (folder / "empty.txt").write_bytes(b"")
    output, _ = run("--input", "latin.txt", "mark.txt", "empty.txt", "--out", "out", cwd=folder)
    assert shards_of("out") == plain_shards(["caf\ufffd au lait", "marked"], 10**8, "npy")
    assert "skipped 1 empty" in output and "replaced broken unicode in 1" in output


def test_parquet_with_nulls_and_numbers(folder):
    write_parquet(folder / "a.parquet", ["one", None, "", "two"], "body")
    write_parquet(folder / "b.parquet", [1, 2, 3], "body")
    arguments = ["--text_field", "body", "--out", "out"]
    output, _ = run("--input", "a.parquet", "b.parquet", *arguments, cwd=folder)
    assert shards_of("out") == plain_shards(["one", "two"], 10**8, "npy")
    assert "skipped 1 empty and 4 that were not text" in output
    assert "no column text; give --text_field, of body, id" in error(
        "--input", "a.parquet", cwd=folder
    )
    assert "no text: 0 empty documents, 3" in error(
        "--input", "b.parquet", "--text_field", "body", "--out", "numbers", cwd=folder
    )


def test_broken_files_are_named(folder):
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:3])
    with open(folder / "a.jsonl", "a") as file:
        file.write('{"text": "half a li\n')
    assert "a.jsonl, line 4: " in error("--input", "a.jsonl", cwd=folder)
    (folder / "b.jsonl").write_text('"no object"\n')
    assert "b.jsonl, line 1: " in error("--input", "b.jsonl", cwd=folder)
    write_jsonl(folder / "c.jsonl", ["a"], "body")
    assert "no column text; give --text_field, of id, body" in error(
        "--input", "c.jsonl", cwd=folder
    )
    write_parquet(folder / "d.parquet", DOCUMENTS)
    whole = (folder / "d.parquet").read_bytes()
    (folder / "d.parquet").write_bytes(whole[: len(whole) // 2])
    assert "d.parquet cannot be read (" in error("--input", "d.parquet", cwd=folder)
    (folder / "d.parquet").write_bytes(whole[:9_000] + bytes(9_000) + whole[18_000:])
    assert "d.parquet cannot be read (" in error("--input", "d.parquet", cwd=folder)
    assert "nothing/*.txt is not a file" in error("--input", "nothing/*.txt", cwd=folder)
    (folder / "e.csv").write_text("a")
    assert "e.csv is not a file that ends in .txt, .jsonl, .parquet" in error(
        "--input", "e.csv", cwd=folder
    )
    assert "--shard_tokens 0" in error("--shard_tokens", 0, cwd=folder)
    assert "does not answer" in error(cwd=folder)


# --------------------------------------------------------------------------------------------------
# The guard that all commands share


GUARDED = """
import atexit, signal, sys
sys.path.insert(0, sys.argv[1])
import fineweb
def main():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("begun", end="", flush=sys.argv[2] == "user")
    atexit.register(print, "a normal exit")
    errors = {"user": fineweb.UserError("mend it"), "disk": OSError(28, "full")}
    errors |= {"ctrl-c": KeyboardInterrupt(), "bug": ZeroDivisionError()}
    if sys.argv[2] in errors:
        raise errors[sys.argv[2]]
fineweb.run_command("x.py", main)
"""


def guarded(what, **environment):
    command = [sys.executable, "-c", GUARDED, str(HERE), what]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONUNBUFFERED": ""} | environment, **pipes
    )


@pytest.mark.parametrize(
    "what, status, line",
    [
        ("nothing", 0, ""),
        ("user", 2, "x.py: mend it\n"),
        ("disk", 2, "x.py: [Errno 28] full\n"),
        ("ctrl-c", 1, "x.py: interrupted\n"),
    ],
)
def test_a_command_ends_in_one_line(what, status, line):
    process = guarded(what)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (status, line)
    assert out == "beguna normal exit\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    process = guarded("bug")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and "ZeroDivisionError" in err and "Traceback" in err


def test_ranks_end_in_one_line():
    """Rank 0 speaks at once, the others only if nobody ends them; none waits for its threads."""
    processes = [guarded("user", RANK=rank) for rank in "012"]
    out, err = processes[0].communicate(timeout=20)
    assert (processes[0].returncode, err) == (2, "x.py: mend it\n")
    assert out == "begun"  # and not "a normal exit"
    assert processes[1].stdout.read(5) == "begun"
    time.sleep(1)
    processes[1].terminate()  # as torchrun does
    assert processes[1].communicate(timeout=20)[1] == ""
    assert processes[1].returncode == -signal.SIGTERM
    _, err = processes[2].communicate(timeout=20)
    assert (processes[2].returncode, err) == (2, "x.py: mend it\n")


def test_wrong_flags_are_one_line():
    parser = fineweb.OneLineParser("x.py")
    parser.add_argument("--number", type=int)
    for argv in (["--number", "x"], ["--a_number", "1"], ["--number"]):
        with pytest.raises(fineweb.UserError, match=r"number.* \(--help lists all flags\)$"):
            parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# The interface to train_gpt2.py


def test_import_is_light_and_runs_nothing(folder):
    script = (
        "import sys, fineweb; print(sorted({'torch', 'datasets', 'tiktoken'} & {*sys.modules}))"
    )
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "[]\n" and not result.stderr and not list(folder.iterdir())


def test_open_shard_names_what_is_wrong(folder):
    good = np.arange(100, dtype=np.uint16)
    for name in ("good.npy", "good.bin"):
        digest = fineweb.write_shard(folder / name, good)
        tokens = fineweb.open_shard(folder / name)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
        assert np.array_equal(tokens, good)
        whole = (folder / name).read_bytes()
        assert digest == hashlib.sha256(whole).hexdigest()
        for damaged in (b"", whole[:-1], whole[:-2], whole + b"\0\0", whole[:50], b"x" * 2000):
            (folder / f"bad_{name}").write_bytes(damaged)
            with pytest.raises(
                fineweb.UserError, match=f"bad_{name} is not a whole shard"
            ) as caught:
                fineweb.open_shard(folder / f"bad_{name}")
            assert "\n" not in str(caught.value)
    for i, array in enumerate(
        [good.astype(np.int32), good.reshape(10, 10), good[:0], good.astype(object)]
    ):
        np.save(folder / f"{i}.npy", array, allow_pickle=True)
        with pytest.raises(fineweb.UserError, match=f"{i}.npy is not a whole shard"):
            fineweb.open_shard(folder / f"{i}.npy")
    (folder / "pickle.npy").write_bytes(pickle.dumps(good))
    for name in ("pickle.npy", "missing.npy", "missing.bin", "text.txt"):
        with pytest.raises(fineweb.UserError, match=name):
            fineweb.open_shard(folder / name)
    for header in ([20240520, 2, 100], [20240521, 1, 100], [20240520, 1, 0], [20240520, 1, -1]):
        bytes_ = np.array(header + [0] * 253, np.int32).tobytes() + good.tobytes()
        (folder / "header.bin").write_bytes(bytes_)
        with pytest.raises(fineweb.UserError, match="header.bin"):
            fineweb.open_shard(folder / "header.bin")


def test_list_shards(folder):
    names = [
        "edufineweb_train_000002.npy",
        "edufineweb_train_000001.npy",
        "edufineweb_val_000000.npy",
    ]
    names += [
        "tiny_shakespeare_val.bin",
        "edufineweb_train_000003.npy.123.tmp",
        "training_notes.npy",
    ]
    for name in names:
        (folder / name).touch()
    assert [p.name for p in fineweb.list_shards(folder, "train")] == [names[1], names[0]]
    assert [p.name for p in fineweb.list_shards(folder, "val")] == [names[2], names[3]]
    assert fineweb.list_shards(folder / "nowhere", "val") == []
    assert fineweb.read_manifest(folder) is None
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(fineweb.UserError, match="manifest.json is damaged"):
        fineweb.read_manifest(folder)


def test_verify(folder):
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:60])
    run("--input", "a.jsonl", "--shard_tokens", 10_000, "--out", "out", cwd=folder)
    output, _ = run("--verify", "--out", "out", cwd=folder)
    assert "sizes and ids are right, SHA-256 too" in output and repr(DOCUMENTS[0][:60]) in output
    path = folder / "out" / "edufineweb_train_000001.npy"
    whole = path.read_bytes()
    for damaged, named in {
        whole[:-1]: "is not a whole shard",
        whole[:-2] + b"\x01\x00": "does not have the SHA-256 in manifest.json",
        whole[:-2] + b"\xff\xff": "has the id 65535",
    }.items():
        path.write_bytes(damaged)
        assert named in error("--verify", "--out", "out", cwd=folder)
    path.write_bytes(whole)
    (folder / "out" / "manifest.json").unlink()
    assert "no manifest.json" in run("--verify", "--out", "out", cwd=folder)[0]
    assert "no shards" in error("--verify", "--out", "nowhere", cwd=folder)


def test_usable_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    assert fineweb.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert fineweb.usable_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert fineweb.usable_cores() == 1


def test_the_trainer_trains_on_the_shards(tmp_path):
    """train_gpt2.py trains on both formats, and warns of an incomplete folder."""
    losses = []
    for format in ("npy", "bin"):
        made = ["--input", HERE / "input.txt", "--format", format, "--shard_tokens", 20_000]
        run(*made, "--out", format, cwd=tmp_path)
        flags = [*helpers.TINY, "--data", format, "--val_every", 4, "--val_tokens", 320]
        done = helpers.run(tmp_path, *flags, "--out_dir", f"log_{format}")
        assert done.returncode == 0 and "incomplete" not in done.stdout, done.stderr
        losses.append(list(helpers.losses(tmp_path / f"log_{format}")))
    assert losses[0] == losses[1]
    manifest = json.loads((tmp_path / "npy" / "manifest.json").read_text())
    (tmp_path / "npy" / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    done = helpers.run(tmp_path, *helpers.TINY, "--data", "npy", "--out_dir", "log_incomplete")
    assert done.returncode == 0 and "npy is incomplete" in done.stdout

"""The command: its flags, its records, --eval_only, and one line for every bad input."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SCRIPT,
    TINY,
    checkpoint,
    make_shards,
    records,
    run,
    run_all,
    some_tokens,
    their_model,
    their_twin,
    write_bin,
)

import support.shards as fineweb
import train_gpt2
from support.command import UserError, parse_flags
from train_gpt2 import PRESETS, TrainConfig, make_config

FLAGS = shlex.split("""
--preset --data --out_dir --init_from --eval_only --prompt --seed --device --dtype
--compile --n_layer --n_head --n_embd --seq_len --batch_tokens --micro_batch --max_steps --epochs
--learning_rate --min_lr_ratio --warmup_tokens --weight_decay --grad_clip
--val_every --val_tokens --sample_every --hellaswag_every --checkpoint_every --resume""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What good and bad commands are about, and two that went well."""
    folder = tmp_path_factory.mktemp("commands")
    make_shards(folder / "shards")
    their_model(n_positions=24, n_embd=16, n_layer=1, n_head=2).save_pretrained(folder / "given")
    # "gpt2" in the working folder is what --init_from gpt2 loads, with no network.
    (folder / "offline").mkdir()
    their_model(n_positions=24, n_embd=16, n_layer=1, n_head=2).save_pretrained(
        folder / "offline/gpt2"
    )
    text = (ROOT / "input.txt").read_text()[:20_000]
    (folder / "text.txt").write_text(text)
    flags = [*TINY, "--data", "shards"]
    trained = [*flags, "--val_every", 2, "--sample_every", 4, "--seed", 3]
    run_all(folder, {"trained": dict(flags=trained)})
    finetuned = [*flags, "--init_from", "trained", "--max_steps", 1]
    run_all(folder, {"finetuned": dict(flags=finetuned)})
    return folder


def settings(*argv) -> TrainConfig:
    return make_config(parse_flags(TrainConfig, "", list(argv)), {})


@pytest.fixture
def command(folder, monkeypatch, capfd):
    """The script as `python train_gpt2.py FLAGS` runs it, in this process, where torch is warm."""

    def hangs(*_):
        raise TimeoutError("the command hangs")

    signal.signal(signal.SIGALRM, hangs)

    def call(*flags, data="shards"):
        given = [*TINY, "--data", data, "--out_dir", "unused", *map(str, flags)]
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
        status = 0
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.alarm(60)  # no command here takes a second: one that hangs ends
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            status = end.code
        finally:
            signal.alarm(0)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return SimpleNamespace(status=status, **capfd.readouterr()._asdict())

    return call


# --------------------------------------------------------------------------------------------------
# What is promised to scripts
# --------------------------------------------------------------------------------------------------


def test_flags_and_presets(command):
    """Every flag of the promise is in --help; presets are complete, and flags win over them."""
    done = command("--help")
    assert done.status == 0
    words = set(re.findall(r"--\w+", done.out))
    assert set(FLAGS) <= words and "--no-compile" in done.out
    assert {f"--{field.name}" for field in dataclasses.fields(TrainConfig)} <= words
    assert list(PRESETS) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3", "demo"]
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for name, row in PRESETS.items():
        config = settings("--preset", name, "--seed", "7")
        assert (config.preset, config.seed) == (name, 7)
        for key, value in row.items():
            assert getattr(config, key) == value and key in defaults
        where = "input.txt" if name == "demo" else "edu_fineweb10B"
        assert config.data == str(ROOT / where)
    # The lecture's numbers are the defaults, and --help says them.
    gpt2 = dict(
        n_layer=12,
        n_head=12,
        n_embd=768,
        seq_len=1024,
        batch_tokens=524288,
        learning_rate=6e-4,
        warmup_tokens=375_000_000,
        weight_decay=0.1,
        grad_clip=1.0,
        min_lr_ratio=0.1,
        epochs=1.0,
    )
    config = settings("--preset", "gpt2")
    flat = " ".join(done.out.split())
    for key, value in gpt2.items():
        assert getattr(config, key) == defaults[key] == value
        assert re.search(rf"--{key} \S+ [^-]*\(default: {re.escape(str(value))}\)", flat), key
    config = settings(*shlex.split("--preset gpt3 --n_layer 2 --n_embd 48 --compile"))
    assert (config.n_layer, config.n_head, config.seq_len) == (2, 12, 2048)
    assert config.micro_batch == 0 and config.compile is True


def test_one_rule_for_settings():
    """A flag wins over what was loaded, that over the preset, and that over the default."""
    loaded = dict(preset="demo", learning_rate=0.5, seed=9, n_layer=4, gone_since=1)
    config = make_config(dict(learning_rate=0.25), loaded)
    assert (config.learning_rate, config.seed) == (0.25, 9)  # flag, checkpoint
    assert (config.max_steps, config.weight_decay) == (850, 0.1)  # preset, default
    with pytest.raises(UserError, match="--seed 8: .* 9"):
        make_config(dict(seed=8), loaded)
    # A model alone fixes only its shape; it may be trained on shorter sequences.
    model = dict(n_layer=2, n_head=2, n_embd=8, seq_len=64, vocab_size=50257)
    config = make_config(dict(seq_len=16, preset="demo"), model)
    assert (config.n_layer, config.seq_len) == (2, 16)
    assert make_config({}, model).seq_len == 64
    with pytest.raises(UserError, match="--n_layer 3: .* 2"):
        make_config(dict(n_layer=3), model)


def test_records(folder):
    """metrics.jsonl: a header, then train, val and sample; each a JSON object with kind, step."""
    lines = (folder / "trained/metrics.jsonl").read_text().splitlines()

    def strict(constant):
        raise ValueError(f"{constant} is no JSON")

    found = [json.loads(line, parse_constant=strict) for line in lines]
    header = found[0]
    assert header["kind"] == "header"
    assert header["settings"]["seed"] == 3 and header["settings"]["n_embd"] == 16
    assert header["network"]["vocab_size"] == 50304
    assert "--seed 3" in header["command"]
    assert header["versions"]["torch"] == torch.__version__
    assert {"device", "revision"} <= header.keys()
    kinds = [(record["kind"], record["step"]) for record in found[1:]]
    assert sorted(kinds) == sorted(
        [("train", i) for i in range(4)]
        + [("val", i) for i in (0, 2, 4)]
        + [("sample", i) for i in (0, 4)]
    )
    for record in records(folder / "trained", "train"):
        assert record["tokens_per_second"] > 0 and record["step_ms"] > 0 and record["mfu"] is None
        assert record["loss"] != round(record["loss"], 4)  # full precision
    for record in records(folder / "trained", "val"):
        assert record["bits_per_byte"] > 0
    for record in records(folder / "trained", "sample"):
        assert all(text.startswith("First Citizen:\n") for text in record["texts"])


def test_the_checkpoint_goes_on_elsewhere(folder):
    """--init_from an --out_dir begins with what its run ended with."""
    before = their_twin(checkpoint(folder / "trained"))
    shards = [fineweb.open_shard(p) for p in fineweb.list_shards(folder / "shards", "train")]
    rows = train_gpt2.DataLoaderLite(shards, 16, 1337).sequences(range(8))
    with torch.no_grad():
        logits = before(rows[:, :-1]).logits.flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).item()
    loss = records(folder / "finetuned", "train")[0]["loss"]
    assert loss == pytest.approx(expected, abs=1e-5)


def test_eval_only(folder, command):
    """Validation loss and continuations of an out_dir, a checkpoint and a transformers folder."""
    expected = f"{records(folder / 'trained', 'val')[-1]['loss']:.4f}"
    flags = ["--eval_only", "--prompt", "Hello, I'm a language model,", "--init_from"]
    (path,) = (folder / "trained").glob("checkpoint_*.pt")
    for source in ("trained", path):
        done = command(*flags, source)
        assert (done.status, done.err) == (0, "")
        assert f"validation loss {expected}" in done.out
        assert done.out.count("Hello, I'm a language model,") == 4
    theirs = their_model(n_positions=24, n_embd=16, n_layer=1, n_head=2)
    tokens = np.load(folder / "shards/x_val_000000.npy").astype(np.int64)
    rows = torch.from_numpy(np.stack([tokens[i * 16 : i * 16 + 17] for i in range(13)]))
    with torch.no_grad():
        logits = theirs(rows[:, :-1]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).item()
    done = command(*flags, "given")
    assert (done.status, done.err) == (0, "")
    shown = float(re.search(r"validation loss ([\d.]+)", done.out)[1])
    assert shown == pytest.approx(loss, abs=1e-4)
    assert not (folder / "unused").exists()  # nothing is recorded


def test_published_names_and_texts(folder, monkeypatch, command):
    """--init_from gpt2, from a folder of that name; --data may be a text; --prompt may be empty."""
    monkeypatch.setattr(sys, "stdin", None)
    done = command("--eval_only", "--init_from", "given", "--prompt", "", data="text.txt")
    assert (done.status, done.err) == (0, "")
    assert "validation loss" in done.out
    # Not 16, the flag of TINY: from a folder without flags, all that the network can look back.
    done = run(folder / "offline", *TINY[:2], *shlex.split("--init_from gpt2 --eval_only --data"),
               folder / "text.txt", "--device", "cpu")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "validation loss" in done.stdout


# --------------------------------------------------------------------------------------------------
# What users do wrong
# --------------------------------------------------------------------------------------------------


def make_faults(folder):
    """A folder for each way in which data can be bad, each with good shards beside it."""
    good = some_tokens(50 * 16 + 1, 1)
    faults = dict(
        wrong_dtype=lambda path: np.save(path, good.astype(np.int64)),
        two_dimensions=lambda path: np.save(path, good[:800].reshape(2, 400)),
        no_numpy=lambda path: path.write_bytes(b"not an array"),
        high_ids=lambda path: np.save(path, np.full(50 * 16 + 1, 50257, np.uint16)),
        too_short=lambda path: np.save(path, good[:9]),
    )
    for name, write in faults.items():
        data = folder / name
        data.mkdir()
        write(data / "bad_train_1.npy")
        np.save(data / "good_val_0.npy", good)
    for name, suffix in (("truncated_npy", "npy"), ("truncated_bin", "bin")):
        data = folder / name
        data.mkdir()
        path = data / f"bad_train_1.{suffix}"
        np.save(path, good) if suffix == "npy" else write_bin(path, good)
        path.write_bytes(path.read_bytes()[:-10])
        np.save(data / "good_val_0.npy", good)
    (folder / "no_shards").mkdir()
    (folder / "no_val").mkdir()
    np.save(folder / "no_val/x_train_0.npy", good)
    (folder / "empty.txt").write_text("")
    (folder / "one.txt").write_text("a")
    (folder / "latin.txt").write_bytes(b"caf\xe9" * 1000)
    (folder / "broken.pt").write_bytes(b"PK no checkpoint")
    (folder / "empty_folder").mkdir()
    torch.save({"model": {}}, folder / "other.pt")
    (folder / "broken_given").mkdir()
    (folder / "broken_given/config.json").write_text((folder / "given/config.json").read_text())
    (folder / "broken_given/model.safetensors").write_bytes(b"\0" * 100)
    (folder / "a_file").write_text("")


@pytest.fixture(scope="module")
def faults(folder):
    make_faults(folder)


# (flags, what the line must say), --data being among the flags
BAD = {
    "unknown preset": ("--preset gpt5", "--preset gpt5: .*gpt2.*demo"),
    "unknown flag": ("--n_layers 3", "--n_layers"),
    "abbreviated flag": ("--max_step 3", "--max_step"),
    "not a number": ("--n_layer two", "--n_layer.*two"),
    "negative": ("--n_layer -1", "--n_layer -1"),
    "zero": ("--n_embd 0", "--n_embd 0"),
    "no number": ("--learning_rate nan", "--learning_rate nan"),
    "endless": ("--max_steps 0 --epochs inf", "--epochs inf"),
    "dtype": ("--dtype int8", "--dtype.*int8.*bfloat16"),
    "no such device": ("--device abacus", "--device abacus"),
    "missing data": ("--data nowhere", "--data nowhere"),
    "no shards": ("--data no_shards", "--data no_shards"),
    "no validation": ("--data no_val", "no_val.*val"),
    "empty text": ("--data empty.txt", r"empty\.txt"),
    "one token": ("--data one.txt", r"one\.txt"),
    "not UTF-8": ("--data latin.txt", r"latin\.txt"),
    "wrong dtype": ("--data wrong_dtype", r"bad_train_1\.npy.*uint16"),
    "two dimensions": ("--data two_dimensions", r"bad_train_1\.npy"),
    "no numpy file": ("--data no_numpy", r"bad_train_1\.npy"),
    "truncated .npy": ("--data truncated_npy", r"bad_train_1\.npy"),
    "truncated .bin": ("--data truncated_bin", r"bad_train_1\.bin"),
    "too short": ("--data too_short", r"too_short"),
    "ids above the vocabulary": (
        "--data high_ids --out_dir met",
        r"bad_train_1\.npy holds id 50257",
    ),
    "missing init_from": ("--init_from nowhere", "--init_from nowhere"),
    "empty init_from": ("--init_from empty_folder", "--init_from empty_folder"),
    "broken checkpoint": ("--init_from broken.pt", r"broken\.pt"),
    "other checkpoint": ("--init_from other.pt", r"other\.pt"),
    "broken transformers folder": ("--init_from broken_given", "broken_given"),
    "not its size": ("--init_from given --n_layer 2", "--n_layer 2.* 1"),
    "batch above the data": ("--batch_tokens 16000 --max_steps 0", "--batch_tokens 16000 .* 800 "),
    "out_dir in a file": ("--out_dir a_file/log", "--out_dir a_file/log"),
    "out_dir a file": ("--out_dir a_file", "--out_dir a_file"),
    "out_dir with a run": ("--out_dir trained", "trained already holds a run.*--resume"),
}


def assert_one_line(done, says):
    assert done.status == 2, done
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train_gpt2.py: "), done.err
    assert re.search(says, lines[0]), lines[0]
    return lines[0]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line(name, command, faults, folder):
    """Promise 7: status 2 and one line that names the flag or file; no traceback, no new folder."""
    flags, says = BAD[name]
    assert_one_line(command(*flags.split()), says)
    assert not (folder / "unused").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_records_reach_the_disk_before_a_checkpoint(command, folder, monkeypatch):
    """After a power cut the newest checkpoint has all records before it."""
    fsync, synced = os.fsync, []

    def spy(file):
        number = file if isinstance(file, int) else file.fileno()
        size = os.fstat(number).st_size
        synced.append((Path(os.readlink(f"/proc/self/fd/{number}")).name.split(".")[0], size))
        fsync(file)

    monkeypatch.setattr(os, "fsync", spy)
    assert command("--max_steps", 2, "--checkpoint_every", 1, "--out_dir", "synced").status == 0
    names = [name for name, _ in synced]
    first = names.index("checkpoint_0000001")
    assert names[first - 1] == "metrics" and names.index("checkpoint_0000002") > first
    lines = (folder / "synced/metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert synced[first - 1][1] >= sum(map(len, lines[:2])), "the header and step 0"


# Flags that do not fit; each message ends in "try --flag value" (or "; try value").
IMPOSSIBLE = {
    "n_head": "--n_head 3",
    "n_head above n_embd": "--n_head 100",
    "batch no multiple of seq_len": "--batch_tokens 100",
    "batch below seq_len": "--batch_tokens 8",
    "batch below seq_len, by epochs": "--batch_tokens 8 --max_steps 0 --epochs 0.1",
    "batch no multiple of micro_batch": "--batch_tokens 160 --micro_batch 3",
    "micro_batch above the batch": "--micro_batch 64",
    "seq_len above the data": "--seq_len 1000 --batch_tokens 8000",
    "seq_len above the model's": "--init_from given --seq_len 48 --batch_tokens 480",
    "seq_len above the text": "--data text.txt --seq_len 5000 --batch_tokens 5000",
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_value_that_is_named_works(name, command, faults, folder):
    """Promise 7: the same command with the value from the message gets to its first step.

    One correction may lead to another, of another flag; never twice to one.
    """
    flags, corrected = IMPOSSIBLE[name].split(), set()
    for attempt in range(4):
        out = f"fixed_{list(IMPOSSIBLE).index(name)}_{attempt}"
        done = command("--max_steps", 1, *flags, "--checkpoint_every", 0, "--out_dir", out)
        if done.status == 0 and corrected:
            assert (folder / out / "metrics.jsonl").exists()
            return
        line = assert_one_line(done, "try ")
        flag, value = re.search(r"try (--\w+ )?(\d+)$", line).groups()
        flag = (flag or re.search(r": (--\w+)", line)[1]).strip()
        assert flag not in corrected, line
        corrected.add(flag)
        flags += [flag, value]
    raise AssertionError(line)


def test_bad_inputs_of_real_processes(folder, faults):
    """The same without the tests' shortcut: by `python`, and by torchrun, where one speaks."""
    flags = [*TINY, "--data", "high_ids", "--out_dir", "real"]
    done = run(folder, *flags)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "bad_train_1.npy" in done.stderr
    done = run(folder, *flags[:-1], "trained", "--data", "shards", processes=2)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("train_gpt2.py: ")]
    assert len(ours) == 1 and "already holds a run" in ours[0]

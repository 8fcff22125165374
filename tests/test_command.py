"""The command: its settings, its records, --eval_only, and one line for every bad input."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    losses,
    make_shards,
    one_line,
    records,
    run,
    run_here,
    some_tokens,
    their_model,
    train,
)

from support.command import UserError
from train_gpt2 import make_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What good and bad commands are about, and one that went well."""
    folder = tmp_path_factory.mktemp("commands")
    make_shards(folder / "shards")
    # "gpt2" in the working folder is what --init_from gpt2 loads, with no network.
    for name in ("given", "offline/gpt2"):
        theirs = their_model(n_positions=24, n_embd=16, n_layer=1, n_head=2)
        theirs.save_pretrained(folder / name)
    (folder / "text.txt").write_text((ROOT / "input.txt").read_text()[:20_000])
    flags = [*TINY, "--data", "shards", "--val_every", 2, "--sample_every", 4, "--seed", 3]
    train(folder, "trained", *flags)
    return folder


@pytest.fixture
def command(folder):
    flags = [*TINY, "--data", "shards", "--out_dir", "unused"]  # what comes after them wins
    return functools.partial(run_here, folder, *flags)


# --------------------------------------------------------------------------------------------------
# What is promised to scripts
# --------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_lectures():
    """The numbers of the lecture and of GPT-3's appendix B; each is a flag."""
    lecture = dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024, vocab_size=50304)
    lecture |= dict(batch_tokens=524288, learning_rate=6e-4, warmup_tokens=375_000_000)
    lecture |= dict(weight_decay=0.1, grad_clip=1.0, min_lr_ratio=0.1, epochs=1.0, seed=1337)
    lecture |= dict(val_every=250, val_tokens=20 * 524288, optimizer="adamw")
    config = make_config(dict(preset="gpt2"), {}, ())
    assert lecture.items() <= dataclasses.asdict(config).items()


def test_one_rule_for_settings():
    """A flag wins over what was loaded, that over the preset, and that over the default."""
    loaded = dict(preset="demo", learning_rate=0.5, seed=9, n_layer=4, gone_since=1)
    config = make_config(dict(learning_rate=0.25), loaded, ("seed",))
    assert (config.learning_rate, config.seed) == (0.25, 9)  # flag, checkpoint
    assert (config.n_embd, config.weight_decay) == (96, 0.1)  # preset, default
    with pytest.raises(UserError, match="--seed 8: .* 9"):
        make_config(dict(seed=8), loaded, ("seed",))


def test_records(folder):
    """metrics.jsonl: a header, then train, val and sample; each a JSON object with kind, step."""
    lines = (folder / "trained/metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    header = found[0]
    assert header["kind"] == "header"
    assert header["settings"]["seed"] == 3 and header["settings"]["n_embd"] == 16
    assert header["network"]["vocab_size"] == 50304
    assert "--seed 3" in header["command"]
    assert header["versions"]["torch"] == torch.__version__
    assert {"device", "revision"} <= header.keys()
    kinds = [(record["kind"], record["step"]) for record in found[1:]]
    once = [("end", 4), ("sample", 4)]
    every = [*(("train", i) for i in range(4)), *(("val", i) for i in (0, 2, 4))]
    assert sorted(kinds) == once + every
    for record in records(folder / "trained", "train"):
        assert record["tokens_per_second"] == pytest.approx(128 / (record["step_ms"] / 1000))
        assert record["mfu"] is None  # of a CPU, and in float32
        assert record["loss"] != round(record["loss"], 4)  # full precision
    for record in records(folder / "trained", "val"):
        assert record["bits_per_byte"] > 0
    for record in records(folder / "trained", "sample"):
        assert all(text.startswith("First Citizen:\n") for text in record["texts"])


def test_eval_only(folder, command):
    """Validation loss and samples, with data and prompt of the checkpoint, or of the flags."""
    expected = f"{records(folder / 'trained', 'val')[-1]['loss']:.4f}"
    flags = ["--device", "cpu", "--dtype", "float32", "--eval_only", "--init_from"]
    done = run(folder, *flags, "trained")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"validation loss {expected}" in done.stdout and "data shards" in done.stdout
    assert done.stdout.count("First Citizen:\n") == 4
    (path,) = (folder / "trained").glob("checkpoint_*.pt")
    done = command("--eval_only", "--init_from", path, "--prompt", "Hello, I'm")
    assert f"validation loss {expected}" in done.stdout and done.stdout.count("Hello, I'm") == 4
    done = command("--eval_only", "--resume", "--out_dir", "trained")
    assert f"validation loss {expected}" in done.stdout
    assert not (folder / "unused").exists()  # nothing is recorded
    command("--init_from", "trained", "--seq_len", 8, "--val_every", 4, "--out_dir", "shorter")
    done = run_here(folder, *flags, "shorter")  # looks back as far as its run did
    expected = f"{records(folder / 'shorter', 'val')[-1]['loss']:.4f}"
    assert f"validation loss {expected}" in done.stdout


def test_published_names_and_texts(folder, command):
    """--init_from gpt2, from a folder of that name; --data may be a text; --prompt may be empty."""
    done = command("--eval_only", "--init_from", "given", "--prompt", "", "--data", "text.txt")
    assert done.returncode == 0 and "validation loss" in done.stdout
    flags = ["--init_from", "gpt2", "--eval_only", "--data", folder / "text.txt"]
    done = run_here(folder / "offline", *flags, "--preset", "demo", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "") and "validation loss" in done.stdout


# --------------------------------------------------------------------------------------------------
# What users do wrong
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(folder):
    """What is bad, each thing with good data beside it."""
    good = some_tokens(50 * 16 + 1, 1)
    for name, tokens in dict(high_ids=np.full_like(good, 50257), too_short=good[:9]).items():
        (folder / name).mkdir()
        np.save(folder / name / "bad_train_1.npy", tokens)
        np.save(folder / name / "good_val_0.npy", good)
    (folder / "no_val").mkdir()
    np.save(folder / "no_val/good_train_1.npy", good)
    (folder / "broken.pt").write_bytes(b"PK no checkpoint")


# Flags, and what the line must say.
BAD = {
    "--preset gpt5": "--preset gpt5: .*gpt2.*demo",
    "--n_layers 3": "--n_layers",
    "--compile=False": "--compile.*it has no value",
    "--max_steps 0 --epochs inf": "--epochs inf",
    "--device abacus": "--device abacus",
    "--data nowhere": "--data nowhere",
    "--data no_val": "no_val.*val",
    "--data too_short": "too_short",
    "--init_from broken.pt": r"broken\.pt",
    "--init_from given --n_layer 2": "--n_layer 2.* 1",
    "--init_from given --seq_len 48": "--seq_len 48.* 24",
    "--batch_tokens 16000 --max_steps 0 --epochs 1": "--batch_tokens 16000 .* 800 ",
    "--out_dir broken.pt/log": r"--out_dir broken\.pt/log",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_in_one_line(flags, command, faults, folder):
    """Promise 7: status 2 and one line that names the flag or file; no traceback, no new folder."""
    line = one_line(command(*flags.split()), BAD[flags])
    assert line.startswith("train_gpt2.py: ") and not (folder / "unused").exists()


# Flags that do not fit; each message ends in "try --flag value" (or "; try value").
IMPOSSIBLE = ["--n_head 3", "--batch_tokens 8", "--batch_tokens 160 --micro_batch 3"]
IMPOSSIBLE += ["--seq_len 1000 --batch_tokens 1000"]


@pytest.mark.parametrize("impossible", IMPOSSIBLE)
def test_the_value_that_is_named_works(impossible, command, tmp_path):
    """Promise 7: the same command with the value from the message trains.

    One correction may lead to another, of another flag; never twice to one.
    """
    flags, corrected = impossible.split(), set()
    more = ["--max_steps", 1, "--checkpoint_every", 0, "--out_dir", tmp_path]
    while (done := command(*flags, *more)).returncode:
        line = one_line(done, "try ")
        flag, value = re.search(r"try (--\w+ )?(\d+)$", line).groups()
        flag = (flag or re.search(r": (--\w+)", line)[1]).strip()
        assert flag not in corrected, line
        corrected.add(flag)
        flags += [flag, value]
    assert corrected and losses(tmp_path).size == 1


def test_bad_inputs_of_real_processes(folder, faults):
    """The same without the tests' shortcut: by `python`, and by torchrun, where one speaks."""
    flags = [*TINY, "--data", "high_ids", "--out_dir", "real"]
    one_line(run(folder, *flags), r"bad_train_1\.npy holds id 50257")
    done = run(folder, *flags[:-1], "trained", "--data", "shards", processes=2)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("train_gpt2.py: ")]
    assert len(ours) == 1 and "already holds a run" in ours[0]

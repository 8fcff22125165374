"""What bug reports of other projects' users broke once, kind by kind."""

import errno
import fcntl
import json
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, losses, make_shards, one_line, run_here, start, their_model, train
from night import LONG, recorded, wait_for
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from support import files, machine
from support.command import UserError
from train_gpt2 import GPT, GPTConfig, Runtime, TrainConfig

SIZES = dict(n_positions=16, n_layer=2, n_head=1, n_embd=64)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "shards")
    return tmp_path


# --------------------------------------------------------------------------------------------------
# Metadata is believed, the contents are not looked at
# --------------------------------------------------------------------------------------------------


def refuse(source, says):
    with pytest.raises(UserError, match=says) as error:
        GPT.from_pretrained(source)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_folder_that_is_not_a_plain_gpt2(folder):
    """What this project does not compute, or has not all weights for, is refused, not guessed."""
    given = folder / "given"
    their_model(**SIZES).save_pretrained(given)
    for change, says in ((dict(n_layer=3), "h.2."), (dict(scale_attn_weights=False), "scale_")):
        GPT2Config(**SIZES | change).save_pretrained(given)
        refuse("given", f"look at its .*{says}")
    GPT2Config(**SIZES).save_pretrained(given)
    (given / "vocab.json").write_text(json.dumps({"ein": 0, "anderer": 1}))
    refuse("given", "does not use GPT-2's tokenizer")
    (given / "vocab.json").unlink()
    # A head of its own, though config.json says that it is tied (transformers#42612).
    weights = load_file(given / "model.safetensors") | {"lm_head.weight": torch.randn(50257, 64)}
    save_file(weights, given / "model.safetensors", metadata={"format": "pt"})
    refuse("given", "lm_head.weight is not its wte.weight")
    (given / "model.safetensors").rename(given / "pytorch_model.bin")
    refuse("given", "convert it: python -c .*save_pretrained")
    # german-gpt2#9, transformers#12842: 21,128 tokens, and an IndexError.
    their_model(vocab_size=21128, **SIZES).save_pretrained(given)
    refuse("given", "given has 21,128 tokens.* not use GPT-2's tokenizer")


# --------------------------------------------------------------------------------------------------
# Advice given without knowing the situation
# --------------------------------------------------------------------------------------------------


class Config:
    """What build-nanogpt pickles beside the weights."""


def test_state_dicts_of_others_load(folder):
    """Weights alone, with torch.compile's prefix, and in OpenAI's layout: the same logits."""
    theirs = their_model(**SIZES)
    torch.save(theirs.state_dict(), "theirs.pt")
    model = GPT.from_pretrained("theirs.pt")
    torch.save({f"_orig_mod.{k}": v for k, v in model.state_dict().items()}, "compiled.pt")
    tokens = torch.randint(50257, (2, 16))
    for name in ("theirs.pt", "compiled.pt"):
        model = GPT.from_pretrained(name)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_files_of_others_are_named(folder):
    """nanoGPT#325: what it is, and what would load it. Or the network has changed since."""
    other = dict(n_layer=1, n_head=1, n_embd=8)
    content = dict(step=1, network=other, settings={}, model=GPT(GPTConfig(**other)).state_dict())
    torch.save(content | dict(network=other | dict(n_embd=16)), "changed.pt")
    refuse("changed.pt", "weights do not fit the network")
    weights = GPT(GPTConfig(seq_len=16, n_layer=1, n_head=1, n_embd=64)).state_dict()
    torch.save(dict(model=weights, model_args=dict(n_layer=1), iter_num=5), "ckpt.pt")
    torch.save(dict(model=weights, config=Config(), step=5), "model_00005.pt")
    torch.save({"other": torch.zeros(1)}, "other.pt")
    del weights["transformer.h.0.ln_1.bias"]
    torch.save(weights, "no_bias.pt")
    save_file({"a": torch.zeros(1)}, "a.safetensors")
    for name, says in {
        "ckpt.pt": r"checkpoint of nanoGPT; .*\['model'\]",
        "model_00005.pt": "Python objects, as build-nanogpt's",
        "other.pt": "no weights of a GPT-2; it has other",
        "no_bias.pt": "look at its transformer.h.0.ln_1.bias",
        "a.safetensors": "give the folder",
    }.items():
        refuse(name, says)


def test_a_number_of_ranks_that_does_not_divide_the_batch(folder):
    """A run's batch stays: what can change is the number of ranks, or the micro-batch."""
    three = SimpleNamespace(world=3)
    model = GPT(GPTConfig(seq_len=32, n_layer=1, n_head=1, n_embd=8))
    for micro_batch, resuming, says in (
        (0, True, "continue on 1, 2, 4, 8 ranks"),
        (2, True, "try --micro_batch 0"),
        (3, True, "try --micro_batch 0"),
        (0, False, "try 288"),
    ):
        config = TrainConfig(seq_len=32, batch_tokens=256, micro_batch=micro_batch)
        with pytest.raises(UserError, match=says):
            machine.choose_micro_batch(config, model, False, resuming, three)
    config = TrainConfig(seq_len=32, batch_tokens=288)
    assert machine.choose_micro_batch(config, model, False, False, three) == 3


@pytest.mark.parametrize("names", [["RANK"], ["WORLD_SIZE", "LOCAL_RANK"]])
def test_half_of_torchruns_variables(folder, names, monkeypatch):
    for name in names:
        monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match="all of RANK, LOCAL_RANK and WORLD_SIZE"):
        Runtime("cpu", "float32")
    if "RANK" in names:  # run_command asks for it, too
        said = start(folder, *TINY).communicate(timeout=60)[0]
        assert said.count("\n") == 2 and "train_gpt2.py: set all of RANK" in said


# --------------------------------------------------------------------------------------------------
# Shared state has no owner; results vanish
# --------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_a_dead_one_holds_nothing(folder):
    """One folder, one run: the second is told whose it is, and changes nothing."""
    flags = [*LONG, "--checkpoint_every", 5, "--out_dir", "log"]
    first = start(folder, *flags)
    wait_for(lambda: list(folder.glob("log/checkpoint_*.pt")), first)
    (folder / "log/checkpoint_0000001.pt.1.tmp").write_text("of the first run")
    for more in (["--resume"], []):
        second = run_here(folder, *flags, *more)
        one_line(second, f"belongs to a run that is not over: process {first.pid} on ")
    assert (folder / "log/checkpoint_0000001.pt.1.tmp").exists()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    steps = len(losses(folder / "log"))
    train(folder, "log", *flags, "--resume", "--max_steps", steps + 3)
    assert len(losses(folder / "log")) == steps + 3
    assert not list(folder.glob("log/*.tmp"))


def test_a_disk_that_cannot_lock(folder, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    files.lock_folder(folder)
    assert "warning: " in (said := capsys.readouterr().out) and "No locks available" in said
    assert folder not in files.LOCKS


# --------------------------------------------------------------------------------------------------
# The list of stop signals is short
# --------------------------------------------------------------------------------------------------


def test_an_ignored_signal_stays_ignored(folder):
    """nohup: the terminal closes, and the run goes on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the new process inherits it
    process = start(folder, *LONG, "--max_steps", 60)
    signal.signal(signal.SIGHUP, before)
    wait_for(recorded(folder / "log", 20), process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(losses(folder / "log")) == 60


def test_evaluations_are_left_early(folder):
    """Ctrl-C during a long validation: a word at once, no record of half of it, a checkpoint."""
    np.save(folder / "shards/edu_fineweb_val_000000.npy", np.zeros(4_000_000, np.uint16))
    flags = [*LONG, "--val_every", 40, "--val_tokens", 10**8, "--out_dir", "log", "--resume"]
    process = start(folder, *flags, "--micro_batch", 1)
    wait_for(recorded(folder / "log", 0), process)  # the header: validation of step 0 begins
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 0, said
    assert "SIGINT: stopping after this step" in said and "no checkpoint yet" in said
    assert not losses(folder / "log", "val").size


def test_a_signal_before_the_first_step(folder):
    """One line that says so, by any signal."""
    os.mkfifo(folder / "slow.txt")  # a text that does not come
    process = start(folder, *TINY, "--data", "slow.txt")
    wait_for(lambda: "python" in open(f"/proc/{process.pid}/comm").read(), process)
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 1
    assert said.splitlines()[-1] == "train_gpt2.py: stopped by SIGTERM; nothing new was written"

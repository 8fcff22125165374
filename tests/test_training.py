"""The real loop, by its command, against plain loops written here."""

import math
import shutil

import numpy as np
import pytest
import torch
from helpers import TINY, checkpoint, losses, make_shards, records, their_model, their_twin, train
from night import facts

from support.shards import gpt2_tokenizer, open_data
from train_gpt2 import DataLoaderLite

T = 16  # and 8 sequences a step: 50 in the data are an epoch of a little over 6 steps
LOOP = ["--data", "shards", "--max_steps", 14, "--learning_rate", 3e-3]
LOOP += ["--warmup_tokens", 10 * 128, "--weight_decay", 0.3, "--grad_clip", 0.5, "--seed", 5]
SIZES = dict(n_positions=24, n_embd=16, n_layer=1, n_head=2)
GIVEN = ["--init_from", "given", "--micro_batch", 2]
VALIDATE = ["--val_every", 5, "--val_tokens", 12 * T + 5]


# --------------------------------------------------------------------------------------------------
# The loop in float32
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run in many ways: from given weights; with other micro-batches; with two processes."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(folder / "shards")
    their_model(**SIZES).save_pretrained(folder / "given")
    ways = {
        # Its warmup is a third of the run, 10 steps, and no more.
        "from given weights": [*GIVEN, "--max_steps", 30, "--warmup_tokens", 10_000],
        "1 process, 8": ["--micro_batch", 8, *VALIDATE],
        "2 processes, 1": ["--micro_batch", 1, *VALIDATE],
        "muon": [*GIVEN, "--optimizer", "muon", "--checkpoint_every", 7],
        "muon, 2 processes": [*GIVEN, "--optimizer", "muon", "--micro_batch", 1],
    }
    for name, flags in ways.items():
        train(folder, name, *TINY, *LOOP, *flags, processes=2 if "2 processes" in name else 1)
    return folder


def training_data(folder):
    """The sequences in the order of the run, which test_data.py holds against its promises."""
    return DataLoaderLite(open_data(str(folder / "shards"), T)[0], T, seed=5)


def their_loss(model, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows[:, :-1]).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())


def test_thirty_steps_are_those_of_a_plain_loop(folder):
    """Promise 2: transformers' model, torch's AdamW and a schedule by hand give every loss."""
    model = their_model(**SIZES)
    groups = [dict(params=[], weight_decay=0.3), dict(params=[], weight_decay=0.0)]
    for name, parameter in model.named_parameters():  # biases and LayerNorm's gains do not decay
        groups[name.endswith("bias") or "ln_" in name]["params"].append(parameter)
    options = dict(betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    optimizer = torch.optim.AdamW(groups, **options)
    data = training_data(folder)
    for step, record in enumerate(records(folder / "from given weights", "train")):
        if step < 10:
            lr = 3e-3 * (step + 1) / 10
        else:
            lr = 3e-4 + 2.7e-3 * 0.5 * (1 + math.cos(math.pi * (step + 1 - 10) / 20))
        rows = data.sequences(range(8 * step, 8 * step + 8))
        model.zero_grad()
        loss = their_loss(model, rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert record["step"] == step
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert record["lr"] == pytest.approx(lr, rel=1e-9)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert norm > 0.5  # or the clip is not tested
    assert step == 29
    assert record["loss"] < losses(folder / "from given weights")[0] - 0.5
    trained = their_twin(checkpoint(folder / "from given weights"))
    with torch.no_grad():  # what is saved is what was trained, the last update included
        ours, theirs = their_loss(trained, rows).item(), their_loss(model, rows).item()
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_muon_resumes_bit_for_bit(folder):
    """test_muon.py and test_fixed_losses.py hold its steps against torch's Muon."""
    again = shutil.copytree(folder / "muon", folder / "muon again")
    (again / "checkpoint_0000014.pt").unlink()
    assert "checkpoint_0000007.pt" in train(folder, again.name, "--resume").stdout
    assert facts(again) == facts(folder / "muon")
    two = losses(folder / "muon, 2 processes")
    np.testing.assert_allclose(two, losses(folder / "muon"), atol=1e-3)


def test_processes_and_micro_batches_change_nothing(folder):
    """Promise 3: batch_tokens fixed, any cut of it: the same batches, losses within 1e-4."""
    one = losses(folder / "1 process, 8")
    assert len(one) == 14
    # Batches differ by more than the tolerance: taking another one would be seen.
    assert np.min(np.abs(np.diff(one))) > 3e-4
    np.testing.assert_allclose(losses(folder / "2 processes, 1"), one, atol=1e-5)


def test_validation_is_the_same_however_it_is_cut(folder):
    """At step 0, every five steps and at the end; a brute-force mean; any batch and world."""
    one, two = (records(folder / name, "val") for name in ("1 process, 8", "2 processes, 1"))
    assert [record["step"] for record in one] == [0, 5, 10, 14]
    for mine, yours in zip(one, two, strict=True):
        assert (mine["step"], mine["loss"]) == (yours["step"], pytest.approx(yours["loss"], 1e-5))
    # val_tokens are 12 sequences and a bit; the shard has 13 and a tail.
    _, (shard,) = open_data(str(folder / "shards"), T)
    tokens = torch.from_numpy(shard.astype(np.int64))
    model = their_twin(checkpoint(folder / "1 process, 8"))
    nats = []
    with torch.no_grad():
        for first in range(0, 12 * T, T):
            log_p = model(tokens[None, first : first + T]).logits[0].double().log_softmax(dim=1)
            nats += [-log_p[t, tokens[first + t + 1]].item() for t in range(T)]
    assert len(nats) == 12 * T
    assert one[-1]["loss"] == pytest.approx(np.mean(nats), abs=1e-5)
    text = gpt2_tokenizer().decode_bytes(tokens[1 : 12 * T + 1].tolist())
    bits = sum(nats) / math.log(2) / len(text)
    assert one[-1]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Compiled
# --------------------------------------------------------------------------------------------------


def test_compiled_runs_agree_with_eager_ones(tmp_path):
    """Promise 5: losses within 1e-3, with validation and samples, on two processes."""
    make_shards(tmp_path / "shards")
    flags = [*TINY, *LOOP, *VALIDATE, "--micro_batch", 2, "--max_steps", 6, "--sample_every", 3]
    done = train(tmp_path, "compiled", *flags, "--compile", processes=2)
    assert "parameters, compiled" in done.stdout
    assert "parameters, eager" in train(tmp_path, "eager", *flags).stdout
    names = ("compiled", "eager")
    for kind, count in (("train", 6), ("val", 3)):
        compiled, eager = (losses(tmp_path / name, kind) for name in names)
        assert len(compiled) == count
        np.testing.assert_allclose(compiled, eager, atol=1e-3)
    compiled, eager = (checkpoint(tmp_path / name)["model"] for name in names)
    assert compiled.keys() == eager.keys()

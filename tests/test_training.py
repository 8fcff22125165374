"""The real loop, by its command, against plain loops written here."""

import math
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    checkpoint,
    in_their_layout,
    losses,
    make_shards,
    records,
    run,
    run_all,
    their_model,
    their_twin,
)
from night import facts

import train_gpt2
from support.shards import gpt2_tokenizer, open_data
from train_gpt2 import DataLoaderLite, TrainConfig

T = 16  # and 8 sequences a step: 50 in the data are an epoch of a little over 6 steps
LOOP = ["--data", "shards", "--max_steps", 14, "--learning_rate", 3e-3]
LOOP += ["--warmup_tokens", 10 * 128, "--weight_decay", 0.3, "--grad_clip", 0.5, "--seed", 5]
GIVEN = ["--init_from", "given", "--micro_batch", 2]
VALIDATE = ["--val_every", 5, "--val_tokens", 12 * T + 5]


def test_learning_rate():
    """Points by hand: lr 1, a tenth of it at last, warmup 100 of 500, a third if it is too long."""
    config = TrainConfig(learning_rate=1.0, min_lr_ratio=0.1, warmup_tokens=100)
    points = {1: 0.01, 50: 0.5, 100: 1.0, 300: 0.55, 500: 0.1}
    points[200] = 0.1 + 0.9 * (0.5 + 0.25 * math.sqrt(2))  # a quarter of the way: cos(pi / 4)
    points[400] = 0.1 + 0.9 * (0.5 - 0.25 * math.sqrt(2))
    for tokens, lr in points.items():
        assert train_gpt2.learning_rate(tokens, 500, config) == pytest.approx(lr, rel=1e-12)
    rates = [train_gpt2.learning_rate(tokens, 90, config) for tokens in (15, 30, 60, 90)]
    assert rates == pytest.approx([0.5, 1.0, 0.55, 0.1])


# --------------------------------------------------------------------------------------------------
# The loop in float32
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run in many ways: from given weights; with other micro-batches; with two processes."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(folder / "shards")
    sizes = dict(n_positions=24, n_embd=16, n_layer=1, n_head=2)
    their_model(**sizes).save_pretrained(folder / "given")
    ways = {
        "from given weights": [*GIVEN, "--max_steps", 30],
        "1 process, 8": ["--micro_batch", 8, *VALIDATE],
        "1 process, 1": ["--micro_batch", 1, *VALIDATE],
        "2 processes, 4": ["--micro_batch", 4, *VALIDATE],
        "2 processes, 1": ["--micro_batch", 1],
        "float16": ["--dtype", "float16"],
        "muon": [*GIVEN, "--optimizer", "muon", "--checkpoint_every", 7],
        "muon, 2 processes": [*GIVEN, "--optimizer", "muon", "--micro_batch", 1],
    }
    jobs = {name: dict(flags=[*TINY, *LOOP, *flags]) for name, flags in ways.items()}
    for name, job in jobs.items():
        job["processes"] = 2 if "2 processes" in name else 1
    return folder, run_all(folder, jobs)


def training_data(folder):
    """The sequences in the order of the run, which test_data.py holds against its promises."""
    train, _ = open_data(str(folder / "shards"), T)
    return DataLoaderLite(train, T, seed=5)


def their_loss(model, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows[:, :-1]).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())


def test_thirty_steps_are_those_of_a_plain_loop(runs):
    """Promise 2: transformers' model, torch's AdamW and a schedule by hand give every loss."""
    folder, _ = runs
    model = their_model(n_positions=24, n_embd=16, n_layer=1, n_head=2)
    no_decay = [p for n, p in model.named_parameters() if n.endswith("bias") or "ln_" in n]
    decay = [p for p in model.parameters() if not any(p is q for q in no_decay)]
    groups = [dict(params=decay, weight_decay=0.3), dict(params=no_decay, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    data = training_data(folder)
    for step, record in enumerate(records(folder / "from given weights", "train")):
        if step < 10:
            lr = 3e-3 * (step + 1) / 10
        else:
            lr = 3e-4 + 2.7e-3 * 0.5 * (1 + math.cos(math.pi * (step + 1 - 10) / 20))
        loss = their_loss(model, data.sequences(range(8 * step, 8 * step + 8)))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert record["step"] == step
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert record["lr"] == pytest.approx(lr, rel=1e-9)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert norm > 0.5  # or the clip is not tested
    assert step == 29
    assert record["loss"] < losses(folder / "from given weights")[0] - 0.5
    content = checkpoint(folder / "from given weights")
    assert content["step"] == 30
    rows = data.sequences(range(8))
    with torch.no_grad():  # what is saved is what was trained, the last update included
        assert their_loss(their_twin(content), rows) == pytest.approx(
            their_loss(model, rows).item(), abs=1e-4
        )


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz rounds in bfloat16, by the coefficients of Jordan's post."""
    x = matrix.bfloat16()
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.float()


def test_muon_is_that_of_its_papers(runs):
    """A plain loop: momentum 0.95 of Nesterov's kind, orthogonal steps, 0.2 sqrt(longer side)."""
    folder, _ = runs
    model = their_model(n_positions=24, n_embd=16, n_layer=1, n_head=2)
    inside = {p: torch.zeros_like(p) for n, p in model.named_parameters() if ".h." in n}
    inside = {p: momentum for p, momentum in inside.items() if p.dim() == 2}
    outside = [p for p in model.parameters() if p not in inside]
    groups = [
        dict(params=[p for p in outside if p.dim() == d], weight_decay=0.3 * (d > 1))
        for d in (1, 2)
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    data, expected = training_data(folder), []
    for step, record in enumerate(records(folder / "muon", "train")):
        loss = their_loss(model, data.sequences(range(8 * step, 8 * step + 8)))
        expected.append(loss.item())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = record["lr"]
        adamw.step()
        with torch.no_grad():
            for p, momentum in inside.items():
                momentum.mul_(0.95).add_(0.05 * p.grad)
                update = orthogonal(0.05 * p.grad + 0.95 * momentum)
                p.mul_(1 - 0.3 * record["lr"])
                p.sub_(record["lr"] * 0.2 * math.sqrt(max(p.shape)) * update)
    assert step == 13
    ours, plain = losses(folder / "muon"), losses(folder / "from given weights")[:14]
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    assert np.abs(ours - plain).max() > 1e-2  # or AdamW would pass for it
    begun = their_model(n_positions=24, n_embd=16, n_layer=1, n_head=2).state_dict()
    trained = in_their_layout(model, checkpoint(folder / "muon")["model"])
    for name, theirs in model.state_dict().items():
        if ".h." in name and theirs.dim() == 2:  # bfloat16 rounds: 0.03 here, 0.2 for another size
            moved, apart = trained[name] - begun[name], trained[name] - theirs
            assert apart.norm() < 0.08 * moved.norm(), name
    np.testing.assert_allclose(losses(folder / "muon, 2 processes"), ours, atol=1e-3)


def test_muon_resumes_bit_for_bit(runs):
    folder, _ = runs
    again = shutil.copytree(folder / "muon", folder / "muon again")
    (again / "checkpoint_0000014.pt").unlink()
    done = run(folder, "--out_dir", again.name, "--resume")
    assert done.returncode == 0 and "checkpoint_0000007.pt" in done.stdout, done.stderr
    assert facts(again) == facts(folder / "muon")


def test_processes_and_micro_batches_change_nothing(runs):
    """Promise 3: batch_tokens fixed, any cut of it: the same batches, losses within 1e-4."""
    folder, _ = runs
    one = losses(folder / "1 process, 8")
    assert len(one) == 14
    # Batches differ by more than the tolerance: taking another one would be seen.
    assert np.min(np.abs(np.diff(one))) > 3e-4
    for name in ("1 process, 1", "2 processes, 4", "2 processes, 1"):
        np.testing.assert_allclose(losses(folder / name), one, atol=1e-4, err_msg=name)


def test_validation_is_the_same_however_it_is_cut(runs):
    """At step 0, every five steps and at the end; a brute-force mean; any batch and world."""
    folder, _ = runs
    names = ("1 process, 8", "1 process, 1", "2 processes, 4")
    val = {name: records(folder / name, "val") for name in names}
    assert [[r["step"] for r in val[name]] for name in names] == [[0, 5, 10, 14]] * 3
    for name in names[1:]:
        np.testing.assert_allclose(
            losses(folder / name, "val"), losses(folder / names[0], "val"), atol=1e-4
        )
    # val_tokens are 12 sequences and a bit; the shard has 13 and a tail.
    _, (shard,) = open_data(str(folder / "shards"), T)
    tokens = torch.from_numpy(shard.astype(np.int64))
    model = their_twin(checkpoint(folder / names[0]))
    nats = []
    with torch.no_grad():
        for first in range(0, 12 * T, T):
            log_p = model(tokens[None, first : first + T]).logits[0].double().log_softmax(dim=1)
            nats += [-log_p[t, tokens[first + t + 1]].item() for t in range(T)]
    assert len(nats) == 12 * T
    assert val[names[0]][-1]["loss"] == pytest.approx(np.mean(nats), abs=1e-5)
    text = gpt2_tokenizer().decode_bytes(tokens[1 : 12 * T + 1].tolist())
    bits = sum(nats) / math.log(2) / len(text)
    assert val[names[0]][-1]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_float16_trains(runs):
    """With the GradScaler, no update is lost: each loss is near float32's of the same step."""
    folder, _ = runs
    half, full = losses(folder / "float16"), losses(folder / "1 process, 8")
    assert (half != full).any()
    np.testing.assert_allclose(half, full, atol=3e-3)
    assert half[-1] < half[0] - 0.01


# --------------------------------------------------------------------------------------------------
# Compiled, and in bfloat16
# --------------------------------------------------------------------------------------------------


def test_compiled_runs_agree_with_eager_ones(tmp_path):
    """Promise 5: losses within 1e-3, with validation and samples, on two processes."""
    make_shards(tmp_path / "shards")
    flags = [*TINY, *LOOP, *VALIDATE, "--micro_batch", 2, "--max_steps", 6, "--sample_every", 3]
    jobs = {
        "compiled": dict(flags=[*flags, "--compile"], processes=2),
        "eager": dict(flags=flags),
    }
    done = run_all(tmp_path, jobs)
    for kind, count in (("train", 6), ("val", 3)):
        compiled, eager = (losses(tmp_path / name, kind) for name in ("compiled", "eager"))
        assert len(compiled) == count
        np.testing.assert_allclose(compiled, eager, atol=1e-3)
    for name in ("compiled", "eager"):
        assert [record["step"] for record in records(tmp_path / name, "sample")] == [3, 6]
        assert name in done[name].stdout
    compiled, eager = (checkpoint(tmp_path / name)["model"] for name in ("compiled", "eager"))
    assert compiled.keys() == eager.keys()


def test_bfloat16_trains_as_well_as_float32(tmp_path):
    """Promise 6, a short run on the demo's text: final losses within 0.05, far below the first."""
    flags = [*TINY, "--n_layer", 2, "--n_embd", 48, "--seq_len", 32, "--max_steps", 100]
    flags += ["--warmup_tokens", 2000, "--val_every", 100, "--val_tokens", 2000]
    dtypes = ("float32", "bfloat16")
    run_all(tmp_path, {dtype: dict(flags=[*flags, "--dtype", dtype]) for dtype in dtypes})
    full, half = (losses(tmp_path / dtype, "val") for dtype in dtypes)
    assert full[-1] < full[0] - 2.5
    assert half[-1] == pytest.approx(full[-1], abs=0.05)
    assert half[-1] != full[-1]

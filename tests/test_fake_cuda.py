"""Whole runs on a GPU that is not there (see fake_cuda.py), against the same runs on the CPU."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda, waits
from helpers import checkpoint, make_shards, records
from test_compile_counts import run_main, some_hellaswag

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is not None,
    reason="fake_cuda needs Linux and a CPU build of torch",
)

# 4 steps of 2 micro-steps. Validation reads 5 sequences, in 2 1/2 micro-batches.
FLAGS = ["--data", "shards", "--n_layer", 2, "--seq_len", 32, "--micro_batch", 2]
FLAGS += ["--val_tokens", 160, "--val_every", 2, "--checkpoint_every", 2]
FLAGS += ["--sample_every", 4, "--hellaswag_every", 4]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    make_shards(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    with some_hellaswag(8):
        yield tmp_path


def resume(out_dir: str, *flags) -> None:
    """Continue a finished run from its last checkpoint but one."""
    max(Path(out_dir).glob("checkpoint_*.pt")).unlink()
    run_main(*FLAGS, *flags, "--out_dir", out_dir, "--resume")
    assert len(records(Path(out_dir), "resume")) == 1


def waits_by_place() -> dict[str, int]:
    """Waits by function of train_gpt2.py, and by file elsewhere."""
    found = Counter()
    for (line, _), count in waits.items():
        file, function = line.split()
        found[function if file.startswith("train_gpt2.py") else file.split(":")[0]] += count
    return found


def apart(kind: str, key: str) -> float:
    """The largest difference of a recorded value between the runs `gpu` and `cpu`."""
    gpu, cpu = (records(Path(name), kind) for name in ("gpu", "cpu"))
    assert [record["step"] for record in gpu] == [record["step"] for record in cpu] != []
    return max(abs(ours[key] - theirs[key]) for ours, theirs in zip(gpu, cpu, strict=True))


def test_a_run_in_float32_repeats_the_cpu(folder, capsys):
    """Training, validation, samples and HellaSwag; then --resume and --eval_only."""
    run_main(*FLAGS, "--out_dir", "cpu")
    on_gpu = ["--device", "auto", "--dtype", "float32"]
    with fake_cuda():
        run_main(*FLAGS, *on_gpu, "--out_dir", "gpu")
        resume("gpu", *on_gpu)
        run_main(*FLAGS, *on_gpu, "--init_from", "gpu", "--eval_only")
    assert records(folder / "gpu", "header")[0]["device"]["kind"] == "cuda"
    last = records(folder / "gpu", "val")[-1]["loss"]
    assert f"\nvalidation loss {last:.4f}" in capsys.readouterr().out
    assert max(apart("train", "loss"), apart("train", "grad_norm")) < 1e-4
    assert apart("val", "loss") < 1e-4
    assert apart("hellaswag", "acc") == apart("hellaswag", "acc_norm") == 0
    gpu, cpu = (records(folder / name, "sample") for name in ("gpu", "cpu"))
    assert [record["texts"] for record in gpu] == [record["texts"] for record in cpu] != []


# Muon in float16 waits once more a step: it asks the scaler whether a gradient has overflowed.
# Fused AdamW asks on the GPU. The scaler counts its steps without an overflow, across --resume.
CARDS = [
    ("NVIDIA A100-SXM4-80GB", (8, 0), "muon", "bfloat16", 0, None),
    ("Tesla T4", (7, 5), "adamw", "float16", 0, 4),
    ("Tesla T4", (7, 5), "muon", "float16", 4, 4),
]


@pytest.mark.parametrize("name, capability, optimizer, dtype, more_waits, good_steps", CARDS)
def test_half_precision(folder, name, capability, optimizer, dtype, more_waits, good_steps):
    """It is chosen by the card. The losses differ from float32's, but not by much."""
    run_main(*FLAGS, "--optimizer", optimizer, "--out_dir", "cpu")
    on_gpu = ["--device", "auto", "--dtype", "auto", "--optimizer", optimizer]
    with fake_cuda(name, capability):
        run_main(*FLAGS, *on_gpu, "--out_dir", "gpu")
        assert waits_by_place()["train_step"] == more_waits
        resume("gpu", *on_gpu)
    assert records(folder / "gpu", "header")[0]["dtype"] == dtype
    assert 0 < apart("train", "loss") < 1e-3 and 0 < apart("val", "loss") < 1e-3
    assert all(record["mfu"] > 0 for record in records(folder / "gpu", "train"))
    assert checkpoint(folder / "gpu")["scaler"].get("_growth_tracker") == good_steps


def test_a_run_waits_only_where_it_must(folder):
    with fake_cuda():
        run_main(*FLAGS, "--device", "cuda", "--out_dir", "gpu")
        found = waits_by_place()
    tensors = len(checkpoint(folder / "gpu")["model"])
    assert found.pop("checkpoint.py") >= 2 * tensors, "two checkpoints"
    assert found == {
        "sum": 4 + 3 + 2,  # a training step, a validation, and a HellaSwag score each wait once
        "generate": 1 + 32 * 2,  # the prompt; each token's probabilities, and the choice back
        "sample": 1,  # the texts
        "hellaswag.py": 2 * 3,  # each score copies tokens and numbers there, and the scores back
        "main": 28,  # model.to(device)
    }

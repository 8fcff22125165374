"""What support/machine.py knows about speed, and what several ranks make of it.

Run by torchrun as a script, this file trains on ranks that have not the same free memory.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, make_shards, records, run
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2
from support import machine
from support.command import UserError
from train_gpt2 import GPT, GPTConfig

# Each card by the name that torch gives it, and the TFLOP/s "with sparsity" that its data sheet
# advertises: twice those of dense matrices.
ADVERTISED = {
    "NVIDIA GB200": 5000,
    "NVIDIA B200": 4500,
    "NVIDIA GH200 480GB": 1979,
    "NVIDIA H200": 1979,
    "NVIDIA H200 NVL": 1671,
    "NVIDIA H100 80GB HBM3": 1979,
    "NVIDIA H100 PCIe": 1513,
    "NVIDIA H100 NVL": 1671,
    "NVIDIA H20": 296,
    "NVIDIA A100-SXM4-80GB": 624,
    "NVIDIA A40": 299.4,
    "NVIDIA A30": 330,
    "NVIDIA A10": 250,
    "NVIDIA A10G": 140,
    "NVIDIA L40S": 733,
    "NVIDIA L40": 362,
    "NVIDIA L4": 242,
    "NVIDIA RTX 6000 Ada Generation": 728.5,
    "NVIDIA RTX A6000": 309.7,
    "NVIDIA GeForce RTX 5090": 419,
    "NVIDIA GeForce RTX 4090": 330.3,
    "NVIDIA GeForce RTX 3090": 142,
    "Tesla V100-SXM2-32GB": 2 * 125,  # these two know no sparsity
    "Tesla T4": 2 * 65,
}


def test_peaks_are_those_of_the_data_sheets(monkeypatch):
    gpu = torch.device("cuda")
    assert len(machine.PEAK_TFLOPS) == len(ADVERTISED)
    for name, advertised in ADVERTISED.items():
        monkeypatch.setattr(machine, "device_name", lambda device, name=name: name)
        peak = machine.peak_flops(gpu, torch.bfloat16)
        assert peak == pytest.approx(0.5e12 * advertised, 0.02), name
        assert machine.peak_flops(gpu, torch.float32) is None, "which has another peak"
    others = ["GeForce RTX 4090 Laptop GPU", "GeForce RTX 3090 Ti", "A100-SXM4-80GB MIG 1g.10gb"]
    for name in (f"NVIDIA {other}" for other in others):
        monkeypatch.setattr(machine, "device_name", lambda device, name=name: name)
        assert machine.peak_flops(gpu, torch.bfloat16) is None, "another chip, or a part"


def test_flops_per_token():
    """torch counts the matrix products of GPT-2 (124M): in attention all of them, masked or not.

    The formula also has 6 FLOPs for each bias and gain, a thousandth of the total.
    """
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        model = GPT(GPTConfig())
        tokens = torch.zeros(1, 1024, dtype=torch.long)
        with counter:
            model(tokens, tokens).backward()
    counted = counter.get_total_flops() / 1024
    assert counted == pytest.approx(0.855e9, rel=1e-3)
    assert machine.flops_per_token(model, 1024) == pytest.approx(counted, rel=1e-3)


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch, tmp_path, capsys):
    """As with a driver that is too old for torch, or with PyPI's torch on Windows. Apple's is taken
    only if it is asked for: on some, torch multiplies large matrices wrongly (pytorch#193487)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    for said in ("", "torch cannot use an NVIDIA GPU here; --device cuda says why\n"):
        assert machine.open_device("auto", 0).type == "cpu"
        assert capsys.readouterr().out == said
        (tmp_path / "nvidia-smi").touch(0o755)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: 1 / 0)  # on a Mac, too
    with pytest.raises(UserError, match="--device mps cannot be used"):
        machine.open_device("mps", 0)
    assert "warning: on M1 and M2" in capsys.readouterr().out


def test_ranks_share_a_micro_batch_and_the_speed(tmp_path):
    """Of 8 sequences a step, 4 fit on rank 0 at once, and 2 on rank 1."""
    make_shards(tmp_path / "shards")
    flags = ["--data", "shards", "--dtype", "bfloat16", "--compile"]
    done = run(tmp_path, *flags, script="tests/test_machine.py", processes=2, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "no working compiler" in done.stdout, done.stderr
    assert [(tmp_path / f"shape_{rank}").read_text() for rank in (0, 1)] == 2 * ["[2, 2, 17]"]
    [header] = records(tmp_path / "log", "header")
    assert header["micro_batch"] == 2 and not header["compiled"]  # rank 1 has no compiler
    C, V, T = 16, 50304, 16
    flops = 6 * (12 * C**2 + 15 * C + V * C) + 12 * C * T  # the formula, for TINY's one layer
    for record in records(tmp_path / "log", "train"):
        expected = flops * record["tokens_per_second"] / 2 / 65e12
        assert record["mfu"] == pytest.approx(expected, rel=1e-6)


def train_on_a_rank() -> None:
    rank = os.environ["RANK"]
    step = train_gpt2.train_step

    def note(state, batch, *args):
        Path(f"shape_{rank}").write_text(str(list(batch.shape)))
        return step(state, batch, *args)

    train_gpt2.train_step = note
    machine.choose_micro_batch = lambda *args: {"0": 4, "1": 2}[rank]
    if rank == "1":
        torch.compile = None  # it raises TypeError
    machine.device_name = lambda device: "Tesla T4"
    train_gpt2.main([*TINY, *sys.argv[1:]])


if __name__ == "__main__":
    train_on_a_rank()

"""Muon in batches, against torch.optim.Muon, which takes one matrix at a time."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.muon import Muon

SHAPES = ((144, 48), (48, 48), (192, 48), (48, 192))  # of a block with 48 channels
ADJUSTED = dict(weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


class Launches(TorchDispatchMode):
    """Counts operations that a GPU would start a kernel for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if func.namespace == "aten" and not view and "unsafe_view" not in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def matrices():
    """Those of twelve blocks."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(0.1 * torch.randn(shape)) for _ in range(12) for shape in SHAPES]


def step(optimizer, parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_it_is_torch_s(matrices):
    """Bit for bit on a CPU, with c_attn whole. A state goes from one to the other."""
    theirs_are = copy.deepcopy(matrices)
    ours, theirs = (
        Muon(matrices, 1e-2, 0.1, split=False),
        torch.optim.Muon(theirs_are, 1e-2, **ADJUSTED),
    )
    for seed in range(3):
        step(ours, matrices, seed)
        step(theirs, theirs_are, seed)
    assert all(map(torch.equal, matrices, theirs_are))
    state = copy.deepcopy(theirs.state_dict())
    state["param_groups"] = ours.state_dict()["param_groups"]
    again = Muon(matrices, 1e-2, 0.1, split=False)
    again.load_state_dict(state)
    step(again, matrices, 3)
    step(theirs, theirs_are, 3)
    assert all(map(torch.equal, matrices, theirs_are))


def test_queries_keys_and_values_are_three_matrices(matrices):
    c_attn = matrices[0]
    thirds = [torch.nn.Parameter(third.clone()) for third in c_attn.detach().split(48)]
    ours, theirs = Muon([c_attn], 1e-2, 0.1), torch.optim.Muon(thirds, 1e-2, **ADJUSTED)
    for seed in range(3):
        step(ours, [c_attn], seed)
        for third, gradient in zip(thirds, c_attn.grad.split(48), strict=True):
            third.grad = gradient
        theirs.step()
    assert torch.equal(c_attn, torch.cat(thirds))


def test_few_kernels_are_launched(matrices):
    """torch's starts 1,104 for the 48 matrices of GPT-2 (124M)."""
    optimizers = Muon(matrices, 1e-2, 0.1), torch.optim.Muon(matrices, 1e-2, **ADJUSTED)
    counts = []
    for optimizer in optimizers:
        step(optimizer, matrices, 0)
        with Launches() as launches:
            optimizer.step()
        counts.append(launches.count)
    assert counts[0] <= 110 and counts[1] == 1104

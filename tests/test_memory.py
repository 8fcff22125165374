"""The arithmetic behind the default micro-batch, and what happens when it is wrong."""

import pytest
import torch

from support import command
from support.machine import step_bytes
from train_gpt2 import TrainConfig


def test_memory_of_a_step():
    """GPT-2 (124M), 64 x 1024 tokens in bfloat16: torch.cuda.max_memory_allocated was 28.6 GB.

    Eagerly, a simulation of every allocation had its peak at 65 GB.
    """
    compiled, eager = (
        step_bytes(TrainConfig(), 124_475_904, 65536, compiled, torch.bfloat16)
        for compiled in (True, False)
    )
    assert 28.6e9 <= compiled <= 1.1 * 28.6e9
    assert 64e9 <= eager <= 66e9


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]
BUG = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, BUG])
def test_out_of_memory_is_one_line_and_a_bug_is_not(monkeypatch, capsys, error, compiling):
    """The compiler wraps what it meets in errors of its own."""

    def fail(*args):
        raise error

    torch._dynamo.reset()
    main = (lambda: torch.compile(torch.sin, backend=fail)(torch.zeros(1))) if compiling else fail
    monkeypatch.setattr(command, "on_signals", lambda handler: None)
    what, says = (RuntimeError, "illegal") if error is BUG else (SystemExit, "^2$")
    with pytest.raises(what, match=says):
        command.run_command("x.py", main, "try this")
    if error is not BUG:
        assert capsys.readouterr().err == "x.py: out of memory; try this\n"

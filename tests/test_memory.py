"""The arithmetic behind the default micro-batch, and what happens when it is wrong.

Eagerly, the training step itself runs here on fake tensors, which have shapes and lifetimes but no
numbers. Compiled, the peak is the one that an H200 has shown.
"""

import pytest
import torch
import torch.nn.functional as F
from test_compile_counts import stream_of_a_gpu
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from support import command, machine
from support.machine import step_bytes
from train_gpt2 import GPT, PRESETS, TrainConfig


def eager_peak(preset: str, micro_batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes at the peak of a step's second micro-batch under AdamW, as counted and as reckoned."""
    config = TrainConfig(**PRESETS[preset])
    memory = MemTracker()
    with FakeTensorMode(), memory:
        model = GPT(config)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # of the first micro-batch
        averages = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        tokens = torch.zeros(micro_batch, config.seq_len, dtype=torch.long)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens, tokens)
        loss.backward()
        del averages
    parameters = sum(p.numel() for p in model.parameters())
    reckoned = step_bytes(config, parameters, tokens.numel(), False, dtype)
    return memory.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"], reckoned


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Autocast on a CPU, but as a GPU's: it computes LayerNorm in float32."""
    norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *args: norm(x.float(), *args))
    monkeypatch.setattr(machine, "bfloat16_stream", stream_of_a_gpu)


CASES = [
    ("demo", 24, torch.bfloat16),
    ("gpt2", 64, torch.bfloat16),
    ("gpt2", 64, torch.float16),
    ("gpt2", 64, torch.float32),
    ("gpt3", 8, torch.bfloat16),
    ("gpt2-medium", 16, torch.bfloat16),
]


@pytest.mark.parametrize("preset, micro_batch, dtype", CASES)
def test_eager_memory(as_on_a_gpu, preset, micro_batch, dtype):
    """A tenth of the memory stays free, so some percent too few do no harm."""
    peak, reckoned = eager_peak(preset, micro_batch, dtype)
    assert peak <= reckoned <= 1.05 * peak


def test_compiled_memory():
    """GPT-2 (124M), 64 x 1024 tokens in bfloat16: torch.cuda.max_memory_allocated was 28.6 GB."""
    predicted = step_bytes(TrainConfig(), 124_475_904, 65536, True, torch.bfloat16)
    assert 28.6e9 <= predicted <= 1.1 * 28.6e9


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

"""The arithmetic behind the default micro-batch, against simulations of the memory it predicts.

Eagerly, the training step itself runs here on fake tensors, which have shapes and lifetimes but no
numbers. Compiled, the peak is the one that an H200 has shown.
"""

import pytest
import torch
from counted_memory import CountedMemory
from torch._subclasses import FakeTensorMode

from support.machine import step_bytes
from train_gpt2 import GPT, PRESETS, GPTConfig

SIZES = ("seq_len", "n_layer", "n_head", "n_embd")


def network(preset: str, vocab_size: int = 50304) -> GPTConfig:
    sizes = {name: PRESETS[preset][name] for name in SIZES if name in PRESETS[preset]}
    return GPTConfig(vocab_size=vocab_size, **sizes)


def eager_peak(config, micro_batch: int, dtype: torch.dtype, train=True) -> tuple[int, int]:
    """Parameters, and bytes at the peak of a step's second micro-batch under AdamW.

    The CPU's autocast casts the same operations of this model as CUDA's does. Without `train`, the
    micro-batch is one of a validation loss.
    """
    with FakeTensorMode(), CountedMemory() as memory:
        model = GPT(config)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # of the first micro-batch
        averages = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        tokens = torch.zeros(micro_batch, config.seq_len, dtype=torch.long)
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with autocast, torch.set_grad_enabled(train):
            loss = model(tokens, tokens)
        if train:
            loss.backward()
        del averages
    return sum(p.numel() for p in model.parameters()), memory.peak


@pytest.mark.parametrize(
    ("preset", "micro_batch", "dtype"),
    [
        ("demo", 24, torch.bfloat16),
        ("gpt2", 4, torch.bfloat16),
        ("gpt2", 64, torch.bfloat16),
        ("gpt2", 64, torch.float16),
        ("gpt2", 64, torch.float32),
        ("gpt3", 8, torch.bfloat16),
        ("gpt2-medium", 16, torch.bfloat16),
        ("gpt2-large", 8, torch.bfloat16),
        ("gpt2-xl", 4, torch.bfloat16),
    ],
)
def test_eager_memory(preset, micro_batch, dtype):
    config = network(preset)
    parameters, peak = eager_peak(config, micro_batch, dtype)
    predicted = step_bytes(config, parameters, micro_batch * config.seq_len, False, dtype)
    assert peak <= predicted <= 1.05 * peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_validation_needs_less(dtype):
    _, training = eager_peak(network("gpt2"), 4, dtype)
    _, validation = eager_peak(network("gpt2"), 4, dtype, train=False)
    assert validation < training


def test_compiled_memory():
    """GPT-2 (124M), 64 x 1024 tokens in bfloat16: torch.cuda.max_memory_allocated was 28.6 GB."""
    predicted = step_bytes(network("gpt2"), 124_475_904, 65536, True, torch.bfloat16)
    assert 28.6e9 <= predicted <= 1.1 * 28.6e9

"""Compute the memory that a compiled micro-batch needs on a GPU, on a machine without a GPU.

    python tools/memory.py        # some ten minutes on one core

Inductor writes the CUDA code of forward and backward (cuda_code.py), and a run of that code with
buffers that are only counted (launches.py) gives the peak. It writes runs/roofline/memory.json,
with which tests/test_memory.py compares the arithmetic of train_gpt2.py.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from cuda_code import GPUS, write_cuda_code
from launches import run

from train_gpt2 import GPT, GPTConfig

# Layers, heads, channels and context of the presets; sequences in the micro-batch.
CASES = [
    ("demo", (4, 3, 96, 32), 24, 50304, "bfloat16"),
    ("gpt2", (12, 12, 768, 1024), 4, 50304, "bfloat16"),
    ("gpt2", (12, 12, 768, 1024), 64, 50304, "bfloat16"),
    ("gpt2", (12, 12, 768, 1024), 16, 50304, "float16"),
    ("gpt2", (12, 12, 768, 1024), 16, 50304, "float32"),
    ("gpt2", (12, 12, 768, 1024), 16, 50257, "bfloat16"),  # as OpenAI's weights have it
    ("gpt3", (12, 12, 768, 2048), 8, 50304, "bfloat16"),
    ("gpt2-medium", (24, 16, 1024, 1024), 16, 50304, "bfloat16"),
    ("gpt2-large", (36, 20, 1280, 1024), 8, 50304, "bfloat16"),
    ("gpt2-xl", (48, 25, 1600, 1024), 4, 50304, "bfloat16"),
]


def compute(case) -> dict:
    """The peak of one case, on an A100. Needs a process of its own."""
    preset, (n_layer, n_head, n_embd, seq_len), micro_batch, vocab_size, dtype = case
    config = GPTConfig(seq_len, vocab_size, n_layer, n_head, n_embd)
    torch.set_float32_matmul_precision("high")
    with torch.device("meta"):
        model = GPT(config)
    code = write_cuda_code(model, micro_batch, seq_len, getattr(torch, dtype), GPUS["a100"])
    return {
        "name": f"{preset}, vocabulary {vocab_size}, {dtype}, {micro_batch} x {seq_len}",
        "preset": preset,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "micro_batch": micro_batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_bytes": run(code).peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    out = ROOT / "runs" / "roofline" / "memory.json"
    parser.add_argument("--out", type=Path, default=out, help="the file to write")
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")  # pretending changes a process for good
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        results = []
        for result in pool.map(compute, CASES):
            print(f"{result['peak_bytes'] / 1e9:7.2f} GB  {result['name']}", flush=True)
            results.append(result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Sampling with and without cached keys and values, the 124M network in float32, in turn.

python runs/sampling-cpu/measure.py
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import train_gpt2


def main() -> None:
    train_gpt2.keep_freed_memory()
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig())
    for length, pairs in ((32, 3), (256, 1)):
        ratios = []
        for _ in range(pairs):
            times, texts = [], []
            for cached in (True, False):
                began = time.perf_counter()
                texts.append(train_gpt2.generate(model, [15496, 11, 314], length, cached=cached))
                times.append(time.perf_counter() - began)
            assert torch.equal(*texts)
            ratios.append(times[1] / times[0])
            print(f"4 x {length}: {times[0]:.1f} s cached, {times[1]:.1f} s not", flush=True)
        print(f"4 x {length}: {statistics.median(ratios):.1f} times as fast", flush=True)


if __name__ == "__main__":
    main()

"""Time sampling with and without the key-value cache, with GPT-2 (124M) in float32.

python runs/sampling-cpu/measure.py
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import fineweb
import train_gpt2
from support import machine

PROMPT = [15496, 11, 314]  # "Hello, I"


@torch.no_grad()
def generate_without_cache(model, prompt: list[int], max_new_tokens: int) -> torch.Tensor:
    """Sample as train_gpt2.generate does by default, but read the whole text for each token."""
    generator = torch.Generator().manual_seed(42)
    tokens = torch.tensor(prompt).repeat(4, 1)  # (T) -> (B, T)
    for _ in range(max_new_tokens):
        logits = model(tokens[:, -model.config.seq_len :])[:, -1]  # (B, T) -> (B, V)
        logits[:, fineweb.VOCAB_SIZE :] = -torch.inf  # the padding
        logits, ids = logits.topk(50)  # (B, V) -> (B, K)
        choice = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)
        tokens = torch.cat([tokens, ids.gather(1, choice)], dim=1)
    return tokens


def main() -> None:
    machine.keep_freed_memory()
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig())
    for length, rounds in ((32, 3), (256, 1)):
        ratios = []
        for _ in range(rounds):
            start = time.perf_counter()
            cached = train_gpt2.generate(model, PROMPT, length)
            middle = time.perf_counter()
            plain = generate_without_cache(model, PROMPT, length)
            end = time.perf_counter()
            assert torch.equal(cached, plain)
            seconds, plain_seconds = middle - start, end - middle
            ratios.append(plain_seconds / seconds)
            print(f"4 x {length}: {seconds:.1f} s cached, {plain_seconds:.1f} s not", flush=True)
        print(f"4 x {length}: {statistics.median(ratios):.1f} times as fast", flush=True)


if __name__ == "__main__":
    main()

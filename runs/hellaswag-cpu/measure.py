"""Examples a second at the 124M network's size: hellaswag.py, and the lecture's way beside it.

    python runs/hellaswag-cpu/measure.py [--pairs 3] [--dtype bfloat16]

New weights and random tokens: contexts of 69 to 71, endings of 15 to 31; 77 records of each length
of context, as dense as HellaSwag's 10,042 would be over 130 lengths. The two ways take turns, and
the medians of the pairs are printed. The lecture's way: the four rows of one example padded
together, one example at a time, all logits, autocast entered for each as its training script does.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import hellaswag
import train_gpt2


@torch.no_grad()
def lectures_way(model, examples, runtime):
    choices = []
    for example in examples:
        rows = [example.context + ending for ending in example.endings]
        tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, len(example.context) : len(row)] = 1
        with runtime.autocast():
            logits = model(tokens)  # (4, T) -> (4, T, V)
        logits = logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses = losses.view(4, -1) * mask[:, 1:]
        means = losses.sum(dim=1) / mask[:, 1:].sum(dim=1)
        choices.append((losses.sum(dim=1).argmin().item(), means.argmin().item()))
    return choices


def ours(model, examples, runtime):
    return hellaswag.evaluate(model, examples, runtime)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    train_gpt2.keep_freed_memory()  # as both commands do; it helps both ways
    torch.manual_seed(0)
    draw = random.Random(0)
    runtime = train_gpt2.Runtime(train_gpt2.TrainConfig(device="cpu", dtype=args.dtype))
    model = train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=50257))
    examples = []
    for i in range(3 * 77):
        context = [draw.randrange(50257) for _ in range(69 + i % 3)]
        endings = [[draw.randrange(50257) for _ in range(draw.randint(15, 31))] for _ in range(4)]
        examples.append(hellaswag.Example(context, endings, list(map(len, endings)), 0))
    lectures_way(model, examples[:2], runtime)
    pairs = []
    for _ in range(args.pairs):
        few = draw.sample(examples, 12)
        began = time.perf_counter()
        lectures_way(model, few, runtime)
        middle = time.perf_counter()
        ours(model, examples, runtime)
        pairs.append((len(few) / (middle - began), len(examples) / (time.perf_counter() - middle)))
        print(f"lecture {pairs[-1][0]:.2f}, hellaswag.py {pairs[-1][1]:.2f} examples/s", flush=True)
    ratios = [b / a for a, b in pairs]
    print(f"medians: {statistics.median(a for a, _ in pairs):.2f}, ", end="")
    print(f"{statistics.median(b for _, b in pairs):.2f}, {statistics.median(ratios):.2f}x")


if __name__ == "__main__":
    main()

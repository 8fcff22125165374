"""Measure examples per second at the 124M model's size: hellaswag.py next to the lecture's way.

    python runs/hellaswag-cpu/measure.py [--pairs 3] [--dtype bfloat16]

The weights are new. Two sets of examples: the 42 records of tests/hellaswag_records.jsonl, and 231
of random tokens, whose contexts have 69 to 71 tokens and endings 15 to 31. That is 77 for each
length of the context, as HellaSwag's 10,042 would have with 130 lengths.

The two ways take turns, and each set's last line has the medians of the pairs. The lecture's way
pads the four rows of an example together, reads one example at a time, computes all logits, and
enters autocast for each example, as its training script does. It scores 42 examples of either set.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
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


def random_examples() -> list[hellaswag.Example]:
    draw = random.Random(0)
    examples = []
    for i in range(3 * 77):
        context = [draw.randrange(50257) for _ in range(69 + i % 3)]
        endings = [[draw.randrange(50257) for _ in range(draw.randint(15, 31))] for _ in range(4)]
        lengths = [len(ending) for ending in endings]
        examples.append(hellaswag.Example(context, endings, lengths, label=0))
    return examples


def compare(name: str, model, examples, pairs: int, runtime) -> None:
    """Time both ways in turns, and print examples per second."""
    theirs = []
    ours = []
    for pair in range(pairs):
        few = random.Random(pair).sample(examples, 42)
        start = time.perf_counter()
        lectures_way(model, few, runtime)
        middle = time.perf_counter()
        train_gpt2.score_hellaswag(model, examples, runtime)
        end = time.perf_counter()
        theirs.append(len(few) / (middle - start))
        ours.append(len(examples) / (end - middle))
        print(f"{name}: lecture {theirs[-1]:.2f}, hellaswag.py {ours[-1]:.2f}", flush=True)
    ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
    medians = (statistics.median(theirs), statistics.median(ours), statistics.median(ratios))
    print("{}: medians {:.2f}, {:.2f} examples/s, {:.2f}x".format(name, *medians), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--pairs", type=int, default=3, help="measurements of each way (default: 3)")
    add("--dtype", default="float32", help="float32 (default) or bfloat16")
    args = parser.parse_args()
    torch.manual_seed(0)
    runtime = train_gpt2.Runtime("cpu", args.dtype)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=50257))
    records = hellaswag.read_examples(ROOT / "tests/hellaswag_records.jsonl")
    lectures_way(model, records[:2], runtime)  # a warmup
    compare("42 records", model, records, args.pairs, runtime)
    compare("231 random", model, random_examples(), args.pairs, runtime)


if __name__ == "__main__":
    main()

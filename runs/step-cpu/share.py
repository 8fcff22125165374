"""Measure what part of a GPT-2 (124M) run is not training, how long a run takes to start, and the
memory of its process.

    python runs/step-cpu/share.py

The parts are timed eagerly, in bfloat16 if the processor has it, on sequences of 256 tokens. The
shares of a run are then calculated for 250 steps of 524,288 tokens, followed by one evaluation:
10,485,760 validation tokens, 10,042 HellaSwag examples and four samples of 32 tokens.
"""

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import fineweb
import hellaswag
import train_gpt2
from support import shards

BATCH_TOKENS = 4096  # of a timed step, and of a timed validation
MICRO_BATCH = 4
SEQ_LEN = 256


def median_seconds(function, times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def random_examples(count: int) -> list[hellaswag.Example]:
    """Make HellaSwag examples of random tokens, about as long as the real ones."""
    draw = random.Random(0)
    examples = []
    for _ in range(count):
        context = [draw.randrange(50257) for _ in range(draw.randint(70, 71))]
        endings = [[draw.randrange(50257) for _ in range(draw.randint(15, 31))] for _ in range(4)]
        examples.append(hellaswag.Example(context, endings, [len(e) for e in endings], 0))
    return examples


def measure_parts(folder: Path) -> None:
    """Time training, validation, HellaSwag and sampling, and print their shares of a run."""
    config = train_gpt2.TrainConfig(
        data=str(folder),
        seq_len=SEQ_LEN,
        batch_tokens=BATCH_TOKENS,
        val_tokens=BATCH_TOKENS,
    )
    runtime = train_gpt2.Runtime("cpu", "auto")
    runtime.micro_batch = MICRO_BATCH
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(seq_len=SEQ_LEN))
    state = train_gpt2.TrainState(model, config, runtime)
    train_shards, val_shards = shards.open_data(config.data, SEQ_LEN)
    loader = train_gpt2.DataLoaderLite(train_shards, SEQ_LEN, config.seed)
    val_loader = train_gpt2.DataLoaderLite(val_shards, SEQ_LEN, None)
    reader = ThreadPoolExecutor(1)
    steps = itertools.count()
    waits = []

    def read():
        return loader.batch(next(steps), config, runtime)

    def train():
        nonlocal ahead
        start = time.perf_counter()
        batch = runtime.to_device(ahead.result())
        ahead = reader.submit(read)
        waits.append(time.perf_counter() - start)
        train_gpt2.train_step(state, batch, 1e-4, config, runtime)

    def validate():
        train_gpt2.validate(model, val_loader, config, runtime)

    def score():
        train_gpt2.score_hellaswag(model, examples, runtime)

    def sample():
        train_gpt2.sample(model, config, 0, 32, runtime)

    examples = random_examples(64)
    ahead = reader.submit(read)
    train()  # a warmup: it makes AdamW's state
    train_token = median_seconds(train) / BATCH_TOKENS
    val_token = median_seconds(validate) / BATCH_TOKENS
    example = median_seconds(score, 2) / 64
    samples = median_seconds(sample)
    wait = statistics.median(waits[1:])
    print(f"training {1 / train_token:.0f} tokens/s, validation {1 / val_token:.0f} tokens/s")
    print(f"HellaSwag {1 / example:.2f} examples/s, ", end="")
    print(f"sampling {samples:.2f} s, data {1000 * wait:.2f} ms")

    others = {
        "validation": 10_485_760 * val_token,
        "HellaSwag": 10_042 * example,
        "sampling": samples,
        "waiting for data": 250 * wait,
    }
    total = 250 * 524_288 * train_token + sum(others.values())
    for name, seconds in others.items():
        print(f"{name}: {seconds / total:.2%} of the run")
    print(f"together: {sum(others.values()) / total:.2%} of the run")


def measure_start(folder: Path, name: str, *flags: str) -> None:
    """Run two steps, and print the seconds before the first one and the process's peak memory."""
    out = folder.parent / f"log_{name.replace(' ', '_')}"
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *flags, "--out_dir", str(out)]
    command += ["--no-compile", "--max_steps", "2", "--val_every", "0", "--sample_every", "0"]
    command += ["--hellaswag_every", "0"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    path = out / "metrics.jsonl"
    lines = []
    while len(lines) < 2:  # the header, and the first step
        time.sleep(0.02)
        assert process.poll() in (None, 0)
        lines = path.read_text().splitlines() if path.exists() else []
    seconds = time.perf_counter() - start - json.loads(lines[1])["step_ms"] / 1000
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    print(f"{name}: {seconds:.1f} s to the first step, {usage.ru_maxrss / 1e6:.2f} GB")


def make_shards(folder: Path, count: int, tokens: int) -> Path:
    """Write shards of random tokens; the first is for validation."""
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 50257, tokens).astype(np.uint16)
    for i in range(count):
        split = "train" if i else "val"
        fineweb.write_shard(folder / f"edufineweb_{split}_{i:06d}.npy", ids)
    return folder


def main() -> None:
    if len(sys.argv) > 1:
        return measure_parts(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as temporary:
        few = make_shards(Path(temporary) / "few", 2, 1_000_000)
        many = make_shards(Path(temporary) / "many", 21, 50_000_000)
        subprocess.run([sys.executable, __file__, str(few)], check=True)
        size = ["--preset", "gpt2", "--seq_len", "256", "--batch_tokens", "1024"]
        measure_start(few, "demo", "--preset", "demo")
        measure_start(few, "124M, 1 shard of 1M tokens", *size, "--data", str(few))
        measure_start(few, "124M, 20 shards of 50M tokens", *size, "--data", str(many))


if __name__ == "__main__":
    main()

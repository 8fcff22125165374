"""What part of a gpt2 run is not training, how long it takes to begin, and what a process holds.

    python runs/step-cpu/share.py

The parts are timed at the 124M network's size, bfloat16 where the processor has it, eagerly, on
sequences of 256 tokens; the run is then arithmetic: 250 steps of 524,288 tokens, and after them
10,485,760 validation tokens, 10,042 HellaSwag records, four samples of 32 tokens.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import fineweb
import hellaswag
import train_gpt2


def seconds(function, times=3) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def parts(folder: Path) -> None:
    train_gpt2.keep_freed_memory()
    settings = dict(seq_len=256, batch_tokens=4096, micro_batch=4, val_tokens=4096, device="cpu")
    config = train_gpt2.TrainConfig(data=str(folder), max_steps=100, **settings)
    runtime = train_gpt2.Runtime(config)
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(seq_len=256))
    optimizers = train_gpt2.make_optimizers(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    shards, val_shards = train_gpt2.open_data(config.data, runtime)
    loader = train_gpt2.DataLoaderLite(shards, config.seq_len, 1)
    val = train_gpt2.DataLoaderLite(val_shards, config.seq_len, None)
    starts, step, waits = (
        train_gpt2.step_starts(config, loader.epoch_sequences),
        iter(range(99)),
        [],
    )

    def train():
        began = time.perf_counter()
        batch = loader.batch(starts, next(step), 4, runtime)
        waits.append(time.perf_counter() - began)
        train_gpt2.train_step(model, model, optimizers, scaler, batch, 1e-4, config, runtime)

    draw, examples = random.Random(0), []
    for _ in range(64):
        context = [draw.randrange(50257) for _ in range(draw.randint(70, 71))]
        endings = [[draw.randrange(50257) for _ in range(draw.randint(15, 31))] for _ in range(4)]
        examples.append(hellaswag.Example(context, endings, list(map(len, endings)), 0))
    train()
    per_token = seconds(train) / 4096
    val_token = seconds(lambda: train_gpt2.validation_loss(model, val, config, 4, runtime)) / 4096
    record = seconds(lambda: hellaswag.evaluate(model, examples, runtime), 2) / len(examples)
    prompt = fineweb.gpt2_tokenizer().encode_ordinary(config.prompt)
    with runtime.autocast():
        sample = seconds(lambda: train_gpt2.generate(model, prompt, 32))
    wait, tokens = statistics.median(waits[1:]), 250 * 524_288
    training = tokens * per_token
    extra = {
        "validation": 10_485_760 * val_token,
        "HellaSwag": 10_042 * record,
        "sampling": sample,
        "waiting for data": 250 * wait,
    }
    print(f"training {1 / per_token:.0f} tokens/s, validation {1 / val_token:.0f} tokens/s")
    print(
        f"HellaSwag {1 / record:.2f} records/s, sampling {sample:.2f} s, data {1000 * wait:.2f} ms"
    )
    total = training + sum(extra.values())
    for name, spent in extra.items():
        print(f"{name}: {spent / total:.2%} of the run")
    print(f"together: {sum(extra.values()) / total:.2%} of the run")


def begin(folder: Path, name: str, *flags) -> None:
    """Seconds from the command to its first step, and the most memory it had."""
    out = folder.parent / f"log_{name.replace(' ', '_')}"
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *flags, "--out_dir", str(out)]
    command += ["--no-compile", "--max_steps", "2", "--val_every", "0", "--sample_every", "0"]
    command += ["--hellaswag_every", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    first = None
    while first is None:
        time.sleep(0.02)
        assert process.poll() in (None, 0)
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        first = json.loads(lines[1]) if len(lines) > 1 else None
    taken = time.perf_counter() - began - first["step_ms"] / 1000
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    print(f"{name}: {taken:.1f} s to the first step, {usage.ru_maxrss / 1e6:.2f} GB")


def make_shards(folder: Path, shards: int, tokens: int) -> Path:
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 50257, tokens).astype(np.uint16)
    for i in range(shards):
        split = "train" if i else "val"
        fineweb.write_shard(folder / f"edufineweb_{split}_{i:06d}.npy", ids)
    return folder


def main() -> None:
    if len(sys.argv) > 1:
        return parts(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as temporary:
        few = make_shards(Path(temporary) / "few", 2, 1_000_000)
        many = make_shards(Path(temporary) / "many", 21, 50_000_000)
        subprocess.run([sys.executable, __file__, str(few)], check=True)
        size = ["--preset", "gpt2", "--seq_len", "256", "--batch_tokens", "1024"]
        begin(few, "demo", "--preset", "demo")
        begin(few, "124M, 1 shard of 1M tokens", *size, "--data", str(few))
        begin(few, "124M, 20 shards of 50M tokens", *size, "--data", str(many))


if __name__ == "__main__":
    main()

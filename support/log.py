"""What a run records and prints.

metrics.jsonl in --out_dir has one JSON object per line: a `header`, which says how to repeat the
run, then lines of kind `train`, `val`, `hellaswag` and `sample` with their steps, and a `resume`
wherever the run was continued.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from support.command import explain, say
from support.files import whole_file
from support.machine import device_name


def describe_run(config, steps, model, compiled, micro_batch, loader, runtime) -> dict:
    """Print a summary, and return all that is needed to repeat the run: the header of its files."""
    count = sum(p.numel() for p in model.parameters())
    warmup = math.ceil(config.warmup_tokens / config.batch_tokens)
    dtype = str(runtime.dtype).removeprefix("torch.")
    say(
        f"{count:,} parameters, {'compiled' if compiled else 'eager'}, on"
        f" {runtime.world} x {runtime.device_type} in {dtype}\n"
        f"{steps:,} steps of {config.batch_tokens:,} tokens ({warmup:,} of warmup),"
        f" {micro_batch} sequences of {config.seq_len} at a time"
    )
    here = Path(__file__).parent
    options = dict(cwd=here, shell=True, capture_output=True, text=True)
    git = subprocess.run("git describe --always --dirty", **options, check=False)
    return dict(
        command=shlex.join(sys.argv),
        settings=dataclasses.asdict(config),
        network=dataclasses.asdict(model.config),
        compiled=compiled,
        micro_batch=micro_batch,
        epoch_sequences=loader.epoch_sequences,  # a resumed run must find the same data
        versions=dict(python=platform.python_version(), torch=str(torch.__version__)),
        device=dict(
            kind=runtime.device_type, name=device_name(runtime.device), processes=runtime.world
        ),
        dtype=dtype,
        revision=git.stdout.strip() or None,  # None without git or a repository
        source=hashlib.sha256((here.parent / "train_gpt2.py").read_bytes()).hexdigest(),
    )


def text_of(kind: str, values: dict) -> str:
    """What is printed of a record. Values that are not named here are recorded only."""
    v = values
    if kind == "val":
        return f"validation loss {v['loss']:.4f} | {v['bits_per_byte']:.4f} bits per byte"
    if kind == "hellaswag":
        return f"hellaswag acc {v['acc']:.4f} | acc_norm {v['acc_norm']:.4f}"
    if kind == "sample":
        return "samples\n" + "\n---\n".join(v["texts"]) + "\n---"
    line = f"loss {v['loss']:.4f} | lr {v['lr']:.2e} | norm {v['grad_norm']:.2f}"
    line += f" | {v['step_ms']:.0f} ms | {v['tokens_per_second']:,.0f} tokens/s"
    return line + (f" | mfu {v['mfu']:.1%}" if v["mfu"] else "")


def kind_and_step(line: bytes) -> tuple[str, float]:
    """What a line of metrics.jsonl records; step infinity if a power cut has damaged it."""
    try:
        record = json.loads(line)
        return record["kind"], record["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return "", math.inf


class Log:
    """metrics.jsonl, and the lines on the console. On ranks other than 0 it does nothing.

    A run that resumes at step `first` drops what was recorded after that, so nothing stands twice.
    What was evaluated at `first` stays.
    """

    def __init__(self, out_dir: str, first: int, steps: int, header: dict, rank: int):
        self.file = None
        self.steps = steps
        self.printed = -math.inf  # when a training step was last printed
        self.kept = set()  # kind and step of the records from before a resume
        if rank > 0:
            return
        path = Path(out_dir) / "metrics.jsonl"
        with explain(f"{path} cannot be written"):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            if lines and not first:  # its checkpoints are gone, or there was none yet
                os.replace(path, path.with_name("metrics.jsonl.old"))
                say(f"the records of a run without a checkpoint are now in {path}.old")
                lines = []
            with whole_file(path) as file:
                for line in lines:
                    kind, step = kind_and_step(line)
                    if step < first or (step == first and kind != "train"):
                        file.write(line)
                        self.kept.add((kind, step))
            self.file = open(path, "ab", buffering=2**20)
        self.record("resume" if first else "header", dict(step=first, **header))

    def __call__(self, kind: str, step: int, values: dict | None) -> None:
        """Record the values, and print them; of training steps, about one a second.

        None, the values of an evaluation that was left early, is not recorded.
        """
        if self.file is None or values is None:
            return
        if (kind, step) not in self.kept:
            self.record(kind, dict(step=step, **values))
        left = ""
        if kind == "train":
            now = time.monotonic()
            if now - self.printed < 1 and step < self.steps - 1:
                return
            self.printed = now
            if step > 0:  # the first step may include compiling
                seconds = values["step_ms"] / 1000 * (self.steps - step - 1)
                left = f" | {timedelta(seconds=round(seconds))} left"  # without evaluations
        say(f"step {step:5d}/{self.steps} | {text_of(kind, values)}{left}")

    def record(self, kind: str, values: dict) -> None:
        def finite(value):  # JSON has neither infinity nor NaN, and no numbers of torch and numpy
            value = value.item() if hasattr(value, "item") else value
            return None if isinstance(value, float) and not math.isfinite(value) else value

        values = {name: finite(value) for name, value in values.items()}
        try:
            self.file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            self.file.flush()
        except OSError:  # the disk is full: the buffer keeps the line for the next flush
            pass

    def close(self) -> None:
        """Write what a full disk may have left in the buffer."""
        if self.file:
            try:
                self.file.close()
            except OSError as error:
                say(f"the last records are lost: {error}")

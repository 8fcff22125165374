"""What a run records and prints.

metrics.jsonl in --out_dir has one JSON object per line: a `header`, which says how to repeat the
run, then lines of kind `train`, `val`, `hellaswag` and `sample` with their steps, a `resume`
wherever the run was continued, and an `end` where it stopped. Each has its `time`, in seconds since
1970. support/report.py says what the run came to.
"""

import dataclasses
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import deque
from itertools import pairwise
from pathlib import Path

import torch

from support import checkpoint, report
from support.command import explain, say
from support.files import json_lines, whole_file
from support.machine import device_name, peak_memory


def describe_run(config, steps, model, compiled, loader, runtime) -> dict:
    """Print a summary, and return all that is needed to repeat the run: the header of its files."""
    count = sum(p.numel() for p in model.parameters())
    warmup = math.ceil(config.warmup_tokens / config.batch_tokens)
    tokens = loader.epoch_sequences * config.seq_len
    passes = steps * config.batch_tokens / tokens
    dtype = str(runtime.dtype).removeprefix("torch.")
    shortened = ""
    if config.warmup_tokens >= steps * config.batch_tokens:  # as in learning_rate
        shortened = ", a third of the run (--warmup_tokens is more than all of it)"
        warmup = math.ceil(steps / 3)
    say(
        f"{count:,} parameters, {'compiled (at the first step)' if compiled else 'eager'}, on"
        f" {runtime.world} x {runtime.device_type} in {dtype}\n"
        f"{steps:,} steps of {config.batch_tokens:,} tokens, --micro_batch {runtime.micro_batch}:"
        f" sequences of {config.seq_len} at a time\n"
        f"{passes:.2g} passes over {tokens:,} tokens\n"
        f"warmup: {warmup:,} steps{shortened}"
    )
    root = Path(__file__).parent.parent
    revision = None
    if (root / ".git").exists():  # or a Mac that has no git would ask to install it
        quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, shell=True, text=True)
        git = subprocess.run("git describe --always --dirty", cwd=root, **quiet, check=False)
        revision = git.stdout.strip() or None  # None where git is not installed
    return dict(
        command=shlex.join(sys.argv),
        settings=dataclasses.asdict(config),
        network=dataclasses.asdict(model.config),
        compiled=compiled,
        micro_batch=runtime.micro_batch,
        epoch_sequences=loader.epoch_sequences,  # a resumed run must find the same data
        versions=dict(python=platform.python_version(), torch=str(torch.__version__)),
        device=dict(
            kind=runtime.device_type, name=device_name(runtime.device), processes=runtime.world
        ),
        dtype=dtype,
        revision=revision,
        source=checkpoint.source(),
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
    if kind != "train":  # one that you added
        return kind + "".join(f" | {name} {value}" for name, value in v.items())
    speed = v["tokens_per_second"]
    speed = f"{speed / 1000:.0f}k" if speed >= 1e5 else f"{speed:,.0f}"
    line = f"loss {v['loss']:.4f} | norm {v['grad_norm']:.2f} | {speed} tok/s"
    return line + (f" | mfu {v['mfu']:.0%}" if v["mfu"] else "")


class Log:
    """metrics.jsonl, and the lines on the console. On ranks other than 0 it does nothing.

    A run that resumes at step `first` drops what was recorded after that, so nothing is logged
    twice. What was evaluated at `first` stays.
    """

    def __init__(self, out_dir: str, first: int, steps: int, header: dict, rank: int):
        self.file = None
        self.folder = Path(out_dir)
        self.steps = steps
        self.first = first
        self.header = header
        self.printed = -math.inf  # when a training step was last printed
        self.kept = set()  # kind and step of the records from before a resume
        self.val = []  # the validation losses
        self.took = {}  # kind -> the seconds it took: the last 100 training steps, or the last one
        self.latest = time.monotonic()  # when the latest record was made
        self.end = None  # the end record of a run that was over already
        if rank > 0:
            return
        path = self.folder / "metrics.jsonl"
        with explain(f"{path} cannot be written"):
            lines = json_lines(path) if path.exists() else []
            if path.exists() and path.stat().st_size and not first:  # no checkpoint has its records
                os.replace(path, path.with_name("metrics.jsonl.old"))
                say(f"the records of a run without a checkpoint are now in {path}.old")
                lines = []
            with whole_file(path) as file:
                for line, record in lines:
                    kind, step = record["kind"], record.get("step", math.inf)
                    if step < first or (step == first and kind != "train"):
                        file.write(line)
                        self.kept.add((kind, step))
                        self.val += [record.get("loss")] if kind == "val" else []
                        self.end = record if record.get("done") and step == steps else None
            self.file = open(path, "ab", buffering=2**20)
        self.record("resume" if first else "header", dict(step=first, **header))

    def __call__(self, kind: str, step: int, values: dict | None) -> None:
        """Record the values, and print them; of training steps, about one a second.

        None, the values of an evaluation that was left early, is not recorded.
        """
        if self.file is None or values is None:
            return
        now = time.monotonic()
        if kind != "train" or step > self.first:  # the first step may include compiling
            took = self.took.setdefault(kind, deque(maxlen=100 if kind == "train" else 1))
            took.append(now - self.latest)
        self.latest = now
        text = text_of(kind, values)
        if kind == "train":
            text += self.time_left(step + 1)
        if kind != "train" or now - self.printed >= 1 or step == self.steps - 1:
            say(f"step {step:5d} {step / self.steps:3.0%} | {text}")
            self.printed = now
        if (kind, step) not in self.kept:
            self.record(kind, dict(step=step, **values))
            if kind == "val":
                self.warn_if_rising(values["loss"])

    def time_left(self, done: int) -> str:
        """The steps to come, and the evaluations, at the pace of the latest ones."""
        if "train" not in self.took:
            return ""
        seconds = 0.0
        for kind, took in self.took.items():
            count = self.steps - done
            if kind != "train":  # those due from here on, and at the end
                every = self.header["settings"].get(f"{kind}_every") or self.steps
                count = self.steps // every - (done - 1) // every + (self.steps % every > 0)
            seconds += count * sum(took) / len(took)
        minutes, seconds = divmod(round(seconds), 60)
        return f" | {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"

    def warn_if_rising(self, loss: float) -> None:
        """Say that validation has risen three times in a row: the model memorizes a small text."""
        self.val.append(loss if math.isfinite(loss) else None)
        last = self.val[-4:]
        if len(last) == 4 and None not in last and all(a < b for a, b in pairwise(last)):
            best = checkpoint.best(self.folder)
            where = f"; {self.folder}/best is {best.name}" if best else ""
            say(f"validation loss has risen three times in a row: overfitting{where}")

    def record(self, kind: str, values: dict) -> None:
        def finite(value):  # JSON has neither infinity nor NaN, and no numbers of torch and numpy
            value = value.item() if hasattr(value, "item") else value
            return None if isinstance(value, float) and not math.isfinite(value) else value

        if self.end:  # there is nothing to add
            return
        values = {name: finite(value) for name, value in values.items()}
        values["time"] = round(time.time(), 3)
        try:
            self.file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            self.file.flush()
        except OSError:  # the disk is full: the buffer keeps the line for the next flush
            pass

    def close(self, step: int, stopped: str) -> None:
        """Record and print what the run came to, and write report.md. `stopped` says why it ended
        early, if it did."""
        if self.file is None:
            return
        words = stopped or f"done: {step:,} steps"
        try:
            self.file.flush()
            records = [record for _, record in json_lines(self.folder / "metrics.jsonl")]
            memory = peak_memory(self.header["device"]["kind"])
            sums = report.summarize(records, self.header["settings"]["batch_tokens"], step)
            end = self.end or dict(step=step, done=not stopped, **sums, peak_memory=memory)
            self.record("end", end)
            self.file.close()
            say(report.write(self.folder, self.header, records, end, words))
        except OSError as error:
            say(f"{words}\nthe last records are lost: {error}")

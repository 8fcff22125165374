"""What a run leaves behind in --out_dir, and how it continues after an interruption.

    metrics.jsonl            one JSON object per line: a header, which says how to repeat the run,
                             then records of kind train, val, hellaswag and sample
    checkpoint_0000250.pt    everything after 250 steps, as plain data: weights, optimizer, settings

`--resume` continues from the newest whole checkpoint. You can give it from the first start:

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc_per_node=8 \\
        --max-restarts=3 train_gpt2.py --resume

The variable gives the ranks a new key-value store after a restart. Otherwise torchrun keeps the old
one, with the addresses of dead ranks still in it.

    what happens               what you find in the morning
    a rank is killed           torchrun restarted all of them, from the last checkpoint
    a rank hangs               the others gave up after 10 minutes, then as above
    SIGTERM, SIGUSR1, Ctrl-C   the step was finished and a checkpoint written; run it again to go on
    power cut, kill -9         run it again; it skips a damaged checkpoint, and says so
    full disk                  training went on; each checkpoint that failed is named
    loss or norm not finite    it stopped before that update; the last good checkpoint is named

A resumed run repeats the losses, gradient norms and samples of an uninterrupted one: bit for bit on
a CPU with one rank, or with the same two; to 1e-4 with other numbers, where gradients are added in
another order. On a GPU that order is never fixed, so any two runs differ in their last bits.

Nothing that is loaded can run code: checkpoints are plain data, read with weights_only=True.
torchrun passes SIGUSR1 on only with --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1.
After a signal to torchrun itself the ranks have 30 seconds (--shutdown-timeout).
"""

import dataclasses
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch

import fineweb
import machine
from command import UserError, first_line

# --------------------------------------------------------------------------------------------------
# 1. The folder and its records (ours)
# --------------------------------------------------------------------------------------------------


def open_folder(folder: Path, resume: bool) -> None:
    """Make --out_dir. Raises UserError if it cannot be written, or a run in it would be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out_dir {folder} cannot be written: {error.strerror}") from None
    if not resume and ((folder / "metrics.jsonl").exists() or files(folder)):
        raise UserError(f"--out_dir {folder} already holds a run; add --resume, or name another")


def describe_run(config, model, compiled: bool, micro_batch: int, loader, runtime) -> dict:
    """Everything needed to repeat this run: the header of metrics.jsonl and of checkpoints."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(git, check=False, capture_output=True, text=True)
        revision = answer.stdout.strip() or None
    except OSError:  # git is not installed
        revision = None
    name = machine.device_name(runtime.device)
    return dict(
        command=shlex.join(sys.argv),
        settings=dataclasses.asdict(config),
        network=dataclasses.asdict(model.config),
        compiled=compiled,
        micro_batch=micro_batch,
        epoch_sequences=loader.epoch_sequences,  # a resumed run must find the same data
        versions=dict(python=platform.python_version(), torch=str(torch.__version__)),
        device=dict(kind=runtime.device_type, name=name, processes=runtime.world),
        dtype=str(runtime.dtype).removeprefix("torch."),
        revision=revision,
    )


def step_recorded(line: bytes) -> float:
    """The step of a line of metrics.jsonl: -1 for the header, infinity for a damaged line."""
    try:
        return json.loads(line).get("step", -1) if line.endswith(b"\n") else math.inf
    except ValueError:  # a power cut can leave anything
        return math.inf


class Records:
    """metrics.jsonl. Rank 0 writes it; on the other ranks nothing happens.

    When a run resumes at step `first`, the records from there on are dropped, so each step occurs
    once. Settings that the command line has changed are recorded and printed.
    """

    def __init__(self, first: int, steps: int, header: dict, model, runtime):
        self.steps = steps
        self.runtime = runtime
        settings = header["settings"]
        self.tokens = settings["batch_tokens"]
        self.flops = self.tokens * model.flops_per_token(settings["seq_len"])
        self.peak = machine.peak_flops(runtime.device)
        self.first = first
        self.began = time.perf_counter()
        self.shown = 0.0
        count = sum(p.numel() for p in model.parameters())
        warmup = math.ceil(settings["warmup_tokens"] / self.tokens)
        runtime.print(
            f"{count:,} parameters, {'compiled' if header['compiled'] else 'eager'}, on"
            f" {runtime.world} x {runtime.device_type} in {header['dtype']}\n"
            f"{steps:,} steps of {self.tokens:,} tokens ({warmup:,} of warmup),"
            f" {header['micro_batch']} sequences of {settings['seq_len']} at a time"
        )
        self.file = None
        if runtime.rank > 0:
            return
        path = Path(settings["out_dir"]) / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() and first else []
        kept = [line for line in lines if step_recorded(line) < first]
        with fineweb.whole_file(path) as file:
            file.write(b"".join(kept))
        self.file = open(path, "ab", buffering=2**20)
        if not kept:
            self.write("header", **header)
            return
        before = json.loads(kept[0]).get("settings", settings)
        changed = {key: value for key, value in settings.items() if before.get(key) != value}
        changed = {key: changed[key] for key in changed if key not in ("out_dir", "resume")}
        if changed:
            runtime.print(f"changed on --resume: {changed}")
            self.write("resume", step=first, **changed)

    def train(self, step: int, seconds: float, **values) -> None:
        """Record a training step; print about one per second, with an ETA."""
        now = time.perf_counter()
        speed = self.tokens / seconds
        mfu = self.flops / seconds / self.runtime.world / self.peak if self.peak else None
        timing = dict(step_ms=1000 * seconds, tokens_per_second=speed, mfu=mfu)
        self.write("train", step=step, **values, **timing)
        if now - self.shown > 1 or step == self.steps - 1:
            self.shown = now
            left = (self.steps - step - 1) * (now - self.began) / (step + 1 - self.first)
            line = f"step {step:5d}/{self.steps} | loss {values['loss']:.4f}"
            line += f" | lr {values['lr']:.2e} | norm {values['grad_norm']:.2f}"
            line += f" | {1000 * seconds:.0f} ms | {speed:,.0f} tokens/s"
            line += f" | mfu {mfu:.1%}" if mfu else ""
            self.runtime.print(f"{line} | eta {timedelta(seconds=round(left))}")

    def write(self, kind: str, **values) -> None:
        if self.file is None:
            return
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[key] = None  # JSON has no infinity and no NaN
        try:
            self.file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            self.file.flush()
        except OSError:  # the disk is full: the buffer keeps the line, and the next flush writes it
            pass


# --------------------------------------------------------------------------------------------------
# 2. Checkpoints (ours)
# --------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. Copies with other names do not count."""
    numbered = [path for path in folder.glob("checkpoint_*.pt") if path.stem[11:].isdigit()]
    return sorted(numbered, key=step_of)


def step_of(path: Path) -> int:
    return int(path.stem[11:])  # checkpoint_0000250


def find(source: str) -> Path | None:
    """The checkpoint that `source` names: a file, or the newest one in a folder."""
    path = Path(source)
    if path.is_dir():
        return files(path)[-1] if files(path) else None
    return path if path.is_file() else None


def read(path: Path) -> dict:
    """Read what a Saver wrote. Raises UserError for anything else."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not check the checksums
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"step", "network", "settings", "model"} - content.keys()
        if missing:
            raise ValueError(f"it has no {min(missing)}")
        return content
    except Exception as error:  # a damaged file can fail in many ways
        what = f"{path} is not a whole checkpoint"
        raise UserError(f"{what} ({type(error).__name__}: {first_line(error)})") from None


def newest(folder: Path) -> dict | None:
    """Read the newest whole checkpoint in a folder; None if the folder has no checkpoint.

    Raises UserError if there are checkpoints and none is whole.
    """
    say = print if os.getenv("RANK", "0") == "0" else lambda *_, **__: None
    paths = files(folder)
    for path in reversed(paths):
        try:
            content = read(path)
            content["settings"]["out_dir"] = str(folder)  # it may have been moved
            say(f"resuming from {path}", flush=True)
            return content
        except UserError as error:
            say(f"{error}; trying the one before", flush=True)
    if paths:
        raise UserError(f"no checkpoint in {folder} is whole; start again in another --out_dir")
    say(f"no checkpoint in {folder} yet: starting from the beginning", flush=True)
    return None


def copy_to_cpu(value):
    """Copy all tensors in nested dicts and lists to the CPU."""
    if isinstance(value, dict):
        return {key: copy_to_cpu(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [copy_to_cpu(part) for part in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


class Saver:
    """Writes checkpoints: everything that the run needs to continue as if nothing had happened.

    Rank 0 copies the state, and a thread writes it: training waits only for the copy, or for the
    previous write if it is not finished. A failed write is reported and does not stop the run.
    `parts` are objects with state_dict() and load_state_dict(), by name; one of them is the model.
    There are no random states to save: without dropout, training draws no random numbers. (With
    it, seed torch from --seed, the step and the rank before each step.) Data order and samples have
    generators of their own.
    """

    def __init__(self, parts: dict, header: dict, runtime):
        self.parts = parts
        self.header = header
        self.runtime = runtime
        self.folder = Path(header["settings"]["out_dir"])
        self.saved = 0  # the step of the newest checkpoint
        self.thread = ThreadPoolExecutor(1)
        self.writing = None
        open_folder(self.folder, header["settings"]["resume"])
        if runtime.rank == 0:
            for partial in self.folder.glob("checkpoint_*.tmp"):  # a killed run left it
                partial.unlink()

    def restore(self, saved: dict | None, steps: int) -> int:
        """Put every part into the state of a checkpoint -> its step; 0 without a checkpoint.

        Raises UserError if the checkpoint does not fit this run.
        """
        if saved:
            if saved["epoch_sequences"] != self.header["epoch_sequences"]:
                raise UserError("the training data has changed since the checkpoint")
            if saved["step"] > steps:
                what = f"the checkpoint is from step {saved['step']}"
                raise UserError(f"{what}, and the run ends at {steps}")
            for name, part in self.parts.items():
                state = saved[name]
                if "param_groups" in state:  # today's settings win over the optimizer's then
                    state = {**state, "param_groups": part.state_dict()["param_groups"]}
                if state:  # a scaler that is not in use has none
                    part.load_state_dict(state)
            self.saved = saved["step"]
        sums = self.runtime.sum(self.saved, self.saved**2)
        if sums != [self.saved * self.runtime.world, self.saved**2 * self.runtime.world]:
            raise UserError("the ranks found different checkpoints; they must share one --out_dir")
        return self.saved

    def save(self, step: int) -> None:
        if self.runtime.rank > 0 or step == self.saved:
            return
        self.saved = step
        self.wait()
        content = copy_to_cpu({name: part.state_dict() for name, part in self.parts.items()})
        weights = content["model"]
        weights["lm_head.weight"] = weights["transformer.wte.weight"]  # tied: stored once
        self.writing = self.thread.submit(self.write, {**self.header, **content, "step": step})

    def write(self, content: dict) -> str:
        """Write a checkpoint and delete old ones -> what went wrong, or ""."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            with fineweb.whole_file(self.folder / f"checkpoint_{content['step']:07d}.pt") as file:
                torch.save(content, file)
            older = [path for path in files(self.folder) if step_of(path) < content["step"]]
            for path in older[:-1]:
                path.unlink()
            return ""
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
            reason = getattr(error, "strerror", None) or first_line(error)
            failure = f"checkpoint {content['step']} NOT written: {reason}"
            print(failure, flush=True)
            return failure

    def wait(self) -> str:
        """Wait for the current write -> what went wrong, or ""."""
        return self.writing.result() if self.writing else ""

    def diverged(self, step: int, loss: float, norm: float) -> UserError:
        self.wait()
        last = (files(self.folder) or ["none"])[-1]
        what = f"loss {loss} and gradient norm {norm} at step {step}; last good checkpoint: {last}"
        hint = "try --resume --dtype float32, or --init_from it with a lower --learning_rate"
        return UserError(f"{what}; {hint}")

    def close(self, step: int) -> None:
        """Write a last checkpoint. Raises UserError if it cannot be written."""
        self.save(step)
        failure = self.wait()
        if failure:
            raise UserError(failure)


class Stop:
    """A request to stop early: SIGTERM, Ctrl-C, or SIGUSR1 (a cluster's warning of its time limit).

    The current step is finished first; a second Ctrl-C stops at once.
    """

    def __init__(self):
        self.signal = ""
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self.on_signal)

    def __bool__(self) -> bool:
        return bool(self.signal)

    def __str__(self) -> str:
        return self.signal or "another rank"

    def on_signal(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

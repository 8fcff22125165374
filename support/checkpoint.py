"""The checkpoints in --out_dir, and how a run continues from one after an interruption.

    checkpoint_0000250.pt    everything after 250 steps: weights, optimizer, settings

The newest two stay, and the best: the one whose step has the lowest validation loss. `--resume`
continues from the newest whole one. Elsewhere, FOLDER names its newest checkpoint, and FOLDER/best
its best. README.md ("When something goes wrong") says what can happen to a run, and how exactly a
resumed run repeats an uninterrupted one; docs/overnight.md says what you find in the morning.

Nothing that is loaded can run code: checkpoints are plain data, read with weights_only=True.
torchrun passes SIGUSR1 on only with --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1.
After a signal to torchrun itself the ranks have 30 seconds (--shutdown-timeout).
"""

import contextlib
import errno
import hashlib
import os
import pickle
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import torch

from support import published
from support.command import UserError, explain, first_line, progress, say
from support.files import json_lines, lock_folder, whole_file


def files(path: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; or the path itself, if it is a file."""
    return [path] if path.is_file() else sorted(path.glob(f"checkpoint_{7 * '[0-9]'}.pt"))


def validation_losses(folder: Path) -> dict[int, float]:
    """The validation losses in a folder's metrics.jsonl, by step."""
    path = folder / "metrics.jsonl"
    records = [record for _, record in json_lines(path)] if path.exists() else []
    val = [record for record in records if record["kind"] == "val"]
    return {record["step"]: record["loss"] for record in val if record["loss"] is not None}


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None if none has one."""
    losses = validation_losses(folder)
    known = [path for path in files(folder) if step_of(path) in losses]
    return min(known, key=lambda path: losses[step_of(path)], default=None)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint_"))


def read(path: Path) -> dict:
    """Read what torch.save wrote, if it is plain data. Raises UserError for anything else."""
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: give the folder that it is in, with its config.json")
    with explain(f"{path} is not a whole checkpoint"):
        with zipfile.ZipFile(path) as file:
            for name in progress(file.namelist(), f"checking {path.name}"):
                with file.open(name) as part:  # this checks its checksum, as torch.load does not
                    while part.read(2**20):
                        pass
        try:
            # Memory-mapped: ranks on one machine share the memory of what they read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            what = (
                f"{path} holds Python objects, as build-nanogpt's checkpoints do, and these could"
            )
            hint = "save its weights alone there: torch.save(model.state_dict(), 'weights.pt')"
            raise UserError(f"{what} run code; {hint}") from None
        return dict(content)


def source() -> str:
    """The SHA-256 of train_gpt2.py. A changed network may have weights with the same names."""
    return hashlib.sha256((Path(__file__).parent.parent / "train_gpt2.py").read_bytes()).hexdigest()


def warn_of_change(content: dict) -> None:
    if content.get("source") not in (None, source()):
        say("train_gpt2.py has changed since the checkpoint")


def is_ours(content: dict) -> bool:
    return {"step", "network", "settings", "model"} <= content.keys()


def load(source: str) -> dict:
    """Load a model's sizes (`network`), weights (`model`) and its run's `settings`.

    `source` is a checkpoint, a folder with some, whose newest is taken, FOLDER/best, a file with a
    GPT-2's state dict alone, a transformers folder or a published name. Raises UserError.
    """
    path = Path(source)
    folder = path.parent if path.name == "best" and not path.exists() else path
    paths = files(folder)
    if not paths and (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} has no checkpoint yet")
    if not paths:
        sizes, weights = published.read(source)
        return dict(network=sizes, model=weights, settings={})
    if path.is_file():
        content = read(path)
        if not is_ours(content):
            return published.from_state_dict(content, path)
    else:
        lowest = best(folder)
        if folder == path:
            chosen, content = newest_whole(paths)
        elif lowest:
            chosen, content = lowest, read(lowest)
        else:
            raise UserError(f"{folder} has no checkpoint with a validation loss; try {folder}")
        other = f"; {folder}/best is {lowest.name}" if lowest not in (chosen, None) else ""
        say(f"model: {chosen}{other}")
    warn_of_change(content)
    return content


def newest_whole(paths: list[Path]) -> tuple[Path, dict]:
    """Read the newest checkpoint that is whole -> its path, and what it holds. Raises UserError."""
    for path in reversed(paths):
        try:
            content = read(path)
            if is_ours(content):
                return path, content
            raise UserError(f"{path} is not a whole checkpoint (it lacks some of its parts)")
        except UserError as error:
            say(f"{error}; trying the one before")
    raise UserError(f"no checkpoint in {paths[0].parent} is whole; train again in another folder")


def newest(folder: Path) -> dict | None:
    """What to resume: the newest whole checkpoint in a folder; None if it has no checkpoint.

    Raises UserError if there are checkpoints and none is whole.
    """
    if folder.is_dir():
        lock_folder(folder)  # no other run writes to it from here on
    paths = files(folder)
    if not paths:
        say(f"no checkpoint in {folder} yet: starting from the beginning")
        return None
    path, content = newest_whole(paths)
    say(f"resuming from {path}")
    content["settings"] |= dict(out_dir=str(folder), resume=True)  # the folder may have moved
    return content


def load_weights(model, weights: dict):
    """Put weights into a model -> the model. Raises UserError if they do not fit it."""
    with explain("these weights do not fit the network: it may have changed in train_gpt2.py"):
        model.load_state_dict(weights)
    return model


def copy_to_cpu(value, copies: dict):
    """Copy all tensors in nested dicts and lists to the CPU.

    `copies` has those that were copied: one that has two names, as wte and lm_head, stays one.
    """
    if isinstance(value, dict):
        return {key: copy_to_cpu(part, copies) for key, part in value.items()}
    if isinstance(value, list):
        return [copy_to_cpu(part, copies) for part in value]
    if not isinstance(value, torch.Tensor):
        return value
    key = value.data_ptr(), value.shape, value.dtype
    if key not in copies:
        copies[key] = value.detach().to("cpu", copy=True)
    return copies[key]


class Saver:
    """Writes checkpoints: everything that the run needs to continue as if nothing had happened.

    Rank 0 copies the state, and a thread writes it: training waits only for the copy, or for the
    previous write if it is not finished. A failed write is reported and does not stop the run.
    `parts` are objects with state_dict() and load_state_dict(), by name; one of them is the model.
    There are no random states to save: each step seeds torch from --seed, the step and the rank.
    """

    def __init__(self, parts: dict, header: dict, rank: int):
        self.parts = parts
        self.header = header
        self.rank = rank
        self.folder = Path(header["settings"]["out_dir"])
        self.saved = 0  # the step of the newest checkpoint
        self.thread = ThreadPoolExecutor(1)
        # The latest write. Its result is its error, or "", as that of str() when there is none yet.
        self.writing = self.thread.submit(str)
        if rank > 0:
            return
        with explain(f"--out_dir {self.folder} cannot be used"):
            self.folder.mkdir(parents=True, exist_ok=True)
        lock_folder(self.folder)
        holds_run = (self.folder / "metrics.jsonl").exists() or files(self.folder)
        if holds_run and not header["settings"]["resume"]:
            raise UserError(f"{self.folder} already holds a run; add --resume or change --out_dir")
        for name in ("checkpoint_*.pt", "metrics.jsonl"):
            for partial in self.folder.glob(f"{name}.*.tmp"):  # a killed run left it
                partial.unlink()

    def restore(self, saved: dict | None, steps: int) -> None:
        """Put every part into the state of a checkpoint, if there is one.

        Raises UserError if the checkpoint does not fit this run.
        """
        if saved is None:
            return
        if saved["epoch_sequences"] != self.header["epoch_sequences"]:
            raise UserError("the training data has changed since the checkpoint")
        if saved["step"] > steps:
            what = f"the checkpoint is from step {saved['step']}"
            raise UserError(f"{what}, but this run ends at step {steps}; raise --max_steps")
        for name, part in self.parts.items():
            if name not in saved:
                raise UserError(f"the checkpoint has no {name}: train_gpt2.py has changed since")
            state = saved[name]
            if "param_groups" in state:  # the current settings win
                state["param_groups"] = part.state_dict()["param_groups"]
            if state:  # a scaler that was not in use has none
                part.load_state_dict(state)
        before = saved["settings"]
        now = self.header["settings"]
        changed = {k: v for k, v in now.items() if k not in before or before[k] != v}
        if changed:
            say(f"changed on --resume: {changed}")
        warn_of_change(saved)
        self.saved = saved["step"]

    def save(self, step: int) -> None:
        if self.rank > 0 or step == self.saved:
            return
        self.saved = step
        self.writing.result()  # wait for the previous write
        content = copy_to_cpu({name: part.state_dict() for name, part in self.parts.items()}, {})
        self.writing = self.thread.submit(self.write, {**self.header, **content, "step": step})

    def write(self, content: dict) -> str:
        """Write a checkpoint, and keep the one before it and the best -> what went wrong, or ""."""
        path = self.path(content["step"])
        failure, spare = "", []
        size = room = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            older = [other for other in files(self.folder) if other < path]
            kept = {*older[-1:], best(self.folder)}
            spare = [other for other in older if other not in kept]
            size = older[-1].stat().st_size if older else 0
            room = shutil.disk_usage(self.folder).free
            if spare and room < 1.1 * size:  # too little for one more
                spare.pop(0).unlink()
            with open(self.folder / "metrics.jsonl", "ab") as records:
                os.fsync(records)  # after a power cut, no record before the checkpoint is missing
            with whole_file(path) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:
            # torch hides the system's error behind a RuntimeError.
            cause = (isinstance(error, RuntimeError) and error.__context__) or error
            why = f"the disk has only {room / 1e9:.2f} GB left" if room < size else ""
            failure = f"{path} NOT written: {why or first_line(cause)}"
            say(failure)
            if getattr(cause, "errno", None) != errno.EDQUOT:
                return failure
            # A quota, which disk_usage does not know, is used up: make room for the next one.
        for old in spare:
            with contextlib.suppress(OSError):  # whatever happens to it, the newest is whole
                old.unlink()
        return failure

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint_{step:07d}.pt"

    def give_up(self, step: int, loss: float, norm: float) -> NoReturn:
        """Raise UserError for a loss that is not finite. A checkpoint with those weights is put
        aside, as *.bad: it was written before they were tried."""
        self.writing.result()  # it may still be on its way
        if self.rank == 0 and self.path(step).exists():
            self.path(step).replace(self.path(step).with_suffix(".bad"))
        last = (files(self.folder) or ["none"])[-1]
        what = f"loss {loss} and gradient norm {norm} at step {step}; last good checkpoint: {last}"
        hint = "try --resume with --dtype float32 or a lower --learning_rate"
        raise UserError(f"{what}; {hint}")

    def close(self, step: int) -> str:
        """Write a last checkpoint -> what went wrong, or ""."""
        if self.writing.result():
            self.saved = 0  # try again: there may be room by now
        self.save(step)
        return self.writing.result()

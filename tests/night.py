"""What the tests of the night share: a run, how to start it, and what it must record."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from helpers import TINY, start

STEPS = 160
RUN = [*TINY, "--max_steps", STEPS, "--checkpoint_every", 40, "--sample_every", 80]
RUN += ["--val_every", 80, "--val_tokens", 160, "--data", "shards"]
LONG = [*RUN, "--max_steps", 100_000, "--val_every", 0, "--sample_every", 0]
# Ranks that torchrun has restarted must not find the addresses of dead ones.
RECIPE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def facts(folder: Path) -> list:
    """What must be the same bit for bit: all records, but for the clock and settings changed."""
    clock = ("step_ms", "tokens_per_second", "mfu", "time")
    lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b"", "the last line is whole"
    found = [json.loads(line) for line in lines]
    found = [record for record in found if record["kind"] not in ("resume", "end")]
    assert [record["kind"] for record in found].count("header") == 1
    keys = [(record["kind"], record["step"]) for record in found[1:]]
    assert len(keys) == len(set(keys)), "each step stands once"
    assert [key[1] for key in keys] == sorted(key[1] for key in keys), "in order"
    return [{k: v for k, v in record.items() if k not in clock} for record in found[1:]]


def night(folder: Path, *flags, processes=1, torchrun=()) -> subprocess.Popen:
    """A run as README.md starts it for the night: torchrun restarts what dies."""
    if processes > 1:
        torchrun = ("--standalone", f"--nproc_per_node={processes}")
    torchrun = (*torchrun, "--max-restarts=3") if torchrun else ()
    return start(folder, *flags, processes=processes, torchrun=torchrun, **RECIPE)


def wait_for(condition, process: subprocess.Popen, seconds=90) -> None:
    for _ in range(10 * seconds):
        if condition():
            return
        assert process.poll() is None, f"ended too early: {process.stdout.read()}"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"nothing happened: {process.stdout.read()}")


def recorded(folder: Path, step: int):
    """Whether the run in `folder` has come to a step."""
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},'.encode() in path.read_bytes()


def workers(parent: int) -> list[int]:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return sorted(map(int, path.read_text().split()))


def copy(quiet: Path, name: str) -> Path:
    """A copy of the quiet run: STEPS steps, with the checkpoints of 120 and 160."""
    return Path(shutil.copytree(quiet / "quiet", quiet / name))

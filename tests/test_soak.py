"""The long night, by `python -m pytest -m soak`: signals, and a rehearsal with kills."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from helpers import ROOT, TINY, start
from night import RECIPE, facts

pytestmark = pytest.mark.soak
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# By default, SIGUSR1 kills torchrun, and its ranks train on. It passes what it handles on to them.
TORCHRUN = ["--standalone", "--nproc_per_node=2"]
TORCHRUN += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
SLOW = [*TINY, "--n_embd", 64, "--data", ROOT / "input.txt", "--max_steps", 60, "--resume"]
SLOW += ["--val_tokens", 8192, "--checkpoint_every", 10]
SLOW += [f"--{kind}_every=15" for kind in ("val", "hellaswag", "sample")]


def copy_program(folder: Path) -> None:
    """Copy the commands, which look for their data beside themselves, and what they need."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("support", "tests", "runs/rehearsal-cpu"):
        shutil.copytree(ROOT / name, folder / name)


def make_stand_in(path: Path) -> None:
    """As many records as HellaSwag has, of four words each."""
    words = (ROOT / "input.txt").read_text().split()
    records = [dict(ctx=words[i], endings=words[i : i + 4], label=i % 4) for i in range(10_042)]
    path.parent.mkdir()
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def comes_to(phase: str, step: int, folder: Path, before: str) -> bool:
    """Whether a run has come to a phase. `before` is the lock of the process before this one."""
    lock, metrics = folder / "lock", folder / "metrics.jsonl"
    if not lock.exists() or lock.read_text() in ("", before):
        return False
    if phase in ("start", "checkpoint"):
        return phase == "start" or any(folder.glob("checkpoint_*.tmp"))
    if not metrics.exists() or metrics.stat().st_mtime_ns < lock.stat().st_mtime_ns:
        return False  # these records are from before
    kind, at = {
        "validation": ("train", step - 1) if step else ("header", 0),
        "HellaSwag": ("val", step),
        "samples": ("hellaswag", step),
        "step": ("train", step + 4),
    }[phase]
    return f'"kind": "{kind}", "step": {at},' in metrics.read_text()


def check_last_words(said: str, name: str, kept: list[Path], before: list[Path]) -> None:
    """What a stopped run says of its checkpoints is true."""
    stopped = re.search(rf"stopped by {name} after step (\d+); (.*)", said)
    if not stopped:  # torchrun kills a rank that waits for one that had ended before it listened
        words = (f"stopped by {name}; nothing new was written", "forcefully exiting via 9")
        assert any(word in said for word in words) and kept == before, said
    elif stopped[1] == "0":
        assert stopped[2] == "there is no checkpoint yet" and not kept
    else:
        assert stopped[2] == "--resume continues"
        assert kept[-1].name == f"checkpoint_{int(stopped[1]):07d}.pt"


@pytest.mark.parametrize("target", ["python", "torchrun", "torchrun's group"])
def test_signals_in_every_phase(tmp_path, target):
    """24 times a run is stopped and continued: it ends with the records of an undisturbed one."""
    copy_program(tmp_path)
    make_stand_in(tmp_path / "hellaswag/hellaswag_val.jsonl")
    for number in SIGNALS:  # what nohup or a shell's & ignores here, the run would ignore, too
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    torchrun = [] if target == "python" else TORCHRUN
    options = dict(script=tmp_path / "train_gpt2.py", torchrun=torchrun, **RECIPE)
    folder = tmp_path / "run"
    owner = ""
    dice = random.Random(0)
    for number, first in zip(SIGNALS, (0, 15, 30, 45), strict=True):
        for phase in ("start", "validation", "HellaSwag", "samples", "step", "checkpoint"):
            before = sorted(folder.glob("checkpoint_*.pt"))
            process = start(tmp_path, *SLOW, "--out_dir", "run", **options)
            while not comes_to(phase, first, folder, owner):
                assert process.poll() is None, f"{phase}: {process.stdout.read()}"
                time.sleep(0.002)
            owner = (folder / "lock").read_text()
            quick = phase in ("samples", "step", "checkpoint")
            time.sleep(dice.uniform(0, 0.02 if quick else 0.5))
            send = os.killpg if target == "torchrun's group" else os.kill
            send(process.pid, number)
            said = process.communicate(timeout=120)[0]
            check_last_words(said, number.name, sorted(folder.glob("checkpoint_*.pt")), before)
    for name in ("run", "quiet"):
        process = start(tmp_path, *SLOW, "--out_dir", name, **options)
        said = process.communicate()[0]
        assert process.returncode == 0, said
    assert facts(folder) == facts(tmp_path / "quiet")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a disk")
def test_rehearsal(tmp_path):
    """runs/rehearsal-cpu, small: every fault hits one run, which records what a quiet one does."""
    copy_program(tmp_path)
    hub = tmp_path / "HuggingFaceFW/fineweb-edu"
    (hub / "sample/10BT").mkdir(parents=True)
    config = "- config_name: sample-10BT\n  data_files: sample/10BT/*\n"
    (hub / "README.md").write_text(f"---\nconfigs:\n{config}---\n")
    scenes = (ROOT / "input.txt").read_text().split("\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": scenes}), hub / "sample/10BT/0.parquet")
    command = [sys.executable, "runs/rehearsal-cpu/rehearse.py", "--small"]
    try:
        done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    finally:
        subprocess.run(["umount", tmp_path / "night"], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "rehearsal.json").read_text())
    faults = [event["fault"] for event in result["night"]["events"]]
    assert faults.count("kill") == 4 and {"warning", "full disk", "power cut"} < set(faults)
    assert facts(tmp_path / "log") == facts(tmp_path / "quiet"), result["largest_difference"]
    assert {record["kind"] for record in facts(tmp_path / "log")} >= {"val", "sample", "hellaswag"}

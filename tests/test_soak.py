"""The long night, by `python -m pytest -m soak`: kills over one demo-sized run, and a rehearsal."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
from helpers import ROOT, make_shards, run
from night import RUN, agent, facts, free_port, night, recorded, wait_for

pytestmark = pytest.mark.soak
DEMO = ["--preset", "demo", "--max_steps", 300, "--checkpoint_every", 15, "--val_every", 100]
DEMO += ["--val_tokens", 4096, "--sample_every", 100, "--device", "cpu"]


def test_twenty_kills(tmp_path):
    """Killed -9 at 20 random moments and resumed each time: bit for bit the quiet run."""
    assert run(tmp_path, *DEMO, "--out_dir", "quiet").returncode == 0
    dice = random.Random(0)
    for checkpoint in range(0, 300, 15):
        process = night(tmp_path, *DEMO, "--out_dir", "killed", "--resume")
        wait_for(recorded(tmp_path / "killed", checkpoint + dice.randrange(14)), process)
        time.sleep(dice.uniform(0, 0.2))  # about a step
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert run(tmp_path, *DEMO, "--out_dir", "killed", "--resume").returncode == 0
    assert facts(tmp_path / "killed") == facts(tmp_path / "quiet")


def test_a_machine_dies_and_comes_back(tmp_path):
    """One of two torchrun agents is killed with its worker and started again: the job finishes."""
    make_shards(tmp_path / "shards")
    longer = [*RUN, "--max_steps", 1500]
    assert run(tmp_path, *longer, "--out_dir", "quiet", processes=2).returncode == 0
    port = free_port()
    flags = [*longer, "--out_dir", "machines", "--resume"]
    first, second = (agent(tmp_path, port, *flags) for _ in range(2))
    wait_for(recorded(tmp_path / "machines", 300), first)
    # The agent that hosts the rendezvous must live; it is the one that listens on the port.
    host = subprocess.run(["ss", "-ltnp"], check=True, capture_output=True, text=True).stdout
    dying, living = (first, second) if f"pid={second.pid}," in host else (second, first)
    os.killpg(dying.pid, signal.SIGKILL)
    time.sleep(3)
    again = agent(tmp_path, port, *flags)
    said = [each.communicate(timeout=300)[0] for each in (living, again)]
    assert living.returncode == 0 and again.returncode == 0, said
    assert facts(tmp_path / "machines") == facts(tmp_path / "quiet")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a disk")
def test_rehearsal(tmp_path):
    """runs/rehearsal-cpu, small: every fault hits one run, which records what a quiet one does."""
    shared = [ROOT / "tests" / name for name in ("night.py", "helpers.py")]
    for path in [*ROOT.glob("*.py"), ROOT / "runs/rehearsal-cpu/rehearse.py", *shared]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
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

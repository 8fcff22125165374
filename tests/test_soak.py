"""The long night, by `python -m pytest -m soak`: kills over one demo-sized run."""

import os
import random
import signal
import subprocess
import time

import pytest
from helpers import make_shards, run
from night import RUN, agent, facts, free_port, recorded, start, wait_for

pytestmark = pytest.mark.soak
DEMO = ["--preset", "demo", "--max_steps", 300, "--checkpoint_every", 15, "--val_every", 100]
DEMO += ["--val_tokens", 4096, "--sample_every", 100, "--device", "cpu"]


def test_twenty_kills(tmp_path):
    """Killed -9 at 20 random moments and resumed each time: bit for bit the quiet run."""
    assert run(tmp_path, *DEMO, "--out_dir", "quiet").returncode == 0
    dice = random.Random(0)
    for _ in range(20):
        process = start(tmp_path, *DEMO, "--out_dir", "killed", "--resume")
        with pytest.raises(subprocess.TimeoutExpired):  # it has not come to its end yet
            process.communicate(timeout=dice.uniform(4, 12))
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

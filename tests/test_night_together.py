"""A night of several processes: killed, warned, hung, on two machines."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SCRIPT, losses, run
from night import LONG, RUN, copy, facts, quiet_run, recorded, start, wait_for, workers


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    return quiet_run(tmp_path_factory.mktemp("night"))


def test_two_processes(quiet):
    """torchrun with restarts: kill -9 of a process, a signal to one, more processes than before."""
    done = run(quiet, *RUN, "--out_dir", "two", processes=2)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(quiet / "two"), losses(quiet / "quiet"), atol=1e-4)

    process = start(quiet, *RUN, "--out_dir", "killed", "--resume", processes=2)
    wait_for(recorded(quiet / "killed", 60), process)
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert facts(quiet / "killed") == facts(quiet / "two")

    process = start(quiet, *RUN, "--max_steps", 5000, "--out_dir", "warned", processes=2)
    wait_for(recorded(quiet / "warned", 20), process)
    os.kill(workers(process.pid)[-1], signal.SIGUSR1)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "--resume" in said, said
    steps = len(losses(quiet / "warned"))
    content = torch.load(max((quiet / "warned").glob("checkpoint_*.pt")), weights_only=True)
    assert content["step"] == steps

    folder = copy(quiet, "grown")
    (folder / "checkpoint_0000160.pt").unlink()
    done = run(quiet, "--out_dir", "grown", "--resume", processes=2)
    assert done.returncode == 0 and "checkpoint_0000120.pt" in done.stdout, done.stderr
    np.testing.assert_allclose(losses(folder), losses(quiet / "quiet"), atol=1e-4)


def agent(folder: Path, port: int, *flags) -> subprocess.Popen:
    """One machine of two, as torchrun sees it, with one process."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=3"]
    torchrun += ["--local-addr=127.0.0.1"]
    new_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # after a restart, as README.md says
    return subprocess.Popen(
        [sys.executable, *torchrun, str(SCRIPT), *map(str, flags)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | new_store,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_machines(quiet):
    """Two torchrun agents that find each other by the c10d rendezvous train one run."""
    port = free_port()
    agents = [agent(quiet, port, *RUN, "--out_dir", "machines") for _ in range(2)]
    said = [each.communicate(timeout=120)[0] for each in agents]
    assert [each.returncode for each in agents] == [0, 0], said
    np.testing.assert_allclose(losses(quiet / "machines"), losses(quiet / "quiet"), atol=1e-4)


def test_a_hung_process_ends_the_wait(quiet):
    """One process stops to answer: the other gives up after --timeout_minutes, as the log says."""
    flags = [*LONG, "--timeout_minutes", 0.1, "--out_dir", "hung"]
    process = start(quiet, *flags, processes=2)
    wait_for(recorded(quiet / "hung", 5), process)
    waiting, hung = workers(process.pid)
    os.kill(hung, signal.SIGSTOP)
    wait_for(lambda: not os.path.exists(f"/proc/{waiting}"), process)
    os.killpg(process.pid, signal.SIGKILL)  # torchrun first: it would start both anew
    os.kill(hung, signal.SIGKILL)
    assert "0.1 minutes" in process.communicate(timeout=60)[0]

"""A night of several processes: as many as one, warned, more than before, on two machines."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, losses, run
from night import RUN, agent, copy, free_port, night, quiet_run, recorded, wait_for, workers


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    return quiet_run(tmp_path_factory.mktemp("night"))


def test_two_processes(quiet):
    """torchrun: the losses of one process, a signal to one of two, more processes than before."""
    done = run(quiet, *RUN, "--out_dir", "two", processes=2)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(quiet / "two"), losses(quiet / "quiet"), atol=1e-4)

    process = night(quiet, *RUN, "--max_steps", 5000, "--out_dir", "warned", processes=2)
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


def test_two_machines(quiet):
    """Two torchrun agents that find each other by the c10d rendezvous train one run."""
    port = free_port()
    agents = [agent(quiet, port, *RUN, "--out_dir", "machines") for _ in range(2)]
    said = [each.communicate(timeout=120)[0] for each in agents]
    assert [each.returncode for each in agents] == [0, 0], said
    np.testing.assert_allclose(losses(quiet / "machines"), losses(quiet / "quiet"), atol=1e-4)


def test_ranks_that_found_different_checkpoints_are_refused(quiet):
    """Two machines without a shared --out_dir: each rank finds its own newest checkpoint."""
    script = quiet / "apart.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import train_gpt2\nfrom support.command import run_command\n"
        "out = ['--out_dir', 'mine' + os.environ['RANK'], '--resume']\n"
        "run_command('x', lambda: train_gpt2.main(sys.argv[1:] + out))\n"
    )
    copy(quiet, "mine0")
    (copy(quiet, "mine1") / "checkpoint_0000160.pt").unlink()
    done = run(quiet, "--device", "cpu", script=script, processes=2)
    assert done.returncode != 0
    assert done.stderr.count("x: the ranks found different checkpoints") == 1, done.stderr

"""Several ranks under torchrun: killed and restarted by README.md's recipe, and four of them."""

import os
import re
import signal

import numpy as np
import pytest
from helpers import ROOT, TINY, losses, make_shards, run
from night import RECIPE, agent, facts, free_port, night, recorded, wait_for, workers

FLAGS = [*TINY, "--max_steps", 60, "--checkpoint_every", 10, "--data", "shards"]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A folder with shards and the run `quiet`, two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("restarts")
    make_shards(folder / "shards")
    done = run(folder, *FLAGS, "--out_dir", "quiet", processes=2)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_killed_rank(quiet):
    """The ranks continue from the last checkpoint; the records are the quiet run's to the bit."""
    process = night(quiet, *FLAGS, "--out_dir", "killed", "--resume", processes=2)
    wait_for(recorded(quiet / "killed", 35), process)
    os.kill(workers(process.pid)[0], signal.SIGKILL)  # rank 0: the others need its store
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "killed/checkpoint_00000" in said, "they did not continue"
    assert facts(quiet / "killed") == facts(quiet / "quiet")


@pytest.mark.soak
def test_a_killed_rank_of_two_machines(quiet):
    """A rank of one torchrun is killed: both start theirs again."""
    port = free_port()
    flags = [*FLAGS, "--out_dir", "machines", "--resume"]
    agents = [agent(quiet, port, *flags) for _ in range(2)]
    wait_for(recorded(quiet / "machines", 35), agents[0])
    os.kill(workers(agents[1].pid)[0], signal.SIGKILL)
    said = [each.communicate(timeout=120)[0] for each in agents]
    assert [each.returncode for each in agents] == [0, 0], said
    assert facts(quiet / "machines") == facts(quiet / "quiet")


def test_four_ranks(quiet):
    """A step is the same, whether one process or four share its batch."""
    for name, processes in (("one", 1), ("four", 4)):
        flags = [*TINY, "--max_steps", 8, "--data", "shards", "--out_dir", name]
        done = run(quiet, *flags, processes=processes)
        assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(quiet / "four"), losses(quiet / "one"), rtol=1e-6)


def test_readme_gives_the_recipe():
    """README.md restarts ranks, and always with the variable without which they may hang."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^.*torchrun .*--max-restarts.*$", readme, re.MULTILINE)
    ((name, value),) = RECIPE.items()
    assert commands and all(line.startswith(f"{name}={value} torchrun") for line in commands)

"""Several ranks under torchrun: as many as one, warned, killed and restarted, on two machines."""

import os
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, losses, make_shards, run, train
from night import facts, night, recorded, wait_for, workers

FLAGS = [*TINY, "--max_steps", 60, "--checkpoint_every", 10, "--data", "shards"]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A folder with shards and the run `quiet`, two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("ranks")
    make_shards(folder / "shards")
    train(folder, "quiet", *FLAGS, processes=2)
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


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_two_machines(quiet, killed):
    """Two torchrun agents meet and train one run. If a rank dies, both start theirs again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["--nnodes=2", "--nproc_per_node=1", "--local-addr=127.0.0.1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    name = f"machines_{killed}"
    flags = [*FLAGS, "--out_dir", name, "--resume"]
    agents = [night(quiet, *flags, torchrun=torchrun) for _ in range(2)]
    wait_for(recorded(quiet / name, 35), agents[0])
    if killed:
        os.kill(workers(agents[1].pid)[0], signal.SIGKILL)
    said = [each.communicate(timeout=120)[0] for each in agents]
    assert [each.returncode for each in agents] == [0, 0], said
    assert facts(quiet / name) == facts(quiet / "quiet")


def test_a_signal_to_one_of_two_ranks(quiet):
    """Both stop after the same step, with a checkpoint."""
    flags = [*FLAGS, "--max_steps", 5000, "--out_dir", "warned"]
    process = night(quiet, *flags, processes=2)
    wait_for(recorded(quiet / "warned", 20), process)
    os.kill(workers(process.pid)[-1], signal.SIGUSR1)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "--resume" in said, said
    content = torch.load(max((quiet / "warned").glob("checkpoint_*.pt")), weights_only=True)
    assert content["step"] == len(losses(quiet / "warned"))


def test_one_rank_continues_what_two_began(quiet):
    """A step is the same, whoever shares its batch."""
    folder = shutil.copytree(quiet / "quiet", quiet / "alone")
    (folder / "checkpoint_0000060.pt").unlink()
    done = train(quiet, "alone", "--resume")
    assert "checkpoint_0000050.pt" in done.stdout
    np.testing.assert_allclose(losses(folder), losses(quiet / "quiet"), rtol=1e-6)


def test_an_unexpected_error_ends_a_rank_at_once(tmp_path):
    """Under nccl a normal exit waits for the other ranks, and they for it. But a checkpoint that is
    being written is finished. A rank that torchrun has ended, as another failed, says nothing."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys, threading, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from support.command import Stop, run_command\n"
        "from support.files import whole_file\n"
        "def write():\n"
        "    with whole_file(Path('rank' + os.environ['RANK'])): time.sleep(2)\n"
        "    time.sleep(3600)\n"
        "def main():\n"
        "    Stop().listen()\n"
        "    threading.Thread(target=write).start()\n"
        "    os.kill(os.getpid(), 15 * int(os.environ['RANK']))\n"
        "    1 / 0\n"
        "run_command('x', main)\n"
    )
    done = run(tmp_path, script=script, RANK="0")
    assert done.returncode == 1 and "x: an error on rank 0" in done.stderr
    done = run(tmp_path, script=script, RANK="1")
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    assert (tmp_path / "rank0").exists() and (tmp_path / "rank1").exists()


def test_ranks_that_found_different_files_are_refused(quiet):
    """Two machines without a shared --out_dir: each rank finds its own newest checkpoint. Or one
    has all the data, and the other a part."""
    script = quiet / "apart.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import train_gpt2\nfrom support.command import run_command\n"
        "mine = [word + os.environ['RANK'] * (word in ('mine', 'text')) for word in sys.argv[1:]]\n"
        "run_command('x', lambda: train_gpt2.main(mine))\n"
    )
    for name in ("mine0", "mine1"):
        shutil.copytree(quiet / "quiet", quiet / name)
    (quiet / "mine1/checkpoint_0000060.pt").unlink()
    for name, words in (("text0", 20_000), ("text1", 10_000)):
        (quiet / name).write_text("word " * words)
    for flags in (["--out_dir", "mine", "--resume"], [*TINY, "--data", "text", "--out_dir", "new"]):
        done = run(quiet, *flags, "--device", "cpu", script=script, processes=2)
        assert done.returncode != 0
        assert done.stderr.count("x: the ranks found different checkpoints or data") == 1, flags
        assert not (quiet / "new").exists()

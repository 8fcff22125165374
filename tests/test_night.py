"""What can happen in a night: signals, kills, damage, full disks. The run goes on or says why."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SCRIPT, TINY, losses, make_shards, records, run
from night import LONG, RUN, STEPS, copy, facts, night, quiet_run, recorded, wait_for

from support import checkpoint


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    return quiet_run(tmp_path_factory.mktemp("night"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_then_resume(quiet, name):
    """A signal lets the step finish, leaves a checkpoint and exit status 0; what follows is as if
    it had not come."""
    folder = quiet / name
    process = night(quiet, *RUN, "--out_dir", name)
    wait_for(recorded(folder, 30), process)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert f"stopped by {name} after step" in said and "--resume" in said
    steps = len(losses(folder))
    assert torch.load(max(folder.glob("*.pt")), weights_only=True)["step"] == steps < STEPS
    if name == "SIGTERM":  # for one of them to the end
        done = run(quiet, *RUN, "--out_dir", name, "--resume")
        assert done.returncode == 0, done.stderr
        assert facts(folder) == facts(quiet / "quiet")


def test_resume_takes_settings_from_the_checkpoint(quiet):
    """--resume alone continues, also with no checkpoint yet; what is given besides wins, is printed
    and recorded, except what would move the data or reshape the model."""
    done = run(quiet, *TINY[:2], "--out_dir", "fresh", "--resume", *RUN)
    assert done.returncode == 0 and "from the beginning" in done.stdout
    assert facts(quiet / "fresh") == facts(quiet / "quiet")

    folder = copy(quiet, "more")
    for flags in (["--seq_len", 8], ["--seed", 2], ["--optimizer", "muon"]):
        refused = run(quiet, "--out_dir", "more", "--resume", *flags)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
        assert f"{flags[0]} {flags[1]}: " in refused.stderr
    taken = ["--max_steps", 165, "--micro_batch", 2, "--checkpoint_every", 1]
    taken += ["--weight_decay", 0.25]
    taken = run(quiet, "--out_dir", "more", "--resume", *taken)
    assert taken.returncode == 0, taken.stderr
    assert "resuming from" in taken.stdout and len(losses(folder)) == 165
    content = torch.load(max(folder.glob("*.pt")), weights_only=True)
    assert content["settings"]["seq_len"] == 16
    assert [group["weight_decay"] for group in content["AdamW"]["param_groups"]] == [0.25, 0.0]
    (changed,) = records(folder, "resume")
    now = changed["settings"]
    assert (changed["step"], now["weight_decay"], now["max_steps"]) == (160, 0.25, 165)
    assert "'weight_decay': 0.25" in taken.stdout
    kept = [int(path.stem.split("_")[1]) for path in sorted(folder.glob("*.pt"))]
    assert kept == [164, 165], "the newest two"
    anew = run(quiet, *RUN, "--out_dir", "more")
    assert anew.returncode == 2 and "--resume" in anew.stderr and len(losses(folder)) == 165


def test_what_a_folder_goes_through(quiet):
    """It is moved, a checkpoint is copied under another name, a power cut leaves half a record."""
    folder = copy(quiet, "log")  # the default, which is not where it ran
    (folder / "checkpoint_0000160.pt").unlink()
    shutil.copy(folder / "checkpoint_0000120.pt", folder / "checkpoint_best.pt")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\0\xff" * 100 + b"\n")
    done = run(quiet, "--resume")
    assert done.returncode == 0 and "checkpoint_0000120.pt" in done.stdout, done.stderr
    assert facts(folder) == facts(quiet / "quiet")
    left = {path.name for path in folder.glob("*.pt")}
    assert left == {f"checkpoint_{name}.pt" for name in ("0000120", "0000160", "best")}


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}.get(how, content))


def test_damaged_checkpoints(quiet, capsys):
    """A damaged newest checkpoint is named and the one before taken; if none is whole, one line."""
    for how in ("truncated", "empty", "flipped"):
        folder = copy(quiet, f"damaged_{how}")
        damage(folder / "checkpoint_0000160.pt", how)
        assert checkpoint.newest(folder)["step"] == 120
        assert "checkpoint_0000160.pt is not a whole checkpoint" in capsys.readouterr().out
    done = run(quiet, "--out_dir", folder.name, "--resume")
    assert done.returncode == 0, done.stderr
    assert "checkpoint_0000160.pt is not a whole checkpoint" in done.stdout
    assert "resuming from" in done.stdout and "checkpoint_0000120.pt" in done.stdout
    assert facts(folder) == facts(quiet / "quiet")
    for path in folder.glob("checkpoint_*.pt"):
        damage(path, "truncated")
    done = run(quiet, "--out_dir", folder.name, "--resume")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert len(losses(folder)) == STEPS, "nothing is lost"


def test_divergence_stops_before_the_update(quiet):
    """A loss that is not finite: one line with the step, and the last good checkpoint stays."""
    flags = [
        "--learning_rate",
        1e30,
        "--min_lr_ratio",
        1,
        "--grad_clip",
        0,
        "--checkpoint_every",
        1,
    ]
    done = run(quiet, *RUN, *flags, "--out_dir", "diverged")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    newest = max((quiet / "diverged").glob("checkpoint_*.pt"))
    assert "at step" in line and newest.name in line and "--resume" in line
    step = int(line.split("at step ")[1].split(";")[0])
    assert torch.load(newest, weights_only=True)["step"] <= step


def test_full_disk(quiet):
    """A checkpoint cannot be written: training goes on with a warning, the old one stays."""
    folder = copy(quiet, "full")
    before = (folder / "checkpoint_0000160.pt").read_bytes()
    limit = 'ulimit -f 2000; exec "$@"'  # blocks of 1 KiB: enough for records, not for a checkpoint
    flags = ["--out_dir", "full", "--resume", "--max_steps", "240"]
    done = subprocess.run(
        ["bash", "-c", limit, "bash", sys.executable, str(SCRIPT), *flags],
        cwd=quiet,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "checkpoint_0000240.pt NOT written" in done.stderr
    assert "checkpoint_0000200.pt NOT written" in done.stdout, "each failure is reported"
    assert len(losses(folder)) == 240
    assert (folder / "checkpoint_0000160.pt").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_output_that_cannot_be_written(quiet):
    """What is printed is lost, on a full disk or in an old encoding; the run is not."""
    for flags in (RUN, ["--resume"]):
        command = [sys.executable, str(SCRIPT), *map(str, flags), "--out_dir", "unsaid"]
        options = dict(cwd=quiet, env=os.environ | {"OMP_NUM_THREADS": "1"})
        with open("/dev/full", "w") as full:
            subprocess.run(command, stdout=full, stderr=full, check=False, **options)
        assert facts(quiet / "unsaid") == facts(quiet / "quiet")
        (quiet / "unsaid/checkpoint_0000160.pt").unlink()  # to be made again, by --resume
    flags = ["--max_steps", 1, "--sample_every", 1, "--prompt", "\N{SNOWMAN}"]
    done = run(quiet, *RUN, *flags, "--out_dir", "ascii", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "sample at step 1\n?" in done.stdout, done.stderr


def test_folder_deleted_while_running(quiet):
    """The output folder vanishes: it is made again for the checkpoints, and the run ends well."""
    process = night(
        quiet, *LONG, "--max_steps", 300, "--checkpoint_every", 100, "--out_dir", "gone"
    )
    wait_for(recorded(quiet / "gone", 20), process)
    shutil.rmtree(quiet / "gone")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert torch.load(quiet / "gone" / "checkpoint_0000300.pt", weights_only=True)["step"] == 300


class Evil:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_nothing_that_is_loaded_runs(quiet):
    """A malicious pickle as checkpoint and as shard: refused in one line, and not run."""
    folder = copy(quiet, "evil")
    for path in folder.glob("checkpoint_*.pt"):
        path.write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, quiet / "evil.pt")
    shards = make_shards(quiet / "evil_shards")
    np.save(shards / "x_train_000001.npy", np.array([Evil()], object), allow_pickle=True)
    (quiet / "evil_shards" / "x_val_000000.npy").write_bytes(pickle.dumps(Evil()))
    for flags in (
        ["--out_dir", "evil", "--resume"],
        ["--init_from", "evil.pt", "--eval_only"],
        [*RUN, "--data", "evil_shards", "--out_dir", "evil_too"],
    ):
        done = run(quiet, *flags)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (quiet / "it_ran").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a FIFO")
def test_killed_while_writing_a_checkpoint(quiet):
    """kill -9 with a checkpoint half written: the older ones are whole, and the half one goes."""
    folder = quiet / "fifo"
    process = night(quiet, *RUN, "--out_dir", "fifo", "--checkpoint_every", 2)
    wait_for(lambda: list(folder.glob("checkpoint_*.pt")), process)
    for step in range(2, STEPS + 1, 2):  # a disk that takes the bytes of no further checkpoint
        half = folder / f"checkpoint_{step:07d}.pt.{process.pid}.tmp"
        if not half.exists():
            os.mkfifo(half)
    time.sleep(2)
    assert process.poll() is None and list(folder.glob("*.tmp")), "the writer waits"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = run(quiet, *RUN, "--out_dir", "fifo", "--resume")
    assert done.returncode == 0, done.stderr
    assert facts(folder) == facts(quiet / "quiet")
    assert not list(folder.glob("*.tmp"))

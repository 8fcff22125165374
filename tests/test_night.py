"""What can happen in a night: signals, kills, damage, full disks. The run goes on or says why."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import (
    command,
    losses,
    make_shards,
    one_line,
    options,
    records,
    release_locks,
    run,
    run_here,
    train,
)
from night import LONG, RUN, STEPS, copy, facts, night, recorded, wait_for

from support import checkpoint
from support.command import UserError


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    """A folder with shards and the run `quiet`, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("night")
    make_shards(folder / "shards")
    train(folder, "quiet", *RUN)
    return folder


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])  # the soak test has the others, too
def test_signal_then_resume(quiet, name):
    """A signal lets the step finish, leaves a checkpoint and exit status 0; what follows is as if
    it had not come."""
    folder = quiet / name
    process = night(quiet, *RUN, "--out_dir", name)
    wait_for(recorded(folder, 30), process)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert f"{name}: stopping after this step" in said
    assert f"stopped by {name} after step" in said and "--resume" in said
    steps = len(losses(folder))
    assert torch.load(max(folder.glob("*.pt")), weights_only=True)["step"] == steps < STEPS
    if name == "SIGTERM":  # for one of them to the end
        train(quiet, name, *RUN, "--resume")
        assert facts(folder) == facts(quiet / "quiet")


def test_a_second_ctrl_c_does_not_wait(quiet):
    """Not for the step, which takes minutes here, and not for a checkpoint."""
    flags = [*LONG, "--batch_tokens", 16 * 200_000, "--micro_batch", 8, "--out_dir", "impatient"]
    process = night(quiet, *flags)
    wait_for(recorded(quiet / "impatient", 0), process)  # the header
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    while "SIGINT: stopping after this step" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 1
    assert "train_gpt2.py: stopped by a second Ctrl-C, without a checkpoint" in said
    assert not list((quiet / "impatient").glob("checkpoint_*"))


class Part:
    """The least that a Saver can save."""

    def state_dict(self):
        return {"transformer.wte.weight": torch.zeros(1)}

    def load_state_dict(self, state):
        pass


def saver(folder, epoch_sequences=50) -> checkpoint.Saver:
    settings = dict(out_dir=str(folder), resume=True)
    header = dict(settings=settings, network={}, source="", epoch_sequences=epoch_sequences)
    return checkpoint.Saver({"model": Part()}, header, 0)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    """Other data, a run that is over, another program: the checkpoint is not loaded."""
    saver(tmp_path).close(7)
    saved = checkpoint.newest(tmp_path)
    saver(tmp_path).restore(saved, steps=7)
    with pytest.raises(UserError, match="data has changed"):
        saver(tmp_path, epoch_sequences=51).restore(saved, steps=7)
    with pytest.raises(UserError, match="from step 7, but this run ends at step 6"):
        saver(tmp_path).restore(saved, steps=6)
    del saved["model"]
    with pytest.raises(UserError, match="the checkpoint has no model"):
        saver(tmp_path).restore(saved, steps=7)


def test_records_reach_the_disk_before_a_checkpoint(tmp_path, monkeypatch):
    """After a power cut no record before it is missing: records, checkpoint, and then its name."""
    there = []
    monkeypatch.setattr(os, "fsync", lambda file: there.append(len(checkpoint.files(tmp_path))))
    saver(tmp_path).close(7)
    assert there == [0, 0, 1]


def test_a_checkpoint_that_failed_is_tried_again(tmp_path, monkeypatch):
    """The system's error is named, which torch hides. The oldest makes room, though the disk seems
    to have some (a quota is used up)."""

    def there():
        return [checkpoint.step_of(path) for path in checkpoint.files(tmp_path)]

    def half(content, file):
        file.write(b"half")
        assert there() == [5, 6], "a kill -9 would leave half a checkpoint"
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        finally:
            raise RuntimeError("enforce fail: unexpected pos 704 vs 598")

    full = saver(tmp_path)
    full.save(5)
    full.save(6)
    assert full.writing.result() == ""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        full.save(7)
        said = full.writing.result()
        assert said.endswith(f"7.pt NOT written: [Errno {errno.EDQUOT}] Disk quota exceeded")
    assert there() == [6]
    full.close(7)
    assert there() == [6, 7]


def test_the_best_checkpoint_stays(tmp_path, capsys, monkeypatch):
    """Beside the newest two; OUT_DIR/best names it. Where a third has no room, it stays, too."""
    full = saver(tmp_path)
    for step, loss in enumerate([5.0, 3.0, 4.0, 3.5, 3.25], start=1):
        full.save(step)
        assert full.writing.result() == ""
        with open(tmp_path / "metrics.jsonl", "a") as file:  # validation comes after the checkpoint
            file.write(json.dumps({"kind": "val", "step": step, "loss": loss}) + "\n")
    kept = [checkpoint.step_of(path) for path in checkpoint.files(tmp_path)]
    assert kept == [2, 4, 5]
    release_locks()
    assert checkpoint.load(str(tmp_path))["step"] == 5
    assert "0000005.pt; " in capsys.readouterr().out
    assert checkpoint.load(f"{tmp_path}/best")["step"] == 2
    there = []

    def look(content, file, save=torch.save):
        there.extend(checkpoint.step_of(path) for path in checkpoint.files(tmp_path))
        save(content, file)

    monkeypatch.setattr(torch, "save", look)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    full.close(6)
    assert there == [2, 5], "4 has made room before 6 was written"
    monkeypatch.undo()

    def delete(path, missing_ok=False):
        if path.suffix == ".pt":
            raise PermissionError("another program has it open")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", delete)
        full.save(7)
        assert full.writing.result() == "", "the new one is whole, whatever happens to older ones"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    monkeypatch.setattr(
        torch, "save", Mock(side_effect=RuntimeError("enforce fail: unexpected pos"))
    )
    assert "0000008.pt NOT written: the disk has only 0.00 GB left" in full.close(8)
    monkeypatch.setattr(checkpoint, "best", Mock(side_effect=OSError("stale file handle")))
    full.save(9)
    full.save(10)  # the failed write does not end the run
    assert "stale file handle" in full.writing.result()


def test_resume_takes_settings_from_the_checkpoint(quiet):
    """--resume alone continues; what is given besides wins, is printed and recorded, except what
    would move the data or reshape the model."""
    folder = copy(quiet, "more")
    for flag, value in (("--seq_len", 8), ("--optimizer", "muon")):
        refused = run_here(quiet, "--out_dir", "more", "--resume", flag, value)
        one_line(refused, f"{flag} {value}: ")
    taken = ["--max_steps", 165, "--micro_batch", 2, "--checkpoint_every", 1]
    taken += ["--weight_decay", 0.25, "--val_every", 50]
    taken = train(quiet, "more", "--resume", *taken)
    assert "resuming from" in taken.stdout and len(losses(folder)) == 165
    content = torch.load(max(folder.glob("*.pt")), weights_only=True)
    assert [group["weight_decay"] for group in content["AdamW"]["param_groups"]] == [0.25, 0.0]
    (changed,) = records(folder, "resume")
    assert (changed["step"], changed["settings"]["weight_decay"]) == (160, 0.25)
    assert "'weight_decay': 0.25" in taken.stdout
    best = min(records(folder, "val")[:-1], key=lambda record: record["loss"])["step"]
    kept = [checkpoint.step_of(path) for path in checkpoint.files(folder)]
    assert kept == sorted({best, 164, 165}), "the best, and the newest two"
    for kind in ("val", "sample"):  # both were due at 160, and samples are due again
        assert [record["step"] for record in records(folder, kind)][-3:] == [80, 160, 165]
    anew = run_here(quiet, *RUN, "--out_dir", "more")
    assert anew.returncode == 2 and "--resume" in anew.stderr and len(losses(folder)) == 165


def test_what_a_folder_goes_through(quiet):
    """It is moved, a checkpoint is copied under another name, a power cut leaves half a record."""
    folder = copy(quiet, "log")  # the default, which is not where it ran
    (folder / "checkpoint_0000160.pt").unlink()
    shutil.copy(folder / "checkpoint_0000120.pt", folder / "checkpoint_best.pt")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\0\xff" * 100 + b"\n")
    done = run_here(quiet, "--resume")
    assert done.returncode == 0 and "checkpoint_0000120.pt" in done.stdout, done.stderr
    assert facts(folder) == facts(quiet / "quiet")
    assert (folder / "checkpoint_best.pt").exists()
    assert [checkpoint.step_of(path) for path in checkpoint.files(folder)][-2:] == [120, 160]


def test_damaged_checkpoints(quiet, capsys):
    """A damaged newest checkpoint is named and the one before taken; if none is whole, one line."""
    content = (quiet / "quiet/checkpoint_0000160.pt").read_bytes()
    half = content[: len(content) // 2]
    flipped = half + bytes([content[len(half)] ^ 1]) + content[len(half) + 1 :]
    for how, damaged in dict(truncated=half, empty=b"", flipped=flipped).items():
        folder = copy(quiet, f"damaged_{how}")
        (folder / "checkpoint_0000160.pt").write_bytes(damaged)
        for read in (checkpoint.newest, lambda folder: checkpoint.load(str(folder))):
            assert read(folder)["step"] == 120
            assert "checkpoint_0000160.pt is not a whole checkpoint" in capsys.readouterr().out
    for path in folder.glob("checkpoint_*.pt"):
        path.write_bytes(half)
    done = run_here(quiet, "--out_dir", folder.name, "--resume")
    assert "no checkpoint in damaged_flipped is whole" in done.stderr
    assert len(losses(folder)) == STEPS, "nothing is lost"


def test_divergence_stops_before_the_update(quiet):
    """A loss that is not finite: one line with the step, and the last good checkpoint stays."""
    folder = copy(quiet, "diverged")
    flags = ["--learning_rate", 1e30, "--min_lr_ratio", 1, "--grad_clip", 0, "--max_steps", 170]
    done = run_here(quiet, "--resume", "--checkpoint_every", 1, "--out_dir", "diverged", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    newest = max(folder.glob("checkpoint_*.pt"))
    assert "at step" in line and newest.name in line and "--resume" in line
    step = int(line.split("at step ")[1].split(";")[0])
    assert torch.load(newest, weights_only=True)["step"] == step - 1
    assert (folder / f"checkpoint_{step:07d}.bad").exists(), "its weights are not good"


def test_full_disk(quiet):
    """A checkpoint cannot be written: training goes on with a warning, the old one stays."""
    folder = copy(quiet, "full")
    before = (folder / "checkpoint_0000160.pt").read_bytes()
    limit = 'ulimit -f 2000; exec "$@"'  # blocks of 1 KiB: enough for records, not for a checkpoint
    resumed = command("train_gpt2.py", ["--out_dir", "full", "--resume", "--max_steps", 240])
    resumed = ["bash", "-c", limit, "bash", *resumed]
    done = subprocess.run(resumed, **options(quiet, {}), stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "checkpoint_0000240.pt NOT written" in done.stderr
    assert "checkpoint_0000200.pt NOT written" in done.stdout, "each failure is reported"
    assert len(losses(folder)) == 240
    assert (folder / "checkpoint_0000160.pt").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_output_that_cannot_be_written(quiet):
    """What is printed is lost, on a full disk or in an old encoding; the run is not."""
    with open("/dev/full", "w") as full:
        unsaid = command("train_gpt2.py", [*RUN, "--out_dir", "unsaid"])
        subprocess.run(unsaid, **options(quiet, {}) | dict(stdout=full, stderr=full), check=False)
    assert facts(quiet / "unsaid") == facts(quiet / "quiet")
    flags = ["--max_steps", 1, "--sample_every", 1, "--prompt", "\N{SNOWMAN}"]
    done = run(quiet, *RUN, *flags, "--out_dir", "ascii", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "samples\n?" in done.stdout, done.stderr


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
    np.save(shards / "edu_fineweb_train_000001.npy", np.array([Evil()], object), allow_pickle=True)
    for flags in (
        ["--out_dir", "evil", "--resume"],
        ["--init_from", "evil.pt", "--eval_only"],
        [*RUN, "--data", "evil_shards", "--out_dir", "evil_too"],
    ):
        one_line(run_here(quiet, *flags), "evil")
        assert not (quiet / "it_ran").exists()

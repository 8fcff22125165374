"""What a person sees of a run: its lines, the time left, warnings, and what it came to."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import records

from support import log

TRAIN = dict(loss=1.5, lr=1e-3, grad_norm=0.25, step_ms=1000.0, tokens_per_second=522123.4)
TRAIN |= dict(mfu=0.4567)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock.now += 1` makes a second pass."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = clock.time = lambda: clock.now
    monkeypatch.setattr(log, "time", clock)
    return clock


def make_log(folder, steps: int, **settings) -> log.Log:
    settings = dict(batch_tokens=100, val_every=0, hellaswag_every=0, sample_every=0) | settings
    network = dict(n_layer=12, n_embd=768)
    header = dict(settings=settings, network=network, command="x.py", device=dict(kind="cpu"))
    return log.Log(str(folder), 0, steps, header, 0)


def test_a_step_is_one_line_of_80_columns(tmp_path, clock, capsys):
    """At most one a second; every step is recorded, with values of one's own."""
    one = make_log(tmp_path, 18794)
    for step in range(18780, 18794):
        clock.now += 0.5
        one("train", step, TRAIN | dict(mine=torch.tensor(2.0), grad_norm=math.inf))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "step 18782 100% | loss 1.5000 | norm inf | 522k tok/s | mfu 46% | 0:00:06 left"
    )
    assert len(lines) == 8 and max(map(len, lines)) <= 80
    record = records(tmp_path, "train")[-1]
    assert (record["mine"], record["grad_norm"]) == (2.0, None)  # JSON has no infinity
    assert record["time"] == clock.now


def test_the_time_left_counts_evaluations(tmp_path, clock, capsys):
    """100 steps of 3 s, validation of 10 s every 40: at 0, 40, 80 and at the end."""
    one = make_log(tmp_path, 100, val_every=40)
    for step in range(51):
        if step % 40 == 0:
            clock.now += 10
            one("val", step, dict(loss=2.0, bits_per_byte=1.0))
        clock.now += 3 if step else 60  # the first step compiles
        one("train", step, TRAIN)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f" | 0:02:{49 * 3 + 2 * 10 - 120:02d} left")


def test_a_loss_that_keeps_rising_is_said(tmp_path, clock, capsys):
    one = make_log(tmp_path, 100)
    warned = []
    for step, loss in enumerate([2.0, 2.5, math.nan, 2.6, 2.7, 2.7, 2.8, 2.9, 3.0]):
        one("val", step, dict(loss=loss, bits_per_byte=1.0))
        warned.append("has risen three times" in capsys.readouterr().out)
    assert warned == [False] * 8 + [True]


def test_what_a_run_came_to(tmp_path, clock, capsys):
    """Killed after step 2, of which step 1 had to be repeated, and started 30 s later. By hand."""
    one = make_log(tmp_path, 4, val_every=1)
    for step in (0, 1):
        clock.now += 5
        one("train", step, TRAIN)
        clock.now += 2
        one("val", step + 1, dict(loss=3.0 - step, bits_per_byte=1.0))
    clock.now += 30
    header = one.header | dict(device=dict(kind="cpu"))
    two = log.Log(str(tmp_path), 1, 4, header, 0)
    for step in (1, 2, 3):
        clock.now += 5
        two("train", step, TRAIN)
    two("val", 4, dict(loss=2.5, bits_per_byte=1.0))
    two("hellaswag", 4, dict(acc=0.25, acc_norm=0.2990))
    two("sample", 4, dict(texts=["one\ntext", "another"]))
    two("one of yours", 4, dict(value=1.5))
    (tmp_path / "checkpoint_0000004.pt").touch()
    assert "one of yours | value 1.5\n" in capsys.readouterr().out
    two.close(4, "")
    said = capsys.readouterr().out.splitlines()
    (end,) = records(tmp_path, "end")
    # 4 steps of 5 s; 2 s of evaluation; 7 s of work done twice, and 30 s.
    assert end["training_seconds"] == pytest.approx(20)
    assert (end["evaluation_seconds"], end["lost_seconds"]) == pytest.approx((2, 37))
    assert (end["tokens"], end["restarts"], end["done"], end["step"]) == (400, 1, True, 4)
    assert (end["best_loss"], end["best_step"], end["hellaswag"]) == (2.5, 4, 0.2990)
    assert end["tokens_per_second"] == pytest.approx(100) and end["peak_memory"] > 1e8
    assert said[:2] == ["done: 4 steps", "400 tokens, 100 tokens/s in the median step"]
    times = "0:00:20 of training, 0:00:02 of evaluation, 0:00:37 lost in 1 restart; at most "
    assert said[2].startswith(times)
    assert said[3:5] == [
        "validation at step 4: 2.5000, 1.0000 bits per byte; the lowest of all",
        "HellaSwag acc_norm 0.2990 (OpenAI's model of this size: 0.2955)",
    ]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    clock.now += 3600
    again = log.Log(str(tmp_path), 4, 4, header, 0)  # --resume of a run that is over
    again("val", 4, dict(loss=2.5, bits_per_byte=1.0))
    again.close(4, "")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-len(said) :] == said
    page = (tmp_path / "report.md").read_text()
    assert all(f"    {line}" in page.splitlines() for line in [*said, "one", "text", "another"])

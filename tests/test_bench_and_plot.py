"""Test bench.py and plot.py, by their commands and by what they compute."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, records, run
from matplotlib.figure import Figure

import bench
import plot
from support import machine
from support.command import UserError

FAST = ["--rounds", "1", "--steps", "1", "--warmup", "1", "--network", "demo", "--device", "cpu"]


def command(name, *flags, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, flags)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


# --------------------------------------------------------------------------------------------------
# bench.py


@pytest.fixture(autouse=True)
def undo_patches(monkeypatch):
    """Restore what a rung replaces, since these tests call it in their own process."""
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.AdamW)
    monkeypatch.setattr(machine, "keep_freed_memory", machine.keep_freed_memory)


@pytest.fixture
def clock(monkeypatch):
    """A clock on which one thing after the other takes 1, 3, 5, ... seconds."""
    readings = itertools.accumulate(itertools.count())  # 0, 1, 3, 6, 10, 15, ...
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=readings.__next__))


def test_plain_attention_equals_torch_s():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 4)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(bench.plain_attention(q, k, v), fused)


def test_the_command_measures_and_plots_the_first_rungs(tmp_path):
    flags = ["--micro_batch", 2, "--until", "torch.compile", "--json", "b.json"]
    done = command("bench.py", *FAST, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "b.json").read_text())
    names = [rung["name"] for rung in result["rungs"]]
    assert names[0] == "float32" and "TF32" in result["skipped"]
    assert {*names, *result["skipped"]} == set(list(bench.RUNGS)[:4])
    for rung in result["rungs"]:
        assert rung["tokens_per_second"] == pytest.approx(2 * 32 / rung["ms"] * 1000)
        assert rung["name"] in done.stdout and rung["mfu"] is None and rung["memory"] > 2e8
    # The lecture's A100 took 1000 ms for 16 x 1024 tokens: 4.5% of 312 TFLOP/s.
    (first,) = [line for line in done.stdout.splitlines() if line.startswith("float32")]
    assert first.split()[-2:] == ["1000", "4.5%"]
    done = command("plot.py", "b.json", "--out", "b.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert matplotlib.image.imread(tmp_path / "b.png").std() > 0.05


def test_rounds_take_turns_and_the_table_is_right(monkeypatch, capsys):
    """Medians, ratios and MFU are calculated by hand."""
    asked = []
    ms = iter([400, 300, 100, 410, 330, 110, 900, 310, 90])
    missing = {"TF32", "bfloat16", "vocabulary 50304", "fused AdamW", "freed memory kept"}

    def answer(rung, argv):
        asked.append(rung)
        if rung == "peak":
            return {"peak": 1e12}
        if rung in missing:
            return {"skipped": "not here"}
        sizes = dict(micro_batch=8, seq_len=100, flops_per_token=10**8, memory=1)
        about = dict(device="x", device_type="cpu", dtype="float32", published_peak=None)
        return dict(ms=next(ms), **sizes, **about)

    monkeypatch.setattr(bench, "run_rung", answer)
    bench.main(["--rounds", "3", "--measure_peak"])
    measured = ["peak", "float32", "torch.compile", "flash attention"]
    assert [rung for rung in asked if rung not in missing] == measured * 3
    assert sum(rung in missing for rung in asked) == len(missing), "skipped once, skipped always"
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:18].strip(): line[18:].split() for line in lines}
    # 800 tokens in 410 ms are 1951 per second, of 1e8 operations each: 19.5% of 1e12.
    assert rows["float32"][:6] == ["410.0", "400-900", "1,951", "1.00", "1.00", "19.5%"]
    assert rows["torch.compile"][:5] == ["310.0", "300-330", "2,581", "1.32", "1.32"]
    assert rows["flash attention"][:5] == ["100.0", "90-110", "8,000", "3.10", "4.10"]
    assert rows["flash attention"][-2:] == ["96", "46.8%"]  # the lecture's A100
    assert rows["TF32"] == ["skipped:", "not", "here"]


SEEN = ("dtype", "compiled", "plain_attention", "vocabulary", "fused", "memory_kept")
RUNG_BY_RUNG = {
    "float32": (torch.float32, False, True, 50257, None, False),
    "bfloat16": (torch.bfloat16, False, True, 50257, None, False),
    "torch.compile": (torch.bfloat16, True, True, 50257, None, False),
    "flash attention": (torch.bfloat16, True, False, 50257, None, False),
    "vocabulary 50304": (torch.bfloat16, True, False, 50304, None, False),
    "fused AdamW": (torch.bfloat16, True, False, 50304, True, False),
    "freed memory kept": (torch.bfloat16, True, False, 50304, True, True),
}


@pytest.mark.parametrize("rung", RUNG_BY_RUNG)
def test_each_rung_adds_one_speedup(rung, clock, monkeypatch, capsys):
    seen = dict(compiled=False, memory_kept=False)

    def look(model, optimizers, *rest):
        (fused,) = {group["fused"] for group in optimizers[0].param_groups}
        attention = torch.nn.functional.scaled_dot_product_attention
        seen.update(fused=fused, plain_attention=attention is bench.plain_attention)
        seen.update(vocabulary=model.config.vocab_size, dtype=rest[-1].dtype)

    def note(name, answer):
        return lambda *_, **__: seen.update({name: True}) or answer

    monkeypatch.setattr(bench.train_gpt2, "train_step", look)
    monkeypatch.setattr(bench.GPT, "compile", note("compiled", None))
    monkeypatch.setattr(machine, "can_compile", lambda *_: True)
    monkeypatch.setattr(machine, "keep_freed_memory", note("memory_kept", True))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    bench.main([*FAST, "--only", rung])
    result = json.loads(capsys.readouterr().out)
    assert result["micro_batch"] == 24 and result["ms"] == 3000.0, "without the warmup"
    assert tuple(seen[name] for name in SEEN) == RUNG_BY_RUNG[rung]


def test_peak(clock, monkeypatch, capsys):
    """A product of two N x N matrices is 2 N^3 operations; six of them take 5, 7, ... 15 s."""
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: None)
    bench.main([*FAST, "--only", "peak"])
    assert json.loads(capsys.readouterr().out)["peak"] == 2 * 4096**3 / 10


def test_a_rung_without_enough_memory_is_skipped(monkeypatch, capsys):
    """torch or cuBLAS says so, or Linux kills the process. No other error is taken for that."""
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
    errors = iter([torch.OutOfMemoryError("CUDA out of memory"), cublas, RuntimeError("a bug")])

    def fail(*_):
        raise next(errors)

    monkeypatch.setattr(bench, "measure_rung", fail)
    for _ in range(2):
        bench.main([*FAST, "--only", "float32"])
        assert "out of memory" in json.loads(capsys.readouterr().out)["skipped"]
    with pytest.raises(RuntimeError, match="a bug"):
        bench.main([*FAST, "--only", "float32"])
    killed = subprocess.CompletedProcess([], -9)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: killed)
    assert "lack of memory" in bench.run_rung("float32", [])["skipped"]


def test_an_error_in_a_rung_s_process_is_one_line():
    done = command("bench.py", "--device", "nonsense")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("bench.py: --device nonsense")


# --------------------------------------------------------------------------------------------------
# plot.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plot")
    flags = [*TINY, "--val_every", 2, "--val_tokens", 160, "--data", ROOT / "input.txt"]
    done = run(folder, *flags)
    assert done.returncode == 0, done.stderr
    return folder / "log"


def dots(panel) -> list[list]:
    """The points that are drawn as dots, one list per run."""
    return [line.get_xydata().tolist() for line in panel.lines if line.get_marker() == "o"]


def test_runs_are_drawn_as_recorded(folder):
    one = plot.read_run(folder)
    seed = dataclasses.replace(one, settings=one.settings | {"seed": 2})
    muon = dataclasses.replace(one, settings=one.settings | {"optimizer": "muon"})
    names = ["optimizer adamw", "optimizer adamw", "optimizer muon"]
    assert plot.labels([one, seed, muon]) == names
    figure = Figure()
    plot.draw_runs(figure, [one, seed, muon], ["tokens", "seconds"], [(2, "killed")])
    tokens, seconds = figure.axes  # no HellaSwag in the records, no panel for it
    val = [record["loss"] for record in records(folder, "val")]
    ms = [record["step_ms"] for record in records(folder, "train")]
    at = [0, sum(ms[:2]) / 1000, sum(ms) / 1000]
    assert dots(tokens) == [[list(p) for p in zip([0, 256, 512], val, strict=True)]] * 3
    assert np.allclose(dots(seconds)[0], list(zip(at, val, strict=True)))
    assert len(tokens.get_legend().texts) == 2
    marks = [text for panel in figure.axes for text in panel.texts]  # and no GPT-2: other data
    assert [text.get_text() for text in marks] == ["killed"] * 2
    assert [text.xy[0] for text in marks] == pytest.approx([256, at[1]])


def test_hellaswag_and_gpt2_s_loss_are_drawn_for_fineweb(folder):
    run = plot.read_run(folder)
    run.settings["data"] = "edu_fineweb10B"
    run.records["hellaswag"] = {"step": np.array([2, 4]), "acc_norm": np.array([0.25, 0.26])}
    figure = Figure()
    plot.draw_runs(figure, [run], ["tokens"], [])
    loss, hellaswag = figure.axes
    assert [text.get_text() for text in loss.texts] == ["GPT-2 (124M) 3.2924"]
    assert dots(hellaswag) == [[[256, 0.25], [512, 0.26]]]
    assert len(hellaswag.texts) == 3
    plot.draw_runs(figure, [run], ["tokens"], with_gpt2=False)
    loss, hellaswag = figure.axes[2:]
    assert not loss.texts and [text.get_text() for text in hellaswag.texts] == ["chance 0.25"]


def test_bars_show_speedup_and_spread():
    """100 ms, and then 50 ms (40 to 100): once and twice as fast (1 to 2.5)."""
    rungs = [dict(name="a", ms=100, each_ms=[100], tokens_per_second=1)]
    rungs.append(dict(name="b", ms=50, each_ms=[40, 50, 100], tokens_per_second=2))
    figure = Figure()
    plot.draw_bench(figure, dict(rungs=rungs, micro_batch=1, seq_len=1, network="n", device="d"))
    (panel,) = figure.axes
    errors = panel.collections[0].get_segments()
    assert [bar.get_width() for bar in panel.patches] == [1.0, 2.0]
    assert [segment[:, 0].tolist() for segment in errors] == [[1.0, 1.0], [1.0, 2.5]]


def test_plot_command(folder, tmp_path):
    done = command("plot.py", folder, "--mark", "2=killed", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "wrote curve.png\n", done.stderr
    assert matplotlib.image.imread(tmp_path / "curve.png").std() > 0.05


def test_plot_refuses_what_it_cannot_draw(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "no_steps").write_text("".join(lines[:2]))
    (tmp_path / "a_step_missing").write_text("".join([*lines[:2], *lines[4:]]))
    (tmp_path / "b.json").write_text("{}")
    refused = [["nosuch"], ["no_steps"], ["a_step_missing"], ["b.json"], ["b.json", str(folder)]]
    refused += [[str(folder), "--out", "a.xyz"], [str(folder), "--mark", "5=too late"]]
    for flags in refused:
        with pytest.raises(UserError):
            plot.main(flags)

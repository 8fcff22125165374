"""Test bench.py, and then plot.py, by their commands and by what they compute."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import TINY, run, run_here
from matplotlib.figure import Figure

import bench
import plot
from support.command import UserError

FAST = ["--rounds", "1", "--steps", "1", "--warmup", "1", "--network", "demo", "--device", "cpu"]


def test_plain_attention_equals_torch_s():
    torch.manual_seed(0)
    inputs = dict(zip(("query", "key", "value"), torch.randn(3, 2, 3, 7, 4), strict=True))
    fused = torch.nn.functional.scaled_dot_product_attention(**inputs, is_causal=True)
    torch.testing.assert_close(bench.plain_attention(**inputs, is_causal=True), fused)


def test_the_command_measures_and_plots_the_first_rungs(tmp_path):
    flags = [*FAST, "--micro_batch", 2, "--until", "bfloat16", "--json", "b.json"]
    done = run(tmp_path, *flags, script="bench.py", TORCHINDUCTOR_COMPILE_THREADS="1")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "b.json").read_text())
    names = {rung["name"] for rung in result["rungs"]}
    assert names | {*result["skipped"]} == {"float32", "TF32", "bfloat16"}
    for rung in result["rungs"]:
        assert rung["tokens_per_second"] == pytest.approx(2 * 32 / rung["ms"] * 1000)
        assert rung["name"] in done.stdout and rung["mfu"] is None and rung["memory"] > 2e8
    done = run_here(tmp_path, "b.json", "--out", "b.png", script="plot.py")
    assert matplotlib.image.imread(tmp_path / "b.png").std() > 0.05, done.stderr


def test_the_table_and_the_bars(tmp_path, monkeypatch, capsys):
    """Medians of rounds that take turns, ratios and MFU, calculated by hand."""
    times = {"float32": [400, 410, 900], "torch.compile": [300, 330, 310]}
    times["flash attention"] = [100, 110, 90]
    asked = []

    def answer(rung, argv):
        asked.append(rung)
        if rung not in times:
            return {"skipped": "not here"}
        row = dict(micro_batch=8, seq_len=100, flops_per_token=10**8, memory=1, dtype="float32")
        row |= dict(device="x", device_type="cpu", published_peak=1e12)
        return row | dict(ms=times[rung][asked.count(rung) - 1])

    monkeypatch.setattr(bench, "run_rung", answer)
    bench.main(["--rounds", "3", "--json", str(tmp_path / "b.json")])
    assert asked[-6:] == ["float32", "torch.compile", "flash attention"] * 2
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:18].strip(): line[18:].split() for line in lines}
    # 800 tokens in 410 ms are 1951 per second, of 1e8 operations each: 19.5% of 1e12.
    assert rows["float32"][:6] == ["410.0", "400-900", "1,951", "1.00", "1.00", "19.5%"]
    assert rows["torch.compile"][:5] == ["310.0", "300-330", "2,581", "1.32", "1.32"]
    assert rows["flash attention"][:5] == ["100.0", "90-110", "8,000", "3.10", "4.10"]
    # The lecture's A100 took 96 ms for 16 x 1024 tokens: 46.8% of 312 TFLOP/s.
    assert rows["flash attention"][-2:] == ["96", "46.8%"]
    assert rows["TF32"] == ["skipped:", "not", "here"]
    figure = Figure()
    plot.draw_bench(figure, json.loads((tmp_path / "b.json").read_text()))
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([1, 410 / 310, 4.1])


def make_run(path, **columns) -> plot.Run:
    """200 steps of 10 tokens and 5 ms, with these columns; resumed once, and killed as it wrote."""
    settings = dict(data="x", batch_tokens=10, preset=path.name)
    steps = [dict(kind="train", step=i, loss=3.0, step_ms=5) for i in range(200)]
    steps = [step | {name: columns[name][i] for name in columns} for i, step in enumerate(steps)]
    steps[100:100] = [dict(kind="val", step=100, loss=8.0), dict(kind="resume", settings=settings)]
    header = dict(kind="header", settings=settings, time=1000.0)
    first, last = (dict(kind="val", step=step, loss=loss) for step, loss in ((0, 9.0), (200, 7.0)))
    rows = [header, first, *steps, last, dict(kind="yours", step=9, y=5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    return plot.read_run(path)


def draw(*args, **options) -> list:
    """The panels of a new figure."""
    figure = Figure()
    plot.draw_runs(figure, *args, **options)
    return figure.axes


def texts(panel_or_legend) -> list[str]:
    return [text.get_text() for text in panel_or_legend.texts]


def test_losses_last_values_and_marks_are_where_they_belong(tmp_path):
    """A step takes 36 seconds, and the restart after the hundredth an hour. The scale is
    logarithmic: 6 is in the middle of 3 and 12."""
    times = [1036.0 + 36 * i + 3600 * (i >= 100) for i in range(200)]
    runs = [make_run(tmp_path / "demo", time=times, loss=[12, *[3] * 199]) for _ in range(3)]
    for one, seed, optimizer in zip(runs, [1, 2, 2], ["adamw", "adamw", "muon"], strict=True):
        one.settings.update(seed=seed, optimizer=optimizer)
    panels = draw(runs, ["loss"], ["tokens", "steps", "hours"], marks=[(40, "killed")])
    for panel, mark, half, end in zip(panels, (400, 40, 0.4), (1e3, 100, 1), (2e3, 200, 3)):
        dots = [line.get_xydata() for line in panel.lines if line.get_marker() == "o"]
        assert np.allclose(dots, [[[0, 9.0], [half, 8.0], [end, 7.0]]] * 3)
        assert panel.get_xlim() == pytest.approx((0, end))
        assert [line.get_color() for line in panel.lines[:9:3]] == ["C0", "C0", "C2"]
        assert texts(panel.get_legend()) == ["optimizer adamw", "optimizer muon"]
        assert texts(panel) == ["7.0000"] * 3 + ["killed"]  # and no GPT-2: other data
        assert panel.texts[3].xy[0] == pytest.approx(mark)
        points = panel.transData.transform([(0, loss) for loss in (3, 6, 7, 8, 12)])
        low, middle, last, val, high = panel.transAxes.inverted().transform(points)[:, 1]
        assert 0 < low < val < high < 1 and middle == pytest.approx((low + high) / 2)
        heights = [text.get_position()[1] for text in panel.texts[:3]]
        assert heights == pytest.approx([last, last + 0.06, last + 0.12])
    assert make_run(tmp_path / "old").x["hours"][[100, 200]] * 3600 == pytest.approx([0.5, 1])
    assert [plot.short(y) for y in (2e9, 5e6, 7.5e3, 0.3)] == ["2B", "5M", "7.5K", "0.3"]


def test_baselines_are_for_the_size_and_the_data(tmp_path):
    one = make_run(tmp_path / "gpt2")
    one.records["hellaswag"] = [dict(step=200, acc_norm=0.26)]
    gpt2 = ["GPT-2 (124M) 3.2924", "chance 0.25", "GPT-2 (124M) 0.2955", "GPT-3 (124M) 0.337"]
    for n_embd, data in ((768, "edu_fineweb"), (1024, "edu_fineweb"), (768, "x")):
        one.settings.update(n_layer=12, n_embd=n_embd, data=data)
        found = [text for panel in draw([one]) for text in texts(panel)[:-1]]  # no last values
        assert found == (gpt2 if (n_embd, data) == (768, "edu_fineweb") else ["chance 0.25"])


def test_any_logged_value_is_drawn_and_smoothed_around_its_steps(tmp_path):
    """The means of a straight line, drawn in the middle of their windows, are on that line."""
    values = [None if i % 7 == 3 else 3.0 * i for i in range(200)]  # null: was not finite
    new = make_run(tmp_path / "new", entropy=values, mfu=[None] * 200)
    old = make_run(tmp_path / "old", note=["text"] * 200)
    (panel,) = draw([old], ["y"])  # of a kind of one's own
    assert panel.lines[0].get_xydata().tolist() == [[90, 5]]
    (panel,) = draw([old, new], ["entropy"])
    raw, smoothed = (line.get_xydata() for line in panel.lines)  # the other run is left out
    assert raw.tolist() == [[10 * i, 3.0 * i] for i in range(200) if i % 7 != 3]
    assert 160 < len(smoothed) < len(raw) and np.allclose(smoothed[:, 1], 0.3 * smoothed[:, 0])
    for name in ("x", "mfu", "note"):
        with pytest.raises(UserError, match=f"--y {name}: no run has .* there are .*entropy"):
            draw([old, new], ["loss", name])


def test_the_command_draws_a_real_run_and_refuses_what_is_none(tmp_path, monkeypatch):
    run_here(tmp_path, *TINY, "--val_every", 2, "--val_tokens", 160)
    with open(tmp_path / "log/metrics.jsonl", "ab") as file:
        file.write(b'\0\xff\n{"kind": "val", "st')  # after a power cut, and while it grows
    flags = ["--y", "loss", "lr", "bits_per_byte", "--x", "hours", "--mark", "2=killed"]
    done = run(tmp_path, "log", *flags, script="plot.py")
    assert done.returncode == 0 and done.stdout == "wrote curve.png\n", done.stderr
    assert matplotlib.image.imread(tmp_path / "curve.png").std() > 0.05
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.json").write_text("{}")
    for flags in ("nosuch", "b.json", "b.json log", "log --out a.xyz", "log --mark 5=late"):
        with pytest.raises(UserError):
            plot.main(flags.split())

"""Draw loss and HellaSwag accuracy of training runs, over the tokens they have seen.

    python plot.py log                          # one run, into curve.png
    python plot.py log log_mine log_yours       # several; seeds share a color
    python plot.py log --x steps hours          # over steps, and over the clock's hours
    python plot.py log --y lr grad_norm         # other values that train_gpt2.py logs
    python plot.py log --mark 120=kill 300=kill # with events marked at these steps
    python plot.py bench.json                   # what bench.py measured, as bars

It needs matplotlib, which the rest of this project does without: pip install matplotlib
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.command import OneLineParser, UserError, explain, run_command
from support.files import json_lines
from support.report import GPT2_HELLASWAG

# OpenAI's models, by layers and channels, as build-nanogpt quotes them: GPT-2's loss on FineWeb-Edu
# and GPT-3 in play.ipynb, GPT-2's HellaSwag in hellaswag.py. For other sizes we know no number.
BASELINES = {
    ("loss", 12, 768): {"GPT-2 (124M)": 3.2924},
    ("acc_norm", 12, 768): {"GPT-2 (124M)": GPT2_HELLASWAG[12, 768], "GPT-3 (124M)": 0.337},
    ("acc_norm", 48, 1600): {"GPT-2 (XL)": GPT2_HELLASWAG[48, 1600]},
}
X_NAMES = ("tokens", "steps", "hours", "seconds")
UNITS = {"loss": "loss (nats)", "tokens_per_second": "tokens/s"}
SMALL = dict(fontsize=9, color="dimgrey")
# Settings that do not make two runs different, besides all whose names end in _every.
NOT_IN_LABELS = {"seed", "out_dir", "resume", "device", "micro_batch", "prompt", "preset"}
NOT_DRAWN = {"header", "resume", "sample", "end"}  # lines of metrics.jsonl without curves


class Run(NamedTuple):
    settings: dict
    records: dict[str, list[dict]]  # by kind
    x: dict[str, np.ndarray]  # X_NAMES -> their values before each step and after the last


def read_run(path: Path) -> Run:
    """Read the metrics.jsonl of an --out_dir, or one itself. Raises UserError if it is not one."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    with explain(f"{path} is not a run's metrics.jsonl"):
        lines = [record for _, record in json_lines(path)]
        settings = lines[0]["settings"]
        settings["data"] = Path(settings["data"]).name
        kinds = {line["kind"] for line in lines} - NOT_DRAWN
        kinds = sorted(kinds, key=lambda kind: (kind != "train", kind == "val"))  # val is on top
        records = {kind: [line for line in lines if line["kind"] == kind] for kind in kinds}
        train = records.get("train")
        if not train or [line["step"] for line in train] != list(range(len(train))):
            raise ValueError("some training steps are missing")
        # Evaluations and restarts take time, too. Older runs recorded only that of the steps.
        times = [line.get("time") for line in (lines[0], *train)]
        if None in times:
            times = np.cumsum([0.0, *(line["step_ms"] / 1000 for line in train)])
        seconds = np.array(times) - times[0]
        steps = np.arange(len(times))
        x = dict(steps=steps, seconds=seconds, hours=seconds / 3600)
        return Run(settings, records, x | dict(tokens=settings["batch_tokens"] * steps))


def labels(runs: list[Run]) -> list[str]:
    """Name the settings in which the runs differ, apart from the seed."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    names = [name for name in names if name not in NOT_IN_LABELS and not name.endswith("_every")]
    names = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    texts = [", ".join(f"{name} {run.settings.get(name)}" for name in names) for run in runs]
    return texts if names else [run.settings["preset"] for run in runs]


def short(value: float, position: int = 0) -> str:
    """Write 5,000,000 as 5M and 2,000,000,000 as 2B. (matplotlib gives a tick's position, too.)"""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def smooth(values: np.ndarray) -> np.ndarray:
    """The means of windows of 1/50 of the values; those of x are the windows' centers."""
    width = max(1, len(values) // 50)
    return np.convolve(values, np.full(width, 1 / width), "valid")


def draw_curves(panel, runs: list[Run], y_name: str, x_name: str) -> list:
    """Draw the values of this name: of training steps thin and smoothed, of evaluations as dots.
    Runs that lack it are left out. -> the last line of each run"""
    names = labels(runs)
    last_lines = {}
    for i, run in enumerate(runs):
        color = f"C{names.index(names[i])}"  # runs with the same name share it
        for kind, lines in run.records.items():
            found = [(line["step"], line.get(y_name)) for line in lines]
            found = [(step, y) for step, y in found if isinstance(y, int | float)]
            if not found:
                continue
            steps, y = np.transpose(found)
            x = run.x[x_name][steps.astype(int)]
            if kind == "train":
                panel.plot(x, y, color=color, alpha=0.2, linewidth=0.5)
                (last_lines[i],) = panel.plot(smooth(x), smooth(y), color=color, linewidth=1)
            else:
                (last_lines[i],) = panel.plot(x, y, "o-", color=color, markersize=3, clip_on=False)
    if not last_lines:
        lines = [line for run in runs for lines in run.records.values() for line in lines]
        there = dict.fromkeys(n for line in lines for n in line if isinstance(line[n], int | float))
        raise UserError(f"--y {y_name}: no run has such numbers; there are {', '.join(there)}")
    if len(runs) > 1:
        lines = {names[i]: line for i, line in last_lines.items()}
        panel.legend(lines.values(), [name[:40] for name in lines], fontsize=9).set_in_layout(False)
    return list(last_lines.values())


def draw_baselines(panel, runs: list[Run], y_name: str) -> None:
    """Draw what OpenAI's models of these sizes reach, if all runs read FineWeb-Edu."""
    baselines = {"chance": 0.25} if y_name == "acc_norm" else {}
    if all("edu_fineweb" in run.settings["data"] for run in runs):
        for run in runs:
            size = (run.settings.get("n_layer"), run.settings.get("n_embd"))
            baselines |= BASELINES.get((y_name, *size), {})
    for name, value in baselines.items():
        panel.axhline(value, color="grey", linestyle="--", linewidth=1)
        x, side = (0.02, "top") if y_name == "loss" else (0.2, "bottom")  # where no curve is
        where = dict(va=side, transform=panel.get_yaxis_transform())
        panel.text(x, value, f"{name} {value}", **where, **SMALL)


def write_last_values(panel, last_lines: list) -> None:
    """Write each run's last value beside its end, or higher where another one is already."""
    height = -1.0  # of 1, the panel's
    for y, color in sorted((line.get_ydata()[-1], line.get_color()) for line in last_lines):
        height = max(height + 0.06, (panel.transScale + panel.transLimits).transform((0, y))[1])
        text = f"{y:.4f}" if 0.01 <= abs(y) < 1000 else short(y)
        panel.text(1.025, height, text, color=color, va="center", transform=panel.transAxes)


def draw_panel(panel, runs: list[Run], y_name: str, x_name: str, stand_in: bool) -> None:
    last_lines = draw_curves(panel, runs, y_name, x_name)
    draw_baselines(panel, [] if stand_in else runs, y_name)
    if y_name in ("loss", "bits_per_byte", "grad_norm"):  # the first would flatten the rest
        panel.set_yscale("log")
        low, high = panel.get_ylim()
        first = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8) if high < 5 * low else (1, 2, 5)
        ticks = [m * 10.0**e for e in range(-3, 4) for m in first]
        panel.set_yticks([y for y in ticks if low < y < high])
        panel.minorticks_off()
    panel.set_xlim(0, max(run.x[x_name][-1] for run in runs))
    panel.xaxis.set_major_formatter(short)
    panel.yaxis.set_major_formatter(short)
    write_last_values(panel, last_lines)
    hellaswag = "stand-in records, not HellaSwag" if stand_in else "HellaSwag"
    titles = dict(loss="training (lines), validation (dots)", acc_norm=hellaswag)
    panel.set(title=titles.get(y_name, ""), xlabel=x_name, ylabel=UNITS.get(y_name, y_name))


def draw_runs(figure, runs: list[Run], y_names=(), x_names=("tokens",), marks=(), stand_in=False):
    """Draw a panel for each y over each x: by default of the loss, and HellaSwag's accuracy if a
    run has it. `marks` are steps of the first run, with the texts to write there."""
    wanted = [(y_name, x_name) for y_name in y_names or ["loss"] for x_name in x_names]
    if not y_names and any("hellaswag" in run.records for run in runs):
        wanted.append(("acc_norm", x_names[0]))
    figure.set_size_inches(4.8 * len(wanted), 3.6)
    panels = figure.subplots(1, len(wanted), squeeze=False, subplot_kw=dict(ymargin=0.08))[0]
    for panel, (y_name, x_name) in zip(panels, wanted, strict=True):
        draw_panel(panel, runs, y_name, x_name, stand_in)
        for step, text in marks:
            if step not in range(len(runs[0].x[x_name])):
                raise UserError(f"--mark {step}={text}: there is no such step in the first run")
            x = runs[0].x[x_name][step]
            panel.axvline(x, color="grey", linestyle=":", linewidth=1)
            if y_name != "acc_norm":  # its curve would be in the way
                where = dict(xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top")
                panel.annotate(text, (x, 0.98), **where, **SMALL)


def draw_bench(figure, result: dict) -> None:
    """Draw each rung's speed as a multiple of the first one's, with the spread of its rounds."""
    rungs = result["rungs"]
    times = [(rung["ms"], max(rung["each_ms"]), min(rung["each_ms"])) for rung in rungs]
    speedups, slowest, fastest = rungs[0]["ms"] / np.transpose(times)
    figure.set_size_inches(6.4, 0.45 * len(rungs) + 1.2)
    panel = figure.subplots()
    names = [rung["name"] for rung in rungs]
    bars = panel.barh(names, speedups, xerr=[speedups - slowest, fastest - speedups], ecolor="grey")
    texts = [f"{rung['ms']:,.0f} ms, {rung['tokens_per_second']:,.0f} tokens/s" for rung in rungs]
    panel.bar_label(bars, texts, padding=6, fontsize=9)
    panel.invert_yaxis()
    size = f"{result['micro_batch']} x {result['seq_len']} tokens a step"
    panel.set_title(f"{result['network']} on {result['device']}, {size}", fontsize=10)
    panel.set(xlim=(0, 1.7 * max(speedups)), xlabel="times as fast as the first rung")


def mark(text: str) -> tuple[int, str]:
    step, _, label = text.partition("=")
    return int(step), label


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser("plot.py", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="an --out_dir, or bench.py's --json")
    add("--y", nargs="+", default=[], metavar="NAME", help="logged values to draw (default: loss)")
    add("--x", nargs="+", choices=X_NAMES, default=["tokens"], help="what to draw them over")
    add("--mark", nargs="+", type=mark, default=[], metavar="STEP=TEXT", help="mark events")
    add("--stand_in", action="store_true", help="say that the records are not HellaSwag's")
    add("--out", type=Path, default="curve.png", help="file to write (default: curve.png)")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out}: its name must end in .png, .pdf or .svg")
    if len(args.runs) > 1 and any(path.suffix == ".json" for path in args.runs):
        raise UserError("give one bench.py JSON, or several runs")
    with explain("matplotlib cannot be imported", "; pip install matplotlib"):
        from matplotlib.figure import Figure
        from PIL import Image  # comes with matplotlib
    figure = Figure(layout="tight")
    if args.runs[0].suffix == ".json":
        with explain(f"{args.runs[0]} is not from bench.py --json"):
            draw_bench(figure, json.loads(args.runs[0].read_text("utf-8")))
    else:
        draw_runs(figure, list(map(read_run, args.runs)), args.y, args.x, args.mark, args.stand_in)
    with explain(f"--out {args.out} cannot be written"):
        figure.savefig(args.out, dpi=150)
        if args.out.suffix == ".png":  # 64 colors are enough, and a third of the bytes
            Image.open(args.out).convert("RGB").quantize(64).save(args.out, optimize=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command("plot.py", main)

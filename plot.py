"""Draw loss and HellaSwag accuracy of training runs, over the tokens they have seen.

    python plot.py log                          # one run, into curve.png
    python plot.py log log_mine log_yours       # several; seeds share a color
    python plot.py log --x tokens seconds       # the loss over seconds of training, too
    python plot.py log --y lr grad_norm         # other values that train_gpt2.py logs
    python plot.py log --mark 120=kill 300=kill # with events marked at these steps
    python plot.py bench.json                   # what bench.py measured, as bars

It needs matplotlib, which the rest of this project does without: pip install matplotlib
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.command import OneLineParser, UserError, explain, run_command

# OpenAI's GPT-2 (124M): validation loss on FineWeb-Edu (build-nanogpt, play.ipynb), and HellaSwag
# by mean loss per token (build-nanogpt, hellaswag.py). GPT-3's 124M: GPT-3 paper, by play.ipynb.
GPT2_LOSS = 3.2924
HELLASWAG_LINES = {"GPT-2 (124M)": 0.2955, "GPT-3 (124M)": 0.337, "chance": 0.25}
SMALL = dict(fontsize=8, color="grey")
# Settings that do not make two runs different, besides all whose names end in _every.
NOT_IN_LABELS = {"seed", "out_dir", "resume", "device", "micro_batch", "prompt", "preset"}
KINDS = ("train", "val", "hellaswag")  # the lines of metrics.jsonl that are drawn


@dataclass
class Run:
    settings: dict
    records: dict[str, dict[str, np.ndarray]]  # kind -> column -> a value per line
    x: dict[str, np.ndarray]  # tokens seen and seconds trained before each step and after the last


def read_columns(lines: list[dict]) -> dict[str, np.ndarray]:
    """Name -> a value per line; NaN where it is absent, null, or not a number."""
    names = dict.fromkeys(name for line in lines for name in line if name != "kind")
    columns = {name: [line.get(name) for line in lines] for name in names}
    for name, values in columns.items():
        columns[name] = np.array([v if isinstance(v, int | float) else np.nan for v in values])
    return columns


def read_run(path: Path) -> Run:
    """Read the metrics.jsonl of an --out_dir, or one itself. Raises UserError if it is not one."""
    if path.is_dir():
        path = path / "metrics.jsonl"
    with explain(f"{path} is not a run's metrics.jsonl"):
        whole_lines = path.read_text("utf-8").rpartition("\n")[0]  # the last may still be growing
        lines = [json.loads(line) for line in whole_lines.splitlines()]
        settings = lines[0]["settings"]
        settings["data"] = Path(settings["data"]).name
        by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in KINDS}
        steps = [line["step"] for line in by_kind["train"]]
        if not steps or steps != list(range(len(steps))):
            raise ValueError("some training steps are missing")
        records = {kind: read_columns(by_kind[kind]) for kind in KINDS}
        tokens = settings["batch_tokens"] * np.arange(len(steps) + 1)
        seconds = np.concatenate([[0.0], records["train"]["step_ms"].cumsum() / 1000])
        return Run(settings, records, dict(tokens=tokens, seconds=seconds))


def labels(runs: list[Run]) -> list[str]:
    """Name the settings in which the runs differ, apart from the seed."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    names = [name for name in names if name not in NOT_IN_LABELS and not name.endswith("_every")]
    names = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    if not names:
        return [run.settings["preset"] for run in runs]
    return [", ".join(f"{name} {run.settings.get(name)}" for name in names) for run in runs]


def draw_reference(panel, name: str, value: float) -> None:
    panel.axhline(value, color="grey", linestyle="--", linewidth=1)
    where = dict(xycoords=("axes fraction", "data"), va="bottom")
    panel.annotate(f"{name} {value}", (0.02, value), **where, **SMALL)


def smooth(values: np.ndarray) -> np.ndarray:
    """The means of windows of 1/50 of the values; those of x are the windows' centers."""
    width = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], values.cumsum()])
    return (sums[width:] - sums[:-width]) / width


def draw_column(panel, runs: list[Run], y_name: str, x_name: str) -> None:
    """Draw the values of this name: of training steps thin and smoothed, of evaluations as dots.
    Runs that lack it are left out."""
    names = labels(runs)
    lines = {}
    for run, name in zip(runs, names, strict=True):
        color = f"C{names.index(name)}"  # runs with the same name share it
        for kind in (kind for kind in KINDS if y_name in run.records[kind]):
            columns = run.records[kind]
            known = np.isfinite(columns[y_name])
            x = run.x[x_name][columns["step"][known]]
            y = columns[y_name][known]
            if kind == "train":
                panel.plot(x, y, color=color, alpha=0.15, linewidth=0.5)
                panel.plot(smooth(x), smooth(y), color=color, alpha=0.6, linewidth=1)
            else:
                panel.plot(x, y, "o-", color=color, markersize=4)
            lines[name] = panel.lines[-1]
    if not lines:
        there = dict.fromkeys(n for run in runs for kind in KINDS for n in run.records[kind])
        raise UserError(f"--y {y_name}: no run has it; there are {', '.join(there)}")
    panel.set(xlabel=x_name, ylabel=y_name)
    panel.legend(lines.values(), lines.keys())


def draw_panel(panel, runs: list[Run], y_name: str, x_name: str, with_gpt2: bool) -> None:
    draw_column(panel, runs, y_name, x_name)
    if y_name == "loss":
        if with_gpt2 and all("edu_fineweb" in run.settings["data"] for run in runs):
            draw_reference(panel, "GPT-2 (124M)", GPT2_LOSS)
        # Cut off the first twentieth of a run, where the loss is far above the rest.
        rest = [run.records["train"]["loss"][len(run.x["tokens"]) // 20 :] for run in runs]
        panel.set_ylim(top=np.nanmax(np.concatenate(rest)) + 0.1)
        panel.set(ylabel="loss (nats)", title="training (thin), validation (dots)")
    if y_name == "acc_norm":
        for name, value in HELLASWAG_LINES.items():
            if with_gpt2 or name == "chance":
                draw_reference(panel, name, value)
        panel.set(ylabel="accuracy (acc_norm)", title="HellaSwag")


def draw_runs(figure, runs: list[Run], y_names=(), x_names=("tokens",), marks=(), with_gpt2=True):
    """Draw a panel for each y over each x: by default of the loss, and HellaSwag's accuracy if a
    run has it. `marks` are steps of the first run, with the texts to write there."""
    wanted = [(y_name, x_name) for y_name in y_names or ["loss"] for x_name in x_names]
    if not y_names and any("acc_norm" in run.records["hellaswag"] for run in runs):
        wanted.append(("acc_norm", "tokens"))
    figure.set_size_inches(6.4 * len(wanted), 4.8)
    panels = figure.subplots(1, len(wanted), squeeze=False)[0]
    for panel, (y_name, x_name) in zip(panels, wanted, strict=True):
        draw_panel(panel, runs, y_name, x_name, with_gpt2)
        for step, text in marks:
            if step not in range(len(runs[0].x[x_name])):
                raise UserError(f"--mark {step}={text}: there is no such step in the first run")
            x = runs[0].x[x_name][step]
            panel.axvline(x, color="grey", linestyle=":", linewidth=1)
            panel.annotate(text, (x, 0.7), xycoords=("data", "axes fraction"), rotation=90, **SMALL)


def draw_bench(figure, result: dict) -> None:
    """Draw each rung's speed as a multiple of the first one's, with the spread of its rounds."""
    rungs = result["rungs"]
    first_ms = rungs[0]["ms"]
    figure.set_size_inches(8, 0.6 * len(rungs) + 1.4)
    panel = figure.subplots()
    names = [rung["name"] for rung in rungs]
    speedups = [first_ms / rung["ms"] for rung in rungs]
    slowest = [first_ms / max(rung["each_ms"]) for rung in rungs]
    fastest = [first_ms / min(rung["each_ms"]) for rung in rungs]
    spread = [np.subtract(speedups, slowest), np.subtract(fastest, speedups)]
    bars = panel.barh(names, speedups, xerr=spread, color="C0", ecolor="grey")
    texts = [f"{rung['ms']:,.0f} ms, {rung['tokens_per_second']:,.0f} tokens/s" for rung in rungs]
    panel.bar_label(bars, texts, padding=6, fontsize=8)
    panel.invert_yaxis()
    size = f"{result['micro_batch']} x {result['seq_len']} tokens a step"
    panel.set_title(f"{result['network']} on {result['device']}, {size}", fontsize=10)
    panel.set(xlim=(0, 1.5 * max(speedups)), xlabel="times as fast as the first rung")


def mark(text: str) -> tuple[int, str]:
    step, _, label = text.partition("=")
    return int(step), label


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser("plot.py", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="an --out_dir, or bench.py's --json")
    add("--y", nargs="+", default=[], metavar="NAME", help="logged values to draw (default: loss)")
    add("--x", nargs="+", choices=["tokens", "seconds"], default=["tokens"], help="the x axes")
    add("--mark", nargs="+", type=mark, default=[], metavar="STEP=TEXT", help="mark events")
    add("--no-gpt2", dest="gpt2", action="store_false", help="leave out GPT-2's own figures")
    add("--out", type=Path, default="curve.png", help="file to write (default: curve.png)")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out}: its name must end in .png, .pdf or .svg")
    if len(args.runs) > 1 and any(path.suffix == ".json" for path in args.runs):
        raise UserError("give one bench.py JSON, or several runs")
    with explain("matplotlib cannot be imported", "; pip install matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(layout="tight")
    if args.runs[0].suffix == ".json":
        with explain(f"{args.runs[0]} is not from bench.py --json"):
            draw_bench(figure, json.loads(args.runs[0].read_text("utf-8")))
    else:
        runs = [read_run(path) for path in args.runs]
        draw_runs(figure, runs, args.y, args.x, args.mark, args.gpt2)
    with explain(f"--out {args.out} cannot be written"):
        figure.savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command("plot.py", main)

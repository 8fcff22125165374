"""Draw loss and HellaSwag accuracy of training runs, over the tokens they have seen.

    python plot.py log                          # one run, into curve.png
    python plot.py log log_mine log_yours       # several; seeds share a color
    python plot.py log --x tokens seconds       # the loss over seconds of training, too
    python plot.py log --mark 120=kill 300=kill # with events marked at these steps
    python plot.py log --no-gpt2                # without GPT-2's figures, for other data
    python plot.py bench.json                   # what bench.py measured, as bars

It needs matplotlib, which the rest of this project does without: pip install matplotlib
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.command import OneLineParser, UserError, run_command

# OpenAI's GPT-2 (124M): validation loss on FineWeb-Edu (build-nanogpt, play.ipynb), and HellaSwag
# by mean loss per token (build-nanogpt, hellaswag.py). GPT-3's 124M: GPT-3 paper, by play.ipynb.
GPT2_LOSS = 3.2924
HELLASWAG_LINES = {"GPT-2 (124M)": 0.2955, "GPT-3 (124M)": 0.337, "chance": 0.25}
SMALL = dict(fontsize=8, color="grey")
# Settings that do not make two runs different, besides all whose names end in _every.
NOT_IN_LABELS = {"seed", "out_dir", "resume", "device", "micro_batch", "prompt", "preset"}
# What is read from metrics.jsonl, besides each line's step, by the kind of line.
COLUMNS = {"train": ("loss", "step_ms"), "val": ("loss",), "hellaswag": ("acc_norm",)}


@dataclass
class Run:
    settings: dict
    records: dict[str, dict[str, np.ndarray]]  # kind -> column -> values
    tokens: np.ndarray  # seen before each step, and after the last
    seconds: np.ndarray  # of training until then


def read_run(path: Path) -> Run:
    """Read the metrics.jsonl of an --out_dir, or one itself. Raises UserError if it is not one."""
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        whole_lines = path.read_text("utf-8").rpartition("\n")[0]  # the last may still be growing
        lines = [json.loads(line) for line in whole_lines.splitlines()]
        settings = lines[0]["settings"]
        settings["data"] = Path(settings["data"]).name
        records = {}
        for kind, names in COLUMNS.items():
            rows = [line for line in lines if line["kind"] == kind]
            columns = {name: np.array([row[name] for row in rows], float) for name in names}
            records[kind] = {"step": np.array([row["step"] for row in rows], int), **columns}
        steps = len(records["train"]["step"])
        if steps == 0 or records["train"]["step"].tolist() != list(range(steps)):
            raise ValueError("some training steps are missing")
        tokens = settings["batch_tokens"] * np.arange(steps + 1)
        seconds = np.concatenate([[0.0], records["train"]["step_ms"].cumsum() / 1000])
        return Run(settings, records, tokens, seconds)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not a run's metrics.jsonl: {error!r}") from None


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


def draw_losses(panel, runs: list[Run], x_name: str, with_gpt2: bool) -> None:
    names = labels(runs)
    for i, run in enumerate(runs):
        train, val = run.records["train"], run.records["val"]
        first = names.index(names[i])  # of the runs with this name: they share color and label
        color = f"C{first}"
        x = getattr(run, x_name)
        panel.plot(x[:-1], train["loss"], color=color, alpha=0.15, linewidth=0.5)
        width = max(1, len(train["loss"]) // 50)  # of the window that smooths the curve
        means = np.convolve(train["loss"], np.full(width, 1 / width), "valid")
        panel.plot(x[width - 1 : -1], means, color=color, alpha=0.6, linewidth=1)
        label = names[i] if i == first else None
        panel.plot(x[val["step"]], val["loss"], "o-", color=color, markersize=4, label=label)
    if with_gpt2 and all("edu_fineweb" in run.settings["data"] for run in runs):
        draw_reference(panel, "GPT-2 (124M)", GPT2_LOSS)
    # Cut off the first twentieth of a run, where the loss is far above the rest.
    rest = [run.records["train"]["loss"][len(run.tokens) // 20 :] for run in runs]
    panel.set_ylim(top=np.nanmax(np.concatenate(rest)) + 0.1)
    panel.set(xlabel=x_name, ylabel="loss (nats)", title="training (thin), validation (dots)")
    panel.legend()


def draw_hellaswag(panel, runs: list[Run], with_gpt2: bool) -> None:
    names = labels(runs)
    for run, name in zip(runs, names, strict=True):
        scores = run.records["hellaswag"]
        color = f"C{names.index(name)}"
        panel.plot(run.tokens[scores["step"]], scores["acc_norm"], "o-", color=color, markersize=4)
    for name, value in HELLASWAG_LINES.items():
        if with_gpt2 or name == "chance":
            draw_reference(panel, name, value)
    panel.set(xlabel="tokens", ylabel="accuracy (acc_norm)", title="HellaSwag")


def draw_runs(figure, runs: list[Run], x_names: list[str], marks=(), with_gpt2=True) -> None:
    """Draw a panel of losses for each x, and one of HellaSwag if a run has scores. `marks` are
    steps with the texts to write there."""
    has_scores = any(len(run.records["hellaswag"]["step"]) for run in runs)
    count = len(x_names) + has_scores
    figure.set_size_inches(6.4 * count, 4.8)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel, x_name in zip(panels, x_names, strict=False):
        draw_losses(panel, runs, x_name, with_gpt2)
    if has_scores:
        draw_hellaswag(panels[-1], runs, with_gpt2)
    for step, text in marks:
        if step not in range(len(runs[0].tokens)):
            raise UserError(f"--mark {step}={text}: there is no such step in the first run")
        for panel, x_name in zip(panels, [*x_names, "tokens"], strict=False):
            x = getattr(runs[0], x_name)[step]
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
    parser = OneLineParser("plot.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="an --out_dir, or bench.py's --json")
    add("--x", nargs="+", choices=["tokens", "seconds"], default=["tokens"], help="the x axes")
    add("--mark", nargs="+", type=mark, default=[], metavar="STEP=TEXT", help="mark events")
    add("--no-gpt2", dest="gpt2", action="store_false", help="leave out GPT-2's own figures")
    add("--out", type=Path, default="curve.png", help="file to write (default: curve.png)")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out}: its name must end in .png, .pdf or .svg")
    if len(args.runs) > 1 and any(path.suffix == ".json" for path in args.runs):
        raise UserError("give one bench.py JSON, or several runs")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot.py needs matplotlib: pip install matplotlib") from None
    figure = Figure(layout="tight")
    if args.runs[0].suffix == ".json":
        try:
            draw_bench(figure, json.loads(args.runs[0].read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{args.runs[0]} is not from bench.py --json: {error!r}") from None
    else:
        draw_runs(figure, [read_run(path) for path in args.runs], args.x, args.mark, args.gpt2)
    figure.savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command("plot.py", main)

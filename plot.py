"""
Draw what a run recorded: loss and HellaSwag over the tokens seen, into curve.png.

    python plot.py log                          # one run
    python plot.py log log_mine log_yours       # several in one picture; other seeds share a colour
    python plot.py log --x tokens seconds       # and over the seconds that training took
    python plot.py bench.json                   # what bench.py measured, as bars

It needs matplotlib, which nothing else here does: pip install matplotlib
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fineweb import UserError

# OpenAI's GPT-2 (124M): validation loss on FineWeb-Edu (build-nanogpt, play.ipynb), and HellaSwag
# by ending's mean (build-nanogpt, hellaswag.py). GPT-3's 124M: the GPT-3 paper, by play.ipynb.
GPT2_LOSS, GPT2_HELLASWAG, GPT3_HELLASWAG, CHANCE = 3.2924, 0.2955, 0.337, 0.25
X_LABELS = {"tokens": "tokens seen", "seconds": "seconds of training"}
AT_THE_LEFT = dict(xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="grey")
# Settings that make no other kind of run, as do all that end in _every.
PLACES = {"seed", "out_dir", "resume", "device", "micro_batch", "prompt", "preset"}


@dataclass
class Run:
    """What metrics.jsonl holds, by kind; `tokens` and `seconds` are those before each step, and
    `settings` those of its header, with the data's name alone."""

    settings: dict
    kinds: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    tokens: np.ndarray = None
    seconds: np.ndarray = None


def read_run(path: Path) -> Run:
    """The run of an --out_dir or a metrics.jsonl. Raises UserError if it is none."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        whole = path.read_text("utf-8").rpartition("\n")[0]  # a kill can halve the last line
        records = [json.loads(line) for line in whole.splitlines()]
        run = Run(records[0]["settings"])
        wanted = {"train": ("loss", "step_ms", "tokens_per_second"), "val": ("loss",)}
        for kind, names in (wanted | {"hellaswag": ("acc_norm",)}).items():
            rows = [record for record in records if record["kind"] == kind]
            columns = {name: np.array([row[name] for row in rows], float) for name in names}
            run.kinds[kind] = columns | {"step": np.array([row["step"] for row in rows], int)}
        run.settings["data"] = Path(run.settings["data"]).name
        train = run.kinds["train"]
        steps = len(train["step"])
        if not steps or train["step"].tolist() != list(range(steps)):
            raise ValueError("its training steps are not all there")
        seconds = train["step_ms"] / 1000
        run.seconds = np.concatenate([[0.0], seconds.cumsum()])
        tokens = np.rint(train["tokens_per_second"] * seconds)  # a growing batch has more each time
        run.tokens = np.concatenate([[0.0], tokens.cumsum()])
        return run
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the --out_dir of a run") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is no metrics.jsonl ({type(error).__name__}: {error})") from None


def labels(runs: list[Run]) -> list[str]:
    """What tells the runs apart: the settings in which they differ, but for the seed."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    names = [name for name in names if name not in PLACES and not name.endswith("_every")]
    names = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    if not names:
        return [run.settings["preset"] for run in runs]
    return [", ".join(f"{name} {run.settings.get(name)}" for name in names) for run in runs]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """(N,) -> (N,), each the mean of the last `width` values, or of as many as there are."""
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_runs(plt, runs: list[Run], axes_of_x: list[str]):
    scored = any(len(run.kinds["hellaswag"]["step"]) for run in runs)
    figure, panels = plt.subplots(
        1, len(axes_of_x) + scored, figsize=(6.4 * (len(axes_of_x) + scored), 4.8), squeeze=False
    )
    names, colours, shown = labels(runs), {}, set()
    of_edu = all("edu_fineweb" in run.settings["data"] for run in runs)
    for run, name in zip(runs, names, strict=True):
        colour = colours.setdefault(name, f"C{len(colours)}")
        train, val, hellaswag = (run.kinds[kind] for kind in ("train", "val", "hellaswag"))
        for panel, x_of in zip(panels[0], axes_of_x, strict=False):
            at = getattr(run, x_of)
            x, width = at[train["step"]], max(1, len(train["step"]) // 50)
            label = None if (x_of, name) in shown else name
            shown.add((x_of, name))
            panel.plot(x, train["loss"], color=colour, alpha=0.15, linewidth=0.5)
            panel.plot(x, smooth(train["loss"], width), color=colour, alpha=0.6, linewidth=1)
            panel.plot(at[val["step"]], val["loss"], "o-", color=colour, markersize=4, label=label)
        if len(hellaswag["step"]):
            x = run.tokens[hellaswag["step"]]
            panels[0][-1].plot(x, hellaswag["acc_norm"], "o-", color=colour, markersize=4)
    for panel, x_of in zip(panels[0], axes_of_x, strict=False):
        if of_edu:
            panel.axhline(GPT2_LOSS, color="grey", linestyle="--", linewidth=1)
            panel.annotate(f"GPT-2 (124M) {GPT2_LOSS}", (0.02, GPT2_LOSS), **AT_THE_LEFT)
        # The first twentieth falls off the picture where it is far above the rest.
        later = [loss[len(loss) // 20 :] for loss in (run.kinds["train"]["loss"] for run in runs)]
        later = np.concatenate([*later, [GPT2_LOSS] if of_edu else []])
        panel.set_ylim(later.min() - 0.1, later.max() + 0.1)
        panel.set(xlabel=X_LABELS[x_of], ylabel="loss, nats a token")
        panel.set_title("loss: training (thin), validation (dots)", fontsize=10)
        panel.legend()
    if scored:
        for value, name in (
            (GPT2_HELLASWAG, f"GPT-2 (124M) {GPT2_HELLASWAG}"),
            (GPT3_HELLASWAG, f"GPT-3 (124M) {GPT3_HELLASWAG}"),
            (CHANCE, f"chance {CHANCE}"),
        ):
            panels[0][-1].axhline(value, color="grey", linestyle="--", linewidth=1)
            panels[0][-1].annotate(name, (0.02, value), **AT_THE_LEFT)
        panels[0][-1].set(xlabel=X_LABELS["tokens"], ylabel="share of right choices")
        panels[0][-1].set_title("HellaSwag, acc_norm", fontsize=10)
    return figure


def draw_bench(plt, result: dict):
    """Bars: how many times as fast as the first rung each one is."""
    rungs = result["rungs"]
    figure, panel = plt.subplots(figsize=(8, 0.6 * len(rungs) + 1.4))
    names = [rung["name"] for rung in rungs]
    times = [rungs[0]["ms"] / rung["ms"] for rung in rungs]
    spread = [
        [t - rungs[0]["ms"] / max(rung["each_ms"]) for t, rung in zip(times, rungs, strict=True)],
        [rungs[0]["ms"] / min(rung["each_ms"]) - t for t, rung in zip(times, rungs, strict=True)],
    ]
    bars = panel.barh(names, times, xerr=spread, color="C0", ecolor="grey")
    texts = [f"{rung['ms']:,.0f} ms, {rung['tokens_per_second']:,.0f} tokens/s" for rung in rungs]
    panel.bar_label(bars, texts, padding=6, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.5 * max(times))
    size = f"{result['micro_batch']} x {result['seq_len']} tokens a step"
    panel.set_title(f"{result['network']} on {result['device']}, {size}", fontsize=10)
    panel.set_xlabel("times as fast as the first rung")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("plot.py", description=__doc__.split("\n\n")[0].strip())
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="an --out_dir, or bench.py's JSON")
    add("--x", nargs="+", choices=list(X_LABELS), default=["tokens"], help="(default: tokens)")
    add("--out", type=Path, default="curve.png", help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out}: give a name that ends in .png, .pdf or .svg")
    if len(args.runs) > 1 and any(path.suffix == ".json" for path in args.runs):
        raise UserError("bench.py's JSON is drawn by itself: give one file")
    try:
        import matplotlib
    except ImportError:
        raise UserError("plot.py needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # draws into a file, with no screen
    import matplotlib.pyplot as plt

    if args.runs[0].suffix == ".json":
        try:
            figure = draw_bench(plt, json.loads(args.runs[0].read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{args.runs[0]} is not bench.py's --json ({error})") from None
    else:
        figure = draw_runs(plt, [read_run(path) for path in args.runs], args.x)
    figure.tight_layout()
    figure.savefig(args.out, dpi=120)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)

"""What a run came to: its last lines, its `end` record, and report.md, all from metrics.jsonl."""

import importlib.util
import statistics
import subprocess
import sys
from collections import defaultdict
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from support import checkpoint
from support.files import whole_file

GPT2_HELLASWAG = {
    (12, 768): 0.2955,
    (48, 1600): 0.4893,
}  # acc_norm of OpenAI's model, by layers and channels


def summarize(records: list[dict], batch_tokens: int, step: int) -> dict:
    """What the records of a run of `step` steps add up to. Times are in seconds.

    The time up to a record belongs to what was recorded: a step's to training, an evaluation's to
    evaluation. What passed before a `resume` since the last record that it kept is lost, but for
    the pause after a run that was stopped.
    """
    seconds = defaultdict(float)
    for before, record in pairwise(records):
        names = {"train": "training", "resume": "lost", "end": "writing the last checkpoint"}
        kind = names.get(record["kind"], "evaluation")
        if before["kind"] == "end":
            kind = "a pause"
        if "time" in before and "time" in record:
            seconds[kind] += record["time"] - before["time"]
    of_kind = defaultdict(list)
    for record in records:
        of_kind[record["kind"]].append(record)
    end = dict(
        tokens=step * batch_tokens,
        training_seconds=seconds["training"],
        evaluation_seconds=seconds["evaluation"],
        lost_seconds=seconds["lost"],
        restarts=len(of_kind["resume"]),
    )
    if of_kind["train"]:
        middle = statistics.median(record["step_ms"] for record in of_kind["train"])
        end["tokens_per_second"] = 1000 * batch_tokens / middle
    known = [record for record in of_kind["val"] if record["loss"] is not None]
    if known:
        best = min(known, key=lambda record: record["loss"])
        end |= {f"val_{name}": known[-1][name] for name in ("step", "loss", "bits_per_byte")}
        end |= dict(best_loss=best["loss"], best_step=best["step"])
    if of_kind["hellaswag"]:
        end["hellaswag"] = of_kind["hellaswag"][-1]["acc_norm"]
    return end


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def lines_of(header: dict, end: dict, words: str, folder: Path) -> list[str]:
    """The last lines of a run."""
    lines = [words, f"{end['tokens']:,} tokens"]
    if "tokens_per_second" in end:
        lines[1] += f", {end['tokens_per_second']:,.0f} tokens/s in the median step"
    times = f"{clock(end['training_seconds'])} of training"
    times += f", {clock(end['evaluation_seconds'])} of evaluation"
    if end["restarts"]:
        restarts = "1 restart" if end["restarts"] == 1 else f"{end['restarts']} restarts"
        times += f", {clock(end['lost_seconds'])} lost in {restarts}"
    memory = f"; at most {end['peak_memory'] / 1e9:.2f} GB of memory" if end["peak_memory"] else ""
    memory += " since then" if memory and end["restarts"] else ""
    lines.append(times + memory)
    if "val_loss" in end:
        lowest = f"the lowest was {end['best_loss']:.4f}, at step {end['best_step']}"
        lowest = "the lowest of all" if end["val_loss"] == end["best_loss"] else lowest
        bits = f"{end['val_bits_per_byte']:.4f} bits per byte"
        lines.append(
            f"validation at step {end['val_step']}: {end['val_loss']:.4f}, {bits}; {lowest}"
        )
    if "hellaswag" in end:
        network = header["network"]
        theirs = GPT2_HELLASWAG.get((network["n_layer"], network["n_embd"]))
        beside = f" (OpenAI's model of this size: {theirs})" if theirs else ""
        lines.append(f"HellaSwag acc_norm {end['hellaswag']:.4f}{beside}")
    if kept := checkpoint.files(folder):
        lines.append(f"newest checkpoint: {kept[-1]}; next:")
        lines.append(f"    python sample.py --model {folder}")
        lines.append(f"    python export.py {folder} {folder.name}-gpt2")
    return lines


def write(folder: Path, header: dict, records: list[dict], end: dict, words: str) -> str:
    """Write report.md, and, where matplotlib is installed, a curve of a run of a minute or more
    -> the last lines of the run. `words` say how it ended."""
    lines = lines_of(header, end, words, folder)
    command = (records or [header])[0].get("command", header["command"])
    page = [f"# The run in {folder}", "", f"`{command}`", ""]
    page += [f"    {line}" for line in lines]
    samples = [record for record in records if record["kind"] == "sample"]
    if samples:
        page += ["", f"Samples at step {samples[-1]['step']}:", ""]
        text = "\n---\n".join(samples[-1]["texts"])
        page += [f"    {line}" for line in text.splitlines()]
    if end["training_seconds"] > 60 and importlib.util.find_spec("matplotlib"):
        plot = Path(__file__).parent.parent / "plot.py"
        command = [sys.executable, plot, folder, "--out", folder / "curve.png"]
        done = subprocess.run(command, check=False, capture_output=True)
        page += ["", "![the losses](curve.png)"] if done.returncode == 0 else []
    with whole_file(folder / "report.md") as file:
        file.write(("\n".join(page) + "\n").encode())
    return "\n".join(lines)

"""README.md's own figures, recomputed from what the runs in runs/ recorded."""

import json
import re
import statistics

import numpy as np
import pytest
from helpers import ROOT

README = " ".join((ROOT / "README.md").read_text().split())
RUNS = ROOT / "runs"


def says(text: str) -> None:
    assert " ".join(text.split()) in README


def metrics(name: str, kind: str) -> list[dict]:
    lines = (RUNS / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def numbers(name: str, pattern: str) -> list[tuple[float, ...]]:
    """The groups of all matches in a run's result.txt."""
    found = re.findall(pattern, (RUNS / name / "result.txt").read_text(), re.MULTILINE)
    assert found, pattern
    rows = [row if isinstance(row, tuple) else (row,) for row in found]
    return [tuple(float(value.replace(",", "")) for value in row) for row in rows]


def test_demo():
    last = metrics("demo-cpu", "val")[-1]
    assert last["step"] == len(metrics("demo-cpu", "train")) == 1000
    loss, bits = f"{last['loss']:.4f}", f"{last['bits_per_byte']:.3f}"
    says(f"ended at a validation loss of {loss}, which is {bits} bits per byte")
    first = metrics("demo-cpu", "val")[0]["loss"]
    says(f"The loss begins at {first:.1f}")
    (sample,) = re.findall(
        r"one of which was\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    (written,) = metrics("demo-cpu", "sample")[-1:]
    assert any(sample.strip() in text for text in written["texts"])


@pytest.mark.parametrize("network", ["124M", "demo"])
def test_step(network):
    label = {"124M": "124M, 4 x 256 tokens, eager", "demo": "demo, 24 x 32 tokens, eager"}[network]
    pattern = r"{} +{} +([\d,]+) tokens/s .*?, ([\d.]+) times transformers', peak ([\d.]+) GB"
    for variant, shown in (
        ("ours eager", label),
        ("ours compiled", f"{network}, compiled"),
        ("transformers", f"{network}, transformers"),
    ):
        ((speed, times, peak),) = numbers("step-cpu", pattern.format(network, variant))
        times = "1" if variant == "transformers" else f"{times:.2f}"
        says(f"| {shown} | {speed:,.0f} | {times} | {peak:.2f} GB |")


def test_share_of_training():
    text = (RUNS / "step-cpu" / "share.txt").read_text()
    share = dict(re.findall(r"^(.+): ([\d.]+%) of the run$", text, re.MULTILINE))
    assert float(share["together"].rstrip("%")) < 5
    says(f"{share['validation']} validation, {share['HellaSwag']} HellaSwag")
    says(f"together {share['together']}")
    for name in ("demo", "124M"):
        seconds = re.search(rf"^{name}.*?: ([\d.]+) s to the first step", text, re.MULTILINE)[1]
        assert float(seconds) < 10
        says(f"{seconds} seconds ({name})")
    few, many = re.findall(r"shards? of \d+M tokens: [\d.]+ s to the first step, ([\d.]+) GB", text)
    says(f"{few} GB with one shard of 1M tokens, {many} GB with twenty of 50M")


def test_sampling():
    for size, times in numbers("sampling-cpu", r"^4 x (\d+): ([\d.]+) times as fast"):
        says(
            f"{times:.1f}"
            + (" times as fast for" if size == 32 else " times for")
            + f" 4 x {size:.0f}"
        )


def test_fineweb():
    columns = {
        way: [row[0] for row in numbers("fineweb-cpu", rf"^\({way}\) .*? median ([\d.]+)M")]
        for way in ("a", "b", "c")
    }
    columns["c"] = columns["c"][::2]  # every second line of (c) is without start and exit
    a, b, c = (np.array(columns[way]) for way in "abc")
    assert len(a) == len(b) == len(c) == 3
    speed = statistics.median(c)
    says(f"{speed:.2f} million tokens a second as a whole command")
    says(f"{np.median(c / a):.2f} times the lecture's way")
    says(f"{np.median(c / b):.2f} of raw tiktoken")
    hours = 9_953_989_101 / (1e6 * speed) / 3600
    says(f"the 9.95B tokens of sample-10BT take {hours:.2f} hours of two cores")


def test_hellaswag():
    medians = numbers("hellaswag-cpu", r"^medians: ([\d.]+), ([\d.]+), ([\d.]+)x")
    for (theirs, ours, times), dtype in zip(medians, ("float32", "bfloat16"), strict=True):
        says(f"| {dtype} | {theirs:.2f} | {ours:.2f} | {times:.2f} |")


def test_muon():
    """The last losses of three seeds each, and when Muon's mean has come to AdamW's last."""
    curves, seconds = {}, {}
    for optimizer in ("adamw", "muon"):
        runs = [f"muon-cpu/{optimizer}-{seed}" for seed in (1337, 1, 2)]
        val = np.array([[record["loss"] for record in metrics(run, "val")] for run in runs])
        last = [metrics(run, "val")[-1] for run in runs]
        bits = np.mean([record["bits_per_byte"] for record in last])
        ms = [[record["step_ms"] for record in metrics(run, "train")] for run in runs]
        curves[optimizer] = val.mean(axis=0)
        seconds[optimizer] = np.mean(np.sum(ms, axis=1)) / 1000
        losses = ", ".join(f"{loss:.3f}" for loss in val[:, -1])
        says(f"| {optimizer} | {losses} | {bits:.3f} | {seconds[optimizer]:.0f} |")
        steps = [record["step"] for record in metrics(runs[0], "val")]
    reached = steps[int(np.argmax(curves["muon"] <= curves["adamw"][-1]))]
    says(f"Muon's mean loss is below AdamW's last one at step {reached} of 1,000")


@pytest.mark.parametrize("network", ["gpt2", "demo"])
def test_bench(network):
    result = json.loads((RUNS / "bench-cpu" / f"{network}.json").read_text())
    first = result["rungs"][0]["ms"]
    for rung in result["rungs"]:
        assert rung["ms"] == pytest.approx(statistics.median(rung["each_ms"]))
        speed = 1000 * result["micro_batch"] * result["seq_len"] / rung["ms"]
        row = f"| {rung['ms']:,.0f} | {speed:,.0f} | {first / rung['ms']:.2f} | {rung['mfu']:.0%} |"
        says(f"| {network}: {rung['name']} {row}")

"""What README.md and runs/README.md say: their figures, from the records; their presets, flags,
links and exercises, from the code and the history."""

import dataclasses
import json
import re
import statistics
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from night import facts
from torch.distributed.run import get_args_parser

import train_gpt2
from support import machine

RUNS = ROOT / "runs"
README = (ROOT / "README.md").read_text()


def words(text: str) -> str:
    """The text with single spaces, so that a figure may stand across a line break."""
    return " ".join(text.split())


PAGES = words(README + (RUNS / "README.md").read_text())


def says(text: str) -> None:
    """The two pages together contain `text`. A failure shows what they should say."""
    assert words(text) in PAGES, f"README.md or runs/README.md should say: {text}"


def folder_says(name: str, text: str) -> None:
    """The same for the README.md of one run."""
    page = RUNS / name / "README.md"
    assert words(text) in words(page.read_text()), f"{page} should say: {text}"


def metrics(name: str, kind: str) -> list[dict]:
    lines = (RUNS / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def numbers(name: str, pattern: str, file="result.txt") -> list[tuple[float, ...]]:
    """The groups of all matches in what a run printed."""
    found = re.findall(pattern, (RUNS / name / file).read_text(), re.MULTILINE)
    assert found, pattern
    rows = [row if isinstance(row, tuple) else (row,) for row in found]
    return [tuple(float(value.replace(",", "")) for value in row) for row in rows]


def test_demo():
    last = metrics("demo-cpu", "val")[-1]
    assert last["step"] == len(metrics("demo-cpu", "train")) == 850
    loss, bits = f"{last['loss']:.4f}", f"{last['bits_per_byte']:.3f}"
    says(f"ended at a validation loss of {loss}, which is {bits} bits per byte")
    says(f"ended at {bits} bits per byte")
    folder_says("demo-cpu", f"validation loss of {loss}, which is {last['bits_per_byte']:.4f} bits")
    first = metrics("demo-cpu", "val")[0]["loss"]
    says(f"The loss begins at {first:.1f}")
    (sample,) = re.findall(r"One of its last samples:\n\n```\n(.*?)```", README, re.DOTALL)
    (written,) = metrics("demo-cpu", "sample")[-1:]
    assert any(sample.strip() in text for text in written["texts"])


@pytest.mark.parametrize("network", ["124M", "demo"])
def test_step(network):
    pattern = r"{} +{} +([\d,]+) tokens/s .*?, ([\d.]+) times transformers', peak ([\d.]+) GB"
    for variant, shown in (
        ("ours eager", "eager"),
        ("ours compiled", "compiled"),
        ("transformers", "transformers"),
    ):
        ((speed, times, peak),) = numbers("step-cpu", pattern.format(network, variant))
        times = "1" if variant == "transformers" else f"{times:.2f}"
        says(f"| {network}, {shown} | {speed:,.0f} | {times} | {peak:.2f} GB |")


@pytest.mark.parametrize("size", ["124M", "demo"])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_beside_the_first_edition(size, how):
    medians = []
    for edition in ("first edition", "this one"):
        pattern = rf'^{size}, ours {how}, {edition}: {{"tokens_per_second": (.+), "peak_gb": (.+)}}'
        found = np.array(numbers("step-cpu", pattern, "first_edition.txt"))
        assert len(found) == 3
        medians.append(np.median(found, axis=0))
    (before, before_gb), (now, now_gb) = medians
    speeds = f"{before:,.0f} | {now:,.0f} | {now / before - 1:+.0%}"
    says(f"| {size}, {how} | {speeds} | {before_gb:.2f} | {now_gb:.2f} |")


def test_share_of_training():
    text = (RUNS / "step-cpu" / "share.txt").read_text()
    share = dict(re.findall(r"^(.+): ([\d.]+%) of the run$", text, re.MULTILINE))
    assert float(share["together"].rstrip("%")) < 5
    parts = ("validation", "HellaSwag", "sampling", "waiting for data", "together")
    says(f"| {' | '.join(parts)} |")
    says(f"| {' | '.join(share[part] for part in parts)} |")
    for name in ("demo", "124M"):
        seconds = re.search(rf"^{name}.*?: ([\d.]+) s to the first step", text, re.MULTILINE)[1]
        assert float(seconds) < 10
        says(f"{seconds} seconds ({name})")
    few, many = re.findall(r"shards? of \d+M tokens: [\d.]+ s to the first step, ([\d.]+) GB", text)
    says(f"{few} GB with one shard of 1M tokens and {many} GB with twenty of 50M")


def test_h200():
    """The table is speed.json's; README.md's status quotes it."""
    rows = json.loads((RUNS / "h200" / "speed.json").read_text())
    shown = 0
    for row in rows:
        memory = row.get("peak_gb") or row.get("peak_mem_gb")
        if memory:
            cells = f"| {row['ms_per_step']:,.1f} | {row['tokens_per_s']:,} | {memory:.1f} |"
            shown += words(cells) in words((RUNS / "h200/README.md").read_text())
    assert shown == 9
    speed = {row["name"]: row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    says(f"trained at {round(speed['ours_c64'], -3):,} tokens/s (MFU 45%)")
    says(f"and at {round(speed['ours_c64_bf16res'], -3):,} (47%) as it is now")
    says(f"with torch.compile reached {round(speed['build_nanogpt_compile'], -3):,}")
    says(f"llm.c {round(speed['llmc_cuda_cudnn_r0_ge0'], -3):,} on the same card")


def test_fineweb():
    # A line for each way and round: speed, (c)'s speed as a multiple of it, peak memory.
    pattern = r"^\({}\) .*? median ([\d.]+)M .*?is ([\d.]+) times .* peak (\d+) MiB"
    rows = {way: np.array(numbers("fineweb-cpu", pattern.format(way))) for way in "abc"}
    rows["c"] = rows["c"][::2]  # every second line of (c) is without start and exit
    assert [len(rows[way]) for way in "abc"] == [3, 3, 3]
    for n, (a, b, c) in enumerate(zip(*rows.values(), strict=True), 1):
        row = f"| {n} | {a[0]:.2f} | {b[0]:.2f} | {c[0]:.2f} | {a[1]:.2f} | {b[1]:.2f} |"
        folder_says("fineweb-cpu", row)
    for way, shown in (
        ("a", "the lecture's way, one process"),
        ("b", "raw tiktoken, two processes, no reading or writing"),
        ("c", "fineweb.py"),
    ):
        speed, times, _ = np.median(rows[way], axis=0)
        times = "1" if way == "c" else f"{times:.2f}"
        says(f"| {shown} | {speed:.2f} | {times} | {rows[way][:, 2].max():,.0f} MiB |")
    hours = 9_953_989_101 / (1e6 * np.median(rows["c"][:, 0])) / 3600
    says(f"the 9.95B tokens of sample-10BT take {hours:.2f} hours on two cores")


def test_hellaswag():
    medians = numbers("hellaswag-cpu", r"^medians: ([\d.]+), ([\d.]+), ([\d.]+)x")
    pairs = np.array(numbers("hellaswag-cpu", r"^lecture ([\d.]+), hellaswag.py ([\d.]+)"))
    for i, dtype in enumerate(("float32", "bfloat16")):
        theirs, ours, times = medians[i]
        says(f"| {dtype} | {theirs:.2f} | {ours:.2f} | {times:.2f} |")
        each = (", ".join(f"{speed:.2f}" for speed in way) for way in pairs[3 * i : 3 * i + 3].T)
        folder_says("hellaswag-cpu", f"| {dtype} | {' | '.join(each)} | {times:.2f}")


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
    says(f"Muon's mean loss falls below AdamW's last one at step {reached} of 1,000")


def test_bench():
    halves = []
    for network in ("gpt2", "demo"):
        result = json.loads((RUNS / "bench-cpu" / f"{network}.json").read_text())
        first, half = result["rungs"][0]["ms"], {}
        for rung in result["rungs"]:
            ms = rung["ms"]
            assert ms == pytest.approx(statistics.median(rung["each_ms"]))
            speed = 1000 * result["micro_batch"] * result["seq_len"] / ms
            half[rung["name"]] = f"{ms:,.0f} | {speed:,.0f} | {first / ms:.2f} | {rung['mfu']:.0%}"
        halves.append(half)
    assert list(halves[0]) == list(halves[1])
    for name in halves[0]:
        says(f"| {name} | {halves[0][name]} | {halves[1][name]} |")


def test_restarts():
    """The runs with a killed rank, by what came of them, in both README.md."""
    table = (RUNS / "restarts-cpu" / "README.md").read_text()
    result = (RUNS / "restarts-cpu" / "result.txt").read_text()
    totals = {"with the variable": np.zeros(4, int), "without it": np.zeros(4, int)}
    pattern = r"^(\w+ machines?, \d ranks), (.*), (\d+) runs: (.*)$"
    for where, how, runs, outcomes in re.findall(pattern, result, re.MULTILINE):
        counts = re.findall(r"(\d+) ([a-z][^,]*)", outcomes)
        came = {outcome: int(count) for count, outcome in counts}
        right = came.get("equal bit for bit", 0) + came.get("equal to 1e-4", 0)
        row = [int(runs), right, came.get("fails", 0), came.get("hangs", 0)]
        assert f"| {where}, {how} | {' | '.join(map(str, row))} |" in table
        totals[how] += row
    runs, _, failed, hung = totals["without it"]
    says(f"of {runs} runs with a killed rank, {hung} hung and {failed} failed")
    runs, right, _, _ = totals["with the variable"]
    says(f"With it, {right} of {runs} finished")


def test_rehearsal():
    """Both runs recorded the same; what each fault cost, and the memory of each rank."""
    folder = RUNS / "rehearsal-cpu"
    assert facts(folder / "night") == facts(folder / "quiet")
    result = json.loads((folder / "rehearsal.json").read_text())
    quiet, night = result["quiet"], result["night"]
    for event in night["events"]:
        back = "it went on" if event["resumed_at"] is None else event["resumed_at"]
        cells = [f"{event['seconds'] / 60:.1f}", event["step"], event["fault"]]
        cells += [event.get("rank", "both"), back, f"{event['lost_seconds']:.0f}"]
        folder_says("rehearsal-cpu", f"| {' | '.join(map(str, cells))} |")
    minutes = [seconds / 60 for seconds in (quiet["seconds"], night["seconds"])]
    says(f"took {minutes[1]:.0f} minutes instead of {minutes[0]:.0f}")
    other = 1 - quiet["training_seconds"] / quiet["seconds"]
    folder_says("rehearsal-cpu", f"{other:.0%} of the time was not training")
    use = (folder / "use.txt").read_text()
    ours, theirs = re.search(r"perplexity ([\d.]+), transformers' ([\d.]+)", use).groups()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)
    folder_says("rehearsal-cpu", f"a perplexity of {theirs} on the whole validation shard")
    folder_says("rehearsal-cpu", f"ours is {ours}")
    scores = re.findall(r"acc ([\d.]+) acc_norm ([\d.]+)", use)
    assert scores[0] == scores[1], "hellaswag.py --harness and lm-eval"
    folder_says("rehearsal-cpu", f"alike: acc {scores[0][0]}, acc_norm {scores[0][1]}")
    rows = [line.split(",") for line in (folder / "memory.csv").read_text().splitlines()[1:]]
    for run in ("quiet", "night"):
        for rank in "01":
            at = [(int(row[2]), int(row[4])) for row in rows if (row[0], row[3]) == (run, rank)]
            parts = [[mb for step, mb in at if a <= step < a + 120] for a in (40, 160, 280)]
            cells = [f"{statistics.median(part):,.0f}" for part in parts]
            cells.append(f"{max(mb for _, mb in at):,}")
            folder_says("rehearsal-cpu", f"| {run}, rank {rank} | {' | '.join(cells)} |")


def test_presets():
    """The table of presets is the code's."""
    defaults = dataclasses.asdict(train_gpt2.TrainConfig())
    rows = re.findall(r"^\| `(\S+)` \|(.+)\|$", README.partition("## Presets")[2], re.MULTILINE)
    rows = {
        name: [cell.strip().replace(",", "") for cell in cells.split("|")] for name, cells in rows
    }
    columns = ("n_layer", "n_head", "n_embd", "seq_len", "batch_tokens", "learning_rate")
    assert rows.keys() == train_gpt2.PRESETS.keys()
    for name, preset in train_gpt2.PRESETS.items():
        settings = defaults | preset
        assert [float(cell) for cell in rows[name][:6]] == [settings[column] for column in columns]


def test_flags():
    """Every flag that README.md names exists."""
    known = {"--index-url", "--reverse"}  # pip's and git's
    known |= {f"--{field.name}" for field in dataclasses.fields(train_gpt2.TrainConfig)}
    known |= {"--no-compile", "--help"}
    for script in ("fineweb.py", "hellaswag.py", "sample.py", "bench.py", "plot.py"):
        known |= set(re.findall(r'add(?:_argument)?\("(--\w+)', (ROOT / script).read_text()))
    known |= {name for action in get_args_parser()._actions for name in action.option_strings}
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - known


def test_links():
    """Every link to a file of the project leads to one."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *RUNS.glob("**/README.md")]
    for page in pages:
        targets = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', page.read_text())
        for target in (link or source for link, source in targets):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_exercises():
    """Each `git show ':/^...'` finds one commit, and no later one has a message like it."""
    log = ["git", "-C", str(ROOT), "log", "--all", "--format=%s"]
    done = subprocess.run(log, capture_output=True, text=True, check=False)
    subjects = done.stdout.splitlines()
    if "0:13:47 The network: embeddings, blocks, a head" not in subjects:
        pytest.skip("the history is not here (a shallow clone, or an export)")
    beginnings = re.findall(r"git show ':/\^(.+?)'", README)
    assert len(beginnings) == 1 + 8  # the example, and the exercises
    for beginning in beginnings:
        found = [subject for subject in subjects if subject.startswith(beginning)]
        assert len(found) == 1, (beginning, found)


@pytest.mark.parametrize("preset", train_gpt2.PRESETS)
def test_micro_batch_table(preset, monkeypatch):
    """The last five columns of the presets are what support/machine.py chooses on such a GPU."""
    config = train_gpt2.TrainConfig(**train_gpt2.PRESETS[preset])
    sizes = {name: getattr(config, name) for name in ("seq_len", "n_layer", "n_head", "n_embd")}
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(**sizes))
    count = sum(p.numel() for p in model.parameters())
    on_gpu = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
    model = SimpleNamespace(config=model.config, parameters=model.parameters, lm_head=on_gpu)
    gpu = SimpleNamespace(world=1, dtype=torch.bfloat16)
    shown = []
    for gigabytes in (16, 24, 40, 80, 141):
        free = gigabytes * 10**9
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        rows = machine.choose_micro_batch(config, model, True, False, gpu)
        need = machine.step_bytes(model.config, count, rows * config.seq_len, True, gpu.dtype)
        shown.append(str(rows) if need <= 0.9 * free else "-")
    (row,) = re.findall(rf"^\| `{preset}` \|.*$", README, re.MULTILINE)
    assert row.endswith(f" | {' | '.join(shown)} |")


def test_lecture_table():
    """Each section named beside the lecture exists, and its banner has a chapter of that row."""
    source = (ROOT / "train_gpt2.py").read_text()
    banner = r"^# -{20,}\n# (\d+\. [^(:\n]+?) ?[(:](.*?)^# -{20,}"
    banners = dict(re.findall(banner, source, re.MULTILINE | re.DOTALL))
    table = README.partition("## Read it beside")[2].partition("## Exercises")[0]
    rows = re.findall(r"^\| (\d:\d\d:\d\d.*?) \| (.+) \|$", table, re.MULTILINE)
    assert rows
    for chapters, places in rows:
        times = re.findall(r"\d:\d\d:\d\d", chapters)
        for section in re.findall(r"\d\. [A-Z][a-z ]+", places):
            assert any(time in banners[section.strip()] for time in times), (section, times)

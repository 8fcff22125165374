"""What the pages say: tables and figures, from the records in runs/; presets, flags, links and
exercises, from the code and the history. The sentences around them may read as they like."""

import json
import re
import subprocess
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, records
from night import facts
from torch.distributed.run import get_args_parser

import train_gpt2
from support import machine

RUNS = ROOT / "runs"
README = (ROOT / "README.md").read_text()
PAGE = (RUNS / "README.md").read_text()


def shows(page: str, name: str, *figures) -> None:
    """A row of the page's tables begins with `name` and has these figures, rounded as it likes."""
    rows = re.findall(rf"^\| {re.escape(name)} \| (.+) \|$", page, re.MULTILINE)
    shown = [re.findall(r"-?\d+(?:\.\d+)?", row.replace(",", "")) for row in rows]
    shown = [cells for cells in shown if len(cells) == len(figures)]
    assert shown, (name, figures)
    for cell, figure in zip(shown[0], figures, strict=True):
        decimals = len(cell.partition(".")[2])
        assert f"{figure:.{decimals}f}" == cell, (name, figures)


def numbers(file: str, pattern: str) -> np.ndarray:
    """The groups of all matches in what a run printed, a row each."""
    found = re.findall(pattern, (RUNS / file).read_text(), re.MULTILINE)
    assert found, pattern
    return np.array([[float(value.replace(",", "")) for value in row] for row in found])


def test_demo():
    """The record is of today's preset, and the pages quote it."""
    config = train_gpt2.make_config(dict(preset="demo"), {}, ())
    (header,) = records(RUNS / "demo-cpu", "header")
    places = dict.fromkeys(("data", "out_dir", "resume", "init_from"))
    assert header["settings"] | places == asdict(config) | places
    last = records(RUNS / "demo-cpu", "val")[-1]
    assert last["step"] == len(records(RUNS / "demo-cpu", "train"))
    assert f"{last['loss']:.4f}" in README
    assert f"{last['bits_per_byte']:.3f}" in README and f"{last['bits_per_byte']:.3f}" in PAGE
    assert f"{last['loss']:.4f}" in (RUNS / "demo-cpu/README.md").read_text()
    (quoted,) = re.findall(r"samples:\n\n```\n(.*?)\n```", README, re.DOTALL)
    assert any(quoted in text for text in records(RUNS / "demo-cpu", "sample")[-1]["texts"])


def test_hellaswag():
    medians = numbers("hellaswag-cpu/result.txt", r"^medians: (\S+), (\S+), (\S+)x")
    shows(PAGE, "float32", *medians[0])
    shows(PAGE, "bfloat16", *medians[1])


@pytest.mark.parametrize("network", ["124M", "demo"])
@pytest.mark.parametrize("name", ["eager", "compiled", "transformers"])
def test_step(network, name):
    pattern = rf"{network} .*{name} +(\S+) tokens/s .*, (\S+) times .* peak (\S+) GB"
    shows(PAGE, f"{network}, {name}", *numbers("step-cpu/result.txt", pattern)[0])


def test_share_of_training():
    text = (RUNS / "step-cpu/share.txt").read_text()
    shares = re.findall(r": (\S+%) of the run$", text, re.MULTILINE)
    assert len(shares) == 5 and f"| {' | '.join(shares)} |" in PAGE


def test_h200():
    speed = {row["name"]: row for row in json.loads((RUNS / "h200/speed.json").read_text())}
    page = (RUNS / "h200/README.md").read_text()
    for name in ("ours_c64", "ours_c64_bf16res", "build_nanogpt_compile", "llmc_cuda_cudnn_r0_ge0"):
        row = speed[name]
        memory = row.get("peak_gb") or row["peak_mem_gb"]
        assert f"| {row['ms_per_step']:,.1f} | {row['tokens_per_s']:,} | {memory:.1f} |" in page
        assert f"{round(row['tokens_per_s'], -3):,}" in README


def test_fineweb():
    # A line for each way and round: speed, (c)'s speed as a multiple of it, peak memory.
    pattern = r"^\({}\) .* median (\S+)M .*is (\S+) times as fast, .* peak (\d+) MiB"
    a, b, c = (numbers("fineweb-cpu/result.txt", pattern.format(way)) for way in "abc")
    c = c[::2]  # every second line of (c) is without start and exit
    names = ("the lecture's way, one process", "raw tiktoken, two processes, no reading or writing")
    for name, way in zip((*names, "fineweb.py"), (a, b, c), strict=True):
        speed, times, _ = np.median(way, axis=0)
        shows(PAGE, name, speed, times, way[:, 2].max())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_muon(optimizer):
    runs = [RUNS / "muon-cpu" / f"{optimizer}-{seed}" for seed in (1337, 1, 2)]
    last = [records(run, "val")[-1] for run in runs]
    bits = np.mean([record["bits_per_byte"] for record in last])
    ms = [record["step_ms"] for run in runs for record in records(run, "train")]
    shows(PAGE, optimizer, *(record["loss"] for record in last), bits, sum(ms) / 3000)


def test_bench():
    rows = {}
    for network in ("gpt2", "demo"):
        result = json.loads((RUNS / "bench-cpu" / f"{network}.json").read_text())
        for rung in result["rungs"]:
            ms = np.median(rung["each_ms"])
            speed = 1000 * result["micro_batch"] * result["seq_len"] / ms
            half = [ms, speed, result["rungs"][0]["ms"] / ms, 100 * rung["mfu"]]
            rows[rung["name"]] = rows.get(rung["name"], []) + half
    for name, row in rows.items():
        shows(PAGE, name, *row)


def test_restarts():
    """The runs with a killed rank, by what came of them."""
    page = (RUNS / "restarts-cpu/README.md").read_text()
    text = (RUNS / "restarts-cpu/result.txt").read_text()
    pattern = r"^(\w+ machines?, .*), (\d+) runs: (.*)$"
    for name, runs, came in re.findall(pattern, text, re.MULTILINE):
        kinds = (rf"(\d+) {kind}" for kind in ("equal", "fails", "hangs"))
        row = [int(runs), *(sum(map(int, re.findall(kind, came))) for kind in kinds)]
        shows(page, name, *row)


def test_rehearsal():
    """Both runs recorded the same, and what each fault cost."""
    folder = RUNS / "rehearsal-cpu"
    assert facts(folder / "night") == facts(folder / "quiet")
    for event in json.loads((folder / "rehearsal.json").read_text())["night"]["events"]:
        row = [event.get(name) for name in ("step", "rank", "resumed_at", "lost_seconds")]
        row = [figure for figure in row if figure is not None]
        shows((folder / "README.md").read_text(), f"{event['seconds'] / 60:.1f}", *row)


@pytest.mark.parametrize("preset", train_gpt2.PRESETS)
def test_presets(preset, monkeypatch):
    """A row is the preset's settings, and the micro-batches that are chosen on such GPUs."""
    (row,) = re.findall(rf"^\| `{preset}` \| (.+) \|$", README, re.MULTILINE)
    cells = row.replace(",", "").split(" | ")
    config = train_gpt2.TrainConfig(**train_gpt2.PRESETS[preset])
    columns = ("n_layer", "n_head", "n_embd", "seq_len", "batch_tokens", "learning_rate")
    assert [float(cell) for cell in cells[:6]] == [getattr(config, name) for name in columns]
    with torch.device("meta"):
        model = train_gpt2.GPT(config)
    count = sum(p.numel() for p in model.parameters())
    on_gpu = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
    model = SimpleNamespace(config=config, parameters=model.parameters, lm_head=on_gpu)
    gpu = SimpleNamespace(world=1, dtype=torch.bfloat16)
    for cell, gigabytes in zip(cells[6:], (16, 24, 40, 80, 141), strict=True):
        free = gigabytes * 10**9
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        rows = machine.choose_micro_batch(config, model, True, False, gpu)
        need = machine.step_bytes(config, count, rows * config.seq_len, True, gpu.dtype)
        assert cell == (str(rows) if need <= 0.9 * free else "-")


def test_flags():
    """Every flag that README.md names exists."""
    known = {"--index-url", "--reverse", "--no-compile", "--help"}  # the first are pip's and git's
    known |= {f"--{name}" for name in asdict(train_gpt2.TrainConfig())}
    for script in ROOT.glob("*.py"):
        known |= set(re.findall(r'add(?:_argument)?\("(--\w+)', script.read_text()))
    known |= {name for action in get_args_parser()._actions for name in action.option_strings}
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - known


def test_links():
    """Every link to a file of the project leads to one."""
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *RUNS.glob("**/README.md")]:
        for target in re.findall(r'(?:\]\(|src=")([^)\s"]+)', page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), (page, target)


def test_exercises():
    """Each `git show ':/^...'` finds one commit, and no later one has a message like it."""
    log = ["git", "-C", str(ROOT), "log", "--all", "--format=%s"]
    subjects = subprocess.run(log, capture_output=True, text=True, check=False).stdout
    if "0:13:47 The network: embeddings, blocks, a head" not in subjects.splitlines():
        pytest.skip("the history is not here (a shallow clone, or an export)")
    beginnings = re.findall(r"git show ':/\^(.+?)'", README)
    assert len(beginnings) == 1 + 8  # the example, and the exercises
    for beginning in beginnings:
        assert f"\n{subjects}".count(f"\n{beginning}") == 1, beginning


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

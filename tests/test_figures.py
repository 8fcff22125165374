"""What the pages say: the demo's figures, by its records; presets, flags and links, by the code."""

import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, records
from torch.distributed.run import get_args_parser

import train_gpt2
from support import machine

RUNS = ROOT / "runs"
README = (ROOT / "README.md").read_text()
PAGE = (RUNS / "README.md").read_text()


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
    known = {"--index-url", "--reverse", "--repo-type", "--local-dir"}  # pip's, git's, hf's
    known |= {"--no-compile", "--help"}
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

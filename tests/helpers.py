"""What the tests share: the command as users run it, small inputs, and readers of its records."""

import contextlib
import faulthandler
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers
from transformers.pytorch_utils import Conv1D

ROOT = Path(__file__).resolve().parent.parent

# A network and a run that take a second: the vocabulary is the only big thing in it.
TINY = shlex.split(
    "--preset demo --n_layer 1 --n_head 2 --n_embd 16 --seq_len 16 --batch_tokens 128 --max_steps 4"
    " --optimizer adamw --learning_rate 4e-3 --warmup_tokens 0 --dtype float32 --device cpu"
    " --no-compile --val_every 0 --sample_every 0"
)


def command(script: str, flags, processes=1, torchrun=()) -> list[str]:
    """`python SCRIPT FLAGS`, or the same by torchrun."""
    if processes > 1 or torchrun:
        torchrun = torchrun or ("--standalone", f"--nproc_per_node={processes}")
        torchrun = ("-m", "torch.distributed.run", *torchrun)
    return [sys.executable, *torchrun, str(ROOT / script), *map(str, flags)]


def options(folder: Path, environment: dict) -> dict:
    """How a command runs: in `folder`, with one thread a process, and it speaks text."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return dict(cwd=folder, env=env, stdout=subprocess.PIPE, text=True)


def run(folder: Path, *flags, script="train_gpt2.py", processes=1, **environment):
    """Run a command in `folder` -> subprocess.CompletedProcess."""
    how = options(folder, environment) | dict(stderr=subprocess.PIPE, timeout=300)
    return subprocess.run(command(script, flags, processes), **how, check=False)


def run_here(folder: Path, *flags, script="train_gpt2.py"):
    """`run` in this process, where torch is warm: it saves four seconds, and may take 300."""
    out, err = io.StringIO(), io.StringIO()  # like a notebook's
    status, words = 0, [str(ROOT / script), *map(str, flags)]
    with (
        contextlib.chdir(folder),
        patch.object(sys, "argv", words),
        patch("support.command.on_signals"),  # pytest's stay
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        finally:
            faulthandler.cancel_dump_traceback_later()
            release_locks()
    err.writelines(f"{warning.message}\n" for warning in warned)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def start(folder: Path, *flags, script="train_gpt2.py", processes=1, torchrun=(), **environment):
    """Start a command in a process group of its own -> subprocess.Popen, its output in one pipe."""
    how = options(folder, environment) | dict(stderr=subprocess.STDOUT, start_new_session=True)
    return subprocess.Popen(command(script, flags, processes, torchrun), **how)


def one_line(done, says: str) -> str:
    """The line in which a user's mistake ends: status 2, no traceback, and it `says` this."""
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert done.returncode == 2 and len(lines) == 1, done
    assert re.search(says, lines[0]), lines[0]
    return lines[0]


def train(folder: Path, out_dir: str, *flags, processes=1) -> subprocess.CompletedProcess:
    """A run that must succeed: in this process, or of several by torchrun."""
    flags = *flags, "--out_dir", out_dir
    done = run_here(folder, *flags) if processes == 1 else run(folder, *flags, processes=processes)
    assert done.returncode == 0, f"{out_dir}: {done.stdout}\n{done.stderr}"
    return done


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(folder: Path, kind="train") -> np.ndarray:
    found = records(folder, kind)
    steps = [record["step"] for record in found]
    assert steps == sorted(set(steps)), "each step stands once, in order"
    return np.array([record["loss"] for record in found])


def checkpoint(folder: Path) -> dict:
    return torch.load(max(folder.glob("checkpoint_*.pt")), weights_only=True)


def write_bin(path: Path, tokens: np.ndarray) -> None:
    """llm.c's format, by hand: 256 int32 (magic, version, count, zeros), then the tokens."""
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


def some_tokens(count: int, seed: int) -> np.ndarray:
    """Tokens with something to learn: few ids are frequent, and each likes a certain next one."""
    random = np.random.default_rng(seed)
    tokens = (50257 * random.random(count) ** 6).astype(np.uint16)
    return np.where(random.random(count) < 0.5, np.roll(tokens, 1) // 2, tokens).astype(np.uint16)


def make_shards(folder: Path) -> Path:
    """Two formats, llm.c's names: 20 + 30 training sequences of 16, 13 to validate, and tails."""
    folder.mkdir()
    np.save(folder / "edu_fineweb_train_000001.npy", some_tokens(20 * 16 + 1 + 9, 1))
    write_bin(folder / "edu_fineweb_train_000002.bin", some_tokens(30 * 16 + 1, 2))
    write_bin(folder / "edu_fineweb_val_000000.bin", some_tokens(13 * 16 + 1 + 15, 3))
    return folder


def their_model(**sizes) -> transformers.GPT2LMHeadModel:
    """transformers' GPT-2 without dropout, in which every bias and gain has a value of its own."""
    torch.manual_seed(4)
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)
    config._attn_implementation = "eager"
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def in_their_layout(theirs: torch.nn.Module, ours: dict) -> dict:
    """Our tensors by name, the matrices of their Conv1D layers turned to (in, out)."""
    turned = {f"{name}.weight" for name, m in theirs.named_modules() if isinstance(m, Conv1D)}
    return {name: t.T if name in turned else t for name, t in ours.items()}


def their_twin(content: dict) -> transformers.GPT2LMHeadModel:
    """transformers' GPT-2 with the weights of one of our checkpoints, the padded rows included."""
    network = dict(content["network"])
    theirs = their_model(n_positions=network.pop("seq_len"), **network)
    theirs.load_state_dict(in_their_layout(theirs, content["model"]))
    return theirs


def their_tokenizer() -> transformers.GPT2TokenizerFast:
    """transformers' own tokenizer, from the same vocab.bpe."""
    lines = (ROOT / "support/vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    printable = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    names = [*printable, *map(chr, range(256, 324)), *(line.replace(" ", "") for line in lines)]
    vocab = {name: i for i, name in enumerate([*names, "<|endoftext|>"])}
    return transformers.GPT2TokenizerFast(vocab=vocab, merges=[tuple(l.split()) for l in lines])


def release_locks() -> None:
    """Give up the folders that this process owns, as its end would."""
    from support import files  # here, because tests/ alone is on the path of torchrun's scripts

    while files.LOCKS:
        files.LOCKS.popitem()[1].close()

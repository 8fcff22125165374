"""How often torch.compile compiles: main() runs whole, and a stand-in for the compiler counts.

A graph break costs speed at every call, and a recompilation half a minute on a GPU. The model may
be compiled once for validation and once for training. Under DDP the training graph is cut at the
buckets of gradients, so that their exchange starts while backward still works.

Run by torchrun as a script, this file counts in each of its ranks.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, make_shards, run
from torch._dynamo.utils import counters

import hellaswag
import train_gpt2
from support import machine

# Per rank and step: 2 or more micro-steps. Validation has 5 sequences, and its last batch is filled
# up: run eagerly, it would need more memory than a compiled step.
FLAGS = ["--seq_len", 32, "--micro_batch", 2, "--batch_tokens", 256, "--max_steps", 3]
FLAGS += ["--val_every", 1, "--val_tokens", 160, "--sample_every", 2]
FLAGS += ["--hellaswag_every", 2, "--compile", "--data", "shards"]
EXPECTED = {"validation": 1, "training": 1, "compilations": 2, "graph breaks": 0}
EXPECTED["validation batches"] = 4 * 3


def stream_of_a_gpu(device_type: str) -> bool:
    """machine.bfloat16_stream, as if the CPU was a GPU."""
    enabled = torch.is_autocast_enabled(device_type)
    return enabled and torch.get_autocast_dtype(device_type) == torch.bfloat16


@contextmanager
def some_hellaswag(count=6):
    """In here, HellaSwag is the first of the tests' own records."""
    path = Path(__file__).with_name("hellaswag_records.jsonl")
    examples = hellaswag.read_examples(path)[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hellaswag, "load_examples", lambda **options: examples)
        yield examples


def run_main(*flags) -> None:
    """Run main() in this process, whose signal handlers it leaves alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2.Stop, "listen", lambda stop: None)
        train_gpt2.main([*TINY, *map(str, flags)])


def count(*flags, compiler=None) -> dict:
    """Run main() and count what it compiles, with `compiler`, or eager graphs -> the counts."""
    graphs = {"validation": 0, "training": 0, "validation batches": 0}

    def backend(graph, inputs):
        graphs["training" if torch.is_grad_enabled() else "validation"] += 1
        assert not any(isinstance(i, torch.SymInt) for i in inputs), "a size may change"
        run = compiler(graph, inputs) if compiler else graph.forward

        def call(*args):
            graphs["validation batches"] += not torch.is_grad_enabled()
            return run(*args)

        return call

    def compile_and_count(model, **options):  # with main()'s own options
        counters.clear()
        torch.nn.Module.compile(model, backend=backend, **options)

    def note(runtime):
        graphs["compilations"] = counters["stats"]["unique_graphs"]
        graphs["graph breaks"] = sum(counters["graph_break"].values())
        Path(f"counts_{runtime.rank}.json").write_text(json.dumps(graphs))
        close(runtime)  # with several ranks, this ends the process

    close = train_gpt2.Runtime.close
    torch._dynamo.reset()
    with some_hellaswag(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2.GPT, "compile", compile_and_count)
        patch.setattr(train_gpt2.Runtime, "close", note)
        patch.setattr(machine, "can_compile", lambda wanted, runtime: wanted)
        run_main(*flags)
    return graphs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_shards(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_process_compiles_twice(folder, monkeypatch, dtype):
    """Also where the model asks autocast in which precision its residual stream should be."""
    monkeypatch.setattr(machine, "bfloat16_stream", stream_of_a_gpu)
    assert count(*FLAGS, "--dtype", dtype) == EXPECTED


def test_two_ranks_compile_twice_and_ddp_cuts_at_its_buckets(folder):
    """The first bucket is full at 1 MB, which the embeddings have; the second takes the rest."""
    script = "tests/test_compile_counts.py"
    done = run(folder, *FLAGS, script=script, processes=2, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "hellaswag acc" in done.stdout and "| samples" in done.stdout
    for rank in (0, 1):
        counts = json.loads((folder / f"counts_{rank}.json").read_text())
        assert counts == EXPECTED | {"training": 2, "validation batches": 4 * (2 - rank)}


if __name__ == "__main__":
    count(*sys.argv[1:])

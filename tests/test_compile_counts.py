"""How often torch.compile compiles: main() runs whole, and a stand-in for the compiler counts.

A graph break costs speed at every call, and a recompilation half a minute on a GPU. What may be
compiled: the model once for validation and once for training. Under DDP the training graph is cut
at the buckets of gradients, so that their exchange starts while backward still works.

Run by torchrun as a script, this file counts in each of its ranks.
"""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import SCRIPT, TINY, make_shards
from torch._dynamo.utils import counters

sys.path.insert(0, str(SCRIPT.parent))  # for torchrun, which does not read conftest.py
import hellaswag
import train_gpt2
from support import machine

# Per rank and step: 2 or more micro-steps. Validation has 7 sequences and thus a short last batch.
FLAGS = ["--seq_len", "32", "--micro_batch", "2", "--batch_tokens", "256", "--max_steps", "3"]
FLAGS += ["--val_every", "1", "--val_tokens", "224", "--sample_every", "2"]
FLAGS += ["--hellaswag_every", "2", "--compile", "--data", "shards"]


@contextmanager
def some_hellaswag(count=6):
    """In here, HellaSwag is the first of the tests' own records."""
    records = Path(__file__).with_name("hellaswag_records.jsonl")
    alone = SimpleNamespace(rank=0, sum=lambda *values: list(values))
    examples = hellaswag.load_examples(alone, records)[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hellaswag, "load_examples", lambda *args, **options: examples)
        yield


def run_main(*flags) -> None:
    """main() in this process; its handlers of signals do not outlast it."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = {name: signal.getsignal(name) for name in names}
    try:
        train_gpt2.main([*map(str, TINY), *map(str, flags)])
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def count(*flags, compiler=None) -> dict:
    """Run main() and count what it compiles, with `compiler`, or eager graphs -> the counts."""
    graphs = {"validation": 0, "training": 0, "symbolic inputs": 0}

    def backend(graph, inputs):
        graphs["training" if torch.is_grad_enabled() else "validation"] += 1
        graphs["symbolic inputs"] += sum(isinstance(i, torch.SymInt) for i in inputs)
        return compiler(graph, inputs) if compiler else graph.forward

    def compile_and_count(model, **options):  # with main()'s own options
        counters.clear()  # machine.can_compile has compiled something small
        torch.nn.Module.compile(model, backend=backend, **options)

    def note(runtime):
        graphs["compilations"] = counters["stats"]["unique_graphs"]
        graphs["graph breaks"] = sum(counters["graph_break"].values())
        Path(f"counts_{runtime.rank}.json").write_text(json.dumps(graphs))
        close(runtime)  # of several ranks, this ends the process

    close = train_gpt2.Runtime.close
    torch._dynamo.reset()
    with some_hellaswag(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2.GPT, "compile", compile_and_count)
        patch.setattr(train_gpt2.Runtime, "close", note)
        if compiler is None:
            patch.setattr(machine, "can_compile", lambda wanted, runtime: wanted)
        run_main(*flags)
    return graphs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_shards(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected(training_graphs: int) -> dict:
    graphs = {"validation": 1, "training": training_graphs, "symbolic inputs": 0}
    return graphs | {"compilations": 2, "graph breaks": 0}


def test_one_process_compiles_twice(folder):
    assert count(*FLAGS) == expected(training_graphs=1)


def test_two_ranks_compile_twice_and_ddp_cuts_at_its_buckets(folder):
    """The first bucket is full at 1 MB, which the embeddings have; the second takes the rest."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, __file__, *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "hellaswag 6 records" in done.stdout and "sample at step 3" in done.stdout
    for rank in (0, 1):
        counts = json.loads((folder / f"counts_{rank}.json").read_text())
        assert counts == expected(training_graphs=2)


def test_the_count_notices_mistakes(folder, monkeypatch):
    """A print in the model breaks its graph; micro-batches that change their size recompile it."""
    block = train_gpt2.Block.forward
    batch = train_gpt2.DataLoaderLite.batch

    def noisy(self, x, cache=None):
        print("a block")
        return block(self, x, cache)

    def changing(self, batch_tokens, micro_batch, runtime, step):
        return batch(self, batch_tokens, micro_batch >> step % 2, runtime, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.DataLoaderLite, "batch", changing)
        assert count(*FLAGS)["training"] == 2
    monkeypatch.setattr(train_gpt2.Block, "forward", noisy)
    counts = count(*FLAGS, "--out_dir", "noisy")
    assert counts["graph breaks"] > 0 and counts["compilations"] > 2


if __name__ == "__main__":
    count(*sys.argv[1:])

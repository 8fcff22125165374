"""The project on a GPU that is not there (see fake_cuda.py), and any GPU that is out of memory.

fake_cuda changes torch for good, so a process of their own runs all scenarios: this file, as a
script. It writes what went wrong in each; the tests read that.
"""

import contextlib
import functools
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import DeviceMismatch, fake_cuda, kernels, waits

import bench
import hellaswag
import train_gpt2
from support import machine

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "tests" / "hellaswag_records.jsonl"
# A step has 4 sequences, in 2 micro-batches; validation reads 9 sequences, in 4 1/2.
SMALL = shlex.split(
    "--preset demo --data data --n_layer 2 --n_head 2 --n_embd 16 --seq_len 32 --batch_tokens 128"
    " --micro_batch 2 --warmup_tokens 0 --val_tokens 288 --optimizer adamw --no-compile"
)
STEPS = ["--max_steps", "4", "--val_every", "2", "--checkpoint_every", "2", "--sample_every", "0"]
SCORES = ["--sample_every", "4", "--hellaswag_every", "4"]
QUIET = ["--val_every", "0", "--sample_every", "0", "--hellaswag_every", "0"]


def write_data(folder: Path) -> None:
    """Write shards of tokens with something to learn: each is often followed by its half."""
    random = np.random.default_rng(1)
    folder.mkdir()
    for name, count in (("train", 60 * 32 + 1), ("val", 10 * 32 + 1)):
        tokens = (50257 * random.random(count) ** 6).astype(np.uint16)
        follows = random.random(count) < 0.5
        np.save(folder / f"x_{name}_000000.npy", np.where(follows, np.roll(tokens, 1) // 2, tokens))


def train(name: str, *flags: str, program=train_gpt2) -> str:
    """Run train_gpt2.py's main with --out_dir `name` -> what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        program.main([*SMALL, "--out_dir", name, *flags])
    return printed.getvalue()


def records(name: str, kind: str) -> list[dict]:
    lines = Path(name, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def assert_equal_runs(name: str, expected: str, tolerance: float, kinds=("train", "val")) -> None:
    """Compare what two runs have recorded: losses, norms and scores to a tolerance."""
    for kind in kinds:
        found, right = records(name, kind), records(expected, kind)
        assert [r["step"] for r in found] == [r["step"] for r in right] != []
        for key in {"loss", "grad_norm", "acc", "acc_norm"} & right[0].keys():
            difference = max(abs(a[key] - b[key]) for a, b in zip(found, right, strict=True))
            assert difference < tolerance, f"{kind} {key} differs by {difference}"


def resume(name: str, *flags: str) -> None:
    """Continue a finished run from its last checkpoint but one."""
    newest = max(Path(name).glob("checkpoint_*.pt"))
    newest.unlink()
    assert "resuming from" in train(name, *STEPS, *flags, "--resume")


@functools.cache
def cpu_run(optimizer: str) -> str:
    name = f"cpu-{optimizer}"
    flags = ["--device", "cpu", "--dtype", "float32", "--optimizer", optimizer]
    train(name, *STEPS, *(SCORES if optimizer == "adamw" else []), *flags)
    return name


def waits_by_function() -> dict[str, int]:
    found = {}
    for (line, _), count in waits.items():
        function = line.split()[-1]
        found[function] = found.get(function, 0) + count
    return found


# --------------------------------------------------------------------------------------------------
# Scenarios: whole runs
# --------------------------------------------------------------------------------------------------


def float32_repeats_the_cpu():
    """Training, validation, samples, HellaSwag; then --resume, --eval_only and --init_from."""
    on_gpu = ["--device", "cuda", "--dtype", "float32"]
    with fake_cuda():
        train("gpu", *STEPS, *SCORES, *on_gpu)
        assert records("gpu", "header")[0]["device"]["kind"] == "cuda"
        everything = ("train", "val", "hellaswag")
        assert_equal_runs("gpu", cpu_run("adamw"), 1e-4, everything)
        assert records("gpu", "sample") == records(cpu_run("adamw"), "sample")
        resume("gpu", *on_gpu)
        assert_equal_runs("gpu", cpu_run("adamw"), 1e-4)
        printed = train("none", "--init_from", "gpu", "--eval_only", *on_gpu)
        assert f"validation loss {records('gpu', 'val')[-1]['loss']:.4f}" in printed
        assert printed.count("--- sample at") == 4
        train("more", "--init_from", "gpu", "--max_steps", "2", "--val_every", "2", *on_gpu)
        first = records("more", "val")[0]["loss"]
        assert abs(first - records("gpu", "val")[-1]["loss"]) < 1e-4


def ampere_trains_in_bfloat16():
    with fake_cuda("NVIDIA A100-SXM4-80GB", (8, 0)):
        train("bfloat16", *STEPS, *SCORES, "--device", "auto", "--dtype", "auto")
    dtype = records("bfloat16", "header")[0]["dtype"]
    assert dtype == "bfloat16", dtype
    assert_equal_runs("bfloat16", cpu_run("adamw"), 0.03)
    assert len(records("bfloat16", "sample")) == len(records("bfloat16", "hellaswag")) == 2
    assert_is_far("bfloat16")


def assert_is_far(name: str) -> None:
    """A run in half precision differs from float32's by more than rounding in float32 does."""
    optimizer = records(name, "header")[0]["settings"]["optimizer"]
    with pytest.raises(AssertionError):
        assert_equal_runs(name, cpu_run(optimizer), 1e-5)


def turing_trains_in_float16_with_muon():
    on_t4 = ["--device", "cuda", "--optimizer", "muon"]
    with fake_cuda("Tesla T4", (7, 5)):
        assert machine.peak_flops(torch.device("cuda:0")) == 65e12
        train("float16", *STEPS, "--hellaswag_every", "9", *on_t4)
        resume("float16", *on_t4)
    dtype = records("float16", "header")[0]["dtype"]
    assert dtype == "float16", dtype
    assert all(record["mfu"] > 0 for record in records("float16", "train"))
    assert_equal_runs("float16", cpu_run("muon"), 0.03)
    assert_is_far("float16")
    newest = max(Path("float16").glob("checkpoint_*.pt"))
    scaler = torch.load(newest, weights_only=True)["scaler"]
    assert scaler["_growth_tracker"] == 4, "steps without an overflow, counted across --resume"


# --------------------------------------------------------------------------------------------------
# Scenarios: memory
# --------------------------------------------------------------------------------------------------


def micro_batch_fits():
    """GPT-2 (124M) with gigabytes free -> sequences of 1024 tokens; compiled, and eager."""
    expected = {2: (1, 1), 8: (8, 4), 16: (16, 8), 24: (32, 16), 40: (64, 32), 80: (64, 64)}
    expected[141] = (64, 64)  # 65,536 tokens keep any GPU busy
    config = train_gpt2.TrainConfig(device="cuda")
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig())
    count = sum(p.numel() for p in model.parameters())
    for gigabytes, sizes in expected.items():
        with fake_cuda(memory=1e9 * gigabytes):
            runtime = train_gpt2.Runtime(config)
            for compiled, size in zip((True, False), sizes, strict=True):
                found = machine.choose_micro_batch(config, model, compiled, runtime)
                assert found == size, (gigabytes, compiled, found)
                need = machine.step_bytes(
                    model.config, count, found * 1024, compiled, runtime.dtype
                )
                assert found == 1 or need <= 1e9 * gigabytes


def out_of_memory_is_one_line():
    """Whatever raises it, and wherever in a step: the next smaller micro-batch is named."""
    errors = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ]
    for stage in STAGES:
        for error in errors:
            assert isinstance(error, RuntimeError)
            arrived = failing_run(stage, error)
            line = "UserError: out of memory with --micro_batch 2; try --micro_batch 1"
            assert arrived == line, f"{stage}: {arrived}"
    alone = failing_run("forward", errors[0], "--micro_batch", "1")
    assert alone.endswith("--micro_batch 1; try a smaller --seq_len")


def other_errors_pass_through():
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    for stage, kind in STAGES.items():
        arrived = failing_run(stage, error)
        assert arrived.startswith(f"{kind}: "), f"{stage}: {arrived}"


# Where a step can fail, and what arrives if a RuntimeError is raised there.
STAGES = {
    "forward": "RuntimeError",
    "backward": "RuntimeError",
    "compile": "BackendCompilerFailed",
    "optimizer": "RuntimeError",
}


def failing_run(stage: str, error: Exception, *flags: str) -> str:
    """Train, with `error` raised at a stage of the first step -> the exception that main raises."""

    def fail(*args, **kwargs):
        raise error

    def compile_and_fail(model, dynamic):
        torch._dynamo.reset()
        torch.nn.Module.compile(model, backend=fail, dynamic=dynamic)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2.GPT, "compile", compile_and_fail)
        owner, name = {
            "forward": (train_gpt2.MLP, "forward"),
            "backward": (torch.Tensor, "backward"),
            "compile": (machine, "can_compile"),
            "optimizer": (torch.optim.AdamW, "step"),
        }[stage]
        patch.setattr(owner, name, fail if stage != "compile" else lambda wanted, runtime: True)
        shutil.rmtree("failing", ignore_errors=True)
        try:
            train("failing", *QUIET, "--device", "cpu", "--dtype", "float32", *flags)
        except Exception as arrived:
            return f"{type(arrived).__name__}: {arrived}"
    return "no error"


# --------------------------------------------------------------------------------------------------
# Scenarios: where the CPU waits for the GPU
# --------------------------------------------------------------------------------------------------


def make_parts(dtype="float32", optimizer="adamw", vocab_size=50304):
    """A configuration like SMALL, its runtime on the GPU, and a model there."""
    sizes = dict(n_layer=2, n_head=2, n_embd=16, seq_len=32)
    config = train_gpt2.TrainConfig(
        device="cuda", dtype=dtype, optimizer=optimizer, val_tokens=288, **sizes
    )
    runtime = train_gpt2.Runtime(config)
    torch.manual_seed(1)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=vocab_size, **sizes))
    return config, runtime, model.to(runtime.device)


def a_step_waits_once():
    """The one wait is Runtime.sum's, for any number of micro-steps. In float16 Muon has one more:
    it asks the scaler whether a gradient has overflowed. Fused AdamW asks on the GPU."""
    cases = {
        ("float32", "adamw"): {"sum": 1},
        ("bfloat16", "muon"): {"sum": 1},
        ("float16", "adamw"): {"sum": 1},
        ("float16", "muon"): {"sum": 1, "train_step": 1},
    }
    for (dtype, optimizer), expected in cases.items():
        with fake_cuda():
            config, runtime, model = make_parts(dtype, optimizer, vocab_size=128)
            optimizers = train_gpt2.make_optimizers(model, config)
            scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
            for micro_steps in (1, 1, 4):
                batch = torch.randint(128, (micro_steps, 2, 33))
                waits.clear()
                kernels.clear()
                batch = runtime.to_device(batch)
                train_gpt2.train_step(
                    model, optimizers, scaler, batch, 1e-3, False, config, runtime
                )
                assert waits_by_function() == expected, (dtype, optimizer, waits)
                assert kernels["embedding"] == 2 * micro_steps, "of tokens and positions"


def a_run_waits_only_where_it_must():
    """Every wait of main: 3 steps, 2 validations, a checkpoint of so many tensors."""
    with fake_cuda():
        waits.clear()
        train("waits", *QUIET, "--device", "cuda", "--max_steps", "3", "--val_every", "3")
        found = waits_by_function()
    content = torch.load("waits/checkpoint_0000003.pt", weights_only=True)
    states = content["AdamW"]["state"].values()
    expected = {"sum": 3 + 2 + 1}  # and whether all ranks resume from the same step
    expected["copy_to_cpu"] = len(content["model"]) + sum(map(len, states))
    expected["main"] = len(states)  # model.to(device)
    assert found == expected, waits


def validation_waits_once():
    for micro_batch in (9, 4, 1):  # 1, 3 and 9 micro-batches
        with fake_cuda():
            config, runtime, model = make_parts()
            _, shards = train_gpt2.shards.open_data("data")
            loader = train_gpt2.DataLoaderLite(shards, config.seq_len, None)
            waits.clear()
            train_gpt2.validation_loss(model, loader, config, micro_batch, runtime)
            assert waits_by_function() == {"sum": 1}, waits


def samples_wait_once_a_token_each_way():
    with fake_cuda():
        config, runtime, model = make_parts()
        waits.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            train_gpt2.show_samples(0, model, config, None, runtime, max_new_tokens=5)
        # The logits come to the CPU and the choice goes back; the prompt before, the texts after.
        assert waits_by_function() == {"generate": 2 * 5 + 1, "show_samples": 1}, waits


def hellaswag_waits_once():
    with fake_cuda():
        _, runtime, model = make_parts()
        examples = hellaswag.load_examples(runtime=runtime)
        waits.clear()
        hellaswag.evaluate(model, examples, runtime, batch_size=2)
        assert waits_by_function() == {"sum": 1}, waits


# --------------------------------------------------------------------------------------------------
# Scenarios: mistakes
# --------------------------------------------------------------------------------------------------

# A file, what a mistake takes out of it, what it leaves, and the function that fails for it.
MISTAKES = [
    (
        "train_gpt2",
        "seen + tokens.size(1), device=tokens.device)",
        "seen + tokens.size(1))",
        "hidden",
    ),
    ("train_gpt2", "torch.tensor(prompt, device=device)", "torch.tensor(prompt)", "hidden"),
    ("train_gpt2", "choice.to(device)", "choice", "generate"),
    ("train_gpt2", "zeros((), dtype=self.double, device=self.device)", "zeros(())", "sum"),
    ("train_gpt2", "rows = runtime.to_device(rows)", "pass", "hidden"),
    ("train_gpt2", "batch = runtime.to_device(ahead.result())", "batch = ahead.result()", "hidden"),
    ("hellaswag", "runtime.to_device(contexts[:, :-1])", "contexts[:, :-1]", "hidden"),
]


def changed(name: str, old: str, new: str) -> types.ModuleType:
    """A module of the project with a change to its text."""
    path = ROOT / f"{name}.py"
    source = path.read_text()
    assert source.count(old) == 1, f"{path.name} does not have once: {old}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(source.replace(old, new), str(path), "exec"), module.__dict__)  # noqa: S102
    return module


def mistakes_are_found():
    flags = [*STEPS, *SCORES, "--device", "cuda", "--dtype", "float32"]
    for number, (name, old, new, function) in enumerate(MISTAKES):
        program = changed(name, old, new)
        with fake_cuda(), pytest.MonkeyPatch.context() as patch:
            if name == "hellaswag":
                patch.setattr(program, "load_examples", hellaswag.load_examples)
                patch.setattr(train_gpt2, "hellaswag", program)
                program = train_gpt2
            with pytest.raises(DeviceMismatch, match=rf"^\w+\.py:\d+ {function}: aten"):
                train(f"mistake{number}", *flags, program=program)


def a_mask_on_the_cpu_is_found():
    """torch makes the mask of the cached path; it has to ask for the queries' device."""
    bias = torch.nn.attention.bias.CausalBias
    with fake_cuda(), pytest.MonkeyPatch.context() as patch:
        config, runtime, model = make_parts()
        patch.setattr(bias, "_materialize", lambda self, device: self._lower_right(None))
        with pytest.raises(DeviceMismatch, match=r"^train_gpt2\.py:\d+ forward: aten"):
            train_gpt2.show_samples(0, model, config, None, runtime)


def copies_that_wait_are_found():
    """A batch that is not pinned, or not copied in the background, is one wait more a step."""
    changes = {"tokens.pin_memory()": "tokens"}
    changes['non_blocking=self.device_type == "cuda"'] = "non_blocking=False"
    for old, new in changes.items():
        program = changed("train_gpt2", old, new)
        with fake_cuda():
            runtime = program.Runtime(program.TrainConfig(device="cuda"))
            waits.clear()
            runtime.to_device(torch.zeros(2, 3, dtype=torch.int64))
            assert waits_by_function() == {"to_device": 1}, waits


def bench_climbs():
    """The first three rungs of bench.py; the others compile."""
    flags = ["--network", "demo", "--micro_batch", "2", "--steps", "1", "--warmup", "1"]
    for rung, dtype in {"float32": "float32", "TF32": "float32", "bfloat16": "bfloat16"}.items():
        with fake_cuda(), pytest.MonkeyPatch.context() as patch:
            attention = torch.nn.functional.scaled_dot_product_attention
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
            patch.setattr(torch.optim, "AdamW", torch.optim.AdamW)  # put back what a rung replaces
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                bench.main([*flags, "--device", "cuda", "--only", rung])
        result = json.loads(printed.getvalue())
        assert result["dtype"] == dtype, rung
        assert result["device"] == "NVIDIA A100-SXM4-80GB"
        assert result["ms"] > 0


SCENARIOS = [
    float32_repeats_the_cpu,
    ampere_trains_in_bfloat16,
    turing_trains_in_float16_with_muon,
    micro_batch_fits,
    out_of_memory_is_one_line,
    other_errors_pass_through,
    a_step_waits_once,
    a_run_waits_only_where_it_must,
    validation_waits_once,
    samples_wait_once_a_token_each_way,
    hellaswag_waits_once,
    mistakes_are_found,
    a_mask_on_the_cpu_is_found,
    copies_that_wait_are_found,
    bench_climbs,
]


def main() -> None:
    """Run the scenarios in this folder, or those named -> failures.json, "" for what passed."""
    torch.set_num_threads(1)
    write_data(Path("data"))
    load = hellaswag.load_examples
    hellaswag.load_examples = lambda runtime=None: load(path=RECORDS, runtime=runtime)[:8]
    failures = {}
    for scenario in SCENARIOS:
        if sys.argv[1:] and scenario.__name__ not in sys.argv[1:]:
            continue
        began = time.perf_counter()
        try:
            scenario()
            failures[scenario.__name__] = ""
        except BaseException:
            failures[scenario.__name__] = traceback.format_exc()
        print(f"{scenario.__name__}: {time.perf_counter() - began:.1f} s")
    Path("failures.json").write_text(json.dumps(failures))
    sys.stdout.flush()
    os._exit(0)


# --------------------------------------------------------------------------------------------------
# Tests
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("fake_cuda")
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "failures.json").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="fake_cuda needs Linux")
@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_on_a_fake_gpu(failures, name):
    assert not failures[name], failures[name]


if __name__ == "__main__":
    main()

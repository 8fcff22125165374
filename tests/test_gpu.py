"""What only a GPU can show, in about ten minutes. Run this first on a new machine:

    python -m pytest -m gpu

Without CUDA every test here is skipped. At the end it prints a table in Markdown, which can go into
runs/ as it is. Speed is only printed; numbers, kernels, memory and waits are asserted. Nobody has
run this file on a GPU yet. What takes a `device` was tried on a CPU; the rest is by reading.
"""

import gc
import os
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import ROOT, TINY, checkpoint, losses, records, run, some_tokens, their_model
from night import recorded, wait_for
from test_compile_counts import count, expected, run_main, some_hellaswag
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile

import hellaswag
import train_gpt2
from support import machine
from train_gpt2 import GPT, GPTConfig, Runtime, TrainConfig

HAS_GPU = torch.cuda.is_available()
AMPERE = HAS_GPU and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]

# A model that trains in seconds and still has what GPUs are good at: whole tiles, heads of 64.
SHAPE = dict(n_layer=2, n_head=4, n_embd=256, seq_len=128)
SMALL = [*TINY, *(word for name, size in SHAPE.items() for word in (f"--{name}", str(size)))]
SMALL += ["--batch_tokens", "2048", "--micro_batch", "8", "--max_steps", "20"]

rows = []  # of the table


def row(what: str, found, expected="") -> None:
    rows.append(f"| {what} | {found} | {expected} |")


def apart(ours, theirs) -> float:
    """The largest relative difference."""
    return float(np.abs(np.array(ours) / np.array(theirs) - 1).max())


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """After the last test, print the table: on stderr, which xdist lets through."""
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        lines = ["", "", "| what | found | expected |", "|---|---|---|", *rows]
        print("\n".join(lines), file=sys.stderr, flush=True)


def free_memory() -> None:
    torch._dynamo.reset()
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """Give each test its own folder and all of the memory; put the precision back."""
    monkeypatch.chdir(tmp_path)
    free_memory()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


class Training:
    """A model, what trains it, and random tokens. Without settings it is GPT-2 (124M)."""

    def __init__(self, device: str, compiled=False, precision="high", **settings):
        self.config = config = TrainConfig(device=device, **settings)
        self.runtime = Runtime(config)
        torch.set_float32_matmul_precision(precision)  # "high" is TF32, "highest" is float32
        torch.manual_seed(1)
        shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
        self.model = GPT(GPTConfig(seq_len=config.seq_len, **shape)).to(self.runtime.device)
        if compiled:
            self.model.compile(dynamic=False)
        self.optimizers = train_gpt2.make_optimizers(self.model, config)
        half = self.runtime.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.runtime.device_type, enabled=half)
        self.ddp = self.model

    def tokens(self, micro_steps: int, sequences: int) -> torch.Tensor:
        shape = (micro_steps, sequences, self.config.seq_len + 1)
        return torch.randint(50257, shape, generator=torch.Generator().manual_seed(2))

    def step(self, tokens) -> float:
        batch = self.runtime.to_device(tokens)
        given = (self.ddp, self.optimizers, self.scaler, batch, 6e-4, False)
        return train_gpt2.train_step(*given, self.config, self.runtime)[0]


def choices(device: str):
    """What a model with large random weights chooses in float32: of HellaSwag's endings in the
    tests' records, and the most likely 150 tokens, past the end of its context."""
    here = Training("cpu", **SHAPE)  # the same weights for every device
    with torch.no_grad():
        for parameter in here.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    runtime = Runtime(TrainConfig(device=device, dtype="float32"))
    torch.set_float32_matmul_precision("highest")
    model = here.model.to(runtime.device)
    with some_hellaswag(42):
        scores = hellaswag.evaluate(model, hellaswag.load_examples(), runtime)
    return scores, train_gpt2.generate(model, [1, 2, 3], 150, samples=1, top_k=1).tolist()


def measure(what, device, sequences, micro_steps, steps, compiled=True, expected="", **settings):
    """Time steps, and add a row for speed and one for memory -> the peak of two micro-steps, as it
    is (0 on a CPU) and as machine.step_bytes reckons it."""
    here = Training(device, compiled, **settings)
    batch = here.tokens(max(2, micro_steps), sequences)
    seconds = []
    for _ in range(3 + steps):
        began = time.perf_counter()
        here.step(batch[:micro_steps])
        seconds.append(time.perf_counter() - began)
    second = statistics.median(seconds[3:])  # the first ones warm up
    peak = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        here.step(batch[:2])
        peak = torch.cuda.max_memory_allocated()
    tokens = sequences * here.config.seq_len
    speed = micro_steps * tokens / second
    flops = machine.peak_flops(here.runtime.device) or float("nan")
    mfu = speed * here.model.flops_per_token(here.config.seq_len) / flops
    count = sum(p.numel() for p in here.model.parameters())
    dtype = here.runtime.dtype
    need = machine.step_bytes(here.model.config, count, tokens, compiled, dtype)
    row(what, f"{1000 * second:.0f} ms, {speed:,.0f} tokens/s, MFU {mfu:.1%}", expected)
    row(f"{what}: memory", f"{peak / 1e9:.1f} GB", f"{need / 1e9:.1f} GB")
    return peak, need


def test_what_this_machine_is():
    runtime = Runtime(TrainConfig())
    assert runtime.device_type == "cuda", "--device auto takes the GPU"
    assert runtime.dtype == (torch.bfloat16 if AMPERE else torch.float16)
    peak = machine.peak_flops(runtime.device)
    row("GPUs", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    row("torch, CUDA", f"{torch.__version__}, {torch.version.cuda}")
    row("peak by the data sheet", f"{peak / 1e12:.0f} TFLOP/s" if peak else "not in PEAK_TFLOPS")


PRECISIONS = [("float32", "highest", 1e-4), ("float32", "high", 1e-3), ("auto", "high", 1e-2)]


@pytest.mark.parametrize("dtype, precision, limit", PRECISIONS)
def test_the_loss_is_that_of_transformers(tmp_path, dtype, precision, limit, device="cuda"):
    """Theirs is in float32, with the same weights."""
    theirs = their_model(n_positions=128, n_embd=256, n_layer=4, n_head=4)
    theirs.save_pretrained(tmp_path)
    here = Training(device, dtype=dtype, **SHAPE)
    ours = GPT.from_pretrained(str(tmp_path)).to(here.runtime.device)
    [rows] = here.runtime.to_device(here.tokens(1, 8))
    x, y = rows[:, :-1], rows[:, 1:]
    with torch.no_grad():
        torch.set_float32_matmul_precision("highest")
        logits = theirs.to(here.runtime.device)(x).logits
        their_loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        torch.set_float32_matmul_precision(precision)
        with here.runtime.autocast():
            difference = apart(ours(x, y).item(), their_loss)
    row(f"transformers' loss, {dtype}, {precision}", f"{difference:.0e} away", limit)
    assert difference < limit


def test_greedy_samples_and_hellaswag_are_those_of_the_cpu():
    assert choices("cuda") == choices("cpu")


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-4), ("auto", 5e-2)])
def test_the_cache_changes_nothing(dtype, limit, device="cuda"):
    """Attention takes other kernels where tokens are read in parts."""
    here = Training(device, precision="highest", dtype=dtype, **SHAPE)
    [tokens] = here.runtime.to_device(here.tokens(1, 4)[..., :99])
    cache = here.model.new_cache()
    with torch.no_grad(), here.runtime.autocast():
        whole = here.model.hidden(tokens)
        parts = [here.model.hidden(part, cache) for part in tokens.split([60, 1, 38], dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < limit * whole.abs().max()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_with_its_scaler(tmp_path, optimizer):
    run_main(*SMALL, "--device", "cuda", "--dtype", "float16", "--optimizer", optimizer)
    found, scale = losses(tmp_path / "log"), checkpoint(tmp_path / "log")["scaler"]["scale"]
    row(f"float16, {optimizer}", f"loss {found[0]:.2f} to {found[-1]:.2f}, scale {scale:.0f}")
    assert found[-1] < found[0] - 1 and 1 <= scale <= 65536


def test_attention_is_flash_and_adamw_is_fused(device="cuda", wanted=("flash", "cudnn")):
    here = Training(device, **SHAPE)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        here.step(here.tokens(1, 8))
    names = {event.key for event in seen.key_averages()}
    assert "aten::_fused_adamw_" in names
    prefix = "aten::_scaled_dot_product_"
    attention = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    row("attention", ", ".join(sorted(attention)), "flash, or cuDNN's on an H100")
    if AMPERE or device == "cpu":  # older GPUs have no flash attention
        assert attention and all(name.startswith(wanted) for name in attention)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_step_waits_for_the_gpu_once(monkeypatch, dtype, compiled, device="cuda"):
    """To wait for the GPU is an error here, except in Runtime.sum."""
    here = Training(device, compiled, dtype=dtype, **SHAPE)
    tokens = here.tokens(2, 8)
    for _ in range(2):  # the first step makes AdamW's state
        here.step(tokens)
    calls, real = [], Runtime.sum

    def allowed(self, *values):
        calls.append(values)
        torch.cuda.set_sync_debug_mode("default")
        result = real(self, *values)
        torch.cuda.set_sync_debug_mode("error")
        return result

    monkeypatch.setattr(Runtime, "sum", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            here.model.lm_head.weight.sum().item()  # the alarm works
        here.step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    row(f"waits of a step, {dtype}, {'compiled' if compiled else 'eager'}", len(calls), 1)
    assert len(calls) == 1


def test_triton_compiles_twice_with_hellaswag_and_samples(tmp_path, device="cuda"):
    from torch._inductor.compile_fx import compile_fx

    flags = [*SMALL, "--max_steps", 10, "--device", device, "--dtype", "auto", "--val_every", 5]
    flags += ["--val_tokens", 21 * 128, "--sample_every", 5, "--hellaswag_every", 5]
    found = count(*flags, "--compile", "--out_dir", "compiled", compiler=compile_fx)
    with some_hellaswag():
        run_main(*flags, "--no-compile", "--out_dir", "eager")
    compiled, eager = losses(tmp_path / "compiled"), losses(tmp_path / "eager")
    graphs = f"{found['compilations']}, {found['graph breaks']} breaks"
    row("graphs compiled", graphs, "2, 0 breaks")
    row("the eager losses, compiled", f"{apart(compiled, eager):.0e} away", 1e-2)
    assert records(tmp_path / "compiled", "header")[0]["compiled"]
    assert found == expected(training_graphs=1) and apart(compiled, eager) < 1e-2


def fits(*args, **options):
    """What `measure` returns, or None if that is out of memory."""
    try:
        return measure(*args, **options)
    except Exception as error:
        if not machine.is_out_of_memory(error):
            raise
        return None


@pytest.mark.parametrize("sequences", [16, 32])  # 64 are the most that are chosen, below
def test_memory_is_as_reckoned(sequences):
    lecture = "the lecture's A100: 90 ms" if sequences == 16 else ""
    found = fits(f"{sequences} x 1024", "cuda", sequences, 1, 10, expected=lecture)
    if not found:
        pytest.skip(f"{sequences} sequences do not fit")
    assert found[0] == pytest.approx(found[1], rel=0.15)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_chosen_micro_batch_fits_and_its_double_does_not(compiled):
    here = Training("cuda")
    size = machine.choose_micro_batch(here.config, here.model, compiled, here.runtime)
    del here
    free_memory()
    free = torch.cuda.mem_get_info()[0]
    what = f"the chosen micro-batch of {size}, {'compiled' if compiled else 'eager'}"
    quoted = "llm.c: MFU 60%" if compiled else ""
    peak, need = measure(what, "cuda", size, min(8, 512 // size), 3, compiled, quoted)
    assert peak == pytest.approx(need, rel=0.15)
    free_memory()
    if 2 * size * 1024 <= 65536:  # the most that is ever chosen
        found = fits("its double", "cuda", 2 * size, 2, 1, compiled)
        assert not found or found[0] > 0.75 * free


HOPELESS = {"eager": ["--no-compile"], "compiled": ["--compile"]}
HOPELESS["validation"] = ["--compile", "--val_every", 1]


@pytest.mark.parametrize("flags", HOPELESS.values(), ids=HOPELESS)
def test_out_of_memory_is_one_line(tmp_path, flags):
    for split in ("train", "val"):  # 4096 sequences
        np.save(tmp_path / f"x_{split}_000000.npy", some_tokens(2**22 + 1, 1))
    wide = ["--n_embd", 768, "--n_head", 12, "--n_layer", 2, "--seq_len", 1024, "--data", tmp_path]
    wide += ["--batch_tokens", 2**22, "--micro_batch", 4096, "--device", "cuda", "--dtype", "auto"]
    done = run(tmp_path, *TINY, *wide, *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.endswith("out of memory with --micro_batch 4096; try --micro_batch 2048")


def test_nccl_with_one_rank(device="cuda"):
    """Training under DDP, a sum and the choice of a micro-batch, in a process group of one."""
    alone = Training(device, True, dtype="float32", **SHAPE)
    tokens = alone.tokens(2, 8)
    plain = [alone.step(tokens) for _ in range(3)]
    torch._dynamo.reset()
    options = dict(backend="gloo")
    if device == "cuda":
        options = dict(backend="nccl", device_id=machine.find_device("cuda"))
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **options)
    try:
        here = Training(device, True, dtype="float32", **SHAPE)
        here.ddp = DDP(here.model, gradient_as_bucket_view=True)
        wrapped = [here.step(tokens) for _ in range(3)]
        here.runtime.world = 2  # so that it asks the others, of which there are none
        assert here.runtime.sum(1.5, torch.ones((), device=here.runtime.device)) == [1.5, 1.0]
        assert machine.choose_micro_batch(here.config, here.model, True, here.runtime) > 0
    finally:
        dist.destroy_process_group()
    row("nccl, one rank: losses without DDP", f"{apart(wrapped, plain):.0e} away", 1e-3)
    assert apart(wrapped, plain) < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_with_two_ranks(tmp_path):
    for ranks in (1, 2):
        flags = ["--device", "cuda", "--dtype", "auto", "--compile", "--out_dir", str(ranks)]
        done = run(tmp_path, *SMALL, *flags, processes=ranks)
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    row("nccl, two ranks: losses of one", f"{apart(two, one):.0e} away", 1e-3)
    assert apart(two, one) < 1e-3


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_kill_and_a_resume(tmp_path, deterministic, device="cuda", more=()):
    """The losses of a run killed -9 and resumed are those of one that nobody disturbed.

    To 1e-3, because some gradients are added atomically, in any order; bit for bit with
    deterministic algorithms, but eagerly: the compiler times its kernels and takes the fastest.
    """
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt2\n"
        f"torch.use_deterministic_algorithms({deterministic})\ntrain_gpt2.main(sys.argv[1:])\n"
    )
    kind = "--no-compile" if deterministic else "--compile"
    flags = [*SMALL, kind, "--device", device, "--dtype", "auto", "--learning_rate", 6e-4]
    flags += ["--batch_tokens", 2**16, "--max_steps", 30, "--checkpoint_every", 5, "--resume"]
    command = [*map(str, [sys.executable, script, *flags, *more, "--out_dir"])]
    options = dict(env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, text=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    subprocess.run([*command, "quiet"], check=True, **options)
    process = subprocess.Popen([*command, "killed"], **options, **pipes)
    wait_for(recorded(tmp_path / "killed", 8), process, seconds=200)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before its end"
    subprocess.run([*command, "killed"], check=True, **options)
    found = np.abs(losses(tmp_path / "killed") - losses(tmp_path / "quiet")).max()
    limit = 0 if deterministic else 1e-3
    exact = "bit for bit" if found == 0 else "not bit for bit"
    how = "eager, deterministic" if deterministic else "compiled"
    row(f"losses after kill -9 and --resume, {how}", f"{found:.0e} away, {exact}", limit)
    assert found <= limit

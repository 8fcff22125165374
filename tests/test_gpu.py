"""What only a GPU can show, in about ten minutes. Run this first on a new machine:

    python -m pytest -m gpu

Without CUDA every test here is skipped. At the end it prints a table in Markdown, which can go into
runs/ as it is. Speed is only printed; numbers, kernels, memory and waits are asserted. Nobody has
run this file on a GPU yet: its helpers ran on a CPU, and what it expects is reckoned or quoted.
"""

import gc
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

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
import machine
import train_gpt2
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


# --------------------------------------------------------------------------------------------------
# Helpers: they take a device, so that a CPU can run them, too
# --------------------------------------------------------------------------------------------------


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
        given = (self.model, self.ddp, self.optimizers, self.scaler, batch, 6e-4, False)
        return train_gpt2.train_step(*given, self.config, self.runtime)[0]

    def backward(self) -> None:
        [rows] = self.runtime.to_device(self.tokens(1, 8))
        with self.runtime.autocast():
            loss = self.model(rows[:, :-1], rows[:, 1:])
        loss.backward()


def operators(work) -> set[str]:
    """The names of the operators that a function runs."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return {event.key for event in seen.key_averages()}


def loss_and_theirs(device: str, dtype: str, precision: str, folder) -> tuple[float, float]:
    """The loss of our model, and of transformers' in float32 with the same weights."""
    theirs = their_model(n_positions=128, n_embd=256, n_layer=4, n_head=4)
    theirs.save_pretrained(folder)
    here = Training(device, dtype=dtype, **SHAPE)
    ours = GPT.from_pretrained(str(folder)).to(here.runtime.device)
    [rows] = here.runtime.to_device(here.tokens(1, 8))
    x, y = rows[:, :-1], rows[:, 1:]
    with torch.no_grad():
        torch.set_float32_matmul_precision("highest")
        logits = theirs.to(here.runtime.device)(x).logits
        their_loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        torch.set_float32_matmul_precision(precision)
        with here.runtime.autocast():
            return ours(x, y).item(), their_loss.item()


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


def read_in_parts(device: str, dtype: str) -> float:
    """How far final hidden states that are read through the cache in parts are from those that are
    read at once, relative to the largest."""
    here = Training(device, precision="highest", dtype=dtype, **SHAPE)
    [tokens] = here.runtime.to_device(here.tokens(1, 4)[..., :99])
    cache = here.model.new_cache()
    with torch.no_grad(), here.runtime.autocast():
        whole = here.model.hidden(tokens)
        parts = [here.model.hidden(part, cache) for part in tokens.split([60, 1, 38], dim=1)]
    return ((torch.cat(parts, dim=1) - whole).abs().max() / whole.abs().max()).item()


@contextmanager
def only_sum_may_wait():
    """In here, to wait for the GPU is an error, except in Runtime.sum -> the list of its calls."""
    calls, real = [], Runtime.sum

    def allowed(self, *values):
        calls.append(values)
        torch.cuda.set_sync_debug_mode("default")
        result = real(self, *values)
        torch.cuda.set_sync_debug_mode("error")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "sum", allowed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield calls
        finally:
            torch.cuda.set_sync_debug_mode("default")


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
    need = machine.step_bytes(here.model, tokens, compiled, here.runtime.dtype)
    row(what, f"{1000 * second:.0f} ms, {speed:,.0f} tokens/s, MFU {mfu:.1%}", expected)
    row(f"{what}: memory", f"{peak / 1e9:.1f} GB", f"{need / 1e9:.1f} GB")
    return peak, need


def world_of_one(backend: str, device: str):
    """Losses without and with DDP, a sum and a micro-batch, as a process group of one agrees."""
    plain = Training(device, True, dtype="float32", **SHAPE)
    tokens = plain.tokens(2, 8)
    plain = [plain.step(tokens) for _ in range(3)]
    torch._dynamo.reset()
    options = dict(device_id=machine.find_device(device)) if device == "cuda" else {}
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1, **options)
    try:
        here = Training(device, True, dtype="float32", **SHAPE)
        here.ddp = DDP(here.model, gradient_as_bucket_view=True)
        wrapped = [here.step(tokens) for _ in range(3)]
        here.runtime.world = 2  # so that it asks the others, of which there are none
        total = here.runtime.sum(1.5, torch.ones((), device=here.runtime.device))
        size = machine.choose_micro_batch(here.config, here.model, True, here.runtime)
        return plain, wrapped, total, size
    finally:
        dist.destroy_process_group()


def kill_and_resume(folder, device: str, deterministic: bool, *more) -> np.ndarray:
    """A run killed -9 and resumed, and one that nobody disturbed -> their losses' differences."""
    script = folder / "train.py"
    script.write_text(
        f"import sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt2\n"
        f"torch.use_deterministic_algorithms({deterministic})\ntrain_gpt2.main(sys.argv[1:])\n"
    )
    # The compiler times its kernels and takes the fastest, so compiled sums need not repeat.
    flags = [*SMALL, "--no-compile" if deterministic else "--compile", "--device", device]
    flags += ["--dtype", "auto", "--learning_rate", 6e-4, "--batch_tokens", 2**16]
    flags += ["--max_steps", 30, "--checkpoint_every", 5, "--resume", *more, "--out_dir"]
    command = [*map(str, [sys.executable, script, *flags])]
    options = dict(cwd=folder, env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, text=True)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    subprocess.run([*command, "quiet"], check=True, **options)
    process = subprocess.Popen([*command, "killed"], **options, **pipes)
    wait_for(recorded(folder / "killed", 8), process, seconds=200)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before its end"
    subprocess.run([*command, "killed"], check=True, **options)
    return losses(folder / "killed") - losses(folder / "quiet")


# --------------------------------------------------------------------------------------------------
# The numbers
# --------------------------------------------------------------------------------------------------


def test_what_this_machine_is():
    runtime = Runtime(TrainConfig())
    assert runtime.device_type == "cuda", "--device auto takes the GPU"
    assert runtime.dtype == (torch.bfloat16 if AMPERE else torch.float16)
    peak = machine.peak_flops(runtime.device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.check_output(query, text=True).split() if shutil.which(query[0]) else ["?"]
    row("GPUs", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    row("torch, CUDA, driver", f"{torch.__version__}, {torch.version.cuda}, {driver[0]}")
    row("peak by the data sheet", f"{peak / 1e12:.0f} TFLOP/s" if peak else "not in PEAK_TFLOPS")


PRECISIONS = [("float32", "highest", 1e-4), ("float32", "high", 1e-3), ("auto", "high", 1e-2)]


@pytest.mark.parametrize("dtype, precision, limit", PRECISIONS)
def test_the_loss_is_that_of_transformers(tmp_path, dtype, precision, limit):
    ours, theirs = loss_and_theirs("cuda", dtype, precision, tmp_path)
    row(f"transformers' loss, {dtype}, {precision}", f"{apart(ours, theirs):.0e} away", limit)
    assert apart(ours, theirs) < limit


def test_a_run_has_the_losses_of_the_cpu(tmp_path):
    """20 steps in float32; inside of products the GPU has TF32."""
    for device in ("cpu", "cuda"):
        run_main(*SMALL, "--device", device, "--out_dir", device)
    cpu, gpu = losses(tmp_path / "cpu"), losses(tmp_path / "cuda")
    row("the CPU's losses, 20 steps in TF32", f"{apart(gpu, cpu):.0e} away", 1e-2)
    assert apart(gpu[0], cpu[0]) < 1e-3 and apart(gpu, cpu) < 1e-2


def test_greedy_samples_and_hellaswag_are_those_of_the_cpu():
    assert choices("cuda") == choices("cpu")


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-4), ("auto", 5e-2)])
def test_the_cache_changes_nothing(dtype, limit):
    assert read_in_parts("cuda", dtype) < limit


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_with_its_scaler(tmp_path, optimizer):
    run_main(*SMALL, "--device", "cuda", "--dtype", "float16", "--optimizer", optimizer)
    found, scale = losses(tmp_path / "log"), checkpoint(tmp_path / "log")["scaler"]["scale"]
    row(f"float16, {optimizer}", f"loss {found[0]:.2f} to {found[-1]:.2f}, scale {scale:.0f}")
    assert found[-1] < found[0] - 1 and 1 <= scale <= 65536


# --------------------------------------------------------------------------------------------------
# Kernels, and waiting for them
# --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not AMPERE, reason="flash attention needs an Ampere GPU or a newer one")
def test_attention_takes_the_flash_kernel():
    here = Training("cuda", dtype="bfloat16", **SHAPE)
    prefix = "aten::_scaled_dot_product_"
    found = {name.removeprefix(prefix) for name in operators(here.backward) if prefix in name}
    row("attention", ", ".join(sorted(found)), "flash, or cuDNN's on an H100")
    kinds = {"flash_attention", "cudnn_attention"}
    assert found and found <= kinds | {f"{kind}_backward" for kind in kinds}


def test_adamw_is_fused_and_right():
    here = Training("cuda", dtype="float32", **SHAPE)
    here.backward()
    group = here.optimizers[0].param_groups[0]
    copies = [p.detach().clone().requires_grad_() for p in group["params"]]
    for mine, p in zip(copies, group["params"], strict=True):
        mine.grad = p.grad.clone()
    plain = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    torch.optim.AdamW(copies, **plain, foreach=False, fused=False).step()
    assert "aten::_fused_adamw_" in operators(here.optimizers[0].step)
    torch.testing.assert_close(copies, group["params"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_step_waits_for_the_gpu_once(dtype, compiled):
    here = Training("cuda", compiled, dtype=dtype, **SHAPE)
    tokens = here.tokens(2, 8)
    for _ in range(2):  # the first step makes AdamW's state
        here.step(tokens)
    with only_sum_may_wait() as calls:
        with pytest.raises(RuntimeError, match="synchronizing"):
            here.model.lm_head.weight.sum().item()  # the alarm works
        here.step(tokens)
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
    row(
        "graphs compiled", f"{found['compilations']}, {found['graph breaks']} breaks", "2, 0 breaks"
    )
    row("the eager losses, compiled", f"{apart(compiled, eager):.0e} away", 1e-2)
    assert records(tmp_path / "compiled", "header")[0]["compiled"]
    assert found == expected(training_graphs=1) and apart(compiled, eager) < 1e-2


# --------------------------------------------------------------------------------------------------
# Memory and speed of GPT-2 (124M)
# --------------------------------------------------------------------------------------------------


def fits(*args, **options):
    """What `measure` returns, or None if that is out of memory."""
    try:
        return measure(*args, **options)
    except Exception as error:
        if not machine.is_out_of_memory(error):
            raise
        return None


@pytest.mark.parametrize("sequences", [16, 32, 64])
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


# --------------------------------------------------------------------------------------------------
# Several ranks, and a night's run
# --------------------------------------------------------------------------------------------------


def test_nccl_with_one_rank():
    plain, wrapped, total, size = world_of_one("nccl", "cuda")
    row("nccl, one rank: losses without DDP", f"{apart(wrapped, plain):.0e} away", 1e-3)
    assert apart(wrapped, plain) < 1e-3 and total == [1.5, 1.0] and size > 0


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
def test_a_kill_and_a_resume(tmp_path, deterministic):
    """Embeddings' gradients are added atomically, in any order, unless torch is told otherwise."""
    found = np.abs(kill_and_resume(tmp_path, "cuda", deterministic)).max()
    kind = "with deterministic algorithms, eager" if deterministic else "as it is, compiled"
    limit = 0 if deterministic else 1e-3
    row(f"losses after kill -9 and --resume, {kind}", f"{found:.0e} away", limit)
    assert found <= limit

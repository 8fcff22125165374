"""Measure what each speedup of the lecture's section 2, "make it fast" (1:22:18), gains here.

    python bench.py                        # GPT-2 (124M)
    python bench.py --network demo         # the small model of train_gpt2.py's demo
    python bench.py --json bench.json && python plot.py bench.json       # as a bar chart

The ladder starts from float32, and each rung adds one speedup to those before it. All rungs time
train_gpt2.py's model and train_step, which have every speedup. So each rung runs in its own process
and first removes the speedups above it. What remains is the lecture's program at that point: eager
before "torch.compile", and with whole attention scores in memory before "flash attention". (One
speedup stays: on a GPU, the rungs from bfloat16 on have the residual stream in bfloat16, too.) Each
round measures every rung, so a temporary load on the machine affects all of them.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from support import machine
from support.command import OneLineParser, UserError, explain, is_out_of_memory, run_command
from train_gpt2 import GPT, PRESETS, Runtime, TrainConfig, TrainState, train_step

# Each rung, and its milliseconds per step of 16 x 1024 tokens on the lecture's A100.
RUNGS = {
    "float32": 1000,
    "TF32": 333,
    "bfloat16": 300,
    "torch.compile": 130,
    "flash attention": 96,
    "vocabulary 50304": 93,
    "fused AdamW": 90,
    "freed memory kept": None,  # ours, for CPUs
}
A100_IDEAL_MS = 44.9  # 16,384 tokens x 0.855 GFLOP / 312 TFLOP/s, the data sheet's bfloat16


def plain_attention(query, key, value, is_causal):
    """Attend as the lecture does at first, with all scores in memory. (B, H, T, D) each."""
    assert is_causal
    T, D = query.shape[2:]
    scores = query @ key.transpose(2, 3) / math.sqrt(D)  # -> (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=3) @ value  # -> (B, H, T, D)


def make_config(args, enabled: list[str]) -> TrainConfig:
    """Take a preset's model with the speedups that are settings, and a batch of one micro-batch."""
    micro_batch, seq_len = 16, 1024  # the lecture's
    if args.device == "cpu":
        micro_batch, seq_len = 4, 256
    if args.network == "demo":
        micro_batch, seq_len = 24, 32
    micro_batch = args.micro_batch or micro_batch
    seq_len = args.seq_len or seq_len
    batch = dict(micro_batch=micro_batch, seq_len=seq_len, batch_tokens=micro_batch * seq_len)
    dtype = "auto" if "bfloat16" in enabled else "float32"
    vocab_size = 50304 if "vocabulary 50304" in enabled else 50257
    speed = dict(device=args.device, dtype=dtype, compile=None, vocab_size=vocab_size)
    return dataclasses.replace(TrainConfig(**PRESETS[args.network]), **batch, **speed)


def median_seconds(work, warmup: int, times: int, runtime) -> float:
    """Call work() `warmup` + `times` times -> the median time of the latter."""
    synchronize = getattr(torch, runtime.device_type).synchronize  # waits for a GPU; no-op on a CPU
    seconds = []
    for _ in range(warmup + times):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:])


def measure_rung(rung: str, args) -> dict:
    """Time the training steps of a rung, after a warmup -> its figures, or why it is skipped."""
    enabled = list(RUNGS)[: list(RUNGS).index(rung) + 1]
    config = make_config(args, enabled)
    if "freed memory kept" not in enabled:
        machine.keep_freed_memory = lambda: False  # machine.open_device calls it on a CPU
    runtime = Runtime(config.device, config.dtype)
    keeps_memory = runtime.device_type == "cpu" and machine.keep_freed_memory()
    ampere = runtime.device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if rung == "TF32" and not ampere:
        return {"skipped": "needs an NVIDIA GPU, Ampere or newer"}
    if rung == "bfloat16" and runtime.dtype == torch.float32:
        return {"skipped": "needs a processor with instructions for it"}
    if rung == "freed memory kept" and not keeps_memory:
        return {"skipped": "needs a CPU, and glibc"}

    # Take away what this rung does not have yet.
    if "TF32" not in enabled:
        torch.set_float32_matmul_precision("highest")
    if "flash attention" not in enabled:
        F.scaled_dot_product_attention = plain_attention
    if "fused AdamW" not in enabled:
        adamw = torch.optim.AdamW
        torch.optim.AdamW = lambda *args, fused, **options: adamw(*args, **options)
    torch.manual_seed(config.seed)
    model = GPT(config).to(runtime.device)
    compiled = "torch.compile" in enabled and machine.can_compile(config.compile, runtime)
    if rung == "torch.compile" and not compiled:
        return {"skipped": "needs a working compiler"}
    if compiled:
        model.compile(dynamic=False)
    state = TrainState(model, config, runtime)
    if state.scaler.is_enabled():  # from the usual 65536 it may overflow, and skip the update
        state.scaler = torch.amp.GradScaler(runtime.device_type, init_scale=1024)
    batch = torch.randint(50257, (1, config.micro_batch, config.seq_len + 1)).to(runtime.device)
    seconds = median_seconds(
        lambda: train_step(state, batch, 6e-4, config, runtime), args.warmup, args.steps, runtime
    )
    return dict(
        ms=1000 * seconds,
        micro_batch=config.micro_batch,
        seq_len=config.seq_len,
        flops_per_token=machine.flops_per_token(model, config.seq_len),
        memory=machine.peak_memory(runtime.device_type),
        device=machine.device_name(runtime.device),
        device_type=runtime.device_type,
        dtype=str(runtime.dtype).removeprefix("torch."),
        published_peak=machine.peak_flops(runtime.device, runtime.dtype),
    )


def measure_peak(args) -> dict:
    """Time the product of two large matrices, in bfloat16 if it is fast here -> FLOP/s."""
    runtime = Runtime(args.device, "auto")
    N = 4096 if runtime.device_type == "cpu" else 8192  # on a GPU 4096 is too short to time
    a, b = torch.randn(2, N, N, device=runtime.device).to(runtime.dtype)
    return {"peak": 2 * N**3 / median_seconds(lambda: a @ b, 2, 6, runtime)}


def run_rung(rung: str, argv: list[str]) -> dict:
    """Measure a rung, or "peak", in its own process. Raises UserError if that fails."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--only", rung]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode == 2:  # the process has printed its error
        sys.exit(2)
    if done.returncode == -9:  # SIGKILL, by which Linux ends a process when memory is short
        return {"skipped": "killed, probably for lack of memory; try a smaller --micro_batch"}
    if done.returncode != 0:
        raise UserError(f"{rung}: the process that measures it failed (status {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(args, argv: list[str]) -> dict:
    """Measure all rungs up to --until, --rounds times -> what --json writes."""
    results = {name: [] for name in list(RUNGS)[: list(RUNGS).index(args.until) + 1]}
    skipped = {}
    peaks = []
    for turn in range(args.rounds):
        if args.measure_peak:
            peaks.append(run_rung("peak", argv)["peak"])
        for rung in list(results):
            result = run_rung(rung, argv)
            if "skipped" in result:
                skipped[rung] = result["skipped"]
                del results[rung]
                continue
            results[rung].append(result)
            print(f"round {turn + 1}, {rung}: {result['ms']:.1f} ms", file=sys.stderr, flush=True)
    if not results:
        raise UserError(f"no rung can be measured: {next(iter(skipped.values()))}")

    first = next(iter(results.values()))[0]
    peak = statistics.median(peaks) if peaks else first["published_peak"]
    rungs = []
    for name, rounds in results.items():
        each_ms = [result["ms"] for result in rounds]
        ms = statistics.median(each_ms)
        speed = first["micro_batch"] * first["seq_len"] / (ms / 1000)
        row = dict(name=name, ms=ms, each_ms=each_ms, tokens_per_second=speed)
        row["dtype"] = rounds[0]["dtype"]
        row["mfu"] = speed * rounds[0]["flops_per_token"] / peak if peak else None
        row["memory"] = max(result["memory"] for result in rounds)
        rungs.append(row)
    shared = {key: first[key] for key in ("device", "device_type", "micro_batch", "seq_len")}
    return dict(
        network=args.network,
        **shared,
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        peak=peak,
        peak_is="measured" if peaks else "published",
        rungs=rungs,
        skipped=skipped,
    )


def print_table(result: dict) -> None:
    """Print a line per rung, with the lecture's A100 in the last two columns."""
    print(f"{result['network']} on {result['device']} ({result['device_type']}),", end=" ")
    print(f"{result['micro_batch']} x {result['seq_len']} tokens a step")
    print(f"{'':18}{'ms a step':>10}{'least-most':>16}{'tokens/s':>11}{'x before':>9}", end="")
    print(f"{'x start':>8}{'MFU':>7}{'memory':>9}{'A100 ms':>9}{'MFU':>6}")
    first_ms = result["rungs"][0]["ms"]
    ms_before = first_ms
    for row in result["rungs"]:
        ms = row["ms"]
        spread = f"{min(row['each_ms']):.0f}-{max(row['each_ms']):.0f}"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        memory = f"{row['memory'] / 1e9:.2f} GB" if row["memory"] else "-"
        line = f"{row['name']:18}{ms:10.1f}{spread:>16}{row['tokens_per_second']:11,.0f}"
        line += f"{ms_before / ms:9.2f}{first_ms / ms:8.2f}{mfu:>7}{memory:>9}"
        a100_ms = RUNGS[row["name"]]
        if a100_ms:
            line += f"{a100_ms:9}{A100_IDEAL_MS / a100_ms:6.1%}"
        print(line + ("  (float16 here)" if row["dtype"] == "float16" else ""))
        ms_before = ms
    for name, reason in result["skipped"].items():
        print(f"{name:18}     skipped: {reason}")
    if result["peak"]:
        print(f"MFU: of {result['peak'] / 1e12:,.2f} TFLOP/s, {result['peak_is']}")


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser("bench.py", __doc__)
    add = parser.add_argument
    add("--network", choices=["gpt2", "demo"], default="gpt2", help="which model (default: gpt2)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cuda, mps or cpu (default here: %(default)s)")
    add("--micro_batch", type=positive, help="sequences per step (on a GPU: 16)")
    add("--seq_len", type=positive, help="tokens per sequence (on a GPU: 1024)")
    add("--rounds", type=positive, default=3, help="measurements of each rung (default: 3)")
    add("--steps", type=positive, default=5, help="timed steps per measurement (default: 5)")
    add("--warmup", type=positive, default=2, help="untimed steps before them (default: 2)")
    add("--measure_peak", action="store_true", help="time a matrix product as MFU's 100%%")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    add("--until", choices=list(RUNGS), default="freed memory kept", help="last rung to measure")
    add("--only", choices=["peak", *RUNGS], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only:
        try:
            result = measure_peak(args) if args.only == "peak" else measure_rung(args.only, args)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            result = {"skipped": "out of memory; try a smaller --micro_batch"}
        print(json.dumps(result))
        return
    if args.json and not args.json.parent.is_dir():  # known now, not after ten minutes
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    result = measure_all(args, argv)
    print_table(result)
    if args.json:
        with explain(f"--json {args.json} cannot be written"):
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_command("bench.py", main)

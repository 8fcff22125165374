"""
The lecture's section 2, "make it fast" (1:22:18), as a command: its ladder, climbed here.

    python bench.py                        # GPT-2 (124M)
    python bench.py --network demo         # the small network of train_gpt2.py's demo
    python bench.py --json bench.json && python plot.py bench.json       # as a bar chart

Each rung stands on all those before it. What is timed is train_gpt2.py's own network and its
train_step; what a rung lacks is taken away from outside, in a process that measures this rung
alone. A round takes every rung in turn, so that a machine that is busy for a while is so for all.
"""

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import train_gpt2
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, UserError

# The rungs, and milliseconds a step on the lecture's A100 with 16 x 1024 tokens, by its chapters.
RUNGS = {
    "float32": 1000,
    "TF32": 333,
    "bfloat16": 300,
    "torch.compile": 130,
    "flash attention": 96,
    "vocabulary 50304": 93,
    "fused AdamW": 90,
    "freed memory kept": None,
}
A100_TFLOPS = 312


def written_out(q, k, v, is_causal=True):
    """Attention as the lecture first writes it, its scores whole in memory. (B, H, T, D) each."""
    T = q.size(2)
    scores = (q @ k.transpose(2, 3)) / math.sqrt(q.size(3))  # -> (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=3) @ v  # -> (B, H, T, D)


def without_fused(adamw, *args, fused, **options):
    return adamw(*args, **options)


def network_config(args) -> TrainConfig:
    """The settings to measure with: the preset's network; 16 x 1024 tokens on a GPU as the lecture,
    4 x 256 on a CPU, for the demo its own 24 x 32; or what the flags say."""
    row = PRESETS[args.network]
    rows, seq_len = (24, row["seq_len"]) if args.network == "demo" else (16, 1024)
    if args.device == "cpu" and args.network != "demo":
        rows, seq_len = 4, 256
    seq_len = args.seq_len or seq_len
    rows = rows if args.micro_batch is None else args.micro_batch
    sizes = {size: row[size] for size in ("n_layer", "n_head", "n_embd")}
    batch = dict(batch_tokens=(rows or 512) * seq_len, seq_len=seq_len, micro_batch=rows)
    return TrainConfig(**sizes, **batch, device=args.device)


def synchronize(runtime) -> None:
    if runtime.kind != "cpu":
        getattr(torch, runtime.kind).synchronize()


def peak_memory(runtime) -> int:
    """The most bytes that were in use, on the GPU or by the process; 0 where nothing tells."""
    if runtime.kind == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_rung(rung: str, args) -> dict:
    """Time the steps of one rung, after a warm-up -> what was found, or why it is not on here."""
    on = list(RUNGS)[: list(RUNGS).index(rung) + 1]
    config = network_config(args)
    runtime = train_gpt2.Runtime(config)
    if rung == "TF32" and not (runtime.kind == "cuda" and runtime.best_dtype() == "bfloat16"):
        return {"skipped": "only NVIDIA's GPUs have it, from Ampere on"}
    if rung == "bfloat16" and runtime.dtype == torch.float32:
        return {"skipped": "this processor has no instructions for it"}
    keep = rung == "freed memory kept"
    if keep and not (runtime.kind == "cpu" and train_gpt2.keep_freed_memory()):
        return {"skipped": "only for a CPU with glibc"}
    if "bfloat16" not in on:
        runtime.dtype = torch.float32
    if "TF32" not in on:
        torch.set_float32_matmul_precision("highest")
    if "flash attention" not in on:
        F.scaled_dot_product_attention = written_out
    if "fused AdamW" not in on:
        torch.optim.AdamW = functools.partial(without_fused, torch.optim.AdamW)
    vocab_size = 50304 if "vocabulary 50304" in on else 50257
    torch.manual_seed(config.seed)
    sizes = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    model = GPT(GPTConfig(config.seq_len, vocab_size, **sizes)).to(runtime.device)
    if "torch.compile" in on:
        compiled = train_gpt2.compile_in_place(model, config, runtime) == "compiled"
        if rung == "torch.compile" and not compiled:
            return {"skipped": "no compiler works here"}
    rows = train_gpt2.choose_micro_batch(config, model, runtime)
    optimizers = train_gpt2.make_optimizers(model, config)
    half = runtime.dtype == torch.float16  # a small scale, so that no step is left out
    scaler = torch.amp.GradScaler(runtime.kind, init_scale=1024, enabled=half)
    tokens = torch.randint(50257, (1, rows, config.seq_len + 1)).to(runtime.device)
    batch, seconds = (tokens[..., :-1], tokens[..., 1:]), []
    if runtime.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(args.warmup + args.steps):
        synchronize(runtime)
        began = time.perf_counter()
        train_gpt2.train_step(model, model, optimizers, scaler, batch, 6e-4, config, runtime)
        synchronize(runtime)
        if step >= args.warmup:
            seconds.append(time.perf_counter() - began)
    return dict(
        ms=1000 * statistics.median(seconds),
        micro_batch=rows,
        seq_len=config.seq_len,
        flops_per_token=model.flops_per_token(config.seq_len),
        memory=peak_memory(runtime),
        device=runtime.device_name(),
        kind=runtime.kind,
        dtype=str(runtime.dtype).removeprefix("torch."),
        published_peak=runtime.peak_flops(),
    )


def measure_peak(args) -> dict:
    """The operations a second of a matrix product of 4096 x 4096, in bfloat16 where that is on."""
    runtime = train_gpt2.Runtime(TrainConfig(device=args.device))
    N, times = 4096, 20 if runtime.kind == "cuda" else 1  # a GPU takes less for one than for asking
    a, b = (torch.randn(N, N, device=runtime.device).to(runtime.dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        synchronize(runtime)
        began = time.perf_counter()
        for _ in range(times):
            a @ b
        synchronize(runtime)
        seconds.append(time.perf_counter() - began)
    return {"peak": times * 2 * N**3 / statistics.median(seconds[2:])}


def in_a_process_of_its_own(what: str, argv: list[str], more: list[str]) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), *argv, *more, "--only", what]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode == 2:  # it has said why
        sys.exit(2)
    if done.returncode:
        hint = "for lack of memory perhaps; try a smaller --micro_batch"
        raise UserError(f"the process that measures {what} was ended ({done.returncode}), {hint}")
    return json.loads(done.stdout.splitlines()[-1])


def climb(args, argv: list[str]) -> dict:
    """All rungs, `args.rounds` times -> what --json writes."""
    found, skipped, peaks, more = {}, {}, [], []
    for turn in range(args.rounds):
        if args.measure_peak:
            peaks.append(in_a_process_of_its_own("peak", argv, [])["peak"])
        for rung in list(RUNGS)[: list(RUNGS).index(args.until) + 1]:
            if rung in skipped:
                continue
            result = in_a_process_of_its_own(rung, argv, more)
            if "skipped" in result:
                skipped[rung] = result["skipped"]
                found.pop(rung, None)
                continue
            # What "auto" found for the first rung is for all.
            more = ["--micro_batch", str(result["micro_batch"])]
            found.setdefault(rung, []).append(result)
            print(f"round {turn + 1}, {rung}: {result['ms']:.1f} ms", file=sys.stderr, flush=True)
    if not found:
        raise UserError(f"no rung can be measured: {next(iter(skipped.values()))}")
    one = next(iter(found.values()))[0]
    peak = statistics.median(peaks) if peaks else one["published_peak"]
    tokens, rungs = one["micro_batch"] * one["seq_len"], []
    for name, results in found.items():
        each_ms = [result["ms"] for result in results]
        speed = 1000 * tokens / statistics.median(each_ms)
        row = dict(name=name, ms=statistics.median(each_ms), each_ms=each_ms)
        row |= dict(tokens_per_second=speed, dtype=results[0]["dtype"])
        row |= dict(mfu=speed * results[0]["flops_per_token"] / peak if peak else None)
        rungs.append(row | dict(memory=max(result["memory"] for result in results)))
    return dict(
        network=args.network,
        **{key: one[key] for key in ("device", "kind", "micro_batch", "seq_len")},
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
        peak=peak,
        peak_is="measured" if peaks else "published",
        rungs=rungs,
        skipped=skipped,
    )


def show(result: dict) -> None:
    """The ladder as a table; last, the lecture's steps on its A100."""
    print(
        f"{result['network']} on {result['device']} ({result['kind']}),"
        f" {result['micro_batch']} x {result['seq_len']} tokens a step"
    )
    columns = f"{'':18}{'ms a step':>10}{'least-most':>16}{'tokens/s':>11}"
    print(columns + f"{'x before':>9}{'x start':>8}{'MFU':>7}{'memory':>9}{'A100 ms':>9}{'MFU':>6}")
    first = before = result["rungs"][0]["ms"]
    with torch.device("meta"):  # sizes without numbers
        lecture = GPT(GPTConfig()).flops_per_token(1024)
    for row in result["rungs"]:
        ms, theirs = row["ms"], RUNGS[row["name"]]
        spread = f"{min(row['each_ms']):.0f}-{max(row['each_ms']):.0f}"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        line = f"{row['name']:18}{ms:10.1f}{spread:>16}{row['tokens_per_second']:11,.0f}"
        memory = f"{row['memory'] / 1e9:.2f} GB" if row["memory"] else "-"
        line += f"{before / ms:9.2f}{first / ms:8.2f}{mfu:>7}{memory:>9}"
        if theirs:
            share = 16 * 1024 / (theirs / 1000) * lecture / (A100_TFLOPS * 1e12)
            line += f"{theirs:9}{share:6.1%}"
        print(line + ("  (float16 here)" if row["dtype"] == "float16" else ""))
        before = ms
    for name, why in result["skipped"].items():
        print(f"{name:18}     left out: {why}")
    if result["peak"]:
        print(f"MFU: of {result['peak'] / 1e12:,.2f} TFLOP/s, {result['peak_is']}")


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def rows_or_auto(text: str) -> int:
    return 0 if text == "auto" else positive(text)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = train_gpt2.OneLineParser("bench.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--network", choices=["gpt2", "demo"], default="gpt2", help="(default: %(default)s)")
    add("--device", default="auto", help="cuda or cpu (default: cuda where there is one)")
    add("--micro_batch", type=rows_or_auto, help="sequences a step, or auto: as many as fit")
    add("--seq_len", type=positive, help="tokens in a sequence")
    add("--rounds", type=positive, default=3, help="(default: %(default)s)")
    add("--steps", type=positive, default=5, help="timed, of each rung and round (default: 5)")
    add("--warmup", type=positive, default=2, help="steps before them (default: %(default)s)")
    add("--measure_peak", action="store_true", help="MFU against a matrix product timed here")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add("--until", choices=list(RUNGS), default=list(RUNGS)[-1], help="the last rung to climb")
    add("--only", choices=["peak", *RUNGS], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.only:
        try:
            result = measure_peak(args) if args.only == "peak" else measure_rung(args.only, args)
        except torch.OutOfMemoryError:
            result = {"skipped": "the memory does not hold it; try --micro_batch auto"}
        return print(json.dumps(result))
    result = climb(args, argv)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("bench.py: interrupted")
    except (UserError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)

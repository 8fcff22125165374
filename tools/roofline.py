"""Compute how fast a GPU could train GPT-2 (124M) at best, on a machine without a GPU.

    python tools/roofline.py                      # A100 and H100: some four minutes on one core
    python tools/roofline.py --gpus a100 --batches 16 --out_dir somewhere

Inductor writes the CUDA code of a training step (cuda_code.py), and a run of that code without a
GPU lists what it launches (launches.py). A launch takes at least as long as its bytes take through
the GPU's memory, and at least as long as its operations take on the tensor cores, both by the data
sheet: the longer of the two is its time here. No real kernel reaches either, and the gaps between
launches count as nothing; only the GPU's cache could save some of the bytes. So the sum is about
the least time that a step can take: computed, not measured.

It writes roofline.json, roofline.txt and roofline.png.
"""

import argparse
import json
import multiprocessing
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from cuda_code import GPU, GPUS, write_cuda_code
from launches import Launch, run
from triton_kernels import compile_kernel

from train_gpt2 import GPT, GPTConfig

# What others measured, in milliseconds a step. The lecture: one A100, 16 x 1024 tokens. llm.c:
# eight GPUs of 64 x 1024 each, the exchange of gradients included (300 ms: run_gpt2_124M.sh in
# llm.c; 140 ms: the records of modded-nanogpt).
QUOTED = {
    ("a100", 16): (90.0, "the lecture"),
    ("a100", 64): (300.0, "llm.c"),
    ("h100", 64): (140.0, "llm.c"),
}

# The kind of a launch is that of the first of these that its name contains. The names of Triton
# kernels list the operations that are fused in them.
KINDS = {
    "flash_attention_backward": "attention, backward",
    "flash_attention": "attention, forward",
    "50304": "matrix products of lm_head",
    "mm": "matrix products of the blocks",
    "AdamW": "AdamW",
    "clip": "gradient clipping",
    "log_softmax_backward": "loss, backward",
    "log_softmax": "loss, forward",
    "gelu_backward_sum": "biases' gradients",
    "gelu_backward": "GELU, backward",
    "gelu": "GELU, forward",
    "layer_norm": "norms and residual sums",
    "embedding": "embeddings",
    "cat_sum": "biases' gradients",
    "cat": "q, k, v: three gradients into one",
    "sum": "biases' gradients",
    "_to_copy": "casts to bfloat16 and back",
}


def kind(name: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in name), "all else")


def milliseconds(launch: Launch, gpu: GPU) -> float:
    return 1e3 * max(launch.bytes / gpu.bandwidth, launch.flops / gpu.flops)


def compute(case: tuple[str, int]) -> dict:
    """Everything about one step of `batch` sequences on one GPU. Needs a process of its own."""
    gpu_name, batch = case
    gpu = GPUS[gpu_name]
    torch.set_float32_matmul_precision("high")
    with torch.device("meta"):
        model = GPT(GPTConfig())
    seq_len = model.config.seq_len
    parameters = sum(p.numel() for p in model.parameters())
    micro_batch = run(write_cuda_code(model, batch, seq_len, torch.bfloat16, gpu))
    binaries = [b for kernel in micro_batch.kernels for b in compile_kernel(*kernel)]

    # What follows backward. In bytes a parameter: clipping reads gradients for their norm (4), then
    # scales them (4 + 4). Fused AdamW reads weight, gradient and two averages and writes all but
    # the gradient (7 x 4).
    update = [Launch("clip_grad_norm_", 12.0 * parameters, 0.0)]
    update += [Launch("AdamW", 28.0 * parameters, 0.0)]

    parts = {"forward": micro_batch.forward, "backward": micro_batch.backward, "update": update}
    rows = []
    for part, launches in parts.items():
        by_name = defaultdict(list)
        for launch in launches:
            by_name[launch.name].append(launch)
        for name, same in by_name.items():
            rows.append(
                {
                    "part": part,
                    "name": name,
                    "kind": kind(name),
                    "launches": len(same),
                    "bytes": sum(launch.bytes for launch in same),
                    "flops": sum(launch.flops for launch in same),
                    "ms": sum(milliseconds(launch, gpu) for launch in same),
                }
            )
    total = sum(row["ms"] for row in rows)
    tokens = batch * seq_len
    quoted_ms, quoted_by = QUOTED.get(case, (None, None))
    return {
        "gpu": gpu.name.removeprefix("NVIDIA "),
        "architecture": gpu.architecture,
        "batch": batch,
        "seq_len": seq_len,
        "parameters": parameters,
        "ms": total,
        "tokens_per_second": 1e3 * tokens / total,
        "mfu": model.flops_per_token(seq_len) * tokens / (1e-3 * total * gpu.flops),
        "quoted_ms": quoted_ms,
        "quoted_by": quoted_by,
        "peak_bytes": micro_batch.peak,
        "kernels": len(micro_batch.kernels),
        "configurations": len(binaries),
        "most_registers": max(binary.registers for binary in binaries),
        "spilling": [binary.name for binary in binaries if binary.spilled],
        "rows": sorted(rows, key=lambda row: -row["ms"]),
    }


def by_kind(result: dict) -> dict[str, dict]:
    """Launches, bytes, operations and time of each kind, the slowest first."""
    kinds = {}
    for row in result["rows"]:
        sums = kinds.setdefault(row["kind"], {"launches": 0, "bytes": 0, "flops": 0, "ms": 0})
        for key in sums:
            sums[key] += row[key]
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"]))


def table(rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return "\n".join(lines)


def summary(results: list[dict]) -> str:
    head = ["GPU, batch", "ms", "tokens/s", "MFU", "memory GB", "quoted ms", "of it", "by"]
    rows = [head]
    for r in results:
        quoted = ["", "", ""]
        if r["quoted_ms"]:
            quoted = [f"{r['quoted_ms']:.0f}", f"{r['ms'] / r['quoted_ms']:.0%}", r["quoted_by"]]
        rows.append(
            [
                f"{r['gpu']}, {r['batch']} x {r['seq_len']}",
                f"{r['ms']:.1f}",
                f"{r['tokens_per_second']:,.0f}",
                f"{r['mfu']:.0%}",
                f"{r['peak_bytes'] / 1e9:.1f}",
                *quoted,
            ]
        )
    return table(rows)


def cells(name: str, row: dict, result: dict) -> list[str]:
    return [
        name,
        str(row["launches"]),
        f"{row['bytes'] / 1e9:.2f}",
        f"{row['flops'] / 1e12:.2f}",
        f"{row['ms']:.2f}",
        f"{row['ms'] / result['ms']:.1%}",
    ]


def report(results: list[dict]) -> str:
    parts = [
        "COMPUTED, NOT MEASURED: the least time that the data sheets allow; no GPU was involved.",
        "One training step of GPT-2 (124M), bfloat16, compiled: forward, backward, clip, AdamW.",
        summary(results),
    ]
    for r in results:
        units = ["launches", "GB", "TFLOP", "ms", "share"]
        launches = sum(row["launches"] for row in r["rows"])
        spilling = ", ".join(r["spilling"]) or "none"
        title = (
            f"{r['gpu']}, {r['batch']} x {r['seq_len']} tokens\n"
            f"{launches} launches; {r['kernels']} Triton kernels in {r['configurations']}"
            f" configurations, all compiled for sm_{r['architecture']}, at most"
            f" {r['most_registers']} registers; spilling: {spilling}"
        )
        parts += [
            title,
            table([["kind", *units]] + [cells(k, row, r) for k, row in by_kind(r).items()]),
        ]
    largest = results[-1]
    by_bytes = sorted(largest["rows"], key=lambda row: -row["bytes"])[:16]
    names = [f"{row['part']}: {row['name']}"[:90] for row in by_bytes]
    rows = [cells(name, row, largest) for name, row in zip(names, by_bytes, strict=True)]
    parts += [
        f"What moves the most bytes ({largest['gpu']}, batch {largest['batch']})",
        table([["launch", *units]] + rows),
    ]
    return "\n\n".join(parts) + "\n"


def draw(results: list[dict], path: Path) -> None:
    """A bar for each GPU and batch: where the least time of a token goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 2 + 1.1 * len(results)), layout="constrained")
    names = list(by_kind(results[0]))
    colors = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))
    for y, r in enumerate(results):
        thousands = r["batch"] * r["seq_len"] / 1000  # of tokens
        kinds = by_kind(r)
        left = 0.0
        for name in names:
            width = kinds[name]["ms"] / thousands
            label = name if y == 0 else None
            axes.barh(y, width, left=left, color=colors[name], label=label, height=0.5)
            left += width
        axes.text(0, y - 0.3, f"{r['ms']:.0f} ms a step, MFU {r['mfu']:.0%}", fontsize=9)
        if r["quoted_ms"]:
            quoted = r["quoted_ms"] / thousands
            axes.plot([quoted, quoted], [y - 0.25, y + 0.25], color="black", linewidth=2)
            text = f"{r['quoted_by']}: {r['quoted_ms']:.0f} ms "
            axes.text(quoted, y - 0.3, text, ha="center", fontsize=9)
    labels = [f"{r['gpu']}\n{r['batch']} x {r['seq_len']} tokens" for r in results]
    axes.set_yticks(range(len(results)), labels)
    axes.set_ylim(len(results) - 0.5, -0.6)  # the first on top
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds for 1000 tokens (black: measured by others)")
    axes.set_title(
        "GPT-2 (124M): the least time that the data sheets allow (computed, not measured)"
    )
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--gpus", nargs="+", default=list(GPUS), choices=GPUS, help="GPUs to compute for")
    add("--batches", nargs="+", type=int, default=[16, 64], help="sequences in a step")
    add("--out_dir", type=Path, default=ROOT / "runs" / "roofline", help="folder of the results")
    args = parser.parse_args()

    cases = [(gpu, batch) for gpu in args.gpus for batch in args.batches]
    context = multiprocessing.get_context("spawn")  # pretending changes a process for good
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        results = []
        for result in pool.map(compute, cases):
            results.append(result)
            print(f"{result['gpu']}, batch {result['batch']}: {result['ms']:.1f} ms", flush=True)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    (args.out_dir / "roofline.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out_dir / "roofline.txt").write_text(report(results))
    draw(results, args.out_dir / "roofline.png")
    print(summary(results))


if __name__ == "__main__":
    main()

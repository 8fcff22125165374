"""Draw the speed of a training step beside its peers and the ceiling, from the records here.

    python runs/h200/draw.py        # writes bars.png beside itself

The ceiling is the card's: a micro-batch that does nothing but its matrix products and attention,
each of them timed alone.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).parent
# The records of call 1, by name and micro-batches in a step, and what to call them.
BARS = {
    ("build_nanogpt_eager", 1): "build-nanogpt as published (eager)",
    ("llmc_cuda_cudnn_r0_ge0", 1): "llm.c",
    ("build_nanogpt_compile", 8): "build-nanogpt with torch.compile",
    ("ours_c64", 8): "train_gpt2.py, float32 residual stream",
    ("ours_c64_bf16res", 8): "train_gpt2.py, bfloat16 residual stream",
}


def ceiling_tokens_per_s(record: dict) -> float:
    header = json.loads((HERE / "metrics.jsonl").open().readline())
    layer_ms = record["attention_one_layer"]["cudnn"]
    attention_ms = header["network"]["n_layer"] * (layer_ms["fwd_ms"] + layer_ms["bwd_ms"])
    ms = record["gemm_only_ms_per_microstep"] + attention_ms
    return record["B"] * record["T"] / ms * 1000


def main() -> None:
    records = [line for line in json.loads((HERE / "speed.json").read_text()) if line["call"] == 1]
    speeds = {}
    for record in records:
        key = (record["name"], record.get("accum") or record.get("grad_accum"))
        if key in BARS:
            speeds[BARS[key]] = record["tokens_per_s"]
    speeds = {name: speeds[name] for name in BARS.values()}
    (ceiling,) = (record for record in records if record["name"] == "ceiling")
    speeds["the ceiling: matrix products, attention"] = ceiling_tokens_per_s(ceiling)

    figure = Figure((7.2, 2.7), layout="tight")
    panel = figure.subplots()
    colors = ["tab:blue" if "train_gpt2" in name else "silver" for name in speeds]
    bars = panel.barh(list(speeds), list(speeds.values()), color=colors)
    panel.bar_label(bars, [f"{speed:,.0f}" for speed in speeds.values()], padding=4)
    panel.invert_yaxis()
    panel.set(xlim=(0, 1.25 * max(speeds.values())), xticks=[])
    panel.set_title(f"tokens/s on one {ceiling['device']}, torch {ceiling['torch']}", fontsize=11)
    figure.savefig(HERE / "bars.png", dpi=150)
    Image.open(HERE / "bars.png").convert("RGB").quantize(64).save(HERE / "bars.png", optimize=True)


if __name__ == "__main__":
    main()

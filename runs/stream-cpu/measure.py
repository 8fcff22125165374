"""Train with the residual stream in bfloat16 and in float32: the demo, and one of twelve layers.

    python runs/stream-cpu/measure.py > runs/stream-cpu/result.txt

On a GPU, train_gpt2.py's residual stream is bfloat16; on a CPU it is float32, because a CPU's
LayerNorm would add up its gradients in bfloat16. So here each sum that goes into the stream, and
each gradient that comes back, is rounded to bfloat16. Matrix products are bfloat16 both ways. What
each run recorded, but for its training steps, goes to runs/stream-cpu/LAYERS-STREAM-SEED.jsonl.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt2
from support.command import run_command

FLAGS = "--preset demo --dtype bfloat16 --sample_every 0 --checkpoint_every 0"
LAYERS = {4: "--val_every 240", 12: "--n_layer 12 --max_steps 480 --val_every 120"}
SEEDS = (1337, 1, 2)


def rounded(x):
    return x.bfloat16().float()  # and backward, the gradient goes through bfloat16


def forward(block, x):
    """Block.forward, as it is with a stream in bfloat16."""
    x = rounded(x)
    x = rounded(x + block.attn(block.ln_1(x)))
    return rounded(x + block.mlp(block.ln_2(x)))


def train(stream: str, flags: list[str]) -> None:
    if stream == "bfloat16":
        train_gpt2.Block.forward = forward
    run_command("train_gpt2.py", lambda: train_gpt2.main(flags))


def main() -> None:
    print(f"{FLAGS}\n\nlayers  stream    seed  validation losses, the last at the end")
    for layers, more in LAYERS.items():
        for seed in SEEDS:
            for stream in ("float32", "bfloat16"):
                flags = [*FLAGS.split(), *more.split(), "--seed", str(seed), "--out_dir"]
                with tempfile.TemporaryDirectory() as folder:
                    command = [sys.executable, __file__, stream, *flags, folder + "/run"]
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                    records = Path(folder, "run/metrics.jsonl").read_text().splitlines()
                lines = [line for line in records if '"kind": "train"' not in line]
                file = Path(__file__).with_name(f"{layers}-{stream}-{seed}.jsonl")
                file.write_text("\n".join(lines) + "\n")
                found = [json.loads(line) for line in lines]
                val = [record["loss"] for record in found if record["kind"] == "val"][1:]
                losses = " ".join(f"{x:.4f}" for x in val)
                print(f"{layers:6d}  {stream:8s} {seed:5d}  {losses}", flush=True)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2:]) if sys.argv[1:] else main()

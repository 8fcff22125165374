"""Train the demo with the residual stream rounded to bfloat16 and without, three seeds each.

    python runs/stream-cpu/measure.py > runs/stream-cpu/result.txt

On a GPU, train_gpt2.py's residual stream is bfloat16. On a CPU it is float32; here each sum that
goes into it, and each gradient that comes back, is rounded to bfloat16. All the rest is float32, so
nothing else differs. The metrics.jsonl of each run goes to runs/stream-cpu/STREAM-SEED.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt2
from support.command import run_command

FLAGS = "--preset demo --dtype float32 --max_steps 240 --val_every 80 --sample_every 0"
SEEDS = (1337, 1, 2)


def rounded(x):
    return x.bfloat16().float()  # and backward, the gradient goes through bfloat16


def forward(block, x):
    """Block.forward, as it is with a stream in bfloat16."""
    x = rounded(x)
    x = rounded(x + block.attn(block.ln_1(x)))
    return rounded(x + block.mlp(block.ln_2(x)))


def train(stream: str, seed: str, folder: str) -> None:
    if stream == "bfloat16":
        train_gpt2.Block.forward = forward
    flags = [*FLAGS.split(), "--checkpoint_every", "0", "--seed", seed, "--out_dir", folder]
    run_command("train_gpt2.py", lambda: train_gpt2.main(flags))


def main() -> None:
    print(f"{FLAGS}\n\n{'stream':10s} seed   validation loss at 80, 160, 240")
    for seed in SEEDS:
        for stream in ("float32", "bfloat16"):
            folder = Path(__file__).with_name(f"{stream}-{seed}")
            command = [sys.executable, __file__, stream, str(seed), str(folder)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines]
            val = [record["loss"] for record in found if record["kind"] == "val"][1:]
            print(f"{stream:10s} {seed:4d}   {', '.join(f'{x:.4f}' for x in val)}", flush=True)


if __name__ == "__main__":
    train(*sys.argv[1:]) if sys.argv[1:] else main()

"""Train the demo with the residual stream in bfloat16 and in float32, three seeds each.

    python runs/stream-cpu/measure.py > runs/stream-cpu/result.txt

Everything else is in bfloat16 autocast. train_gpt2.py has the stream in bfloat16 on a GPU alone;
here `machine.bfloat16_stream` answers yes, or no, on the CPU. The metrics.jsonl of each run goes to
runs/stream-cpu/STREAM-SEED.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt2
from support import machine
from support.command import run_command

FLAGS = "--preset demo --dtype bfloat16 --max_steps 400 --val_every 100 --sample_every 0"
SEEDS = (1337, 1, 2)


def train(stream: str, seed: str, folder: str) -> None:
    machine.bfloat16_stream = lambda device_type: stream == "bfloat16"
    flags = [*FLAGS.split(), "--checkpoint_every", "0", "--seed", seed, "--out_dir", folder]
    run_command("train_gpt2.py", lambda: train_gpt2.main(flags))


def main() -> None:
    print(f"{FLAGS}\n\n{'stream':10s} seed   validation loss at 100, 200, 300, 400")
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

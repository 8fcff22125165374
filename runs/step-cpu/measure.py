"""Training steps a second and peak memory of train_gpt2.py beside transformers' GPT-2, on a CPU.

    python runs/step-cpu/measure.py [rounds]

Every variant runs in a process of its own, in turn, several rounds; medians are printed. All train
in bfloat16 autocast (where the CPU has it) on the same random tokens. transformers' side is what its
documentation leads to: GPT2LMHeadModel with labels, torch.optim.AdamW, no dropout.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# layers, heads, channels, context, batch, steps to time
SIZES = {"124M": (12, 12, 768, 256, 4, 4), "demo": (4, 3, 96, 32, 24, 30)}
VARIANTS = ("ours eager", "ours compiled", "transformers")


def one(variant: str, size: str) -> None:
    """Time one variant in this process and print its figures as JSON."""
    import resource

    import torch

    sys.path.insert(0, str(ROOT))
    import train_gpt2

    L, H, C, T, B, steps = SIZES[size]
    torch.manual_seed(0)
    tokens = torch.randint(50257, (1, B, T + 1))
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    config = train_gpt2.TrainConfig(device="cpu", compile=variant == "ours compiled")
    runtime = train_gpt2.Runtime(config)
    if variant == "transformers":
        import transformers

        sizes = dict(n_layer=L, n_head=H, n_embd=C, n_positions=T)
        sizes |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step():
            with runtime.autocast():
                loss = model(inputs[0], labels=inputs[0]).loss  # it shifts the labels itself
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    else:
        train_gpt2.keep_freed_memory()
        network = train_gpt2.GPTConfig(seq_len=T, n_layer=L, n_head=H, n_embd=C)
        model = train_gpt2.GPT(network)
        optimizers = train_gpt2.make_optimizers(model, config)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train_gpt2.compile_in_place(model, config, runtime)

        def step():
            batch, lr = (inputs, targets), 1e-4
            train_gpt2.train_step(model, model, optimizers, scaler, batch, lr, config, runtime)

    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # KB -> GB
    print(json.dumps(dict(tokens_per_second=B * T / seconds, peak_gb=peak)))


def main() -> None:
    if len(sys.argv) > 2:
        return one(sys.argv[1], sys.argv[2])
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for size in SIZES:
        found = {variant: [] for variant in VARIANTS}
        for _ in range(rounds):
            for variant in VARIANTS:
                command = [sys.executable, __file__, variant, size]
                answer = subprocess.run(command, check=True, capture_output=True, text=True)
                found[variant].append(json.loads(answer.stdout.splitlines()[-1]))
        theirs = [figure["tokens_per_second"] for figure in found["transformers"]]
        for variant, figures in found.items():
            speeds = [figure["tokens_per_second"] for figure in figures]
            ratio = statistics.median(a / b for a, b in zip(speeds, theirs, strict=True))
            print(
                f"{size:5s} {variant:14s} {statistics.median(speeds):6,.0f} tokens/s "
                f"({min(speeds):,.0f} to {max(speeds):,.0f}), {ratio:.2f} times transformers', "
                f"peak {statistics.median(f['peak_gb'] for f in figures):.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()

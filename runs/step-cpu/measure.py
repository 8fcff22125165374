"""Compare a training step with transformers' GPT-2 on a CPU: tokens per second and peak memory.

    python runs/step-cpu/measure.py [rounds]

Each variant runs in its own process. The variants take turns, for several rounds (default: 3), and
medians are printed. All train on the same random tokens, in bfloat16 autocast if the CPU has it.
transformers is used as its documentation suggests: GPT2LMHeadModel with labels and
torch.optim.AdamW; its dropout is off, because ours has none.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# n_layer, n_head, n_embd, seq_len, sequences per step, timed steps
SIZES = {"124M": (12, 12, 768, 256, 4, 4), "demo": (4, 3, 96, 32, 24, 30)}
VARIANTS = ("ours eager", "ours compiled", "transformers")
WARMUP = 2  # steps that are not timed


def make_our_step(compiled: bool, sizes: dict, tokens):
    """Return a function that does one of train_gpt2.py's training steps."""
    import train_gpt2

    config = train_gpt2.TrainConfig()
    runtime = train_gpt2.Runtime("cpu", "auto")
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**sizes))
    if compiled:
        model.compile(dynamic=False)
    state = train_gpt2.TrainState(model, config, runtime)

    def step():
        train_gpt2.train_step(state, tokens, 1e-4, config, runtime)

    return step


def make_their_step(sizes: dict, tokens):
    """Return a function that does the same step with transformers."""
    import torch
    import transformers

    from support import machine

    dtype = machine.choose_dtype("auto", torch.device("cpu"))
    sizes = dict(sizes)
    network = transformers.GPT2Config(
        n_positions=sizes.pop("seq_len"),
        **sizes,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = tokens[0, :, :-1]

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(inputs, labels=inputs).loss  # it shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(variant: str, size: str) -> None:
    """Time one variant in this process, and print its figures as JSON."""
    import resource

    import torch

    sys.path.insert(0, str(ROOT))
    L, H, C, T, B, steps = SIZES[size]
    sizes = dict(seq_len=T, n_layer=L, n_head=H, n_embd=C)
    torch.manual_seed(0)
    tokens = torch.randint(50257, (1, B, T + 1))
    if variant == "transformers":
        step = make_their_step(sizes, tokens)
    else:
        step = make_our_step(variant == "ours compiled", sizes, tokens)
    seconds = []
    for _ in range(WARMUP + steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    speed = B * T / statistics.median(seconds[WARMUP:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # KB -> GB
    print(json.dumps(dict(tokens_per_second=speed, peak_gb=peak)))


def main() -> None:
    if len(sys.argv) > 2:
        return measure(sys.argv[1], sys.argv[2])
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for size in SIZES:
        results = {variant: [] for variant in VARIANTS}
        for _ in range(rounds):
            for variant in VARIANTS:
                command = [sys.executable, __file__, variant, size]
                answer = subprocess.run(command, check=True, capture_output=True, text=True)
                results[variant].append(json.loads(answer.stdout.splitlines()[-1]))
        theirs = [result["tokens_per_second"] for result in results["transformers"]]
        for variant in VARIANTS:
            speeds = [result["tokens_per_second"] for result in results[variant]]
            peak = statistics.median(result["peak_gb"] for result in results[variant])
            ratio = statistics.median(a / b for a, b in zip(speeds, theirs, strict=True))
            print(
                f"{size:5s} {variant:14s} {statistics.median(speeds):6,.0f} tokens/s "
                f"({min(speeds):,.0f} to {max(speeds):,.0f}), {ratio:.2f} times transformers', "
                f"peak {peak:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""What a GPU has not shown yet, in the order of its worth: some 15 to 20 minutes (estimate).

    python runs/h200/measure.py SHARDS RECORDS.jsonl           # all parts, into runs/h200/new/
    python runs/h200/measure.py SHARDS RECORDS.jsonl --parts tests times stream  # half of it
    python runs/h200/measure.py SHARDS RECORDS.jsonl --parts rates bench         # the other half
    python runs/h200/measure.py SHARDS RECORDS.jsonl --small   # tiny sizes, on a CPU: does it run?

SHARDS is a folder of token shards (20M tokens are enough), RECORDS has HellaSwag's records or
stand-ins. With --second FOLDER, the files of commit 192697f, `times` includes its HellaSwag, which
kept the context's keys and values (git archive 192697f | tar x -C FOLDER). Each part has a limit of
time, and its results are written at once. The runs of `rates` share the GPU, two at a time (30 GB
each), so their losses count and their speed does not.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OUT = Path(__file__).parent / "new"
RATES = {"adamw": ("6e-4", "1.8e-3"), "muon": ("6e-4", "1.8e-3", "3.6e-3", "7.2e-3")}

# A training run whose residual stream is float32, as it was in the second edition.
FLOAT32_STREAM = """if True:
    from support import machine
    from support.command import run_command
    import train_gpt2
    machine.bfloat16_stream = lambda device_type: False
    run_command("train_gpt2.py", train_gpt2.main)
"""

# The seconds that HellaSwag takes in training, and an optimizer's update, in milliseconds.
TIMES = """if True:
    import json, pathlib, sys, time, torch, hellaswag
    from types import SimpleNamespace as Names
    from train_gpt2 import GPT, GPTConfig, Runtime, TrainState, score_hellaswag
    path, small = pathlib.Path(sys.argv[1]), sys.argv[2] == "True"
    runtime = Runtime("auto", "bfloat16")
    sizes = dict(n_layer=1, n_embd=24, n_head=2) if small else {}
    model = GPT(GPTConfig(**sizes)).to(runtime.device)
    examples = hellaswag.read_examples(path)[: 20 if small else None]
    found = {"records": len(examples)}
    for name in ("first", "second"):
        start = time.perf_counter()
        score_hellaswag(model, examples, runtime)
        found["hellaswag_seconds_" + name] = time.perf_counter() - start
    wait = getattr(torch, runtime.device_type).synchronize
    for optimizer in ("adamw", "muon"):
        config = Names(optimizer=optimizer, learning_rate=1e-4, weight_decay=0.1)
        state = TrainState(model, config, runtime)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        milliseconds = []
        for _ in range(3 if small else 30):
            wait()
            start = time.perf_counter()
            for one in state.optimizers.values():
                one.step()
            wait()
            milliseconds.append(1000 * (time.perf_counter() - start))
        found[optimizer + "_update_ms"] = sorted(milliseconds)[len(milliseconds) // 2]
    print(json.dumps(found))
"""

# What HellaSwag took in the second edition, with the third's tokenizer, which needs no internet.
SECOND_TIMES = """if True:
    import json, pathlib, sys, time, fineweb, hellaswag
    from types import SimpleNamespace as Names
    from train_gpt2 import GPT, GPTConfig, Runtime
    path, small = pathlib.Path(sys.argv[1]), sys.argv[2] == "True"
    sys.path.append(sys.argv[3])
    from support.shards import gpt2_tokenizer
    fineweb.gpt2_tokenizer = gpt2_tokenizer
    runtime = Runtime(Names(device="auto", dtype="bfloat16"))
    sizes = dict(n_layer=1, n_embd=24, n_head=2) if small else {}
    model = GPT(GPTConfig(**sizes)).to(runtime.device).eval()
    examples = hellaswag.load_examples(runtime, path)[: 20 if small else None]
    found = {"records": len(examples)}
    for name in ("first", "second"):
        start = time.perf_counter()
        hellaswag.evaluate(model, examples, runtime)
        found["cached_hellaswag_seconds_" + name] = time.perf_counter() - start
    print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument(
        "--parts", nargs="+", default=["tests", "times", "stream", "rates", "bench"]
    )
    parser.add_argument("--second", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    python = [sys.executable]
    train = ["--data", str(args.shards.resolve()), "--batch_tokens", "65536", "--max_steps", "300"]
    train += ["--warmup_tokens", "2000000", "--val_every", "100", "--val_tokens", "1048576"]
    train += ["--sample_every", "0", "--hellaswag_every", "0", "--checkpoint_every", "0"]
    train = ["--preset", "gpt2", *train]
    bench = ["bench.py", "--rounds", "1", "--micro_batch", "16", "--json", str(OUT / "bench.json")]
    if args.small:
        train = ["--preset", "demo", *train[2:], "--n_layer", "1", "--batch_tokens", "768"]
        train += ["--max_steps", "4", "--val_tokens", "768", "--device", "cpu"]
        bench += ["--network", "demo", "--steps", "1", "--warmup", "1", "--until", "float32"]

    def run(name: str, command: list, limit: int, folder: Path = ROOT) -> None:
        start = time.monotonic()
        with open(OUT / f"{name}.txt", "w") as file:
            options = dict(cwd=folder, stdout=file, stderr=subprocess.STDOUT)
            try:
                status = subprocess.run(command, check=False, timeout=limit, **options).returncode
            except subprocess.TimeoutExpired:
                status = "out of time"
        line = dict(name=name, status=status, seconds=round(time.monotonic() - start, 1))
        with open(OUT / "session.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)

    if "tests" in args.parts:  # memory, micro-batch and out of memory first: they never ran
        pytest = [*python, "-m", "pytest", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider", "-rP"]
        run("tests_memory", [*pytest, "-k", "memory or micro_batch"], 240)
        at_once = ["-n", "3", "--dist", "load"]  # a test of gradients takes 13 GB
        run("tests_others", [*pytest, "-k", "not memory and not micro_batch", *at_once], 400)
    if "times" in args.parts:
        flags = [str(args.records.resolve()), str(args.small)]
        run("times", [*python, "-c", TIMES, *flags], 90)
        if args.second:
            run("times_second", [*python, "-c", SECOND_TIMES, *flags, str(ROOT)], 90, args.second)
    if "stream" in args.parts:
        flags = [*train, "--out_dir", str(OUT / "bf16")]
        run("stream_bfloat16", [*python, "train_gpt2.py", *flags], 120)
        flags = [*train, "--out_dir", str(OUT / "fp32")]
        run("stream_float32", [*python, "-c", FLOAT32_STREAM, *flags], 120)
    if "rates" in args.parts:
        with ThreadPoolExecutor(2) as pool:
            for optimizer, rates in RATES.items():
                for rate in rates:
                    name = f"{optimizer}-{rate}"
                    flags = ["--optimizer", optimizer, "--learning_rate", rate]
                    flags += ["--out_dir", str(OUT / name)]
                    pool.submit(run, name, [*python, "train_gpt2.py", *train, *flags], 180)
    if "bench" in args.parts:
        run("bench", [*python, *bench], 360)


if __name__ == "__main__":
    main()

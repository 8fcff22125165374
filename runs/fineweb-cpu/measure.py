"""Measure tokens per second and peak memory of fineweb.py next to two yardsticks.

    python runs/fineweb-cpu/measure.py FOLDER [rounds]     # the hub's layout, offline

(a) the lecture: a process pool on half the cores, a document a task, encode_ordinary, np.array
(b) raw tiktoken on all cores: processes, texts in memory, no reading or writing in the clock
(c) python fineweb.py, as users run it; the clock runs from start to exit, imports included

The sample is small, so all three go over it PASSES times: its files are linked that often.
(a) and (c) are whole commands. Of (c) there is also the rate without start and exit, timed by a run
of one token: among ten billion tokens they are nothing. A round runs all of it in turn.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import fineweb
from support import shards

PASSES = 18  # 415M tokens of the 4,684 documents' 23M


def documents():
    from datasets import load_dataset

    rows = load_dataset(
        "HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train", streaming=True
    )
    return (row["text"] for row in rows)


def lecture_document(text):
    import numpy as np

    tokens = [shards.END_OF_TEXT, *shards.gpt2_tokenizer().encode_ordinary(text)]
    return np.array(tokens).astype(np.uint16)


def lecture():
    """(a), with the lecture's chunks of 16 and its shard-sized buffer; prints the tokens."""
    import numpy as np

    shards.gpt2_tokenizer()  # before the fork, as the lecture's module does
    buffer, filled, total = np.empty(100_000_000, np.uint16), 0, 0
    with get_context("fork").Pool(max(1, fineweb.usable_cores() // 2)) as pool:
        for tokens in pool.imap(lecture_document, documents(), chunksize=16):
            if filled + len(tokens) > len(buffer):
                np.save("a.npy", buffer)
                filled = 0
            buffer[filled : filled + len(tokens)] = tokens
            filled, total = filled + len(tokens), total + len(tokens)
    np.save("a.npy", buffer[:filled])
    print(f"{total:,} tokens")


def raw_share(share):
    encode = shards.gpt2_tokenizer().encode_to_numpy
    first, step = share
    return sum(1 + len(encode(text, disallowed_special=())) for text in texts[first::step])


def raw():
    """(b); prints the tokens and the seconds that the tokenizer alone took.

    Forked processes that already hold the texts, encode_to_numpy, and only a sum goes back: the
    fastest way that was found, a tenth faster than threads.
    """
    global texts
    texts, cores = list(documents()), fineweb.usable_cores()
    shards.gpt2_tokenizer()
    with get_context("fork").Pool(cores) as pool:
        pool.map(abs, range(cores))
        start = time.perf_counter()
        tokens = sum(pool.map(raw_share, [(i, cores) for i in range(cores)]))
        print(f"{tokens:,} tokens {time.perf_counter() - start} seconds")


def run(*command):
    """(tokens, seconds, peak bytes of the largest process) of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, output
    seconds = re.search(r"([\d.]+) seconds", output)
    elapsed = float(seconds[1]) if seconds else time.perf_counter() - start
    return (
        int(re.findall(r"([\d,]+) tokens", output)[-1].replace(",", "")),
        elapsed,
        usage.ru_maxrss,
    )


def main():
    if sys.argv[1] in ("lecture", "raw"):
        return globals()[sys.argv[1]]()
    here, source = Path(__file__).resolve(), Path(sys.argv[1]) / "HuggingFaceFW/fineweb-edu"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as work:
        hub = Path(work) / "HuggingFaceFW/fineweb-edu"
        (hub / "sample/10BT").mkdir(parents=True)
        shutil.copy(source / "README.md", hub)
        for i in range(PASSES):
            for file in (source / "sample/10BT").glob("*.parquet"):
                os.link(file, hub / "sample/10BT" / f"{i}_{file.name}")
        os.chdir(work)
        commands = {
            "(a) lecture's way": (sys.executable, str(here), "lecture"),
            "(b) raw tiktoken": (sys.executable, str(here), "raw"),
            "(c) fineweb.py": (sys.executable, str(ROOT / "fineweb.py"), "--out", "out"),
        }
        steady = "(c) without start"
        rates = {name: [] for name in (*commands, steady)}
        peaks = dict.fromkeys(commands, 0)
        for _ in range(rounds):
            for name, command in commands.items():
                shutil.rmtree("out", ignore_errors=True)
                tokens, seconds, peak = run(*command)
                rates[name].append(tokens / seconds)
                peaks[name] = max(peaks[name], peak)
                print(f"{name:20} {tokens:,} tokens in {seconds:.1f} s", flush=True)
            _, start, _ = run(*commands["(c) fineweb.py"], "--out", "one", "--max_tokens", "1")
            shutil.rmtree("one")
            print(f"{'start and exit':20} {start:.1f} s", flush=True)
            rates[steady].append(tokens / (seconds - start))
    for name, values in rates.items():
        ratios = [
            statistics.median(x / y for x, y in zip(rates[c], values, strict=True))
            for c in ("(c) fineweb.py", steady)
        ]
        each = ", ".join(f"{value / 1e6:.2f}" for value in values)
        print(
            f"{name:20} median {statistics.median(values) / 1e6:.2f}M tokens/s ({each}); "
            f"(c) is {ratios[0]:.2f} times as fast, without start {ratios[1]:.2f}; "
            f"peak {peaks.get(name, 0) / 2**10:.0f} MiB"
        )
    hours = 9_953_989_101 / statistics.median(rates[steady]) / 3600
    print(f"sample-10BT: 9,953,989,101 tokens, {hours:.2f} hours, {9_953_989_101 * 2 / 1e9:.1f} GB")


if __name__ == "__main__":
    main()

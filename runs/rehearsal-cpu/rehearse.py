"""Rehearse the night: a run that one fault after the other hits, and the same run undisturbed.

    python runs/rehearsal-cpu/rehearse.py            # in a clone of its own; Linux, as root
    python runs/rehearsal-cpu/rehearse.py --small    # minutes, with a tiny network

The clone must hold HuggingFaceFW/fineweb-edu, a folder in the hub's layout. Its documents are cut
into pages and shuffled, and fineweb.py turns them into shards. Two ranks under torchrun then train
in quiet/, where nothing happens to them, and in night/, where at random moments

    kill         a random rank gets SIGKILL, and torchrun restarts both; four times
    warning      a random rank gets SIGUSR1; the run stops, and the same command goes on with it
    full disk    there is no room for the next checkpoint, and then there is again
    power cut    torchrun and its ranks get SIGKILL together, and the same command goes on

Both must record the same. night/ is a small disk in memory (tmpfs), so that it can be filled; that
takes root. At the end it is copied to log/. The HellaSwag records are not HellaSwag's: each has
eight words of the validation shard as its context, and four times three words as its endings. What
happened is written to rehearsal.json, and each rank's memory to memory.csv.
"""

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from night import facts

import hellaswag
from support import shards

# What differs between the two sizes: the flags, the steps, tokens in a shard, the disk of night/.
FULL = "--n_layer 4 --n_head 4 --n_embd 256 --seq_len 256 --batch_tokens 2048 --val_tokens 16384"
SMALL = "--n_layer 2 --n_head 2 --n_embd 32 --seq_len 64 --batch_tokens 512 --val_tokens 4096"
SIZES = {
    "full": (f"{FULL} --warmup_tokens 50000", 400, 250_000, "900M"),
    "small": (f"{SMALL} --warmup_tokens 10000 --no-compile", 400, 20_000, "100M"),
}
# Four micro-steps on each of two ranks.
BOTH = "--preset gpt2 --micro_batch 1 --learning_rate 1e-3 --dtype float32"
# When a fault comes, as a part of the run.
FAULTS = [(0.08, "kill"), (0.22, "kill"), (0.35, "warning"), (0.47, "full disk"), (0.58, "kill")]
FAULTS += [(0.72, "power cut"), (0.88, "kill")]
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=5"
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # README.md says why
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def mix_documents(source: Path, target: Path) -> None:
    """Write the texts of a data set again, in the hub's layout, as shuffled pages.

    Some documents here are longer than a shard, so neighboring shards can hold different kinds of
    text, and the loss jumps between them. FineWeb-Edu's documents have about 1,000 tokens each and
    come in no order; so do these pages of 4,000 characters.
    """
    files = sorted(source.glob("sample/10BT/*.parquet"))
    tables = [pyarrow.parquet.read_table(file, columns=["text"]) for file in files]
    texts = [text for table in tables for text in table["text"].to_pylist()]
    pages = [text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)]
    random.Random(0).shuffle(pages)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.parquet"))
    for i, file in enumerate(files):
        table = pyarrow.table({"text": pages[i :: len(files)]})
        pyarrow.parquet.write_table(table, target / file.relative_to(source), row_group_size=500)


def make_records(shard: Path, file: Path) -> None:
    """Write as many records as HellaSwag has, in its schema, from the text of a shard."""
    words = shards.decode(np.load(shard).tolist()).split()
    words = [word for word in words if len(word) < 15]  # no addresses, no rules of dashes
    dice = random.Random(0)
    file.parent.mkdir(exist_ok=True)
    with open(file, "w") as lines:
        for i in range(hellaswag.RECORDS["val"]):
            places = [dice.randrange(len(words) - 11) for _ in range(4)]
            label = dice.randrange(4)
            context = " ".join(words[places[label] : places[label] + 8])
            endings = [" ".join(words[place + 8 : place + 11]) for place in places]
            record = dict(ind=i, source_id=f"shard~{places[label]}", activity_label="Text")
            record |= dict(ctx_a=context, ctx_b="", ctx=context, endings=endings, label=label)
            lines.write(json.dumps(record) + "\n")


class Job:
    """A run under torchrun, watched from outside."""

    def __init__(self, folder: str, flags: list[str]):
        self.command = [*TORCHRUN.split(), "train_gpt2.py", "--resume", "--out_dir", folder, *flags]
        self.metrics = Path(folder, "metrics.jsonl")
        self.log = Path(f"{folder}.txt")
        self.memory = []  # rows of (seconds, steps, rank, MB)
        self.over = threading.Event()
        self.began = time.time()
        self.start()
        threading.Thread(target=self.watch_memory, daemon=True).start()

    def start(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                env=os.environ | ENVIRONMENT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ranks(self) -> dict[int, int]:
        """Process id -> rank, of the ranks that live."""
        found = {}
        parent = self.process.pid
        try:
            for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
                environment = b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
                rank = re.search(rb"\0RANK=(\d+)\0", environment)
                if rank:
                    found[int(pid)] = int(rank[1])
        except OSError:  # one has died meanwhile
            pass
        return found

    def watch_memory(self) -> None:
        while not self.over.wait(2):
            for pid, rank in self.ranks().items():
                try:
                    kib = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
                except OSError:
                    continue
                if kib:
                    seconds = round(time.time() - self.began)
                    self.memory.append((seconds, self.steps(), rank, int(kib[1]) // 1024))

    def steps_ms(self) -> list[float]:
        """The milliseconds of each step that is recorded."""
        text = self.metrics.read_text() if self.metrics.exists() else ""
        return [float(ms) for ms in re.findall(r'"kind": "train".*"step_ms": ([\d.]+)', text)]

    def steps(self) -> int:
        return len(self.steps_ms())

    def wait(self, happened) -> None:
        """Wait until happened() is true. Fails if the run ends before."""
        while not happened():
            assert self.process.poll() is None, f"the run has ended: see {self.log}"
            time.sleep(0.05)

    def said(self, text: str) -> list[str]:
        return re.findall(text, self.log.read_text())

    def strike(self, fault: str, dice: random.Random) -> dict:
        """Let a fault happen, and do what its user would do next -> what it cost."""
        step_seconds = statistics.median(self.steps_ms()[-20:]) / 1000
        time.sleep(dice.uniform(0, step_seconds))
        steps, moment = self.steps(), time.time()
        event = dict(fault=fault, seconds=round(moment - self.began), step=steps)
        resumes, rank = len(self.said("resuming from")), dice.choice(list(self.ranks()))
        match fault:
            case "kill":
                event["rank"] = self.ranks()[rank]
                os.kill(rank, signal.SIGKILL)
            case "warning":
                event["rank"] = self.ranks()[rank]
                os.kill(rank, signal.SIGUSR1)
                assert self.process.wait() == 0, f"a warned run ends well: see {self.log}"
                self.start()
            case "power cut":
                for pid in (self.process.pid, *self.ranks()):
                    os.kill(pid, signal.SIGKILL)
                self.process.wait()
                self.start()
            case "full disk":
                ballast = self.metrics.with_name("ballast")
                fill = ["dd", "if=/dev/zero", f"of={ballast}", "bs=1M"]  # until nothing fits
                subprocess.run(fill, check=False, stderr=subprocess.DEVNULL)
                self.wait(lambda: self.said("NOT written"))
                ballast.unlink()
                return event | dict(resumed_at=None, lost_seconds=0.0)
        self.wait(lambda: len(self.said("resuming from")) > resumes)
        event["resumed_at"] = int(self.said(r"resuming from \S+_(\d+)\.pt")[-1])
        steps_then = max(steps, event["resumed_at"]) + 1  # the first step that is new
        self.wait(lambda: self.steps() >= steps_then)
        lost = time.time() - moment - (steps_then - steps) * step_seconds
        return event | dict(lost_seconds=round(lost, 1))


def run(folder: str, flags: list[str], steps: int, faults: list) -> dict:
    """Run to the end -> what happened."""
    job = Job(folder, flags)
    dice = random.Random(1)
    events = []
    for part, fault in faults:
        step = round(steps * part) + dice.randrange(steps // 20)
        job.wait(lambda step=step: job.steps() >= step)
        events.append(job.strike(fault, dice))
        print(events[-1], flush=True)
    assert job.process.wait() == 0, f"the run failed: see {job.log}"
    seconds = time.time() - job.began
    job.over.set()
    with open("memory.csv", "a") as file:
        file.writelines(f"{folder},{','.join(map(str, row))}\n" for row in job.memory)
    training = sum(job.steps_ms()) / 1000
    result = dict(command=" ".join(job.command), seconds=round(seconds), events=events)
    result |= dict(steps=job.steps(), training_seconds=round(training))
    print(result, flush=True)
    return result


def main() -> None:
    os.chdir(ROOT)
    flags, steps, shard_tokens, disk = SIZES["small" if "--small" in sys.argv[1:] else "full"]
    cadences = dict(checkpoint=20, val=10, sample=5, hellaswag=2)  # times in a run
    flags = f"{BOTH} {flags} --max_steps {steps}".split()
    for name, times in cadences.items():
        flags += [f"--{name}_every", str(steps // times)]
    mix_documents(Path("HuggingFaceFW/fineweb-edu"), Path("mixed"))
    make_shards = [sys.executable, "fineweb.py", "--dataset", "mixed"]
    make_shards += ["--shard_tokens", str(shard_tokens)]
    subprocess.run(make_shards, env=os.environ | ENVIRONMENT, check=True)
    (val_shard,) = shards.list_shards("edu_fineweb10B", "val")
    make_records(val_shard, hellaswag.path_of("val"))
    Path("night").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk}", "tmpfs", "night"], check=True)
    Path("memory.csv").write_text("run,seconds,steps,rank,MB\n")
    result = {"quiet": run("quiet", flags, steps, []), "night": run("night", flags, steps, FAULTS)}
    quiet, night = facts(Path("quiet")), facts(Path("night"))
    result["equal"] = quiet == night
    losses = [
        [line["loss"] for line in lines if line["kind"] == "train"] for lines in (quiet, night)
    ]
    result["largest_difference"] = float(np.abs(np.subtract(*losses)).max())
    shutil.copytree("night", "log")
    subprocess.run(["umount", "night"], check=True)
    Path("rehearsal.json").write_text(json.dumps(result, indent=1) + "\n")
    print("equal:", result["equal"], "largest difference of a loss:", result["largest_difference"])


if __name__ == "__main__":
    main()

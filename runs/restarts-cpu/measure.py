"""Kill ranks of small runs under torchrun --max-restarts, and see whether the runs still finish.

    python runs/restarts-cpu/measure.py [runs]

1. One machine, two ranks, with and without VARIABLE.
2. What a restarted rank finds in the key-value store that torchrun gives it.
3. Two machines, which are two torchruns on this one, with and without VARIABLE.
4. The losses of 4 and 8 ranks beside those of one process.

A kill is `kill -9` of one rank. The rank and the moment are drawn with a seed; a quarter of the
kills hit ranks that are starting. A disturbed run is good if it exits with status 0 and its records
are those of the undisturbed run: each step once, and all losses, gradient norms, and samples equal
bit for bit, or losses within 1e-4. It hangs if it has recorded nothing for SILENCE seconds.
"""

import collections
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VARIABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
STEPS = 120
# Seconds. A step takes 0.1, a start 10; torchrun gives the ranks that it stops 30.
SILENCE = 120


def torchrun(folder: Path, options: list, script: list, environment: dict) -> subprocess.Popen:
    """Start torchrun; what it and its ranks print is added to torchrun.log."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLE}
    with open(folder / "torchrun.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, *map(str, script)],
            cwd=folder,
            env={**clean, "OMP_NUM_THREADS": "1", **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def training(name: str) -> list:
    """The command line of a small run with many checkpoints, in the folder `name`."""
    from helpers import SCRIPT, TINY

    run = ["--max_steps", STEPS, "--checkpoint_every", 10, "--data", "shards", "--resume"]
    records = ["--val_every", 40, "--val_tokens", 160, "--sample_every", 60]
    return [SCRIPT, *TINY, *run, *records, "--out_dir", name]


def one_machine(folder: Path, name: str, ranks: int, environment: dict) -> list[subprocess.Popen]:
    options = ["--standalone", f"--nproc_per_node={ranks}", "--max-restarts=3"]
    return [torchrun(folder, options, training(name), environment)]


def two_machines(folder: Path, name: str, ranks: int, environment: dict) -> list[subprocess.Popen]:
    """Start two torchruns, each with half of the ranks, that meet at a port of this machine."""
    endpoint = f"127.0.0.1:{free_port()}"
    options = ["--nnodes=2", f"--nproc_per_node={ranks // 2}", "--max-restarts=3"]
    options += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--local-addr=127.0.0.1"]
    return [torchrun(folder, options, training(name), environment) for _ in range(2)]


def living_ranks(agents: list[subprocess.Popen]) -> dict[int, str]:
    """Process id and rank of all processes that the torchruns have started and that still live."""
    found = {}
    for agent in agents:
        with contextlib.suppress(OSError):  # one of them has just ended
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()
            for pid in map(int, children.split()):
                variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
                ranks = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
                if ranks:
                    found[pid] = ranks[0]
    return found


def last_step(run: Path) -> int:
    """The last step that a run has recorded; -1 before the first."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max((json.loads(line).get("step", -1) for line in lines), default=-1)


def wait(condition, agents: list[subprocess.Popen], run: Path) -> None:
    """Wait until the condition holds or all torchruns have ended. Raises TimeoutError."""
    path = run / "metrics.jsonl"
    size, changed = 0, time.monotonic()
    while not condition() and any(agent.poll() is None for agent in agents):
        time.sleep(0.05)
        now = path.stat().st_size if path.exists() else 0
        if now != size:
            size, changed = now, time.monotonic()
        if time.monotonic() - changed > SILENCE:
            raise TimeoutError


def kill_one(agents: list[subprocess.Popen], run: Path, until: int, dice) -> str:
    """Kill one rank before the step `until` -> which, and when it was."""
    if dice.random() < 0.25:
        time.sleep(dice.uniform(0, 6))
    else:
        step = dice.randrange(last_step(run) + 1, until)
        wait(lambda: last_step(run) >= step, agents, run)
    ranks = living_ranks(agents)
    if not ranks:
        return "no rank left to kill"
    victim = dice.choice(sorted(ranks))
    os.kill(victim, signal.SIGKILL)
    step = last_step(run)
    when = f"after step {step}" if step >= 0 else "before the first step"
    return f"rank {ranks[victim]} killed {when}"


def disturb(start, folder: Path, name: str, ranks: int, environment: dict, kills: int, dice):
    """Train and kill a rank once or twice -> what came of it, and which rank died when."""
    from helpers import losses
    from night import facts

    run, quiet = folder / name, folder / f"{start.__name__}-{ranks}"
    story, old = [], set()
    agents = start(folder, name, ranks, environment)
    try:
        for until in (STEPS // 2, STEPS - 5)[-kills:]:
            wait(lambda old=old: len(living_ranks(agents).keys() - old) == ranks, agents, run)
            old = old | living_ranks(agents).keys()
            story.append(kill_one(agents, run, until, dice))
        wait(lambda: False, agents, run)
    except TimeoutError:
        return "hangs", story
    finally:
        left = living_ranks(agents)
        for agent in agents:
            agent.kill()  # first, or it would start its ranks again
            agent.wait()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if any(agent.returncode for agent in agents):
        return "fails", story
    if facts(run) == facts(quiet):  # facts() also checks that each step is there once
        return "equal bit for bit", story
    furthest = abs(losses(run) - losses(quiet)).max()
    story.append(f"losses within {furthest:.1e}")
    return "equal to 1e-4" if furthest < 1e-4 else "differs", story


def series(start, folder: Path, ranks: int, environment: dict, runs: int) -> None:
    """Disturb some runs, every fourth one twice, and print what came of each and of all."""
    how = "with the variable" if environment else "without it"
    what = f"{start.__name__.replace('_', ' ')}, {ranks} ranks, {how}"
    counts = collections.Counter()
    for number in range(runs):
        dice = random.Random(number)
        name = f"{start.__name__}-{ranks}-{len(environment)}-{number}"
        began = time.monotonic()
        kills = 2 if number % 4 == 3 else 1
        outcome, story = disturb(start, folder, name, ranks, environment, kills, dice)
        counts[outcome] += 1
        seconds = time.monotonic() - began
        print(f"  {number:2d} {outcome}, {seconds:.0f} s: {', '.join(story)}", flush=True)
    total = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"{what}, {runs} runs: {total}\n", flush=True)


def undisturbed(start, folder: Path, ranks: int) -> None:
    for agent in start(folder, f"{start.__name__}-{ranks}", ranks, VARIABLE):
        assert agent.wait() == 0, (folder / "torchrun.log").read_text()


def show_key() -> None:
    """Say, as rank 0, whether a key set before the restart is still in the store.

    The store is the one that init_process_group would take. A process group has all its keys below
    a prefix there, except for nccl's watchdog: it ends a rank that finds its key "exception_dump".
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://"))
    restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if rank == 0 and not restarted:
        store.set("exception_dump", "1")
    if not restarted:
        store.wait(["exception_dump"])  # torchrun ends all ranks as soon as it misses one
    elif rank == 0:
        there = store.check(["exception_dump"])
        print("the key is still there" if there else "the key is gone", flush=True)
    os._exit(0 if restarted else 1)


def keys(folder: Path) -> None:
    """Print for each way to start torchrun whether a key survives a restart."""
    for options in (
        ["--standalone"],
        ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"],
        [f"--master_port={free_port()}"],  # torchrun's "static" rendezvous
    ):
        for environment in ({}, VARIABLE):
            (folder / "torchrun.log").write_text("")
            script = [__file__, "key"]
            flags = [*options, "--nproc_per_node=2", "--max-restarts=1"]
            assert torchrun(folder, flags, script, environment).wait() == 0
            lines = (folder / "torchrun.log").read_text().splitlines()
            (answer,) = [line for line in lines if line.startswith("the key")]
            how = "with the variable" if environment else "without it"
            shown = re.sub(r"=\d+", "=PORT", " ".join(options))
            print(f"torchrun {shown}, {how}: after a restart {answer}", flush=True)


def main() -> None:
    if sys.argv[1:] == ["key"]:
        return show_key()
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import losses, make_shards, run

    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder / "shards")
        undisturbed(one_machine, folder, 2)
        series(one_machine, folder, 2, VARIABLE, runs)
        series(one_machine, folder, 2, {}, runs // 2)

        keys(folder)
        print()

        for ranks, share in ((4, 4), (8, 10)):
            undisturbed(two_machines, folder, ranks)
            series(two_machines, folder, ranks, VARIABLE, max(1, runs // share))
        series(two_machines, folder, 4, {}, max(1, runs // 4))

        done = run(folder, *training("alone")[1:])
        assert done.returncode == 0, done.stderr
        alone = losses(folder / "alone")
        for ranks in (4, 8):
            undisturbed(one_machine, folder, ranks)
            for start in (one_machine, two_machines):
                found = losses(folder / f"{start.__name__}-{ranks}")
                furthest = abs(found - alone).max()
                where = start.__name__.replace("_", " ")
                print(f"{where}, {ranks} ranks: losses within {furthest:.1e} of one process's")


if __name__ == "__main__":
    main()

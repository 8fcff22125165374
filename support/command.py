"""What all commands share: flags, and errors that are one line."""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from tqdm import tqdm


class UserError(Exception):
    """An error that the user can fix: one line that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """Shorten an exception's message to one line; some libraries write a page, in colors."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return (text.splitlines() or [type(error).__name__])[0]


def is_first_rank() -> bool:
    return os.getenv("RANK", "0") == "0"  # torchrun sets it


def say(*args, **options) -> None:
    """Print, on rank 0 only. A full disk or a closed terminal must not end the run."""
    if is_first_rank():
        with contextlib.suppress(OSError):
            print(*args, **options, flush=True)


@contextlib.contextmanager
def explain(what: str, hint: str = "") -> Iterator[None]:
    """Turn any exception into a UserError; damaged files and networks raise nearly all types."""
    try:
        yield
    except UserError:  # it is explained
        raise
    except Exception as error:
        raise UserError(f"{what} ({first_line(error)}){hint}") from error


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all other errors here. `doc` is a
    command's docstring, of which --help shows the first line."""

    def __init__(self, prog: str, doc: str | None = None, **options):
        first_line = (doc or "").partition("\n")[0]  # under python -OO there are no docstrings
        super().__init__(prog, **{"description": first_line, **options})

    def error(self, message: str):
        hint = "it has no value; its --no- form says no; " if "ignored explicit" in message else ""
        raise UserError(f"{message} ({hint}--help lists all flags)")


def progress(items, name: str):
    """The items, with a progress bar if they take more than a second on a terminal."""
    hidden = None if is_first_rank() else True  # None: where stderr is no terminal
    return tqdm(items, name, disable=hidden, delay=1, leave=False)


def setting(default, help: str, choices="", least=0, group=""):
    """Declare a setting: its default, and its flag's help, choices, and least value of a number.

    It begins a `group` of flags in --help, if that is given.
    """
    metadata = dict(help=help, choices=choices, least=least, group=group)
    return dataclasses.field(default=default, metadata=metadata)


def parse_flags(config_class: type, presets: dict, prog: str, doc: str | None, argv) -> dict:
    """Make a flag of each field of a dataclass -> those that the command line gives, by name.

    A field without `setting` has a flag, too, and no help. Raises UserError for bad flags.
    """
    parser = OneLineParser(prog, doc, allow_abbrev=False)
    group = parser.add_argument_group("model")
    for field in dataclasses.fields(config_class):
        name, about = field.name, field.metadata
        if about.get("group"):
            group = parser.add_argument_group(about["group"])
        values = {"default": field.default} if field.default not in (None, "", False) else {}
        values |= {preset: given[name] for preset, given in presets.items() if name in given}
        text = about.get("help", "") + (f": {', '.join(presets)}" if name == "preset" else "")
        text += f" ({', '.join(f'{k}: {v!r}' for k, v in values.items())})" if values else ""
        options = dict(help=text.replace("%", "%%"), default=argparse.SUPPRESS)
        if field.type in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = field.type
            options["choices"] = about.get("choices", "").split() or None
            options["metavar"] = None if options["choices"] else field.type.__name__.upper()
        group.add_argument(f"--{name}", **options)
    return vars(parser.parse_args(argv))


def merge(config_class: type, presets: dict, preset: str, loaded: dict, flags: dict, fixed):
    """Make a config: flags win over what was loaded, that over the preset, that over the defaults.

    Raises UserError if there is no such preset, if a number is too small, or if a flag contradicts
    one of the `fixed` settings that were loaded.
    """
    if preset not in presets:
        raise UserError(f"--preset {preset}: choose from {', '.join(presets)}")
    for name, value in flags.items():
        if name in fixed and value != loaded.get(name, value):
            what = f"--{name} {value}: what was loaded has {loaded[name]}"
            raise UserError(f"{what}; leave the flag out, or start a new run in another --out_dir")
    settings = {**presets[preset], **loaded, **flags, "preset": preset}
    known = {}
    for field in dataclasses.fields(config_class):
        value = known[field.name] = settings.get(field.name, field.default)
        least = field.metadata.get("least", 0)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise UserError(f"--{field.name} {value}: it must be finite and at least {least}")
    return config_class(**known)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, its compiler, cuBLAS or Triton ran out of memory: each has its own type."""
    words = r"out ?of ?memory|ALLOC_FAILED|can't allocate memory"
    return bool(re.search(words, f"{type(error).__name__}: {error}", re.IGNORECASE))


def on_signals(handler: Callable) -> None:
    """Call `handler` on Ctrl-C, SIGTERM, SIGHUP (the terminal closes) and SIGUSR1 (a cluster's
    warning of its time limit). What is ignored, as SIGHUP under nohup, stays ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has only the first two
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


RECEIVED = set()  # the signals that a Stop was told of
WRITING = threading.RLock()  # held while a file is written: see files.whole_file


def stop_at_once(number, frame) -> None:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}; nothing new was written")


class Stop:
    """A request to stop, once `listen` was called: true after the first signal.

    The current step is finished first; a second Ctrl-C stops without a checkpoint.
    """

    def __init__(self):
        self.signal = ""

    def __bool__(self) -> bool:
        return bool(self.signal)

    def last_words(self, step: int) -> str:
        """What to say after a run has stopped with `step` steps done."""
        why = self.signal or "a signal to another rank"
        left = "--resume continues" if step else "there is no checkpoint yet"
        return f"stopped by {why} after step {step}; {left}"

    def listen(self) -> None:
        on_signals(self.on_signal)

    def on_signal(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped by a second Ctrl-C, without a checkpoint")
        first, self.signal = not self.signal, signal.Signals(number).name  # a second may come now
        RECEIVED.add(number)
        if first and is_first_rank():
            text = "stopping after this step"
            if number == signal.SIGINT and "RANK" not in os.environ:  # torchrun passes on only one
                text += "; Ctrl-C again stops without a checkpoint"
            with contextlib.suppress(OSError):  # print must not be called in a signal's handler
                os.write(1, f"\n{self.signal}: {text}\n".encode())


def let_others_speak(seconds: float) -> None:
    """Wait before an error is reported that another rank may have caused, or reports, too.

    If one has, torchrun ends this rank by SIGTERM, before it comes here or while it sleeps. A rank
    that wakes up failed alone. A checkpoint that is being written is finished first.
    """
    with WRITING:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.SIGTERM in RECEIVED:
            signal.raise_signal(signal.SIGTERM)
    time.sleep(seconds)


def run_command(name: str, main: Callable, if_out_of_memory="") -> None:
    """Run a command's `main`. An error that the user can fix ends it in one line, with status 2."""
    with contextlib.suppress(AttributeError):  # a notebook's stdout has no such method
        sys.stdout.reconfigure(errors="replace")  # Windows may write in an old encoding
    on_signals(stop_at_once)
    status, interrupted = 2, False
    try:
        main()
        return
    except KeyboardInterrupt as error:
        message, status, interrupted = str(error) or "interrupted", 1, True
    except UserError as error:
        message = str(error)
    except Exception as error:
        if is_out_of_memory(error):
            message = f"out of memory; {if_out_of_memory}"
        elif "RANK" not in os.environ:
            raise
        else:
            let_others_speak(1)
            message = f"an error on rank {os.environ['RANK']}\n{traceback.format_exc().rstrip()}"
            status = 1
    if not is_first_rank():  # most errors reach all ranks, at least as a lost connection
        let_others_speak(5)
    with contextlib.suppress(OSError):  # stderr may be on the disk that is full
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:  # torchrun sets it
        if not interrupted:
            WRITING.acquire()
        os._exit(status)  # a normal exit may wait for other ranks: see Runtime.close
    sys.exit(status)

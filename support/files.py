"""Files that are written whole or not at all, lines of JSON, and folders with one owner."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from support.command import WRITING, UserError, first_line, is_first_rank, say

LOCKS = {}  # folder -> the open file that holds its lock, until this process ends


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. It gets its name when all of it is on the disk, or never."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # the process id keeps runs apart
    with WRITING:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            if hasattr(os, "O_DIRECTORY"):  # the name must reach the disk, too; not on Windows
                folder = os.open(path.parent, os.O_RDONLY)
                with contextlib.suppress(OSError):  # not all network disks can
                    os.fsync(folder)
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)  # after an error


def json_lines(path: Path) -> list[tuple[bytes, dict]]:
    """The whole lines of a metrics.jsonl, and the record in each. A kill may have cut the last one,
    and a power cut damaged others."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if line.endswith(b"\n") and isinstance(record, dict) and "kind" in record:
                found.append((line, record))
    return found


def lock_folder(folder: Path) -> None:
    """Own a folder until this process ends, however it ends; of several ranks, rank 0 owns it.

    Raises UserError if another process does.
    """
    folder = folder.resolve()
    if folder in LOCKS or not is_first_rank():
        return
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        file = open(folder / "lock", "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        hint = "stop it first, or give another folder"
        raise UserError(f"{folder} belongs to a run that is not over: {owner}; {hint}") from None
    except OSError as error:  # some network disks
        say(f"warning: {folder} cannot be locked ({first_line(error)}): start no other run in it")
        return
    LOCKS[folder] = file
    with contextlib.suppress(OSError):  # on a full disk the lock holds, but has no name
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {platform.node()}, since {since}\n")
        file.flush()

"""Files that are whole or absent."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. It gets its name when all of it is on the disk, or never."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # the process id keeps runs apart
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

"""Texts and records on disk: which files, in which encoding, and whether they have changed.

A document is a .txt file, a line of a .jsonl file, or a row of a .parquet file. No document may end
the job that reads it: what cannot be text is handed on as None, and what cannot be decoded as lone
surrogates.
"""

import codecs
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from support.command import UserError, explain

ENDINGS = (".txt", ".jsonl", ".parquet")  # of what `read_file` reads
HEAD_BYTES = 2**16  # of a file, which tell what it is
BATCH_ROWS = 64  # rows of a table that become Python strings at a time

# The byte order mark of an encoding. UTF-32's begins with UTF-16's.
ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
# How files begin that are not texts.
MAGIC = {
    b"\x1f\x8b\x08": "a gzip archive; unpack it",
    b"PK\x03\x04": "a zip archive, a Word document or a PyTorch file; save its text as .txt",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"%PDF-": "a PDF; save its text as .txt",
    b"PAR1": "Parquet; give it to fineweb.py, with the ending .parquet",
    b"\x93NUMPY": "a numpy array; as a shard, it needs the ending .npy and a folder",
}

codecs.register_error("lone_surrogate", lambda error: ("\udcff", error.end))
# JSON with integers of any length, and with raw control characters in strings.
RECORD = json.JSONDecoder(parse_int=float, strict=False)


def ending(path: Path) -> str:
    return path.suffix.lower()


def other_kind(head: bytes) -> str:
    """Name what a file is that begins like this, and that is no text; "" if it may be a text."""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    if b"\0" not in head or head.startswith(tuple(ENCODINGS)):
        return ""
    one_side = max(head[::2].count(0), head[1::2].count(0))
    if one_side > 0.9 * head.count(0) and one_side > 0.02 * len(head):
        return "UTF-16 without a byte order mark; save it as UTF-8"
    return "binary data, with NUL bytes"


def is_text(head: bytes) -> bool:
    """Whether a file that begins like this is UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return not re.search(rb"[\x00-\x08]", head)


def open_text_file(path: Path | str, errors="strict") -> io.TextIOWrapper:
    """Open a text in UTF-8, or in the encoding that its byte order mark names.

    Raises OSError, and UserError if it is clearly not a text.
    """
    file = open(path, "rb", buffering=HEAD_BYTES)
    head = file.peek()  # a pipe could not be opened twice
    if kind := other_kind(head):
        file.close()
        raise UserError(f"{path} is not a text: it looks like {kind}")
    names = (name for mark, name in ENCODINGS.items() if head.startswith(mark))
    return io.TextIOWrapper(file, encoding=next(names, "utf-8"), errors=errors)


def check_field(field: str, names: list[str]) -> None:
    if field not in names:
        raise ValueError(f"no column {field}; give --text_field, of {', '.join(names)}")


def column_values(column) -> list:
    """Arrow's column -> Python's values."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        rows = column.cast("large_binary").to_pylist()
        return [None if row is None else row.decode("utf-8", "lone_surrogate") for row in rows]


def read_record(line: str) -> dict:
    """Read a line of a .jsonl file; {} if it is nested too deep for Python."""
    try:
        record = RECORD.decode(line)
    except RecursionError:
        return {}
    if not isinstance(record, dict):
        raise TypeError("it is not an object with names and values")
    return record


def read_file(path: Path, field: str) -> Iterator[object]:
    """Yield the documents of a file: strings, anything else, or the open file if it is a .txt."""
    if ending(path) == ".parquet":
        import pyarrow.parquet

        with explain(f"{path} cannot be read"), pyarrow.parquet.ParquetFile(path) as file:
            check_field(field, file.schema_arrow.names)
            for batch in file.iter_batches(BATCH_ROWS, columns=[field]):
                yield from column_values(batch.column(0))
        return
    with explain(f"{path} cannot be read"), open_text_file(path, "lone_surrogate") as file:
        if ending(path) == ".txt":
            yield file
            return
        for number, line in enumerate(file, start=1):
            with explain(f"{path}, line {number}: not a JSON record"):
                record = read_record(line) if line.strip() else {field: ""}
                if number == 1 and record:
                    check_field(field, list(record))
            yield record.get(field)


def find_files(patterns: list[str]) -> list[Path]:
    """Find the files that --input names, each once and in the order given.

    A path that exists is a file, whatever its characters. In another path, what comes after the
    last folder that exists is a pattern; its matches are sorted. Raises UserError if one is missing
    or not a text.
    """
    files = {}
    for pattern in map(Path, patterns):
        folder = next(path for path in (pattern, *pattern.parents) if os.path.exists(path))
        rest = str(pattern.relative_to(folder))  # "." if the path exists
        names = sorted(glob.glob(rest, root_dir=folder, recursive=True))
        for path in [folder / name for name in names] or [pattern]:
            if not os.path.isfile(path) or ending(path) not in ENDINGS:
                raise UserError(f"--input {path} is not a file that ends in {', '.join(ENDINGS)}")
            if ending(path) != ".parquet":
                with explain(f"--input {path} cannot be read"):
                    open_text_file(path).close()
            files.setdefault(path.resolve(), path)
    return list(files.values())


def fingerprint(files: list[Path], names: list[str]) -> str:
    """Hash the contents of files, and names that decide how they are read.

    Of a file above 1 GiB, these are its size and 1024 blocks of 1 MiB, spread over it.
    """
    block = 2**20
    sha256 = hashlib.sha256(repr(names).encode())
    for path in files:
        with explain(f"{path} cannot be read"), open(path, "rb") as file:
            size = path.stat().st_size
            sha256.update(f" {size} ".encode())
            for offset in range(0, size, max(block, size // 1024)):
                file.seek(offset)
                sha256.update(file.read(block))
    return sha256.hexdigest()


def contents(files: list[Path], dataset: str, config: str, out: Path) -> str | None:
    """Hash the files, or those of a data set if it is on this disk; None if it is on the hub.

    Hidden files do not count, nor do those in `out`.
    """
    if files:
        return fingerprint(files, [ending(path) for path in files])
    if not os.path.isdir(dataset):
        return None
    named = {}
    for path in sorted(Path(dataset).rglob("*")):
        name = path.relative_to(dataset).as_posix()
        ours = out.resolve() in path.resolve().parents
        if path.is_file() and not ours and "/." not in f"/{name}":
            named[name] = path
    return fingerprint(list(named.values()), [config, *named])

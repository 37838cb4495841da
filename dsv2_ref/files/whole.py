# SPDX-License-Identifier: MIT
"""Files that are there whole or not at all, whenever the process is killed or the power fails.

A file is written under another name beside its place, flushed to the disk, and renamed; then the
folder is flushed, so that the new name is on the disk too. Every file that the package writes goes
this way, but for a log that grows by a line a step.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` when the block ends without an error.

    Makes the folder. ValueError, naming `path`, where it cannot be written; the file that was
    there before is then as it was, and nothing else is left behind.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        flush(scratch)
        os.replace(scratch, path)
        flush(path.parent)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            scratch.unlink()


def write_text(path: str | Path, text: str) -> None:
    """A whole text file, in UTF-8."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Wait until a file is on the disk; a folder too, where the system can do that."""
    if path.is_dir() and os.name == "nt":
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)

# SPDX-License-Identifier: MIT
"""Files that are there whole or not at all, whenever the process is killed or the power fails.

A file is written under another name beside its place, flushed to the disk, and renamed; then the
folder is flushed, so that the new name is on the disk too. Every file that the package writes goes
this way, but for a log that grows by a line per step. A folder of files goes the same way; one that
it replaces is moved aside first, since no rename takes the place of a folder that holds something.
"""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
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
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):
            scratch.unlink()


def write_text(path: str | Path, text: str) -> None:
    """A whole text file, in UTF-8."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")   # on every system


@contextmanager
def whole_folder(path: str | Path, replaced: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder to write files into; it takes the place of `path` when the block ends well.

    Where `path` is a link, of the folder that it leads to. `replaced` names the files of the folder
    that is there now, which go; any other file in it is kept, beside the new one. ValueError, which
    names `path`, where it cannot be written; what was there before is then as it was.
    """
    try:
        place = Path(path).resolve()
        if os.path.ismount(place):
            raise ValueError(f"{path}: a mount point, which cannot be replaced, expected a folder "
                             "inside it")
        scratch = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
    except (OSError, RuntimeError) as error:                     # RuntimeError: links in a circle
        raise _unwritable(path, error) from None
    try:
        yield scratch
        for file in (*scratch.iterdir(), scratch):
            flush(file)
        _exchange(scratch, place, replaced)
        flush(place.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _exchange(new: Path, place: Path, replaced: Iterable[str]) -> None:
    old = new.with_suffix(".old")
    try:
        if place.exists():
            place.rename(old)
        new.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    if old.exists():
        with suppress(OSError):              # a file that came meanwhile keeps the old folder
            for name in replaced:
                (old / name).unlink()
            old.rmdir()


def _unwritable(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})")


def flush(path: Path) -> None:
    """Wait until a file is on the disk; a folder too, where the system can do that."""
    if path.is_dir() and os.name == "nt":
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)

# SPDX-License-Identifier: MIT
"""The cells of a needle grid in a folder, which survive a kill at any moment.

A grid's settings make the first line of a file of its own, the checksum of that line its name; then
comes a line a cell, as each is made. A kill can tear the last line: it is cut off, and its cell is
made again. Nobody else's file is replaced or cut: one under our name whose first line is another is
refused. One process at a time writes into a folder.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv2_ref.files.lock import locked
from dsv2_ref.files.whole import write_text

Cell = dict[str, Any]
SCRATCH = re.compile(r"\.cells-[0-9a-f]{8}\.jsonl\.\d+\.tmp")       # what a kill leaves behind


@contextmanager
def kept_cells(
    folder: str | Path, settings: dict[str, Any]
) -> Iterator[tuple[dict[tuple[int, float], Cell], Callable[[Cell], None]]]:
    """The cells that are there, by length and depth; and a function that keeps another one.

    Makes the folder. ValueError where it cannot be read or written, another process writes into it,
    or the file of these settings holds anything but their cells.
    """
    folder, first = Path(folder), json.dumps(settings, sort_keys=True)
    path = folder / _name(first)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
    with locked(folder, "writes into"):
        found = _whole_lines(path, first)
        try:
            for left in folder.glob(".cells-*"):
                if SCRATCH.fullmatch(left.name):
                    left.unlink(missing_ok=True)
            log = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from None

        def keep(cell: Cell) -> None:
            try:
                log.write(json.dumps(cell) + "\n")
                log.flush()
            except OSError as error:
                raise _unwritable(path, error) from None

        try:
            yield found, keep
        finally:
            try:
                log.close()
            except OSError:          # what a full disk did not take was told by `keep`
                pass


def _whole_lines(path: Path, first: str) -> dict[tuple[int, float], Cell]:
    """The cells of a file, a torn last line cut off; a new file where there is none."""
    text = first + "\n"
    if path.exists() or path.is_symlink():
        if not is_of_cells(path):
            raise ValueError(f"{path}: exists and was not written by this, expected another --out, "
                             "or this moved away")
        text = _read(path)
    head, *lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    found = {}
    for number, line in enumerate(lines, 2):
        cell = _cell(line)
        if cell is None:
            raise ValueError(f"{path}: line {number} is no cell, expected length, depth, exact and "
                             "rank, or this moved away")
        found[cell["length"], cell["depth"]] = cell
    if not path.exists() or "".join([head, *lines]) != text:
        write_text(path, "".join([head, *lines]))
    return found


def is_of_cells(path: Path) -> bool:
    """Whether it was written here: the checksum of its first line is its name."""
    head, end, _ = _read(path).partition("\n")
    return bool(end) and path.name == _name(head)


def _name(first: str) -> str:
    return f"cells-{zlib.crc32(first.encode()):08x}.jsonl"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _cell(line: str) -> Cell | None:
    try:
        cell = json.loads(line)
    except json.JSONDecodeError:
        return None
    whole = isinstance(cell, dict) and {"length", "depth", "exact", "rank"} <= set(cell)
    return cell if whole else None


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path}: cannot be written ({error.strerror or error})")

# SPDX-License-Identifier: MIT
"""Documents from files and folders of your own.

A text file is a document, so is a row of a .jsonl or .parquet file. A file that is named is read
whatever its suffix; of a folder, only files with a suffix that says text. Nothing is left out in
silence: what cannot be read is refused by name, what is not meant to be read is counted.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".cpp", ".rs", ".js"}
ROW_SUFFIXES = {".jsonl", ".parquet"}


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def read_paths(paths: Iterable[Path], field: str) -> tuple[list[Document], Counter[str]]:
    """The documents of files and folders, and how many files of which kind were left out.

    A file that is reached twice, also through a link, is read once. `field` is the key or column
    with the text. ValueError says which path, line or field is wrong; ImportError if parquet is
    met without pyarrow.
    """
    documents, left_out, seen = [], Counter(), set()
    for path in paths:
        if not path.exists():
            raise ValueError(f"path {str(path)!r} does not exist, expected a file or a folder")
        for file in walk(path, _refuse) if path.is_dir() else [path]:
            if file != path and (kind := _no_text(file)):
                left_out[kind] += 1
            elif (real := os.path.realpath(file)) not in seen:
                seen.add(real)
                name = file.name if file == path else file.relative_to(path).as_posix()
                documents.extend(_read(file, name, field))
    return documents, left_out


def walk(folder: Path, refuse: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """All files below `folder` in a fixed order, and the links to folders, which are not entered.

    Hidden folders are left out. `refuse` is told of a folder that cannot be read.
    """
    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [f for f in folders if os.path.islink(os.path.join(where, f))]
        yield from (Path(where, f) for f in sorted(files))


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _no_text(file: Path) -> str:
    """Why a file of a folder is left out; nothing for a file that is to be read."""
    if file.name.startswith("."):           # what editors, macOS and version control put there
        return "hidden"
    if file.is_dir():
        return "linked folder"
    suffix = file.suffix.lower()
    return "" if suffix in TEXT_SUFFIXES | ROW_SUFFIXES else suffix or "no suffix"


def _read(path: Path, name: str, field: str) -> Iterator[Document]:
    suffix = path.suffix.lower()
    try:
        if not stat.S_ISREG(path.stat().st_mode):       # to read a pipe may wait for ever
            raise ValueError(f"{path}: a pipe or a device, expected a file")
        if suffix == ".jsonl":
            yield from _read_jsonl(path, name, field)
        elif suffix == ".parquet":
            yield from _read_parquet(path, name, field)
        else:
            yield Document(name, path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_jsonl(path: Path, name: str, field: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error})") from error
            if not isinstance(row, dict) or field not in row:
                raise ValueError(f"{path}:{number}: no field {field!r}, expected an object with it")
            yield Document(f"{name}:{number}", checked(row[field], f"{path}:{number}", field))


def _read_parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    parquet = extra("pyarrow.parquet", f"reading {path.name}")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's own errors derive from it
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    with file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{path}: no column {field!r}, expected one of {columns}")
        row = 0
        for batch in file.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield Document(f"{name}:{row}", checked(text, f"{path}:{row}", field))


def checked(text: object, where: str, field: str) -> str:
    """`text`, if it is a string that UTF-8 can hold; else a ValueError that says where it stood."""
    if not isinstance(text, str):
        found = type(text).__name__
        raise ValueError(f"{where}: field {field!r} is {found}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{where}: field {field!r} has no UTF-8 form") from None
    return text


def extra(module: str, purpose: str) -> ModuleType:
    """A module of the `data` extra; an ImportError that says how to install it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module.split('.')[0]}: .venv/bin/pip install -e '.[data]'"
        ) from error

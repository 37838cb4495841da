# SPDX-License-Identifier: MIT
"""What we wrote into a folder, so that only that is ever replaced: manifest.json, name -> SHA-256.

A folder may hold a thesis beside a model, or a model that someone has trained further. A name does
not tell; a checksum does.
"""

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Note all files that are in `folder` now."""
    record = {"files": {file.name: _digest(file) for file in sorted(folder.iterdir())}}
    (folder / MANIFEST).write_bytes(json.dumps(record, indent=1).encode() + b"\n")


def written_files(folder: Path) -> list[str]:
    """The names in `folder`, all of them noted and unchanged since.

    ValueError names a file that is not; nothing is touched.
    """
    try:
        names = sorted(file.name for file in folder.iterdir())
        record = json.loads((folder / MANIFEST).read_bytes()) if MANIFEST in names else {}
        noted = {MANIFEST: _digest(folder / MANIFEST), **record.get("files", {})}
        for name in names:
            if noted.get(name, "") != _digest(folder / name):
                raise ValueError(f"{folder / name}: not written here, or changed since, expected "
                                 f"only the files that {MANIFEST} names")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError):
        raise ValueError(f"{folder / MANIFEST}: damaged, expected a list of files") from None
    return names


def _digest(file: Path) -> str | None:
    """SHA-256 of a plain file; None for a link, a folder or anything else."""
    if file.is_symlink() or not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

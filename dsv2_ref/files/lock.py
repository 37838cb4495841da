# SPDX-License-Identifier: MIT
"""A folder that one process at a time writes into."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:          # Windows: folders cannot be locked there
    fcntl = None


@contextmanager
def locked(folder: Path, does: str) -> Iterator[None]:
    """The folder itself is locked: no file is left behind, and the lock dies with its process.

    ValueError where another process holds it, which `does` what this one wanted to do.
    """
    if fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise ValueError(f"{folder}: another process {does} it, expected its end first, or "
                         "another folder") from None
    except OSError:              # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(number)

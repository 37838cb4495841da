# SPDX-License-Identifier: MIT
"""A training state that several processes write together: a folder, there whole or not at all.

Each process writes what it holds into a file of its own, by torch.distributed.checkpoint; a tensor
that several have is written by one of them. Shares of one tensor are DTensors, and whoever reads
may ask for other shares, or for all: the number of processes that read is not the one that wrote.
On several machines the folder lies on a file system that all of them see.

state.json holds the dictionary of the state and a checksum of every other file; a folder without it
is no state. torch's .metadata is a pickle: read only states that you trust.
"""

import json
import warnings
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2_ref.files.whole import whole_folder

T = TypeVar("T")
STATE = "state.json"


def save_sharded(
    path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any],
    first_does: Callable[[Callable[[], T]], T],
) -> None:
    """Write tensors, of which each process gives its own, and a JSON-able dictionary. By all.

    `first_does(work)` is what `work` gives on the first process, told to all. An interruption at
    any moment leaves what was there before.
    """
    import torch.distributed.checkpoint as dcp  # a second, which one process does not need
    from torch.distributed.checkpoint.api import CheckpointException

    with ExitStack() as opened:
        before = sorted(files_of_sharded(path)) if is_sharded(path) else []
        scratch = first_does(lambda: opened.enter_context(whole_folder(path, before)))
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(scratch))
        except CheckpointException as error:          # a BaseException, which names every process
            why = "; ".join(sorted({str(e[0]) for e in error.failures.values()}))
            raise ValueError(f"{path}: cannot be written ({' '.join(why.split())[:200]})") from None
        own = {p.name: _checksum(p) for p in scratch.glob(f"__{dist.get_rank()}_*")}
        sums: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(sums, own)

        def finish() -> None:
            files = {".metadata": _checksum(scratch / ".metadata")}
            for part in sums:
                files |= part
            for name in files:
                if not (scratch / name).exists():       # written, but on another node's disk
                    raise ValueError(f"{path}: {name} is not there, expected a file system that "
                                     "all nodes see")
            text = json.dumps({"state": state, "crc32": files})
            (scratch / STATE).write_text(text, encoding="utf-8")
            opened.close()                                # flushed, and renamed

        first_does(finish)


def load_sharded(
    path: str | Path,
    like: Callable[[str, torch.Size, torch.dtype], Tensor | None] | None = None,
    check: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what `save_sharded` wrote. By all processes that there are, or by one.

    `like(name, size, dtype)` gives the tensor to be filled with that one of the whole state: a
    DTensor for a share, None for nothing; by default all is read. ValueError for what is no state,
    or is damaged; `check` reads every file for that.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.tensor import DTensor

    path = Path(path)
    state = state_of_sharded(path, check)
    reader = dcp.FileSystemReader(path)
    there = reader.read_metadata().state_dict_metadata
    wanted = {}
    for name, what in there.items():
        if not isinstance(what, TensorStorageMetadata):
            raise ValueError(f"{path}: {name} is no tensor, expected tensors alone")
        size, dtype = what.size, what.properties.dtype
        t = torch.empty(size, dtype=dtype) if like is None else like(name, size, dtype)
        if t is not None:
            wanted[name] = t
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(wanted, storage_reader=reader, no_dist=like is None)
    return {name: t.to_local() if isinstance(t, DTensor) else t
            for name, t in wanted.items()}, state


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a folder that says it is such a state."""
    return "state" in _json(Path(path))


def files_of_sharded(path: str | Path) -> set[str]:
    """Names of the files of a state."""
    return {STATE, *_json(Path(path)).get("crc32", {})}


def state_of_sharded(path: str | Path, check: bool = True) -> dict[str, Any]:
    """Its dictionary, without tensors; ValueError if a bit of any file has changed."""
    path = Path(path)
    found = _json(path)
    if "state" not in found:
        raise ValueError(f"{path}: no {STATE} inside, expected a training state")
    for name, known in found["crc32"].items() if check else ():
        try:
            here = _checksum(path / name)
        except OSError as error:
            raise ValueError(f"{path / name}: damaged, cannot be read ({error.strerror})") from None
        if here != known:
            raise ValueError(f"{path / name}: damaged, expected checksum {known}, not {here}")
    return found["state"]


def _json(path: Path) -> dict[str, Any]:
    """What state.json says; nothing, where there is none or it is no such file."""
    try:
        found = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("crc32"), dict)
    return found if whole else {}


def _checksum(file: Path) -> str:
    total = 0
    with file.open("rb") as reader:
        while block := reader.read(1 << 24):
            total = zlib.crc32(block, total)
    return f"{total:08x}"

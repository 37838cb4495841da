# SPDX-License-Identifier: MIT
"""A bench as cases, none of which is lost with another.

Such a bench is a module with CASES (and QUICK, tiny ones), in order of worth, each with a `name`
and `needs`, the bytes it takes at most; and rows(case, device), which yields rows as they are made.
A row takes the place of an earlier one with the same "case", so ours alone can come first and the
same with its peers after it. A module that has `run` alone counts as one case.

What became of a case is one string:

  measured
  too large: ...     it needs more than there is; nothing was allocated
  failed: ...        an exception, or the end of its process; the rows it had given stay
  left out: ...      the time was spent
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, NamedTuple

import torch

from dsv2_ref.bench.harness.goals import judged, line
from dsv2_ref.bench.harness.gpu import device_for, reason, record
from dsv2_ref.training.machine import memory

SILENCE = 240.0         # seconds without a row after which a case is taken to hang
GRACE = 60.0            # seconds that a case may go on when the time is spent
SPAWN = multiprocessing.get_context("spawn")       # a fork has no CUDA


class Whole(NamedTuple):
    """The one case of a module that has `run` alone."""

    name: str = "all of it"
    needs: int = 0


def cases_of(bench: ModuleType, quick: bool) -> Sequence[Any]:
    if not hasattr(bench, "rows"):
        return [Whole()]
    return bench.QUICK if quick else bench.CASES


def measured(name: str, quick: bool) -> dict[str, Any]:
    """The record of dsv2_ref/bench/NAME.py, case by case in this process.

    ValueError without a CUDA device, unless `quick`.
    """
    device = device_for(name, quick)
    bench = sys.modules[f"dsv2_ref.bench.{name}"]
    found: dict[str, Any] = {"rows": [], "cases": {}}
    for case in cases_of(bench, quick):
        for message in attempt(bench, case, device, quick):
            note(found, name, case.name, message, quick)
    return {"name": name, "quick": quick, **record(device), **found}


def attempt(
    bench: ModuleType, case: Any, device: torch.device, quick: bool
) -> Iterator[dict[str, Any] | str]:
    """The rows of a case as they are made, and then what became of it."""
    free, _ = memory(device)
    if free is not None and case.needs > free:
        yield f"too large: needs {case.needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return
    try:
        whole = isinstance(case, Whole)
        for row in bench.run(quick=quick)["rows"] if whole else bench.rows(case, device):
            yield json.loads(json.dumps(row))         # what cannot be written is this case's fault
    except Exception as error:               # whatever it is, the others are still worth their run
        traceback.print_exc()
        yield f"failed: {reason(error)}"
    else:
        yield "measured"
    finally:
        gc.collect()
        if device.type == "cuda":
            with suppress(RuntimeError):     # after an illegal address everything raises
                torch.cuda.empty_cache()


def note(
    found: dict[str, Any], bench: str, case: str, message: dict[str, Any] | str, quick: bool
) -> None:
    """Put a row, or what became of the case, into a bench's record; tell it on stderr."""
    if isinstance(message, str):
        found["cases"][case] = message
        told = f"{bench}: {case}: {message}"
    else:
        row = message if quick else message | {"goals": judged(bench, message)}
        names = [old["case"] for old in found["rows"]]
        at = names.index(row["case"]) if row["case"] in names else len(names)
        found["rows"][at : at + 1] = [row]
        told = line(bench, row)
    if message != "measured":
        print(told, file=sys.stderr, flush=True)


def without_numbers(record: dict[str, Any]) -> dict[str, str]:
    """"bench: case" -> why, of all cases of `all` that were not measured."""
    return {f"{name}: {case}": why for name, found in record["benches"].items()
            for case, why in found["cases"].items() if why != "measured"}


def in_a_process(
    module: str, names: Sequence[str], quick: bool, told: Callable[[str, Any], None], end: float,
) -> Sequence[str]:
    """Measure the cases of those names in a process of their own; what is left when it has ended.

    It ends with the first case that fails, for CUDA may be of no use after it, and at `end` of
    `time.monotonic`. told(name, message) gets what the process is (`record`), each row, and what
    became of each case.
    """
    mine, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(theirs, module, quick))
    process.start()
    theirs.close()                           # or the end of the process would not be seen
    try:
        for i, name in enumerate(names):
            if time.monotonic() >= end:
                return names[i:]
            with suppress(OSError):          # it has ended: _hear says so
                mine.send(name)
            message: Any = None
            while not isinstance(message, str):
                message = _hear(mine, process, end)
                told(name, message)
            if message.startswith(("failed", "left out")):
                return names[i + 1 :]
        return []
    finally:
        mine.close()
        process.join(2)
        process.kill()
        process.join()


def _hear(pipe: Connection, process: Any, end: float) -> Any:
    left = end + GRACE - time.monotonic()
    try:
        if pipe.poll(max(min(SILENCE, left), 0)):
            return pipe.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"failed: its process ended ({how})"
    if left < SILENCE:
        return "left out: stopped, the time was spent"
    return f"failed: stopped, no row in {SILENCE:.0f} s"


def serve(pipe: Connection, module: str, quick: bool) -> None:
    """In the other process: the name of a case in; rows, and what became of it, out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the one who started this ends it
    os.dup2(2, 1)                                       # stdout is for its record alone
    try:
        bench = importlib.import_module(module)
        device = device_for(module, quick)
        pipe.send(record(device))
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"failed: {reason(error)}")
        return
    cases = {case.name: case for case in cases_of(bench, quick)}
    with suppress(EOFError, BrokenPipeError):
        while True:
            for message in attempt(bench, cases[pipe.recv()], device, quick):
                pipe.send(message)

# SPDX-License-Identifier: MIT
"""The benches of kernels and of training on a GPU, in order of worth, in so many minutes.

Each bench runs in a process of its own, and after a case that failed or hung in a new one, so an
error that CUDA does not get over costs that case alone. Every row is in data/results/gpu-DATE.json
as soon as it is made; a run that was killed, or whose minutes were spent, is gone on with by the
same command on the same day, machine and source, and what is still missing stands in the record,
under `without_numbers`, with its reason. Notebook 13 draws that file; first_look.md, in this
folder, says what to read first in it.

Cases are made for 141 GB, and all of them fit in 80; on a smaller card one that needs more than is
free is left out before anything is allocated, and says so. `ablations` and `serve` use a GPU too,
and are run by themselves.
"""

import hashlib
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from dsv2_ref.bench.harness.cases import cases_of, in_a_process, note, without_numbers
from dsv2_ref.bench.harness.gpu import device_for, reason
from dsv2_ref.checkout import PACKAGE, in_checkout
from dsv2_ref.files.whole import write_text
from dsv2_ref.training.machine import machine

# a bench, and how the names of its cases begin; one without a file is passed over
ORDER = (
    "correct", "mla_decode 16 heads", "attention 16 heads", "experts V2-Lite",
    "six_bit_decode 16 heads", "optimizer", "train", "mla_decode", "attention", "experts",
    "six_bit_decode", "fp8",
)
MODULES = "dsv2_ref.bench."
FINAL = ("measured", "too large")


def run(quick: bool = False, minutes: float = 8.0, folder: Path | None = None) -> dict[str, Any]:
    """One JSON-able record of all, also a file in data/results; with `quick` nothing is written.

    No case begins after `minutes`, and none goes on for more than one minute after them.
    """
    device_for("all", quick)
    begun = time.monotonic()
    result: dict[str, Any] = {"name": "all", "quick": quick, **machine(), "source": _source()}
    file = None
    if not quick:
        file, result = _place(folder or in_checkout("data/results"), result)
    spent = result.get("seconds", 0.0)
    plan = list(_plan(quick, result.setdefault("benches", {})))

    def save() -> None:
        result["without_numbers"] = without_numbers(result)
        result["seconds"] = spent + time.monotonic() - begun
        if file is not None and "device" in result:
            try:
                write_text(file, json.dumps(result, indent=1) + "\n")
            except ValueError as error:      # a full disk: stdout still gets all of it
                print(error, file=sys.stderr)

    def told(bench: str, case: str, message: dict[str, Any] | str) -> None:
        found = result["benches"][bench]
        if isinstance(message, dict) and "case" not in message:          # what the process is
            found["rates"] = {name: message[name] for name in ("copy_tb_per_s", "matmul_tflops")}
            result.update(message | result)
        else:
            note(found, bench, case, message, quick)
        save()

    for bench, names in plan:
        while names and time.monotonic() < begun + 60 * minutes:
            names = in_a_process(MODULES + bench, names, quick, partial(told, bench),
                                 begun + 60 * minutes)
    save()
    for case, why in result["without_numbers"].items():
        print(f"without numbers: {case}: {why}", file=sys.stderr)
    if file is not None and file.exists():
        print(f"written: {file}", file=sys.stderr)
    return result


def _plan(quick: bool, benches: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Each part of ORDER with its cases that are to be measured: each once, none that has been."""
    seen: set[tuple[str, str]] = set()
    for bench, _, start in (part.partition(" ") for part in ORDER):
        if importlib.util.find_spec(MODULES + bench) is None:
            continue
        found = benches.setdefault(bench, {"rows": [], "cases": {}})
        try:
            cases = cases_of(importlib.import_module(MODULES + bench), quick)
        except ImportError as error:
            found["cases"]["all of it"] = f"failed: {reason(error)}"
            continue
        names = [case.name for case in cases
                 if case.name.startswith(start) and (bench, case.name) not in seen]
        seen |= {(bench, name) for name in names}
        names = [name for name in names if not found["cases"].get(name, "").startswith(FINAL)]
        found["cases"] |= dict.fromkeys(names, "left out: not begun")
        yield bench, names


def _place(folder: Path, head: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file for a record that begins with `head`, and the record: a new one, or one of today's
    that has cases to go on with. ValueError where no file can be written, and after 26 in a day."""
    for letter in ("", *ascii_lowercase[1:]):
        file = folder / f"gpu-{head['date']}{letter}.json"
        if not file.exists():
            write_text(file, json.dumps(head))     # before the work, not after it
            file.unlink()                          # until it is known which card this is
            return file, head
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
            whys = earlier["without_numbers"].values()
            same = earlier | head == earlier
        except (ValueError, TypeError, KeyError, AttributeError):
            continue                               # not one of these
        if same and not all(why.startswith(FINAL) for why in whys):
            print(f"going on with {file}", file=sys.stderr)
            return file, earlier
    raise ValueError(f"{file}: there, and all before it, expected fewer records of one day")


def _source() -> str:
    """What was measured: a checksum of the package's Python files."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]

# SPDX-License-Identifier: MIT
"""`bench`: a measurement against a peer in the same process.

Exit code 1 where a case of a GPU bench failed; its record is on stdout all the same.
"""

import importlib
import pkgutil
from argparse import ArgumentParser, ArgumentTypeError
from json import dumps

from dsv2_ref import bench
from dsv2_ref.commands.options import Failed, filled


def add_options(parser: ArgumentParser) -> None:
    names = [m.name for m in pkgutil.iter_modules(bench.__path__) if not m.ispkg]
    parser.add_argument("name", choices=names)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--only", type=filled, metavar="STUDY",
                        help="one study of ablations, as attention")
    parser.add_argument("--minutes", type=_minutes, metavar="N",
                        help="of all: no case begins after so many (8)")
    parser.add_argument("--json", action="store_true", help="on one line")
    parser.set_defaults(act=bench_command)


def bench_command(
    name: str, quick: bool, only: str | None, minutes: float | None, json: bool
) -> str:
    given = {"only": (only, "ablations"), "minutes": (minutes, "all")}
    for option, (value, bench_of_it) in given.items():
        if value is not None and name != bench_of_it:
            raise ValueError(f"--{option}: {value!r}, expected with {bench_of_it} alone")
    options = {option: value for option, (value, _) in given.items() if value is not None}
    record = importlib.import_module(f"dsv2_ref.bench.{name}").run(quick=quick, **options)
    text = dumps(record, indent=None if json else 2)
    whys = [why for found in record.get("benches", {name: record}).values()
            for why in found.get("cases", {}).values()]
    return Failed(text) if any(why.startswith("failed") for why in whys) else text


def _minutes(text: str) -> float:
    try:
        if 0 < (number := float(text)) < float("inf"):
            return number
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r}, expected minutes, as 8")

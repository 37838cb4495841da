# SPDX-License-Identifier: MIT
"""`bench`: a measurement against a peer in the same process."""

import importlib
import pkgutil
from argparse import ArgumentParser
from json import dumps

from dsv2_ref import bench
from dsv2_ref.commands.options import filled


def add_options(parser: ArgumentParser) -> None:
    names = [m.name for m in pkgutil.iter_modules(bench.__path__) if not m.ispkg]
    parser.add_argument("name", choices=names)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--only", type=filled, metavar="STUDY",
                        help="one study of ablations, as attention")
    parser.add_argument("--json", action="store_true", help="on one line")
    parser.set_defaults(act=bench_command)


def bench_command(name: str, quick: bool, only: str | None, json: bool) -> str:
    if only is not None and name != "ablations":
        raise ValueError(f"--only: {only!r}, expected with ablations alone")
    measure = importlib.import_module(f"dsv2_ref.bench.{name}").run
    record = measure(quick=quick) if only is None else measure(quick=quick, only=only)
    return dumps(record, indent=None if json else 2)

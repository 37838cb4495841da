# SPDX-License-Identifier: MIT
"""`copy`: a concept file, lifted into a folder of your own."""

import json
from argparse import ArgumentParser
from collections.abc import Sequence

from dsv2_ref import copying
from dsv2_ref.commands.options import Failed, filled


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("what", nargs="*", type=filled, metavar="NAME DEST",
                        help="rope, mla, routing, ...")
    parser.add_argument("--list", action="store_true", help="the names there are")
    parser.add_argument("--check", type=filled, metavar="DEST",
                        help="what changed since the copies were made; exit code 1 if anything did")
    parser.set_defaults(act=copy_command)


def copy_command(what: Sequence[str], list: bool, check: str | None) -> str:
    if list:
        return json.dumps(sorted(copying.concepts()), indent=1)
    if check is not None:
        states = copying.check(check)
        text = json.dumps(states, indent=1)
        return text if set(states.values()) <= {"same"} else Failed(text)
    if len(what) != 2:
        raise ValueError(f"copy: {' '.join(what) or 'nothing given'}, expected NAME DEST")
    return json.dumps(copying.copy(*what), indent=1)

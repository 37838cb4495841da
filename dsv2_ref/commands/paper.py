# SPDX-License-Identifier: MIT
"""`paper`: the paper's claims beside ours."""

from argparse import ArgumentParser

from dsv2_ref import paper


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(act=paper_command)


def paper_command(json: bool) -> str:
    rows = paper.rows()
    return paper.as_json(rows) if json else paper.as_table(rows)

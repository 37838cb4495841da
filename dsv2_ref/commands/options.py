# SPDX-License-Identifier: MIT
"""What the options of several commands share. No torch: `--help` and `copy` need none."""

from argparse import ArgumentTypeError

CORPORA = "python, packages, stories, hub:NAME or a path"


def filled(text: str) -> str:
    """Type of an option that names something: an empty path would be the current folder."""
    if not text:
        raise ArgumentTypeError("'', expected a name or a path")
    return text


class Failed(str):
    """Text for stdout of a command that did its work and whose answer is no: exit code 1."""

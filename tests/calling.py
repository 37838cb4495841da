# SPDX-License-Identifier: MIT
"""A command as it is typed, in this process."""

from dsv2_ref.__main__ import main


def call(capsys, *args):
    """(exit code, stdout, stderr) of a command."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in args])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err

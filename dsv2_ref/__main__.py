# SPDX-License-Identifier: MIT
"""The command line: results as JSON or text on stdout, messages on stderr.

Each command has a file in commands/ with its options and its work. Only the file of the command
that is asked for is imported: torch takes seconds.

Exit codes: 0 done; 1 the work was done or begun and the answer is no (training diverged, copies
have changed); 2 bad input or output, one line says what was wrong and what was expected; 128 and
the number of a signal that stopped it: 130 is Ctrl-C, 141 that nobody reads what it writes.
"""

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import IO, NoReturn

from dsv2_ref.commands.options import Failed

COMMANDS = {
    "run": "the main job: train, judge, generate, draw, save",
    "train": "train a preset",
    "sft": "fine-tune a saved model on conversations",
    "grpo": "a chat model learns from rewards",
    "reward": "train a reward model on judged answers",
    "align": "base, SFT, reward model, GRPO in two stages, and a table",
    "export": "a saved model written anew, as other programs take it",
    "figures": "draw a run from its log.jsonl",
    "generate": "continue a prompt with a saved model",
    "needle": "what a saved model finds in a long text",
    "evaluate": "benchmarks by name, through lm-evaluation-harness",
    "paper": "the paper's claims beside ours",
    "copy": "lift a concept file into a folder of your own",
    "bench": "a measurement against a peer in the same process",
}


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-\.?\d")      # "-1e-3" is a value, no flag

    def error(self, message: str) -> NoReturn:
        self.exit(_failed(message, 2, self.prog))

    def print_help(self, file: IO[str] | None = None) -> None:
        if code := _write(self.format_help()):
            self.exit(code)


def parser_of(command: str) -> argparse.ArgumentParser:
    """A parser that knows all commands by name and the options of one."""
    parser = _Parser(prog="dsv2_ref", description="DeepSeek-V2, exactly.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, what in COMMANDS.items():
        own = commands.add_parser(name, help=what)
        if name == command:
            importlib.import_module(f"dsv2_ref.commands.{name}").add_options(own)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = vars(parser_of(argv[0] if argv else "").parse_args(argv))
        args.pop("command")
        result = args.pop("act")(**args)
        if result is None:                     # of several processes one that does not speak
            return 0
        if isinstance(result, Iterator):       # a line each, as they come
            return next((code for line in result if (code := _write(json.dumps(line) + "\n"))), 0)
        text = result if isinstance(result, str) else json.dumps(result)
        return _write(text + "\n") or int(isinstance(result, Failed))
    except (ValueError, ImportError) as error:
        return _failed(str(error), 2)
    except FloatingPointError as error:        # training diverged
        return _failed(str(error), 1)
    except KeyboardInterrupt as stopped:
        return _failed("stopped; what was saved is whole", getattr(stopped, "code", 130))
    except BrokenPipeError:                    # while a message was written
        _lead_to_nowhere(sys.stderr)
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        return _failed(f"{error.filename}: {error.strerror}", 2)


def _write(text: str) -> int:
    """`text` and what waits before it to stdout; 0, or the exit code where that fails.

    A character that the terminal's encoding lacks becomes a question mark.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        print(text, end="", flush=True)
        return 0
    except OSError as error:
        _lead_to_nowhere(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return 141                         # as a shell says of a program ended by SIGPIPE
        return _failed(f"stdout: cannot be written ({error.strerror})", 2)


def _failed(why: str, code: int, who: str = "dsv2_ref") -> int:
    """One line on stderr; the exit code."""
    try:
        print(f"{who}: {' '.join(why.split())}", file=sys.stderr, flush=True)
    except OSError:
        _lead_to_nowhere(sys.stderr)
    return code


def _lead_to_nowhere(stream: IO[str]) -> None:
    """Of a stream that cannot be written: Python will flush it again at exit, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""What a compiler and a check say of a program, as a reward (section 4.2).

The paper gets preferences for code from compiler feedback. A program is read, run and checked here,
and each of the three says more than the one before:

    parses   it is Python
    runs     it ends by itself, within the limits of the sandbox
    passes   and so does the check that is run behind it

What is rewarded will be found, whether it was meant or not. "It parses" is won by the shortest body
there is (`return self`), and credit for a part of the way is won in the same way. That is why
`does_something` is a floor and no slope: a program of fewer than `LEAST` different statements is
worth nothing, however well it parses. Docstrings, `pass`, bare names and constants do not count,
nor does what is never reached: a policy that is paid for statements finds `return`, `return None`
and `return self`, one below the other.
"""

import ast
import secrets
from typing import NamedTuple

from torch import Tensor

from dsv2_ref.alignment.sandbox import run

LEAST = 3


class Feedback(NamedTuple):
    """How far a program came, and what stopped it ("" where nothing did)."""

    parses: bool
    runs: bool
    passes: bool
    why: str


def parsed(code: str) -> ast.Module | None:
    """The program's tree, None for what is no Python."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def statements(code: str) -> int:
    """Different statements of a program that do something; 0 for what is no Python."""
    found, waiting = set(), [parsed(code) or ast.Module([], [])]
    while waiting:
        for block in vars(waiting.pop()).values():
            for node in block if isinstance(block, list) else []:
                if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
                    waiting.append(node)
                if isinstance(node, ast.stmt) and _does_something(node):
                    found.add(ast.unparse(node))
                if isinstance(node, ast.Return | ast.Raise | ast.Break | ast.Continue):
                    break                                # nothing behind it is reached
    return len(found)


def _does_something(node: ast.stmt) -> bool:
    idle = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.Name)
    return not idle and not isinstance(node, ast.Pass)


def does_something(code: str, least: int = LEAST) -> float:
    """1 for a program of at least so many different statements, else 0."""
    return float(statements(code) >= least)


def feedback(code: str, check: str = "", seconds: float = 2.0) -> Feedback:
    """Read, run and check a program, in the sandbox.

    check: Python that is run behind it and raises where it is wrong. A program that ends before its
    check does not pass.
    """
    if parsed(code) is None:
        return Feedback(False, False, False, "no Python")
    alone = run(code, seconds=seconds)
    if not alone.ok:
        return Feedback(True, False, False, alone.why)
    if not check:
        return Feedback(True, True, True, "")
    mark = secrets.token_hex(8)          # printed last of all: exit(0) on the way prints no mark
    judged = run(f"{code}\n{check}\nprint({mark!r})", seconds=seconds)
    passes = judged.ok and judged.stdout.rstrip("\n").endswith(mark)
    why = "" if passes else judged.why or "it ended before its check"
    return Feedback(True, True, passes, why)


def pairs(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Which answers to compare: rewards (Q, G) -> flat numbers of the better and the worse, (P,).

    All pairs of one question with different rewards, for a pair-wise reward model.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, expected (questions, answers)")
    q, i, j = (rewards[:, :, None] > rewards[:, None, :]).nonzero(as_tuple=True)
    return q * rewards.shape[1] + i, q * rewards.shape[1] + j

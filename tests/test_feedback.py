# SPDX-License-Identifier: MIT
"""How far a program comes, what it is worth, and which answers are compared."""

import pytest
import torch
from refusals import refused

from dsv2_ref.alignment.feedback import does_something, feedback, pairs, statements
from dsv2_ref.alignment.sandbox import Uncontained, run

WORKS = """def add(a, b):
    total = a + b
    return total
"""


@pytest.fixture(scope="module", autouse=True)
def _contained():
    try:
        run("")
    except Uncontained as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("code", "check", "expected"), [
    ("def add(a, b:\n", "", (False, False, False)),
    (WORKS, "", (True, True, True)),
    (WORKS, "assert add(2, 3) == 5", (True, True, True)),
    (WORKS.replace("a + b", "a - b"), "assert add(2, 3) == 5", (True, True, False)),
    ("1 / 0", "", (True, False, False)),
    ("while True: pass", "", (True, False, False)),
    ("import os; os._exit(0)", "assert False", (True, True, False)),
    ("raise SystemExit", "assert False", (True, True, False)),
    (WORKS + "print('passed')", "assert add(2, 2) == 5", (True, True, False)),
    (WORKS, "import atexit, os, sys; atexit.register(lambda: sys.stdout.flush() or os._exit(3))",
     (True, True, False)),
    ("x = '\0'", "", (False, False, False)),
    ("(" * 500 + ")" * 500, "", (False, False, False)),
])
def test_how_far_a_program_comes(code, check, expected):
    found = feedback(code, check, seconds=1.0)
    assert found[:3] == expected
    assert ("\n" not in found.why) and bool(found.why) == (expected != (True, True, True))


@pytest.mark.parametrize(("code", "n"), [
    ("", 0), ("return self", 1), ("pass\npass", 0), ("'''words'''\n1\nx\n...", 0),
    ("x = 1\nx = 1\nx = 1", 1), ("x = 1\ny = x\nprint(y)", 3), ("x = (", 0),
    ("return\nreturn None\nreturn self", 1),
    ("if a:\n    return 1\n    b()\nelse:\n    c()\nd()", 4),
    ("for a in b:\n    if a:\n        break\n        c()\n    continue\n    e()\nraise f\ng()", 5),
    ("try:\n    a()\nexcept B:\n    c()\n    raise\n    d()\nfinally:\n    e()", 5),
    ("match a:\n    case 1:\n        b()\n    case _:\n        c()", 3),
    ("def f():\n    '''words'''\n    pass", 1), (WORKS, 3), ("if a:\n    b()\nelse:\n    c()", 3),
])
def test_only_different_statements_that_do_something_count(code, n):
    assert statements(code) == n
    assert does_something(code) == float(n >= 3)
    assert does_something(code, n) == 1.0 and does_something(code, n + 1) == 0.0


def test_pairs_are_all_of_one_question_with_different_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, 2.0], [0.0, 3.0, 0.0]])
    better, worse = pairs(rewards)
    expected = {(3 * q + i, 3 * q + j) for q in range(3) for i in range(3) for j in range(3)
                if rewards[q, i] > rewards[q, j]}
    found = set(zip(better.tolist(), worse.tolist(), strict=True))
    assert found == expected and len(better) == len(expected) == 5
    refused(lambda: pairs(torch.zeros(3)), "rewards: shape (3,)")

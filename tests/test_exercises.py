# SPDX-License-Identifier: MIT
"""Checks of exercises: right, wrong, and not attempted."""

import math

import pytest
import torch

from dsv2_ref.exercises import WrongAnswer, check, check_function, check_refuses


@pytest.mark.parametrize("answer, right", [
    (3, 3), (3.0, 3), (torch.tensor(3), 3), (0.3331, 1 / 3), (True, True), ("MLA", "MLA"),
    ([1, 2.0], [1, 2.0]), ((1, 2), [1, 2]), (torch.ones(2, 3), torch.ones(2, 3).double()),
    (0.0, 1e-12),
])
def test_right_answers(answer, right, capsys):
    check("1", answer, right, "no hint needed")
    assert capsys.readouterr().out == "1: right\n"


@pytest.mark.parametrize("answer, right, word", [
    (4, 3, "4 is not it"), (1, True, "1 is not it"), (True, 1, "True is not it"),
    (0.34, 1 / 3, "0.34"), (math.nan, 0.5, "nan"), ("MHA", "MLA", "'MHA'"), (None, 3, "None"),
    ([1], [1, 2], "list of 2"), ([1, 3], [1, 2], "item 1: 3"), (3, [3], "not a list"),
    (1.0, torch.ones(2), "not a tensor"), (torch.ones(3), torch.ones(2), "shape (3,)"),
    (torch.tensor([1, 2.0]), torch.ones(2), "1 of 2 numbers are off, the first at index 1: 2"),
    (torch.tensor([1, math.nan]), torch.ones(2), "1 of 2"),
])
def test_wrong_answers(answer, right, word):
    with pytest.raises(WrongAnswer) as caught:
        check("b", answer, right, "Look at (41).")
    message = str(caught.value)
    assert word in message and message.startswith("b: ") and message.endswith("Look at (41).")
    assert "\n" not in message


def test_functions_are_compared_case_by_case(capsys):
    cases = [(torch.arange(3.0), 2), (torch.arange(8.0), -1)]
    check_function("c", lambda x, n: x * n, lambda x, n: n * x, cases, "")
    check_function("d", lambda x, n: ..., lambda x, n: n * x, cases, "")
    assert capsys.readouterr().out == "c: right\nd: not attempted\n"
    with pytest.raises(WrongAnswer, match=r"shape \(8,\), -1: 7 of 8 .* Signs\."):
        check_function("e", lambda x, n: x * abs(n), lambda x, n: n * x, cases, "Signs.")


def test_a_checker_is_checked(capsys):
    def checker(answer):
        check("f", answer, 5, "")

    check("f", ..., 5, "")
    checker(5)
    check_refuses(checker, [4, "5", None])
    assert capsys.readouterr().out == "f: not attempted\nf: right\n"
    with pytest.raises(AssertionError, match="5 passed"):
        check_refuses(checker, [4, 5])
    with pytest.raises(AssertionError, match="passed"):
        check_refuses(checker, [...])

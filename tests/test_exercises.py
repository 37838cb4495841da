# SPDX-License-Identifier: MIT
"""Exercises: the checks themselves, then every exercise with right and wrong answers."""

import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv2_ref.exercises import Exercises, Function, Value, WrongAnswer

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NAMES = [file.stem[3:] for file in NOTEBOOKS]


@pytest.mark.parametrize("answer, right", [
    (3, 3), (3.0, 3), (torch.tensor(3), 3), (np.int64(3), 3), (0.3331, 1 / 3), (True, True),
    (torch.tensor(True), True), ("MLA", "MLA"), (" mla", "MLA"),
    ([1, 2.0], [1, 2.0]), ((1, 2), [1, 2]), (torch.tensor([1, 2]), [1, 2]),
    (torch.ones(2, 3), torch.ones(2, 3).double()),
    ([[1, 2], (3, 4)], torch.arange(1, 5.0).view(2, 2)), (np.ones(2), torch.ones(2)),
    (0.0, 1e-12), (7, lambda: 7),
])
def test_right_answers(answer, right, capsys):
    Exercises({1: Value(right, "")}).check(1, answer)
    assert capsys.readouterr().out == "1: right\n"


@pytest.mark.parametrize("answer, right, word", [
    (4, 3, "4 is too large"), (2.5, 3, "too small"), (1, True, "1 is not a truth"),
    (True, 1, "True is not a number"), (0.34, 1 / 3, "0.34 is too large"),
    (math.nan, 0.5, "nan is not it"), (math.inf, 0.5, "inf is not it"), ("MHA", "MLA", "'MHA' is"),
    (None, 3, "None is not a number"), ("3", 3, "'3' is not a number"),
    ([1], [1, 2], "list of 2"), ([1, 3], [1, 2], "item 1: 3"), (3, [3], "not a list"),
    (1.0, torch.ones(2), "shape ()"), ("no", torch.ones(2), "'no' is not a tensor"),
    (torch.ones(3), torch.ones(2), "shape (3,)"), (torch.ones(2), 1, "not one number"),
    (torch.tensor([1, 2.0]), torch.ones(2), "1 of 2 numbers are off, the first at index 1: 2"),
    (torch.tensor([1, math.nan]), torch.ones(2), "1 of 2"),
])
def test_a_wrong_answer_is_told_what_is_off_and_then_why(answer, right, word):
    exercises = Exercises({2: Value(right, "Look at (41).")})
    said = []
    for _ in range(3):
        with pytest.raises(WrongAnswer) as caught:
            exercises.check(2, answer)
        said.append(str(caught.value))
    assert all(word in text and text.startswith("2: ") and "\n" not in text for text in said)
    assert "(41)" not in said[0] and said[1] == said[2] and said[1].endswith("Look at (41).")


def test_a_mistake_often_made_is_told_by_its_name():
    exercises = Exercises({1: Value(3, "", known=[(4, "the row itself was counted")])})
    with pytest.raises(WrongAnswer, match="1: 4: the row itself was counted"):
        exercises.check(1, 4)


def test_functions_are_compared_case_by_case(capsys):
    cases = [(torch.arange(3.0), 2), (torch.arange(8.0), -1)]
    exercises = Exercises({number: Function(lambda x, n: n * x, cases, "Signs.")
                           for number in (1, 2, 3)})
    exercises.check(1, lambda x, n: x.mul_(n))                      # in place: its own copy
    exercises.check(2, lambda x, n: ...)
    assert capsys.readouterr().out == "1: right\n2: not attempted\n"
    with pytest.raises(WrongAnswer, match=r"shape \(8,\), -1: 7 of 8 .*tells more"):
        exercises.check(3, lambda x, n: x * abs(n))
    with pytest.raises(WrongAnswer, match=r"raises TypeError: .* Signs\."):
        exercises.check(3, lambda x: x)
    with pytest.raises(WrongAnswer, match="3 is not a function"):
        exercises.check(3, 3)


def test_a_further_condition():
    item = Function(lambda x: x, [(1,)], "", besides=lambda f: "right, but slow")
    with pytest.raises(WrongAnswer, match="1: right, but slow"):
        Exercises({1: item}).check(1, lambda x: x)


def test_the_report_says_how_each_stands(capsys):
    exercises = Exercises({n: Value(n, "") for n in (1, 2, 3)})
    exercises.check(1, 1)
    exercises.check(2, ...)
    with pytest.raises(WrongAnswer):
        exercises.check(3, 4)
    capsys.readouterr()
    exercises.report()
    assert capsys.readouterr().out == (
        "1: right\n2: not attempted\n3: not right yet\n1 of 3 right\n")
    with pytest.raises(ValueError, match="4: no such exercise"):
        exercises.check(4, 1)


def fresh(name: str) -> Exercises:
    """A notebook's exercises, none attempted."""
    return Exercises(importlib.import_module(f"dsv2_ref.exercises.{name}").exercises.items)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=NAMES)
def test_a_notebook_asks_each_of_its_exercises(file):
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    asked = [int(n) for n in re.findall(r"^exercises\.check\((\d+), ", code, re.M)]
    assert asked == sorted(fresh(file.stem[3:]).items)


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_pass_and_wrong_ones_do_not(name):
    answers = importlib.import_module(f"answers.{name}")
    exercises = fresh(name)
    assert sorted(exercises.items) == sorted(answers.RIGHT) == sorted(answers.WRONG)
    for number, item in exercises.items.items():
        assert len(answers.RIGHT[number]) >= 3 and len(answers.WRONG[number]) >= 5, number
        for answer in answers.RIGHT[number]:
            assert item.fault(answer) is None, (number, answer)
        for answer in answers.WRONG[number]:
            fault = item.fault(answer)
            assert isinstance(fault, str) and "\n" not in fault, (number, answer)
            if isinstance(item, Value) and type(item.right) in (int, float):     # is not told
                assert repr(item.right) not in fault.replace(repr(answer), ""), number

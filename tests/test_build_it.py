# SPDX-License-Identifier: MIT
"""The capstone's checks: parts, what is said of each mistake, and where it is seen."""

import pytest
import torch
from answers.build_it import CHANGED, RIGHT, TOLD, WRONG

from dsv2_ref.exercises import Exercises, WrongAnswer
from dsv2_ref.exercises.build_it import exercises
from dsv2_ref.exercises.stub import Stub, flat, tensor_differs


@pytest.mark.parametrize("number", exercises.items)
def test_what_is_said_names_the_mistake(number):
    item = exercises.items[number]
    assert len(WRONG[number]) >= 5
    for answer, words, (_, *changes) in zip(WRONG[number], TOLD[number], CHANGED[number],
                                            strict=True):
        assert words in (fault := str(item.fault(answer))), (changes, fault)


@pytest.mark.parametrize("number", exercises.items)
def test_every_known_mistake_is_told_by_its_name(number):
    """And the part without a mistake is right, but for keys where none may be made."""
    item = exercises.items[number]
    fault = item.fault(item.right)
    assert "as many as the keys" in fault if number == 7 else fault is None
    for wrong, meaning in item.known:
        assert meaning in str(item.fault(wrong)), wrong.keywords


@pytest.mark.parametrize("number", exercises.items)
def test_the_hints_do_not_hold_the_solution(number):
    """Of the second hint no line of code that the notebook's solution has."""
    item = exercises.items[number]
    for call in ("einsum", ".topk(", ".triu(", ".softmax(", ".flatten(", "torch.cat", "argmax("):
        assert call not in item.why + "".join(meaning for _, meaning in item.known)
    assert "notebook" in item.why


@pytest.mark.parametrize("number", exercises.items)
def test_stubs_are_not_attempted(number):
    assert exercises.items[number].fault(lambda *inputs: ...) is ...


def test_a_part_waits_for_those_that_it_calls(capsys):
    fresh = Exercises(exercises.items, exercises.needs)
    fresh.check(8, RIGHT[8][0])
    assert capsys.readouterr().out == "8: not attempted, it needs 4, 5, 6, 7 first\n"
    for number in (2, 4, 5, 6, 7, 8):
        fresh.check(number, RIGHT[number][0])
    assert capsys.readouterr().out.endswith("8: right\n")
    assert fresh.ready(8) and not fresh.ready(8, 9, 10)
    assert capsys.readouterr().out == "not attempted, it needs 9, 10 first\n"
    with pytest.raises(WrongAnswer):
        fresh.check(4, WRONG[4][0])
    assert not fresh.ready(8, 4)


def test_needs_are_earlier_parts():
    assert all(p < n for n, parts in exercises.needs.items() for p in parts)


NUMBERS = torch.arange(1, 25, dtype=torch.float64).view(2, 3, 4)


@pytest.mark.parametrize("change, words", [
    (lambda x: x[:1], "o has shape (1, 3, 4), expected (2, 3, 4): (sequence, token, number)"),
    (lambda x: x.float(), "o is float32, expected float64"), (lambda x: "x", "o is 'x', expected"),
    (lambda x: 3 * x, "o is 3 times what it should be, everywhere"),
    (lambda x: x * (1 + 1e-7 * torch.rand(x.shape)), "is computed in fp32"),
    (lambda x: x.index_fill(1, torch.tensor([2]), 0.0), "o is off only at token 2 (first: "),
    (lambda x: x.masked_fill(x == 6, 0.0),
     "only at sequence 0 and token 1 and number 1 (first: sequence 0, token 1, number 1)"),
    (lambda x: x.masked_fill(x == 6, torch.nan), "o is NaN only at sequence 0"),
    (lambda x: x.square(), "o is off"), (lambda x: 0 * x, "o is off (first: sequence 0"),
])
def test_where_a_tensor_differs(change, words):
    assert words in tensor_differs("o: sequence token number", change(NUMBERS), NUMBERS, 1e-9)
    assert tensor_differs("o: sequence token number", NUMBERS + 1e-13, NUMBERS, 1e-9) is None


def test_whole_numbers_are_wanted():
    assert tensor_differs("i: slot", torch.ones(2), torch.tensor([1, 1]), 0) == (
        "i is float32, expected whole numbers")


def test_other_faults_of_a_part():
    item = Stub(lambda x: (x, -x), [(NUMBERS,)], "", gives=["a: i j k", "b: i j k"])
    for answer, words in ((3, "3 is not a function"),
                          (lambda x: None, "gives None, as if a return were missing"),
                          (lambda x: x, "gives 1 tensor(s), expected 2: a, b"),
                          (lambda: 0, "it raises TypeError: "),
                          (lambda x: x[9], "(called with x (2, 3, 4))"),
                          (lambda x: (x, x), "b is -1 times")):
        assert words in item.fault(answer)
    assert item.fault(lambda x: [x, -x]) is None
    assert "writes into x" in item.fault(lambda x: [x.clone(), x.neg_()])
    assert flat((1, [2, (3,)])) == [1, 2, 3]


def test_a_part_that_writes_into_what_it_is_given_is_refused():
    def rotate(x, cos, sin):
        x.copy_(RIGHT[2][0](x.clone(), cos, sin))
        return x

    assert "it writes into x; give a new tensor instead" in exercises.items[2].fault(rotate)


def test_the_first_call_of_a_model_has_caches_too():
    assert "missing 1 required positional argument: 'caches'" in exercises.items[14].fault(
        lambda model, tokens, n: model(tokens))

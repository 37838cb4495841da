# SPDX-License-Identifier: MIT
"""Checks of a notebook's exercises, "predict, then run".

An answer that is left as `...` is reported as not attempted, so that an untouched notebook runs to
its end; a wrong one raises `WrongAnswer`, whose one line says where it is off and what to look at.

Answers may be numbers, booleans, texts, tensors, lists of these, or functions. A function is
compared with an executable specification, case by case; one that returns `...` is a stub.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class WrongAnswer(ValueError):
    """An exercise was answered, and not rightly."""


def check(name: str, answer: Any, right: Any, hint: str, tolerance: float = 0.005) -> None:
    """Report `answer`: not attempted, or right; raise WrongAnswer with the hint if it is wrong.

    Floats and tensors may be off by `tolerance` of the right value (or, near 0, by 1e-9).
    """
    if answer is ...:
        print(f"{name}: not attempted")
        return
    if fault := _fault(answer, right, tolerance):
        raise WrongAnswer(f"{name}: {fault}. {hint}")
    print(f"{name}: right")


def check_function(
    name: str, function: Callable[..., Any], specification: Callable[..., Any],
    cases: Sequence[tuple], hint: str, tolerance: float = 1e-6,
) -> None:
    """Compare `function` with `specification` on each case, a tuple of arguments."""
    for case in cases:
        answer = function(*case)
        if answer is ...:
            print(f"{name}: not attempted")
            return
        if fault := _fault(answer, specification(*case), tolerance):
            given = ", ".join(_short(value) for value in case)
            raise WrongAnswer(f"{name}: called with {given}: {fault}. {hint}")
    print(f"{name}: right")


def check_refuses(checker: Callable[[Any], None], wrong: Sequence[Any]) -> None:
    """A checker must raise WrongAnswer for each of these; AssertionError if it lets one pass."""
    for answer in wrong:
        try:
            checker(answer)
        except WrongAnswer:
            continue
        raise AssertionError(f"{_short(answer)} passed as right")


def _fault(answer: Any, right: Any, tolerance: float) -> str | None:
    """What is wrong with the answer, or None."""
    if isinstance(right, Tensor):
        return _tensor_fault(answer, right, tolerance)
    if isinstance(right, list | tuple) and not isinstance(answer, Tensor):
        if not isinstance(answer, list | tuple) or len(answer) != len(right):
            return f"{_short(answer)} is not a list of {len(right)}"
        faults = (_fault(a, r, tolerance) for a, r in zip(answer, right, strict=True))
        return next((f"item {i}: {f}" for i, f in enumerate(faults) if f), None)
    if isinstance(answer, Tensor) and answer.numel() == 1:
        answer = answer.item()
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (answer, right))
    if numbers and isinstance(right, float):
        same = math.isclose(answer, right, rel_tol=tolerance, abs_tol=1e-9)
    else:
        same = (numbers or type(answer) is type(right)) and answer == right
    return None if same else f"{_short(answer)} is not it"


def _tensor_fault(answer: Any, right: Tensor, tolerance: float) -> str | None:
    if not isinstance(answer, Tensor):
        return f"{_short(answer)} is not a tensor"
    if answer.shape != right.shape:
        return f"shape {tuple(answer.shape)} is not {tuple(right.shape)}"
    error = (answer.double() - right.double()).abs()
    bad = ~(error <= tolerance * right.double().abs() + 1e-9)        # ~: NaN is bad, too
    if not bad.any():
        return None
    first = tuple(bad.nonzero()[0].tolist())
    return (f"{int(bad.sum())} of {right.numel()} numbers are off, the first at index "
            f"{', '.join(map(str, first))}: {answer[first].item():.4g}")


def _short(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, Tensor) and value.numel() > 4:
        return f"a tensor of shape {tuple(value.shape)}"
    text = str(value.tolist()) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

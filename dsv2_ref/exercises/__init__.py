# SPDX-License-Identifier: MIT
"""Exercises of the notebooks, "predict, then run", and what checks them.

  tour              of notebook 00
  attention         of notebook 01
  mla               of notebook 02
  rope              of notebook 03
  absorption        of notebook 04
  cache             of notebook 05
  moe               of notebook 06
  routing           of notebook 07
  balance           of notebook 08
  dropping          of notebook 09
  model             of notebook 10
  six_bits          of notebook 11
  fp8_weights       of notebook 12
  kernels           of notebook 13
  pretraining       of notebook 14
  surviving         of notebook 23
  memory            of notebook 24
  lite_on_a_gpu     of notebook 15
  expert_parallel   of notebook 16
  pipelines         of notebook 17
  yarn_and_needles  of notebook 18
  grpo              of notebook 20
  serving           of notebook 21
  build_it          of notebook 30, the capstone: parts of a model, from stubs
  stub              a part that is built: which token is off, which mistake that looks like
  given             what is given to the parts when they are checked
  parts             the parts, each also with mistakes that are often made
  student           the notebooks copied without their answers

A file is named as its notebook and holds `exercises = Exercises({1: …, 2: …})`, each a `Value` or
a `Function`. The notebook asks, and calls `exercises.check(1, answer)`.

An answer that is left as `...` is reported as not attempted, so that an untouched notebook runs to
its end. A wrong one raises `WrongAnswer` in one line: at first it says what is off; run again, it
says why, too. `exercises.report()` ends the notebook and says how each stands.

Any right form is right: 3, 3.0 and torch.tensor(3); a list, a tuple and a tensor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class WrongAnswer(ValueError):
    """An exercise was answered, and not rightly."""


@dataclass(frozen=True)
class Value:
    """An exercise whose answer is a number, a truth, a text, a tensor, or a list of these.

    right: the answer, or a function without arguments that works it out.
    why: what to look at, told from the second wrong answer on.
    tolerance: how far a float may be off, in parts of the right one (near 0: 1e-9).
    known: (a mistake often made, what it means); told at once in place of "too large".
    """

    right: Any
    why: str
    tolerance: float = 0.005
    known: Sequence[tuple[Any, str]] = ()

    def fault(self, answer: Any) -> str | None:
        """What is off, or None."""
        right = self.right() if callable(self.right) else self.right
        found = _fault(answer, right, self.tolerance)
        if found is None:
            return None
        return next((f"{_short(answer)}: {meaning}" for mistake, meaning in self.known
                     if _fault(answer, mistake, self.tolerance) is None), found)


@dataclass(frozen=True)
class Function:
    """An exercise whose answer is a function; one that returns `...` was not attempted.

    right: the specification, called with the same arguments.
    cases: tuples of arguments, or a function without arguments that makes them.
    besides: a further condition, function -> what is off or None, looked at when all cases hold.
    """

    right: Callable[..., Any]
    cases: Sequence[tuple] | Callable[[], Sequence[tuple]]
    why: str
    tolerance: float = 1e-6
    besides: Callable[[Callable[..., Any]], str | None] = field(default=lambda function: None)

    def fault(self, answer: Any) -> Any:
        """What is off, or None; `...` if the function is a stub."""
        if not callable(answer):
            return f"{_short(answer)} is not a function"
        for case in self.cases() if callable(self.cases) else self.cases:
            given = ", ".join(_short(value) for value in case)
            try:
                told = answer(*_copied(case))
            except Exception as error:
                return f"called with {given} it raises {type(error).__name__}: {error}"
            if told is ...:
                return ...
            if found := _fault(told, self.right(*_copied(case)), self.tolerance):
                return f"called with {given}: {found}"
        return self.besides(answer)


class Exercises:
    """The exercises of one notebook, by number, and how each stands.

    needs: number -> the exercises that its answer calls; it is looked at when these are right.
    """

    def __init__(self, items: Mapping[int, Value | Function],
                 needs: Mapping[int, Sequence[int]] | None = None) -> None:
        self.items, self.needs = dict(items), dict(needs or {})
        self._wrong = dict.fromkeys(self.items, 0)
        self._last = dict.fromkeys(self.items, "not attempted")

    def check(self, number: int, answer: Any) -> None:
        """Print "not attempted" or "right", or raise WrongAnswer: what is off, later also why."""
        if number not in self.items:
            raise ValueError(f"{number}: no such exercise, expected one of {list(self.items)}")
        if missing := self._missing(self.needs.get(number, ())):
            self._last[number] = "not attempted"
            print(f"{number}: not attempted, it needs {missing} first")
            return
        item = self.items[number]
        found = ... if answer is ... else item.fault(answer)
        if found is ... or found is None:
            self._last[number] = "not attempted" if found is ... else "right"
            print(f"{number}: {self._last[number]}")
            return
        self._last[number] = "not right yet"
        self._wrong[number] += 1
        more = item.why if self._wrong[number] > 1 else "Think again; the next try tells more."
        raise WrongAnswer(f"{number}: {found}. {more}")

    def ready(self, *numbers: int) -> bool:
        """Whether these exercises are right; if not, "not attempted" is printed.

        For a cell that uses what they built, so that it does not stop a run without them.
        """
        if missing := self._missing(numbers):
            print(f"not attempted, it needs {missing} first")
        return not missing

    def _missing(self, numbers: Sequence[int]) -> str:
        return ", ".join(str(n) for n in numbers if self._last[n] != "right")

    def report(self) -> None:
        """Print how each exercise stands after its last check."""
        for number, standing in self._last.items():
            print(f"{number}: {standing}")
        done = sum(standing == "right" for standing in self._last.values())
        print(f"{done} of {len(self.items)} right")


def _copied(case: tuple) -> tuple:
    """Arguments of one call, so that a function that writes into its own harms nobody."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in case)


def _fault(answer: Any, right: Any, tolerance: float) -> str | None:
    """What is off, without saying what is right; None if nothing is."""
    if isinstance(right, Tensor):
        return _tensor_fault(answer, right, tolerance)
    if isinstance(right, list | tuple):
        if hasattr(answer, "tolist"):
            answer = answer.tolist()
        if not isinstance(answer, list | tuple) or len(answer) != len(right):
            return f"{_short(answer)} is not a list of {len(right)}"
        faults = (_fault(a, r, tolerance) for a, r in zip(answer, right, strict=True))
        return next((f"item {i}: {f}" for i, f in enumerate(faults) if f), None)
    if hasattr(answer, "item") and getattr(answer, "size", 1) != 0:
        try:
            answer = answer.item()                  # a tensor or array of one number
        except (RuntimeError, ValueError):
            return f"{_short(answer)} is not one {_kind(right)}"
    if _kind(answer) != _kind(right):
        return f"{_short(answer)} is not a {_kind(right)}"
    if isinstance(right, str):
        return None if answer.strip().lower() == right.lower() else f"{_short(answer)} is not it"
    if isinstance(right, float):
        same = math.isclose(answer, right, rel_tol=tolerance, abs_tol=1e-9)
    else:
        same = answer == right
    if same:
        return None
    if isinstance(right, int | float) and not isinstance(right, bool) and math.isfinite(answer):
        return f"{_short(answer)} is too {'large' if answer > right else 'small'}"
    return f"{_short(answer)} is not it"


def _kind(value: Any) -> str:
    """The word for what a plain value is: True is no number."""
    kinds = {bool: "truth (True or False)", int: "number", float: "number", str: "text"}
    return next((word for kind, word in kinds.items() if isinstance(value, kind)),
                type(value).__name__)


def _tensor_fault(answer: Any, right: Tensor, tolerance: float) -> str | None:
    if not isinstance(answer, Tensor):
        try:
            answer = torch.as_tensor(answer)        # a list, a tuple, an array
        except (TypeError, ValueError, RuntimeError):
            return f"{_short(answer)} is not a tensor"
    if answer.shape != right.shape:
        return f"shape {tuple(answer.shape)} is not {tuple(right.shape)}"
    error = (answer.double() - right.double()).abs()
    bad = ~(error <= tolerance * right.double().abs() + 1e-9)        # ~: NaN is bad, too
    if not bad.any():
        return None
    first = tuple(bad.nonzero()[0].tolist())
    where = f" at index {', '.join(map(str, first))}" if first else ""
    return (f"{int(bad.sum())} of {right.numel()} numbers are off, the first{where}: "
            f"{answer[first].item():.4g}")


def _short(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, Tensor) and value.numel() > 4:
        return f"a tensor of shape {tuple(value.shape)}"
    text = str(value.tolist()) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

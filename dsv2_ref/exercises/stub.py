# SPDX-License-Identifier: MIT
"""What checks a part of a model that is built from a stub.

Beside right and wrong it says where (which output, which tokens, which heads) and, where it can,
what: the result is compared with those of mistakes that are often made.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv2_ref.exercises import Function, _short


@dataclass(frozen=True)
class Stub(Function):
    """An exercise whose answer is a function that gives a tensor, or a tuple of tensors.

    gives: for each of them its name and its axes, "q_c: sequence token head number".
    known: (the function with a mistake, what is said of it); the first that gives the same is told.
    seen: result -> the form in which results are compared.
    """

    tolerance: float = 1e-9
    gives: Sequence[str] = ()
    known: Sequence[tuple[Callable[..., Any], str]] = ()
    seen: Callable[[Any], Any] = field(default=lambda result: result)

    def fault(self, answer: Any) -> Any:
        """What is off, or None; `...` if the function is a stub."""
        if not callable(answer):
            return f"{_short(answer)} is not a function"
        for case in self.cases() if callable(self.cases) else self.cases:
            called = f"(called with {self._arguments(case)})"
            given = copy.deepcopy(case)
            try:
                told = answer(*given)
            except Exception as error:
                words = " ".join(str(error).split()).rstrip(".")
                return f"it raises {type(error).__name__}: {words} {called}"
            if told is ...:
                return ...
            if told is None:
                return f"it gives None, as if a return were missing {called}"
            names = inspect.signature(self.right).parameters
            changed = [name for name, value, before in zip(names, given, case)
                       if isinstance(value, Tensor) and not torch.equal(value, before)]
            if changed:
                return f"it writes into {changed[0]}; give a new tensor instead {called}"
            right = self._flat(self.right(*copy.deepcopy(case)))
            if found := self._differs(self._flat(told), right):
                return f"{self._named(told, case) or found} {called}"
        return self.besides(answer)

    def _arguments(self, case: tuple) -> str:
        """The names of the arguments, with shapes."""
        names = inspect.signature(self.right).parameters
        return ", ".join(
            f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else
            f"{name} {value!r}" if isinstance(value, int | float) else
            f"no {name}" if value is None else name
            for name, value in zip(names, case))

    def _flat(self, result: Any) -> list[Any]:
        try:
            return flat(self.seen(result))
        except Exception:                           # of a form that cannot be seen so
            return flat(result)

    def _named(self, told: Any, case: tuple) -> str | None:
        """What is said of the mistake that gives the same."""
        told = self._flat(told)
        for wrong, meaning in self.known:
            try:
                same = self._flat(wrong(*copy.deepcopy(case)))
            except Exception:                       # a mistake that this case does not allow
                continue
            if len(same) == len(told) and all(map(_equal, told, same)):
                return meaning
        return None

    def _differs(self, told: list[Any], right: list[Tensor]) -> str | None:
        if len(told) != len(right):
            names = ", ".join(line.partition(":")[0] for line in self.gives)
            return f"it gives {len(told)} tensor(s), expected {len(right)}: {names}"
        return next((found for line, t, r in zip(self.gives, told, right, strict=True)
                     if (found := tensor_differs(line, t, r, self.tolerance))), None)


def flat(result: Any) -> list[Any]:
    """A tensor, or tensors in tuples and lists, as one list."""
    if isinstance(result, tuple | list):
        return [tensor for part in result for tensor in flat(part)]
    return [result]


def tensor_differs(line: str, told: Any, right: Tensor, tolerance: float) -> str | None:
    """What differs and where, or None. line: a name and its axes."""
    name, _, words = line.partition(":")
    axes = words.split()
    if not isinstance(told, Tensor):
        return f"{name} is {_short(told)}, expected a tensor"
    if told.shape != right.shape:
        return (f"{name} has shape {tuple(told.shape)}, expected {tuple(right.shape)}: "
                f"({', '.join(axes)})")
    if told.is_floating_point() and not right.is_floating_point():
        return f"{name} is {str(told.dtype)[6:]}, expected whole numbers"
    if right.is_floating_point() and told.dtype != right.dtype:
        return f"{name} is {str(told.dtype)[6:]}, expected {str(right.dtype)[6:]}"
    if right.dtype == torch.float32:
        tolerance = 1e-5
    told, right = told.double(), right.double()
    error, size = (told - right).abs(), right.abs()
    bad = ~(error <= tolerance * (size + size.amax()))               # ~: NaN is bad, too
    if not bad.any():
        return None
    if told.isnan().any():
        return f"{name} is NaN {_where(told.isnan(), axes)}"
    if (error <= 1e-5 * size.amax()).all():
        return (f"{name} is right to {(error.max() / size.amax()).item():.0e} only: something "
                "is computed in fp32")
    large = size > 1e-3 * size.amax()
    ratio = told[large] / right[large]
    if (ratio - ratio[0]).abs().max() < 1e-6 * ratio[0].abs() and not ratio[0].abs() < 1e-9:
        return f"{name} is {ratio[0].item():.4g} times what it should be, everywhere"
    return f"{name} is off {_where(bad, axes)}"


def _where(bad: Tensor, axes: Sequence[str]) -> str:
    """Which part of a tensor: the indices of each axis that has good ones, too; the first."""
    parts = []
    for i, axis in enumerate(axes):
        others = [j for j in range(bad.ndim) if j != i]
        off = bad.any(others) if others else bad
        if not off.all():
            parts.append(f"{axis} {', '.join(map(str, off.nonzero()[:, 0].tolist()[:6]))}")
    first = ", ".join(f"{a} {i}" for a, i in zip(axes, bad.nonzero()[0].tolist()))
    return f"only at {' and '.join(parts)} (first: {first})" if parts else f"(first: {first})"


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    near = 1e-5 if a.dtype == torch.float32 else 1e-9
    return torch.allclose(a.double(), b.double(), near, near, equal_nan=True)

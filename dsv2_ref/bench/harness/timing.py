# SPDX-License-Identifier: MIT
"""Timing two things in one process, in turns, so that both see the same state of the machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4        # of the largest output

Step = Callable[[], object]


class Disagreement(RuntimeError):
    """Two sides that should compute the same do not: nothing is timed."""


def agree(a: Tensor, b: Tensor, what: str) -> float:
    difference = ((a - b).abs().max() / b.abs().max()).item()
    if not difference < TOLERANCE:
        raise Disagreement(f"{what}: outputs differ by {difference:.1e} of the largest, expected "
                           f"less than {TOLERANCE:.0e}")
    return difference


def times(step: Step, n: int) -> list[float]:
    times = []
    for _ in range(n):
        start = time.perf_counter()
        step()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def in_turns(
    a: Step, b: Step, n: int, rewind: Callable[[], None], turn: int = 4
) -> tuple[list[float], list[float]]:
    """At least n times of each, `turn` steps of one and then of the other, warmed up."""
    times_a, times_b = [], []
    times(a, 1), times(b, 1)
    rewind()
    while len(times_a) < n:
        times_a += times(a, turn)
        times_b += times(b, turn)
        rewind()
    return times_a, times_b


def result(pair: tuple[list[float], list[float]], tokens: int) -> dict[str, Any]:
    """Rates, and how often ours is faster: the median of single steps of each side.

    The other side may have no times; its rate and the ratio are then None.
    """
    ours, theirs = (statistics.median(times) if times else None for times in pair)
    return {
        "steps": len(pair[0]), "ours_tokens_per_s": tokens / ours,
        "theirs_tokens_per_s": theirs and tokens / theirs, "ours_ms": ours * 1e3,
        "theirs_ms": theirs and theirs * 1e3, "ratio": theirs and theirs / ours,
    }


def milliseconds(tried: dict[str, float]) -> dict[str, float]:
    return {name: seconds * 1e3 for name, seconds in tried.items()}


def matmul_rate(device: torch.device | str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matmul of random numbers, here and now: what MFU is a share of."""
    g = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=g, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(times(lambda: a @ b, 12)[2:])


def read_rate(size: int) -> float:
    """Bytes/s at which a CPU reads a square matrix once, to multiply a vector by it."""
    a, x = torch.randn(size, size), torch.randn(size)
    return 4 * size**2 / statistics.median(times(lambda: torch.mv(a, x), 7)[2:])

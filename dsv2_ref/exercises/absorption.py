# SPDX-License-Identifier: MIT
"""Exercises of 04_absorption."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref.exercises import Exercises, Function, Value


def scores(q: Tensor, c: Tensor, W_UK: Tensor) -> Tensor:
    """q (n_h, d_h), c (S, d_c), W_UK (n_h, d_h, d_c) -> (n_h, S)."""
    return torch.einsum("hd,hdc,sc->hs", q, W_UK, c)


def cases() -> list[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(size, generator=g, dtype=torch.float64)
                  for size in ((n_h, d_h), (S, d_c), (n_h, d_h, d_c)))
            for n_h, d_h, d_c, S in ((2, 3, 4, 5), (8, 16, 64, 300))]


class _Multiplied(torch.overrides.TorchFunctionMode):
    """The numbers of the largest tensor that any call returns."""

    largest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def no_keys(function: Callable[..., Tensor]) -> str | None:
    """Keys of all heads are S * n_h * d_h numbers, larger than anything that is needed."""
    for q, c, W_UK in cases()[1:]:
        (n_h, d_h), (S, d_c) = q.shape, c.shape
        most = 2 * n_h * d_c * (d_h + S)
        with FlopCounterMode(display=False) as counter, _Multiplied() as multiplied:
            function(q, c, W_UK)
        if counter.get_total_flops() > most:
            return (f"right scores, but {counter.get_total_flops():,} FLOPs where {most:,} are "
                    "enough")
        if multiplied.largest >= S * n_h * d_h:
            return (f"right scores, but a tensor of {multiplied.largest:,} numbers is made on the "
                    "way, as many as all keys")
    return None


exercises = Exercises({
    1: Function(scores, cases, "The score of head h on token s is the query of h times W_UK[h] "
                "times latent s. Carry the query to the latent first.", besides=no_keys),
    2: Value(384, "Set d_cq * d_c = d_h * (d_cq + d_c) and solve for d_h."),
    3: Value(170, "d_c (d_h + d_v) / (2 d_c - d_h - d_v), and the last whole T below.",
             known=[(171, "this T is just past the point, where absorbed costs more")]),
    4: Value(True, "Which sizes stand in the inequality of section 6? Compare V2 and LITE in "
             "those."),
})

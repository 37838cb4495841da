# SPDX-License-Identifier: MIT
"""Exercises of 04_absorption."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv2_ref.attention.mla import absorbed_is_cheaper
from dsv2_ref.config import V2, Config
from dsv2_ref.exercises import Exercises, Function, Value

aten = torch.ops.aten


def scores(q: Tensor, c: Tensor, W_UK: Tensor) -> Tensor:
    """q (n_h, d_h), c (S, d_c), W_UK (n_h, d_h, d_c) -> (n_h, S)."""
    return torch.einsum("hd,hdc,sc->hs", q, W_UK, c)


def cases() -> list[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(size, generator=g, dtype=torch.float64)
                  for size in ((n_h, d_h), (S, d_c), (n_h, d_h, d_c)))
            for n_h, d_h, d_c, S in ((2, 3, 4, 5), (4, 16, 32, 60))]


def _of_each(*_, out_shape: torch.Size, **__) -> int:
    return 2 * out_shape.numel()


def _of_rows(matrix: torch.Size, *_, **__) -> int:
    return 2 * matrix.numel()


# what FlopCounterMode leaves out: a * b, matrix @ vector, vector @ vector
MORE = {aten.mul: _of_each, aten.mul_: _of_each, aten.mv: _of_rows, aten.dot: _of_rows}


def no_keys(function: Callable[..., Tensor]) -> str | None:
    """Without keys it is 2 n_h d_c (d_h + S) FLOPs; the keys alone are 2 n_h d_c d_h S."""
    q, c, W_UK = cases()[-1]
    (n_h, d_h), (S, d_c) = q.shape, c.shape
    enough = 2 * n_h * d_c * (d_h + S)
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        function(q, c, W_UK)
    counted = counter.get_total_flops()
    if counted == 0:
        return "right scores, but no product of torch's was seen: use @, * or einsum"
    if counted > 2 * enough:
        return (f"right scores, but {counted:,} FLOPs where {enough:,} are enough: keys of all "
                "tokens are made on the way")
    return None


def largest_T(c: Config, S: int) -> int:
    """Up to how many new tokens absorbed multiplies less."""
    return max(T for T in range(1, 1000)
               if absorbed_is_cheaper(T, S, c.d_h, c.d_r, c.d_v, c.d_c))


def moved() -> list[bool]:
    """Whether another size moves the change-over: n_h, d, d_cq, d_c, d_r."""
    changes = ({"n_h": 16}, {"d": 2048}, {"d_cq": None}, {"d_c": 256}, {"d_r": 128})
    return [largest_T(V2.with_(**change), 4096) != largest_T(V2, 4096) for change in changes]


exercises = Exercises({
    1: Function(scores, cases, "The score of head h on token s is the query of h times W_UK[h] "
                "times latent s. Carry the query to the latent first. (An einsum of three "
                "operands begins with the two on the left, unless opt_einsum is installed.)",
                besides=no_keys),
    2: Value(V2.d_cq * V2.d_c // (V2.d_cq + V2.d_c),
             "Set d_cq * d_c = d_h * (d_cq + d_c) and solve for d_h."),
    3: Value(largest_T(V2, 10**9),
             "d_c (d_h + d_v) / (2 d_c - d_h - d_v), and the last whole T below.",
             known=[(171, "this T is just past the point, where absorbed costs more"),
                    (V2.d_c * (V2.d_h + V2.d_v) / (2 * V2.d_c - V2.d_h - V2.d_v),
                     "this is where both cost the same; asked is the last whole number below"),
                    (186, "this is with padded values; the module counts without")]),
    4: Value(moved, "Look for each size in the inequality of section 6. What stands in both rows "
             "of the table, and as often, falls out.",
             known=[([False, False, False, True, True],
                     "one item is off: how often does d_r stand in a pair of either form?"),
                    ([True, False, False, True, False],
                     "one item is off: both sides of the inequality are counted for one head")]),
})

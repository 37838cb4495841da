# SPDX-License-Identifier: MIT
"""Exercises of 11_six_bits."""

import torch
from torch import Tensor

from dsv2_ref.attention.cache_quant import SixBitCache
from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value

CODES = (6 * V2.d_c + 6 * V2.d_r) // 8              # bytes of a row's codes
D = V2.d_c + V2.d_r


def with_wide_scales() -> int:
    """Bytes of one token of V2 whose rows have two scales of 8 bytes."""
    assert SixBitCache(1, 1, 1, V2.d_c, V2.d_r).nbytes_per_token == CODES + 2 * 2
    return V2.n_layers * (CODES + 2 * 8)


def row_scale(x: Tensor) -> Tensor:
    """(..., n) -> (..., 1)."""
    return x.abs().amax(-1, keepdim=True) / 31.5


def rows() -> list[tuple[Tensor]]:
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(4))
    return [(x[0],), (7 * x,), (-x[1].abs(),)]


def folded(W_UK: Tensor, gain: Tensor, R: Tensor) -> Tensor:
    """W_UK (n, d_c), gain (d_c,), R (d_c, d_c) -> (n, d_c), for a latent turned by R."""
    return W_UK @ (gain[:, None] * R.T)


def weights() -> list[tuple[Tensor, ...]]:
    """Rotations that are not symmetric, so that R and its inverse differ."""
    g = torch.Generator().manual_seed(5)
    made = []
    for n, d_c in ((3, 2), (5, 8)):
        W, gain = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((n, d_c), d_c))
        R = torch.linalg.qr(torch.randn(d_c, d_c, generator=g, dtype=torch.float64))[0]
        made.append((W, gain.abs() + 0.1, R))
    return made


exercises = Exercises({
    1: Value(with_wide_scales, "A row is 432 bytes of codes, and then its two scales. How many "
             "rows does one token have?",
             known=[(V2.n_layers * 436, "that is with scales of 2 bytes"),
                    (CODES + 2 * 8, "that is one row, and each layer keeps one"),
                    (V2.n_layers * (CODES + 8), "a row has two scales")]),
    2: Value(lambda: (6 * V2.d_c + 8 * V2.d_r + 32) / D, "Add up bits: latent codes, RoPE codes, "
             "scales. Then divide by the numbers of a row.", tolerance=0.001,
             known=[((6 * D + 32) / D, "that is with six bits for the RoPE key, too"),
                    ((6 * V2.d_c + 8 * V2.d_r) / D, "the scales take bits as well"),
                    (7, "there are eight times as many latents as RoPE numbers"),
                    (6 * V2.d_c + 8 * V2.d_r + 32, "that is the whole row in bits")]),
    3: Value(1, "Section 5: how far apart are two neighbouring codes of this latent, and how "
             "far from the nearer one can a number between them be?",
             known=[(0.5, "that is a latent that keeps its six bits"),
                    (2, "that is the distance of two codes; a number is rounded to the nearer")]),
    4: Function(row_scale, rows, "Section 2: in every row the number with the largest magnitude "
                "lies half a step beyond code 31."),
    5: Function(folded, weights, "Section 8: the cached latent is R times the norm's result. "
                "Undo R, apply the gain, then W_UK; as matrices this reads from right to left."),
})

# SPDX-License-Identifier: MIT
"""Exercises of 13_kernels."""

import math

from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.figures.kernels import tile_kinds

MEMORY, MATRIX = 4.8e12, 989e12                     # bytes, operations per second: H200
FLOPS = 2 * (2 * V2.d_c + V2.d_r)                   # per cached token and head
BF16, SIX_BITS = 2 * (V2.d_c + V2.d_r), 436         # bytes per row
TOKENS = 2**17

Piece = tuple[float, float, float]
NOTHING = (-math.inf, 0.0, 0.0)


def merge(a: Piece, b: Piece) -> list[float]:
    """m, l, a of the keys of both pieces together."""
    m = max(a[0], b[0])
    x, y = (0.0 if p[0] == -math.inf else 2.0 ** (p[0] - m) for p in (a, b))
    return [m, x * a[1] + y * b[1], x * a[2] + y * b[2]]


PIECES = [
    ((3.0, 1.875, 10.0), (4.0, 1.875, 4.0)), ((4.0, 1.875, 4.0), (3.0, 1.875, 10.0)),
    ((2.0, 1.25, 3.0), (2.0, 1.5, -1.0)), ((900.0, 1.5, 2.0), (-900.0, 1.0, 7.0)),
    (NOTHING, (2.0, 1.25, 3.0)), ((2.0, 1.25, 3.0), NOTHING), ((-5.0, 1.0, 2.0), NOTHING),
    (NOTHING, NOTHING),
]

exercises = Exercises({
    1: Function(merge, PIECES, "Shrink each piece by 2 to the power of (its m minus the larger "
                "m). A piece that has seen nothing adds nothing, so its factor is 0."),
    2: Value(lambda: int((tile_kinds(1024, 1024, 128, 64) == "skipped").sum()),
             "Row i of tiles, from 0 on, has queries up to 128·(i + 1) - 1. How many tiles of 64 "
             "keys begin at or before this one?",
             known=[(72, "those are the tiles that are computed"),
                    (64, "half of all; but tiles on the diagonal are computed"),
                    (28, "tiles of 128 keys; here they have 64")]),
    3: Value(TOKENS * BF16 / MEMORY * 1e6, "All rows are read once: bytes of all rows over bytes "
             "per second, then in microseconds. Is reading slower than multiplying?",
             tolerance=0.01,
             known=[(TOKENS * 16 * FLOPS / MATRIX * 1e6, "that is multiplying alone"),
                    (TOKENS * SIX_BITS / MEMORY * 1e6, "that is with six bits"),
                    (16 * TOKENS * BF16 / MEMORY * 1e6, "all heads share the bytes of a row"),
                    (TOKENS * BF16 / MEMORY * 1e3, "that is in milliseconds")]),
    4: Value(MATRIX / MEMORY * SIX_BITS / FLOPS, "At this number of heads, operations per byte of "
             "a 436-byte row are those of the ridge.", tolerance=0.015,
             known=[(MATRIX / MEMORY * BF16 / FLOPS, "that is with rows in bf16"),
                    (MATRIX / MEMORY, "that is the ridge itself, in operations per byte")]),
})

# SPDX-License-Identifier: MIT
"""Exercises of 12_fp8_weights."""

import math

import torch
from torch import Tensor

from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.kernels.fp8 import LARGEST, quantise, scale_shape


def scales_of_kv_a() -> int:
    return math.prod(scale_shape((V2.d_c + V2.d_r, V2.d)))


def smallest() -> float:
    """The smallest positive code, of which the scale is 1."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return codes[codes > 0].min().item()


def expert_bytes() -> int:
    shapes = [(V2.expert_width, V2.d)] * 2 + [(V2.d, V2.expert_width)]
    return sum(math.prod(shape) + 4 * math.prod(scale_shape(shape)) for shape in shapes)


def block_scale(w: Tensor) -> float:
    """One block (r, c) -> its scale."""
    return quantise(w)[1].item()


def blocks() -> list[tuple[Tensor]]:
    g = torch.Generator().manual_seed(9)
    few, many = (torch.randn(size, generator=g) for size in ((2, 3), (128, 128)))
    return [(few,), (-4 * many,), (-few.abs(),), (many[:44, :72] / 1000,)]


exercises = Exercises({
    1: Value(scales_of_kv_a, "Blocks are counted up: 576 rows are 4 whole blocks of 128 and a half "
             "one, which needs a scale as well.",
             known=[(160, "the last 64 rows need scales, too"),
                    (180, "there is no half scale"),
                    (576 * 40, "that is one scale for each row of 128 numbers")]),
    2: Value(smallest, "First the scale: 448 over 448. Then which positive code is the smallest? "
             "Look at the subnormal ones.",
             known=[(2.0**-6, "that is the smallest normal number; there are smaller codes"),
                    (2.0**-10, "that is the half step, where numbers begin to become 0"),
                    (2.0**-9 / LARGEST, "the scale is not 1/448 here")]),
    3: Value(expert_bytes, "One byte for each code, and 4 bytes for the scale of each block, three "
             "times.", tolerance=0,
             known=[(3 * 1536 * 5120, "scales take bytes as well"),
                    (2 * 3 * 1536 * 5120, "that is bf16"),
                    (3 * (1536 * 5120 + 12 * 40), "a scale takes 4 bytes")]),
    4: Function(block_scale, blocks, "Section 2: the number with the largest magnitude becomes "
                "the largest code, 448."),
})

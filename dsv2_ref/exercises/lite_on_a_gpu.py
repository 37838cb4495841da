# SPDX-License-Identifier: MIT
"""Exercises of 15_lite_on_a_gpu."""

from dsv2_ref import cost
from dsv2_ref.config import LITE
from dsv2_ref.exercises import Exercises, Function, Value

N_WEIGHTS = cost.parameters(LITE).total
PEAK_FLOPS = 989e12                       # per second, H100 and H200, bf16, dense
STANDING = (2 + 2 + 2 + 8 / 256) * N_WEIGHTS
STREAM, BLOCK = 4096, 102_000             # bytes per token: a block's input, what it keeps


def fitting(card: float) -> int:
    """Sequences of 4,096 tokens, all blocks recomputed, as the backward pass begins."""
    per_token = (LITE.n_layers - 1) * STREAM + 2 * BLOCK
    return int((card - STANDING) / (4096 * per_token))


def steps(tokens: float, batch: int, sequence: int) -> int:
    """Whole steps that come closest to so many tokens, one at least."""
    return max(1, round(tokens / (batch * sequence)))


def mfu(tokens_per_second: float) -> float:
    """Share of the card's peak."""
    return tokens_per_second * 3 * cost.forward_flops_per_token(LITE, 2048) / PEAK_FLOPS


MATRICES = 12_000 * 6 * cost.activated_parameters(LITE) / PEAK_FLOPS

exercises = Exercises({
    1: Value(N_WEIGHTS * (2 + 8 / 256) / 1e9, "One byte for each moment, and two fp32 scales for "
             "256 weights.",
             known=[(N_WEIGHTS * 8 / 1e9, "those are two moments in fp32"),
                    (N_WEIGHTS * (6 + 8 / 256) / 1e9, "that is with weights and gradients")]),
    2: Value(mfu(12_000), "FLOPs per token times tokens per second, over the peak; attention "
             "counts.",
             known=[(MATRICES, "the pairs of attention are missing"),
                    (MATRICES / 3, "that is a forward pass alone"),
                    (100 * mfu(12_000), "a share is asked for, as 0.1")]),
    3: Value(fitting(141e9), "What is left beside the 94.7 GB? A token takes 26 inputs of blocks, "
             "and the block at work: what it keeps, and as many bytes of gradients.",
             known=[(int((141e9 - STANDING) / (4096 * (26 * STREAM + BLOCK))),
                     "the gradients in flight of the block at work are missing"),
                    (fitting(141e9) + 1, "that is a little more than 141 GB")]),
    4: Function(steps, [(5e6, 8, 4096), (1e3, 8, 4096), (1e7, 4, 1024), (9e5, 6, 256)],
                "A step reads batch x sequence tokens; whole steps, one at least."),
})

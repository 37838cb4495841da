# SPDX-License-Identifier: MIT
"""Exercises of 00_tour."""

from dsv2_ref import cost
from dsv2_ref.config import LITE, V2
from dsv2_ref.exercises import Exercises, Function, Value

NUMBERS = LITE.n_layers * (LITE.d_c + LITE.d_r)      # cached for one token
TOTAL = cost.parameters(V2).total
ROW = 2 * (V2.d_c + V2.d_r)                          # bytes, in bf16
CARD = 80 * 2**30


def conversations(memory: int, tokens: int, n_layers: int, row: int) -> int:
    return memory // (tokens * n_layers * row)


exercises = Exercises({
    1: Value(2 * NUMBERS, "Section 5 names the two parts of a row. Add their sizes; every layer "
             "keeps such a row.", tolerance=0,
             known=[(NUMBERS, "so many numbers, but how many bytes?"),
                    (2 * LITE.n_layers * LITE.d_c, "the latent alone is not the whole row"),
                    (V2.n_layers * ROW, "this is V2's; has Lite as many layers?")]),
    2: Value(cost.activated_parameters(V2) / TOTAL,
             "Section 1 prints both numbers for V2: the activated ones and all.", tolerance=0.01,
             known=[(V2.top_k / V2.n_routed, "this is the share of the routed experts; what "
                     "else does every token pass through?"),
                    (cost.activated_parameters(V2, True) / TOTAL,
                     "the input embedding is counted here, a token does not pass through it"),
                    (100 * cost.activated_parameters(V2) / TOTAL,
                     "in per cent; asked is a number from 0 to 1")]),
    3: Function(conversations,
                [(CARD, 2**17, V2.n_layers, ROW), (CARD, 2**17, V2.n_layers, 436),
                 (CARD, 2**12, V2.n_layers, 4 * V2.n_h * V2.d_h), (CARD, 2**17, 95, 4096),
                 (CARD, 2**17, V2.n_layers, 4 * V2.n_h * V2.d_h), (720, 4, 3, 60)],
                "Work out the bytes of one conversation first. Only whole ones count, and one that "
                "fits exactly does."),
})

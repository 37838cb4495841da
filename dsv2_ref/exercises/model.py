# SPDX-License-Identifier: MIT
"""Exercises of 10_model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2_ref import cost
from dsv2_ref.block import Block
from dsv2_ref.config import LITE, V2
from dsv2_ref.exercises import Exercises, Function, Value


def moe_parameters(d: int, w: int, n_shared: int, n_routed: int) -> int:
    """Counted on a live layer."""
    config = LITE.with_(d=d, expert_width=w, n_shared=n_shared, n_routed=n_routed, top_k=1)
    with torch.device("meta"):
        layer = Block(config, config.n_dense).ffn
    return sum(p.numel() for p in layer.parameters())


def attended(form: Callable[..., int] = cost.pair_flops_expanded) -> float:
    """At how many tokens V2-Lite's pairs cost what its matrices do."""
    return cost.forward_flops_per_token(LITE) / form(LITE)


@dataclass
class _Named:
    """A function with a name in messages."""

    name: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __repr__(self) -> str:
        return self.name


def halves() -> list[tuple]:
    """h (tokens, d), norm, f."""
    g = torch.Generator().manual_seed(4)
    stream, other, W = (torch.randn(size, generator=g, dtype=torch.float64)
                        for size in ((3, 6), (2, 6), (6, 6)))
    norm = _Named("norm", lambda h: h / h.square().mean(-1, keepdim=True).sqrt())
    return [(stream, norm, _Named("f = a matrix", lambda x: x @ W)),
            (other, norm, _Named("f = tanh", torch.tanh))]


SIX, EIGHT = (cost.activated_parameters(V2.with_(top_k=k)) for k in (6, 8))
MORE_BLOCKS = SIX + (EIGHT - SIX) // (V2.n_layers - V2.n_dense) * V2.n_layers

exercises = Exercises({
    1: Function(moe_parameters, [(2048, 1408, 2, 64), (5120, 1536, 2, 160), (32, 8, 1, 7)],
                "Section 4 has them for V2: how many matrices has an expert, of which shape? And "
                "the router has one row of d numbers for each routed expert."),
    2: Value(EIGHT, "What does a token pass in addition, in one block, and in how many blocks?",
             known=[(MORE_BLOCKS, "that would be experts in all 60 blocks"),
                    (SIX * 8 // 6, "not everything grows with the number of experts"),
                    (EIGHT + cost.parameters(V2).embedding,
                     "the embedding is in it, which is not passed through")]),
    3: Value(attended, "The FLOPs of all matrices over those of a pair, both for V2-Lite; "
             "section 6 has the rule, notebook 04 what a pair is.", tolerance=0.01,
             known=[(attended() / 2, "a multiplication and an addition are two FLOPs, in matrices "
                     "and in pairs"),
                    (attended() * 2, "a multiplication and an addition are two FLOPs, in matrices "
                     "and in pairs"),
                    (attended(cost.pair_flops_absorbed), "this is the absorbed form"),
                    (attended() * LITE.n_layers, "this is one layer's pairs")]),
    4: Function(lambda h, norm, f: h + f(norm(h)), halves,
                "Follow the two lines of the picture: which of them goes through the norm?"),
})

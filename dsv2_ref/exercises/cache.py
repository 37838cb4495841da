# SPDX-License-Identifier: MIT
"""Exercises of 05_cache."""

from collections.abc import Callable
from functools import cache as once

import torch
from torch import Tensor

from dsv2_ref import cost
from dsv2_ref.attention.cache_quant import SixBitCache
from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.config import LITE, TINY, V2
from dsv2_ref.exercises import Exercises, Function, Value
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.paper import DENSE_D_H, DENSE_LAYERS, DENSE_N_KV

CONTEXT = 2**17
ROW = SixBitCache(1, 1, 1, LITE.d_c, LITE.d_r).nbytes


def lite_gib(bytes_per_row: float = ROW, unit: int = 2**30) -> float:
    return LITE.n_layers * bytes_per_row * CONTEXT / unit


def largest_batch(memory: int, weights: int, context: int, bytes_per_token: int) -> int:
    return max(0, (memory - weights) // (context * bytes_per_token))


def saved(bits_old: float, bits_new: float) -> float:
    """Per cent that V2 caches less than DeepSeek 67B, at these bits per number."""
    old = cost.per_head_elements(DENSE_LAYERS, DENSE_N_KV, DENSE_D_H)
    new = cost.cache_elements_per_token("MLA", V2)
    return 100 * (1 - cost.cache_bits(new, bits_new) / cost.cache_bits(old, bits_old))


SMALL = TINY.with_(vocab=32, n_layers=2, init_std=0.2)


class _Model(DeepSeekV2):
    read: list[int] | None = None        # the tokens of each call, where somebody asks

    def forward(self, tokens: Tensor, cache: LatentCache | None = None) -> Tensor:
        if self.read is not None:
            self.read.append(tokens.shape[1])
        return super().forward(tokens, cache)

    def __repr__(self) -> str:
        return "model"


class _Cache(LatentCache):
    def __repr__(self) -> str:
        return "cache"


@once
def _model() -> DeepSeekV2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Model(SMALL).double().eval().requires_grad_(False)


def reading() -> list[tuple]:
    """model, an empty cache, ids (2, 6), lengths of pieces."""
    ids = torch.randint(SMALL.vocab, (2, 6), generator=torch.Generator().manual_seed(0))
    return [(_model(), _Cache(2, 2, 8, SMALL.d_c, SMALL.d_r, torch.float64), ids, pieces)
            for pieces in ([6], [3, 1, 2], [1] * 6)]


def in_one_piece(model: DeepSeekV2, cache: LatentCache, ids: Tensor, pieces: list[int]) -> Tensor:
    return model(ids)


def piece_by_piece(function: Callable[..., Tensor]) -> str | None:
    """The cache has read everything, and no call has read more than its piece."""
    for model, cache, ids, pieces in reading():
        model.read = []
        try:
            function(model, cache, ids, pieces)
            read = model.read
        finally:
            model.read = None
        if cache.lengths != [6, 6]:
            return f"right logits, but the cache has read {cache.lengths} tokens of [6, 6]"
        if read != pieces:
            return f"right logits, but with pieces {pieces} the model was given {read} tokens"
    return None


exercises = Exercises({
    1: Value(lite_gib, "Layers times bytes of a packed row (section 5) times tokens. A GiB has "
             "2**30 bytes.",
             known=[(lite_gib(2 * (LITE.d_c + LITE.d_r)), "these are rows of 16 bits per number"),
                    (lite_gib(unit=10**9), "these are GB of 10**9 bytes, not GiB"),
                    (lite_gib(6 * (LITE.d_c + LITE.d_r) / 8), "a packed row also has its scales"),
                    (lite_gib() * V2.n_layers / LITE.n_layers, "this is V2, with its layers")]),
    2: Function(largest_batch,
                [(1000, 400, 10, 7), (80, 20, 3, 4), (80 * 2**30, 31 * 10**9, 4096, 31_104),
                 (100, 101, 1, 1), (100, 150, 7, 3)],
                "The weights come off first. Only whole sequences count, and never fewer than "
                "none."),
    3: Function(in_one_piece, reading, "Split ids along its second dimension. Each piece goes "
                "through the model with the same cache, and the answers stand side by side along "
                "that dimension.", tolerance=1e-6, besides=piece_by_piece),
    4: Value(lambda: saved(8, 6), "Numbers times bits on either side: 34,560 against 194,560 "
             "numbers.", tolerance=0.001,
             known=[(saved(16, 6), "here the other side has 16 bits per number"),
                    (saved(6, 6), "here both sides have the same bits"),
                    (100 - saved(8, 6), "this is what is left; asked is what is saved"),
                    (saved(8, 6) / 100, "this is a share; asked are per cent")]),
})

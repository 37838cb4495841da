# SPDX-License-Identifier: MIT
"""What caches really occupy: real attention modules fill them, and their bytes are counted.

`cost` says the same in closed form; this is the experiment beside it.
"""

from collections.abc import Sequence

import torch

from dsv2_ref import cost
from dsv2_ref.attention.kv_cache import LatentCache, PerHeadCache
from dsv2_ref.attention.mha import MultiHeadAttention
from dsv2_ref.attention.mla import MultiHeadLatentAttention
from dsv2_ref.attention.rope import rope_frequencies, rope_tables
from dsv2_ref.config import Config


def measured_cache_bytes(
    config: Config, kinds: Sequence[str] = cost.KINDS, tokens: int = 3, groups: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, int]:
    """Bytes per token that live caches occupy after real attention has filled them, by kind.

    Equal width as `cost` defines it. In the order of `kinds`: MHA, GQA, MQA, MLA.
    """
    caches = {kind: filled_cache(kind, config, tokens, groups, dtype) for kind in kinds}
    return {kind: cache.nbytes // sum(cache.lengths) for kind, cache in caches.items()}


@torch.no_grad()
def filled_cache(
    kind: str, config: Config, tokens: int = 3, groups: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PerHeadCache | LatentCache:
    """A cache of exactly `tokens` tokens, every layer of it written by a real attention module.

    No cache depends on the stream's width d, so a narrow stream stands for it, and one module for
    all layers: V2's own cache, 128 heads and 60 layers, is filled in a second.
    """
    c, narrow = config, 32
    n_kv = c.n_h if kind == "MLA" else cost.kv_heads(kind, c.n_h, groups)
    with torch.random.fork_rng(devices=[]):      # the caller's random numbers stay as they were
        torch.manual_seed(0)
        h = torch.randn(1, tokens, narrow, dtype=dtype)                      # (1, T, d)
        if kind == "MLA":
            cache = LatentCache(c.n_layers, 1, tokens, c.d_c, c.d_r, dtype)
            # no query compression: queries are not cached
            module = MultiHeadLatentAttention(narrow, c.n_h, c.d_h, c.d_r, c.d_v, c.d_c)
            tables = rope_tables(torch.arange(tokens), rope_frequencies(c.d_r, c.rope_theta))
        else:
            cache = PerHeadCache(c.n_layers, 1, tokens, n_kv, c.d_h, dtype)
            module = MultiHeadAttention(narrow, c.n_h, c.d_h, n_kv)
            tables = (None, None)                # equations (1)-(8) know no positions
        module = module.to(dtype)
    for layer in range(c.n_layers):
        module(h, *tables, cache=cache, layer=layer)
    cache.advance(tokens)
    return cache

# SPDX-License-Identifier: MIT
"""Multi-head attention and its two cheaper relatives, the baseline that MLA is measured against.

Section 2.1.1, equations (1)-(8). Every head has its own query, key and value; every old token's
keys and values are kept for the tokens to come, 2·n_h·d_h numbers a token and layer. That cache,
not the arithmetic, limits how many sequences fit on a device while decoding. Two famous remedies
share keys and values between heads and pay with quality (Table 8 of the paper):

  n_kv = n_h          multi-head attention (MHA)
  1 < n_kv < n_h      grouped-query attention (GQA): n_h / n_kv query heads share a key and a value
  n_kv = 1            multi-query attention (MQA)

One module covers the three, because they are one algorithm with a different number of key heads;
compare its cache with the mla file's, which keeps neither keys nor values.

How this file differs from the famous versions:
  1. The paper's equations say nothing of positions; RoPE is applied to whole queries and keys when
     cos and sin are given, as in the dense 67B model that the paper compares with.
  2. There are no biases and no dropout, as in every model of the family.

Shapes: B batch, T new tokens, S = cached + new tokens, n_h heads, n_kv key-value heads, d width,
d_h head size.
Copy with: rope.py, kv_cache.py.  Needs: torch.

Wiring, once copied:
    import torch
    from mha import MultiHeadAttention
    from rope import rope_frequencies, rope_tables
    attention = MultiHeadAttention(d=48, n_h=6, d_h=8, n_kv=2)       # GQA: 3 heads a key
    h = torch.randn(2, 9, 48)                                        # (B, T, d), after the norm
    cos, sin = rope_tables(torch.arange(9), rope_frequencies(8))
    u = h + attention(h, cos, sin)                                   # (B, T, d)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2_ref.attention.kv_cache import Cache, without_gradient
from dsv2_ref.attention.rope import rotate


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor | None = None
) -> Tensor:
    """Causal softmax attention.

    q (B, T, n_h, d_qk), k (B, S, n_kv, d_qk), v (B, S, n_kv, d_v) -> (B, T, n_h, d_v).
    A query sees the keys at positions <= its own; key j stands at position j. `positions` (B, T)
    are the queries'; None means that the queries are the last T of the S tokens.
    """
    T, S = q.shape[1], k.shape[1]
    visible = None
    if positions is not None:
        visible = torch.arange(S, device=q.device) <= positions[:, None, :, None]  # (B, 1, T, S)
    elif 1 < T < S:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # (T, S)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible,
        is_causal=visible is None and bool(T == S), scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)                                     # (B, T, n_h, d_v)


class MultiHeadAttention(nn.Module):
    """MHA, GQA (1 < n_kv < n_h) or MQA (n_kv = 1) of n_h heads of size d_h over width d."""

    def __init__(self, d: int, n_h: int, d_h: int, n_kv: int | None = None) -> None:
        super().__init__()
        n_kv = n_h if n_kv is None else n_kv
        if n_kv < 1 or n_h % n_kv:
            raise ValueError(f"n_kv: {n_kv}, expected a divisor of n_h = {n_h}")
        self.n_h, self.n_kv, self.d_h = n_h, n_kv, d_h
        self.W_Q = nn.Linear(d, n_h * d_h, bias=False)
        self.W_K = nn.Linear(d, n_kv * d_h, bias=False)
        self.W_V = nn.Linear(d, n_kv * d_h, bias=False)
        self.W_O = nn.Linear(n_h * d_h, d, bias=False)

    def forward(
        self, h: Tensor, cos: Tensor | None = None, sin: Tensor | None = None,
        cache: Cache | None = None, layer: int = 0, positions: Tensor | None = None,
    ) -> Tensor:
        """h (B, T, d) -> u (B, T, d); `cache` is written at `layer`, not advanced."""
        q = self.W_Q(h)                                          # (B, T, n_h·d_h)     (1)
        k = self.W_K(h)                                          # (B, T, n_kv·d_h)    (2)
        v = self.W_V(h)                                          # (B, T, n_kv·d_h)    (3)
        q = q.unflatten(-1, (self.n_h, self.d_h))                # (B, T, n_h, d_h)    (4)
        k = k.unflatten(-1, (self.n_kv, self.d_h))               # (B, T, n_kv, d_h)   (5)
        v = v.unflatten(-1, (self.n_kv, self.d_h))               # (B, T, n_kv, d_h)   (6)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache.write(layer, k, v)
            k, v = cache.rows(layer)                             # (B, S, n_kv, d_h)
            positions = cache.queries if positions is None else positions
        o = attend(q, k, v, self.d_h**-0.5, positions)           # (B, T, n_h, d_h)    (7)
        u = self.W_O(o.flatten(2))                               # (B, T, d)           (8)
        return u if cache is None else without_gradient(u)

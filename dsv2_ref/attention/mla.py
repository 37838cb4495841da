# SPDX-License-Identifier: MIT
"""Multi-head latent attention (MLA): the cache is one short row per token, shared by all heads.

Section 2.1.2-2.1.3; equations (37)-(47), the full list in appendix C. Each token is compressed to a
latent c_kv of d_c numbers from which every head's key and value *could* be expanded. Position
cannot enter through those keys: with a rotation R between W^UQ and W^UK the product would depend on
the distance, R·W_UK·c is not W_UK·R·c, and the re-association below would be lost. So position gets
its own little query per head, q_r, and one key for all heads, k_r, made from h and not from the
latent ("decoupled RoPE"). What is cached is [c_kv ; k_r], d_c + d_r numbers: 576 for V2 where MHA
would keep 32,768.

The same attention is computed in two ways, two functions with one signature:

  attend_expanded   builds each head's keys and values, then attends as usual. Per query-key pair
                    and head it multiplies d_h + d_r + d_v numbers (320): right for training and
                    for reading a prompt, where the expansion is shared by many queries.
  attend_absorbed   never builds them: q·(W_UK c) = (W_UKᵀ q)·c, so the query goes down to the
                    latent once and meets the cached rows as they lie; the output is gathered in
                    the latent and goes up through W_UV once. MQA with one 576-wide key whose
                    first 512 numbers are also the value. 3.4 times the work per pair, but no
                    expansion of S old tokens: right for decoding.

It is a decode-time re-association, not a merging of weights: W_O·W_UV as one matrix would have
335.5M numbers a layer for V2 instead of 92.3M, and be slower.

How this file differs from the famous versions:
  1. W_UK, W_UV, W_UQ, W_QR are separate, as in the paper; the published files interleave them.
  2. Both latents are normed (the paper says so in section 3.1.2, not in the equations), with eps
     1e-6 whatever the model's own eps is: so do the published weights.
  3. d_cq = None leaves query compression out, as V2-Lite does: c_q is then h itself, and W_UQ,
     W_QR together are the plain W^Q.

Shapes: B batch, T new tokens, S = cached + new tokens, n_h heads; d width, d_h head, d_r RoPE,
d_v value, d_c and d_cq latent sizes.
Copy with: rope.py, kv_cache.py.  Needs: torch.

Wiring, once copied:
    import torch
    from kv_cache import LatentCache
    from mla import MultiHeadLatentAttention, attend_absorbed, attend_expanded
    from rope import rope_frequencies, rope_tables
    mla = MultiHeadLatentAttention(d=48, n_h=4, d_h=12, d_r=6, d_v=12, d_c=24)
    cache = LatentCache(n_layers=1, batch=2, max_tokens=40, d_c=24, d_r=6)
    for T, attend in ((8, attend_expanded), (1, attend_absorbed)):   # a prompt, then a token
        cos, sin = rope_tables(cache.positions(T), rope_frequencies(6))
        u = mla(torch.randn(2, T, 48), cos, sin, attend, cache, layer=0)     # (B, T, d)
        cache.advance()
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2_ref.attention.kv_cache import Cache, without_gradient
from dsv2_ref.attention.rope import rotate


def visible_keys(T: int, S: int, positions: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys a query sees, (B or 1, 1, T, S) bool; None for all of them.

    Key j stands at position j. Without `positions` the queries are the last T of the S tokens.
    """
    if positions is None:
        if T == 1:
            return None
        positions = torch.arange(S - T, S, device=device)[None]
    return torch.arange(S, device=device) <= positions[:, None, :, None]


def attend_expanded(
    q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, W_UK: Tensor, W_UV: Tensor,
    scale: float, positions: Tensor | None = None,
) -> Tensor:
    """Every head's keys and values are built, then attended to.

    q_c (B, T, n_h, d_h), q_r (B, T, n_h, d_r), c_kv (B, S, d_c), k_r (B, S, d_r),
    W_UK (n_h, d_h, d_c), W_UV (n_h, d_v, d_c), positions (B, T) of the queries -> (B, T, n_h, d_v).
    """
    k, v_c = expand(c_kv, k_r, W_UK, W_UV)
    return attend_heads(q_c, q_r, k, v_c, W_UK, W_UV, scale, positions)


def expand(c_kv: Tensor, k_r: Tensor, W_UK: Tensor, W_UV: Tensor) -> tuple[Tensor, Tensor]:
    """Every head's keys k (B, S, n_h, d_h + d_r) and values v_c (B, S, n_h, d_v)."""
    n_h = len(W_UK)
    k_c = F.linear(c_kv, W_UK.flatten(0, 1)).unflatten(-1, (n_h, -1))        # (B, S, n_h, d_h) (42)
    v_c = F.linear(c_kv, W_UV.flatten(0, 1)).unflatten(-1, (n_h, -1))        # (B, S, n_h, d_v) (45)
    k = torch.cat((k_c, k_r[:, :, None].expand(-1, -1, n_h, -1)), -1)        # (B, S, n_h, ·)   (44)
    return k, v_c


def attend_heads(
    q_c: Tensor, q_r: Tensor, k: Tensor, v_c: Tensor, W_UK: Tensor, W_UV: Tensor,
    scale: float, positions: Tensor | None = None,
) -> Tensor:
    """The second half of `attend_expanded`: of rows that were cached expanded, as MHA's are.

    k and v_c as `expand` gives them; W_UK and W_UV are in them already.
    """
    T, S = q_c.shape[1], k.shape[1]
    q = torch.cat((q_c, q_r), -1)                                            # (B, T, n_h, ·)   (40)
    wider = max(q.shape[-1] - v_c.shape[-1], 0)
    v = F.pad(v_c, (0, wider))                             # one width lets SDPA take its fast path
    causal = positions is None and bool(T == S)            # known to SDPA, which then skips half
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, scale=scale,
        attn_mask=None if causal else visible_keys(T, S, positions, q.device),
    )[..., : v_c.shape[-1]]                                                  # (B, n_h, T, d_v) (46)
    return o.transpose(1, 2)


def attend_absorbed(
    q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, W_UK: Tensor, W_UV: Tensor,
    scale: float, positions: Tensor | None = None,
) -> Tensor:
    """The same attention with W_UK on the query's side and W_UV on the output's.

    Shapes as in `attend_expanded`; the softmax is taken in at least fp32.
    """
    T, n_h = q_c.shape[1:3]
    visible = visible_keys(T, c_kv.shape[1], positions, q_c.device)
    # heads and queries are one dimension here: all of them meet the same cached rows. Rows times
    # queries, not queries times rows: a CPU reads the rows up to 1.6 times as fast
    q_latent = torch.einsum("bthd,hdc->bcht", q_c * scale, W_UK).flatten(2)  # (B, d_c, n_h·T)
    q_turned = (q_r * scale).permute(0, 3, 2, 1).flatten(2)                  # (B, d_r, n_h·T)
    scores = torch.baddbmm(c_kv @ q_latent, k_r, q_turned).transpose(1, 2)   # (B, n_h·T, S)
    scores = scores.unflatten(1, (n_h, T)).contiguous()                      # (B, n_h, T, S)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    o_latent = weights.to(c_kv.dtype).flatten(1, 2) @ c_kv                   # (B, n_h·T, d_c)
    return torch.einsum("bhtc,hvc->bthv", o_latent.unflatten(1, (n_h, T)), W_UV)


def absorbed_is_cheaper(T: int, S: int, d_h: int, d_r: int, d_v: int, d_c: int) -> bool:
    """Whether `attend_absorbed` multiplies less than `attend_expanded` for T queries on S keys.

    Per head: expanding S keys and values against carrying T queries down and T outputs up, and
    d_h + d_r + d_v against 2·d_c + d_r multiplications a query-key pair.
    """
    expanded = S * d_c * (d_h + d_v) + T * S * (d_h + d_r + d_v)
    absorbed = T * d_c * (d_h + d_v) + T * S * (2 * d_c + d_r)
    return absorbed < expanded


def is_its_weight(layer: nn.Module) -> bool:
    """Whether a linear layer is x·weightᵀ and nothing else: no bias, no adapter, no hook."""
    plain = getattr(layer, "is_its_weight", type(layer) is nn.Linear and layer.bias is None)
    return plain and not layer._forward_hooks and not layer._forward_pre_hooks


def matrix(layer: nn.Module, columns: int, like: Tensor) -> Tensor:
    """The matrix (rows, columns) of a linear layer, in which adapters count.

    A plain layer's weight; else what the layer makes of the unit vectors, which are of `like`'s
    device and dtype. ValueError for a layer that is not linear, as one with a bias.
    """
    if is_its_weight(layer):
        return layer.weight
    if any(isinstance(m, nn.Dropout) and m.p and m.training for m in layer.modules()):
        raise ValueError("W_UK, W_UV: an adapter with dropout in training, expected dropout 0: it "
                         "would drop rows of a matrix, not of tokens")
    units = torch.eye(columns, dtype=like.dtype, device=like.device)
    if layer(torch.zeros_like(units[:1])).any():
        raise ValueError("W_UK, W_UV: a layer with a bias, expected a linear one without")
    return layer(units).T


class MultiHeadLatentAttention(nn.Module):
    """MLA over width d: n_h heads of d_h + d_r (query, key) and d_v (value) numbers.

    `scale` is the softmax scale; None means 1/sqrt(d_h + d_r), without YaRN's factor.
    """

    def __init__(
        self, d: int, n_h: int, d_h: int, d_r: int, d_v: int, d_c: int,
        d_cq: int | None = None, scale: float | None = None,
    ) -> None:
        super().__init__()
        self.n_h, self.d_h, self.d_r, self.d_v, self.d_c = n_h, d_h, d_r, d_v, d_c
        self.scale = (d_h + d_r) ** -0.5 if scale is None else scale
        self.W_DQ = nn.Linear(d, d_cq, bias=False) if d_cq else nn.Identity()
        self.norm_q = nn.RMSNorm(d_cq, eps=1e-6) if d_cq else nn.Identity()
        self.W_UQ = nn.Linear(d_cq or d, n_h * d_h, bias=False)
        self.W_QR = nn.Linear(d_cq or d, n_h * d_r, bias=False)
        self.W_DKV = nn.Linear(d, d_c, bias=False)
        self.norm_kv = nn.RMSNorm(d_c, eps=1e-6)
        self.W_UK = nn.Linear(d_c, n_h * d_h, bias=False)
        self.W_UV = nn.Linear(d_c, n_h * d_v, bias=False)
        self.W_KR = nn.Linear(d, d_r, bias=False)
        self.W_O = nn.Linear(n_h * d_v, d, bias=False)

    def queries(
        self, h: Tensor, cos: Tensor, sin: Tensor, rotate: Callable[..., Tensor] = rotate
    ) -> tuple[Tensor, Tensor]:
        """h (B, T, d) -> the content and the position part of every head's query."""
        c_q = self.norm_q(self.W_DQ(h))                                      # (B, T, d_cq)     (37)
        q_c = self.W_UQ(c_q).unflatten(-1, (self.n_h, self.d_h))             # (B, T, n_h, d_h) (38)
        q_r = self.W_QR(c_q).unflatten(-1, (self.n_h, self.d_r))             # (B, T, n_h, d_r)
        return q_c, rotate(q_r, cos, sin)                                    # (B, T, n_h, d_r) (39)

    def latents(
        self, h: Tensor, cos: Tensor, sin: Tensor, rotate: Callable[..., Tensor] = rotate
    ) -> tuple[Tensor, Tensor]:
        """h (B, T, d) -> what is cached: d_c + d_r numbers a token."""
        c_kv = self.norm_kv(self.W_DKV(h))                                   # (B, T, d_c)      (41)
        k_r = rotate(self.W_KR(h), cos, sin)                                 # (B, T, d_r)      (43)
        return c_kv, k_r

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor] = attend_expanded,
        cache: Cache | None = None, layer: int = 0, positions: Tensor | None = None,
        rotate_both: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """h (B, T, d), cos and sin (T or B, T, d_r/2) -> u (B, T, d).

        `attend` is one of the functions above, expanded for prompts and training, absorbed for
        decoding, or another that takes the cache's rows. `cache` is written at `layer`, not
        advanced. `positions` (B, T) of the new tokens are needed where they are not the last of
        all S; None with a cache: the cache knows. `rotate_both` turns q_r and k_r at once, as
        `rotate` does each where it is made.
        """
        turn = rotate if rotate_both is None else lambda x, *tables: x
        q_c, q_r = self.queries(h, cos, sin, turn)
        rows = self.latents(h, cos, sin, turn)
        if rotate_both is not None:
            q_r, k_r = rotate_both(q_r, rows[1], cos, sin)
            rows = rows[0], k_r
        if cache is not None:
            cache.write(layer, *rows)
            rows = cache.rows(layer)                                         # (B, S, ·) each
            positions = cache.queries if positions is None else positions
        W_UK = matrix(self.W_UK, self.d_c, h).unflatten(0, (self.n_h, self.d_h))   # (n_h, d_h, d_c)
        W_UV = matrix(self.W_UV, self.d_c, h).unflatten(0, (self.n_h, self.d_v))   # (n_h, d_v, d_c)
        o = attend(q_c, q_r, *rows, W_UK, W_UV, self.scale, positions)       # (B, T, n_h, d_v)
        u = self.W_O(o.flatten(2))                                           # (B, T, d)        (47)
        return u if cache is None else without_gradient(u)

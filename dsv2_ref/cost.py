# SPDX-License-Identifier: MIT
"""What a model costs, in closed form: parameters, cache, arithmetic.

Everything here follows from a `Config`, without building the model; tests compare it with the live
one, module by module. What live caches occupy is measured by inference/live_cache.py.

Three conventions, because published numbers differ by them:

  1. *Activated* parameters (headline of the paper) are the matrices that one token passes through:
     attention, dense feed-forward, shared experts and top_k of the routed ones, router, norms and
     head. The input embedding is a table of which one row is read, and is not counted: 20.85B for
     V2 where 21.38B would include it.
  2. *Elements* of a cache are numbers, all layers together, for one token (Table 1 and Table 9).
     Bytes need a precision on top; a comparison has to say whether both sides have the same one.
  3. One multiplication and one addition are two FLOPs. A forward pass takes 2 per parameter
     and token, a training step 6 (the backward pass is two more products of the same size); both
     rules count norms, a few hundred-thousandths of it, and leave the attention scores out.

"Equal width" of two kinds of attention means: the same number of layers l, of heads n_h, and the
same head size d_h. What differs is n_kv, the number of key-value heads (n_h in MHA, n_g groups in
GQA, 1 in MQA), or, for MLA, the row of d_c + d_r numbers that takes their place.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dsv2_ref.config import Config

KINDS = ("MHA", "GQA", "MQA", "MLA")


@dataclass(frozen=True)
class Parameters:
    """Parameters of a whole model by what they are for; the fields sum to `total`."""

    embedding: int    # input table
    head: int         # output matrix; 0 where it is the embedding
    attention: int    # without its norms
    dense: int        # feed-forward of the first n_dense layers
    shared: int       # shared experts
    routed: int       # routed experts, all of them
    router: int       # their centroids
    norms: int        # on the stream and on the latents

    @property
    def total(self) -> int:
        return (self.embedding + self.head + self.attention + self.dense + self.shared
                + self.routed + self.router + self.norms)


def parameters(config: Config) -> Parameters:
    """Every parameter of the model, in closed form."""
    c = config
    n_moe = c.n_layers - c.n_dense
    W_DQ = c.d * c.d_cq if c.d_cq else 0
    W_UQ_QR = (c.d_cq or c.d) * c.n_h * (c.d_h + c.d_r)
    W_DKV_KR = c.d * (c.d_c + c.d_r)
    W_UK_UV = c.d_c * c.n_h * (c.d_h + c.d_v)
    W_O = c.n_h * c.d_v * c.d
    expert = 3 * c.d * c.expert_width        # gate, up and down of one SwiGLU network
    return Parameters(
        embedding=c.vocab * c.d,
        head=0 if c.tie_embeddings else c.vocab * c.d,
        attention=c.n_layers * (W_DQ + W_UQ_QR + W_DKV_KR + W_UK_UV + W_O),
        dense=c.n_dense * 3 * c.d * c.dense_width,
        shared=n_moe * c.n_shared * expert,
        routed=n_moe * c.n_routed * expert,
        router=n_moe * c.n_routed * c.d,
        norms=c.n_layers * (2 * c.d + c.d_c + (c.d_cq or 0)) + c.d,
    )


def activated_parameters(config: Config, with_embedding: bool = False) -> int:
    """Parameters that one token passes through.

    A head tied to the embedding is passed through and counts once, whatever `with_embedding` is.
    """
    p = parameters(config)
    idle = p.routed // config.n_routed * (config.n_routed - config.top_k)
    uncounted = 0 if with_embedding or config.tie_embeddings else p.embedding
    return p.total - idle - uncounted


def per_head_elements(n_layers: int, n_kv: int, d_h: int) -> int:
    """Cached numbers per token: n_kv keys and n_kv values in each layer (Table 1)."""
    return 2 * n_kv * d_h * n_layers


def latent_elements(n_layers: int, d_c: int, d_r: int) -> int:
    """Cached numbers per token: one latent and one RoPE key in each layer (Table 1)."""
    return (d_c + d_r) * n_layers


def expanded_elements(config: Config) -> int:
    """Cached numbers per token if keys and values were kept expanded: the mistake to avoid."""
    return config.n_layers * config.n_h * (config.d_h + config.d_r + config.d_v)


def default_groups(n_h: int) -> int:
    """Key-value heads of GQA where none are given: one for four heads, two at least, a divisor."""
    return max(g for g in range(1, max(n_h // 4, 2) + 1) if n_h % g == 0)


def kv_heads(kind: str, n_h: int, groups: int | None = None) -> int:
    """Key-value heads of MHA, GQA or MQA with n_h query heads; MLA has none."""
    counts = {"MHA": n_h, "GQA": default_groups(n_h) if groups is None else groups, "MQA": 1}
    if kind not in counts:
        raise ValueError(f"kind: {kind!r}, expected MHA, GQA, MQA or MLA")
    if not 1 <= counts[kind] <= n_h or n_h % counts[kind]:
        raise ValueError(f"groups: {counts[kind]}, expected a divisor of n_h = {n_h}")
    return counts[kind]


def cache_elements_per_token(kind: str, config: Config, groups: int | None = None) -> int:
    """Cached numbers per token for `kind` (one of KINDS) at the config's n_layers, n_h and d_h.

    `groups` are GQA's key-value heads, a divisor of n_h; None means `default_groups`.
    """
    if kind == "MLA":
        return latent_elements(config.n_layers, config.d_c, config.d_r)
    return per_head_elements(config.n_layers, kv_heads(kind, config.n_h, groups), config.d_h)


def cache_bits(elements: int, bits: float = 16.0) -> float:
    """Bits that `elements` take at `bits` each (an average may be a fraction)."""
    return elements * bits


def cache_bytes(elements: int, bits: float = 16.0) -> float:
    """Bytes that `elements` take at `bits` each."""
    return cache_bits(elements, bits) / 8


def average_bits(d_c: int, d_r: int, latent_bits: float = 4.75, rope_bits: float = 16.0) -> float:
    """Bits per element of a row whose latent is quantised and whose RoPE key is not.

    4.75 is 4-bit codes with 24 bits of scale and zero for every 32 of them. For V2's 512 + 64 that
    gives the paper's "6 bits on average" exactly (section 3.2.3); the paper does not say how it
    gets there, so this layout is our reading.
    """
    return (d_c * latent_bits + d_r * rope_bits) / (d_c + d_r)


def pair_flops_expanded(config: Config) -> int:
    """FLOPs of one query on one cached token, all heads and layers, with expanded keys.

    Without what an implementation adds by padding values to the width of keys.
    """
    return 2 * config.n_layers * config.n_h * (config.d_h + config.d_r + config.d_v)


def pair_flops_absorbed(config: Config) -> int:
    """The same in the latent: 3.4 times as many for V2, in exchange for no expansion."""
    return 2 * config.n_layers * config.n_h * (2 * config.d_c + config.d_r)


def forward_flops_per_token(
    config: Config, context: int = 0,
    pair_flops: Callable[[Config], int] = pair_flops_expanded,
) -> int:
    """FLOPs of a forward pass for one token that attends to `context` tokens, itself included.

    2·N_active holds for both forms: either expands the token's own latent once, or carries its
    query down and its output up, which are the same matrices. Decoding through the expanded form
    would come to more, since it expands all old tokens again.
    """
    return 2 * activated_parameters(config) + context * pair_flops(config)


def training_flops(n_active: int, tokens: float) -> float:
    """6·N_active FLOPs per token: forward and backward, without the attention scores."""
    return 6.0 * n_active * tokens


def causal_training_flops(config: Config, sequence: int) -> int:
    """FLOPs of training on one token in causal sequences, attention scores included.

    Three forward passes' worth; a token attends to (sequence + 1) / 2 tokens on average.
    """
    pairs = pair_flops_expanded(config) * (sequence + 1) // 2
    return 3 * (forward_flops_per_token(config) + pairs)


def implied_tflops(flops: float, hours: float) -> float:
    """TFLOP/s that each GPU must have sustained to do `flops` in so many GPU-hours."""
    return flops / (hours * 3600 * 1e12)

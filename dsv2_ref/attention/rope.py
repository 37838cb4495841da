# SPDX-License-Identifier: MIT
"""Rotary position embedding (RoPE) and its YaRN extension, as DeepSeek-V2 uses them.

RoPE turns each pair of coordinates (2i, 2i+1) of a query or key by the angle
position · theta^(-2i/d_r). The dot product of a turned query and a turned key then depends on
their distance alone. DeepSeek-V2 turns only a small part of each query and one key shared by all
heads ("decoupled" RoPE, section 2.1.3; the mla file shows why), so d_r is 64, not the head size.

YaRN (section 3.1.4) stretches a model trained on 4K positions to 160K without changing what the
fast pairs see. A pair that makes more than beta_fast turns inside the original context already
tells positions apart and is kept; one that makes fewer than beta_slow turns has never shown a
whole turn and is interpolated, its angle divided by the factor; those between are mixed linearly.
Two temperatures come with it, and they are easily confused:

  - cos and sin carry m(factor, mscale) / m(factor, mscale_all_dim): exactly 1 for V2 and Lite,
    where both are 0.707;
  - the softmax scale carries m(factor, mscale_all_dim) squared: 1.2608² = 1.5896 for V2. The
    paper's sqrt(t) = 0.0707 ln s + 1 is this m, once for the query and once for the key.

How this file differs from the famous versions:
  1. Pairs are adjacent, (0,1), (2,3) ..., as the published weights are stored; Llama-style code
     pairs i with i + d_r/2 and needs its weights permuted. Mixing the two looks fine at short
     distances and fails at long ones.
  2. Angles are computed in fp64 and cast last: an angle multiplied in fp32 is off by 1e-3 rad at
     position 131,071, and one in bf16 is noise long before.
  3. There is no table to outgrow: cos and sin are made for the positions that are asked for.

Shapes: B batch, T new tokens, n_h heads, d_r RoPE size (even).
Copy with: nothing.  Needs: torch.

Wiring, once copied:
    import torch
    from rope import rope_frequencies, rope_tables, rotate, softmax_scale
    frequencies = rope_frequencies(d_r=64)                 # or yarn_frequencies, to read further
    positions = torch.arange(7, 12)                        # 5 new tokens behind 7 cached ones
    cos, sin = rope_tables(positions, frequencies)         # (T, d_r/2), once for all layers
    q_r = rotate(torch.randn(2, 5, 16, 64), cos, sin)      # (B, T, n_h, d_r)
    k_r = rotate(torch.randn(2, 5, 64), cos, sin)          # (B, T, d_r), one key for all heads
    scores = softmax_scale(128 + 64) * torch.einsum("bthr,bsr->bhts", q_r, k_r)
"""

import math

import torch
from torch import Tensor


def rope_frequencies(d_r: int, theta: float = 1e4) -> Tensor:
    """Radians per position of each pair, theta^(-2i/d_r).  Returns (d_r/2,) in fp64."""
    if d_r <= 0 or d_r % 2:
        raise ValueError(f"d_r: {d_r}, expected a positive even number (RoPE turns pairs)")
    pairs = torch.arange(0, d_r, 2, dtype=torch.float64, device="cpu")
    return theta ** (-pairs / d_r)                                           # (d_r/2,)


def yarn_ramp(
    d_r: int, theta: float, beta_fast: float, beta_slow: float, original_positions: int
) -> Tensor:
    """Share of interpolation per pair: 0 keep, 1 divide the angle by the factor.  (d_r/2,) fp64."""

    def pair_that_turns(turns: float) -> float:
        # wavelength 2π·theta^(2i/d_r) = original_positions / turns, solved for i
        return d_r * math.log(original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), d_r - 1)
    span = high - low if high != low else 0.001
    pairs = torch.arange(d_r // 2, dtype=torch.float64, device="cpu")
    return ((pairs - low) / span).clamp(0, 1)                                # (d_r/2,)


def yarn_frequencies(
    d_r: int, theta: float, factor: float, beta_fast: float, beta_slow: float,
    original_positions: int,
) -> Tensor:
    """Frequencies stretched by `factor` where a pair is slow.  Returns (d_r/2,) in fp64."""
    keep = rope_frequencies(d_r, theta)
    ramp = yarn_ramp(d_r, theta, beta_fast, beta_slow, original_positions)
    return keep * (1 - ramp) + keep / factor * ramp                          # (d_r/2,)


def yarn_mscale(factor: float, mscale: float) -> float:
    """m(s, x) = 0.1·x·ln s + 1 for s > 1, else 1: the paper's sqrt(t) for x = 0.707."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_magnitude(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What cos and sin are multiplied by under YaRN."""
    if mscale_all_dim:
        return yarn_mscale(factor, mscale or 1.0) / yarn_mscale(factor, mscale_all_dim)
    return yarn_mscale(factor, mscale or 1.0)


def softmax_scale(d_qk: int, factor: float = 1.0, mscale_all_dim: float | None = None) -> float:
    """1/sqrt(d_h + d_r), times m(factor, mscale_all_dim)² under YaRN."""
    return d_qk**-0.5 * yarn_mscale(factor, mscale_all_dim or 0.0) ** 2


def rope_tables(
    positions: Tensor, frequencies: Tensor, magnitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · frequency.

    positions (..., T) integers, frequencies (d_r/2,) fp64 -> two tensors (..., T, d_r/2) in fp64,
    which `rotate` casts to its own precision: cast earlier, and the rounding is in every angle.
    """
    if frequencies.dtype != torch.float64:
        raise ValueError(f"frequencies: {frequencies.dtype}, expected torch.float64: a model's "
                         "cast rounds the angles of all positions")
    angles = positions[..., None].to(torch.float64) * frequencies.to(positions.device)
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each adjacent pair of the last dimension: (a, b) -> (a cos - b sin, a sin + b cos).

    x (B, T, d_r) or (B, T, n_h, d_r); cos, sin (T, d_r/2) or (B, T, d_r/2).  Same shape and
    dtype as x; computed in at least fp32.
    """
    if cos.shape[-2:] != (x.shape[1], x.shape[-1] // 2):
        raise ValueError(f"cos, sin: shape {tuple(cos.shape)}, expected (..., {x.shape[1]}, "
                         f"{x.shape[-1] // 2}), a row for each of the T new tokens")
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(dtype), sin.to(dtype)
    if x.ndim == 4:                                        # one turn for all heads of a token
        cos, sin = cos[..., None, :], sin[..., None, :]    # (B, T, 1, d_r/2)
    a, b = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)   # (B, T, ..., d_r/2) each
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return turned.flatten(-2).to(x.dtype)

# SPDX-License-Identifier: MIT
"""AdamW whose two moments take two bytes a weight, for weights that may themselves be bf16.

A 15.7B model in one 141 GB card: bf16 weights 31 GB and bf16 gradients 31 GB leave no room for
moments in fp32 (126 GB). Here they take 32 GB. Three things have to be right.

  1. Codes are logarithmic, relative to the largest of a block of 256 weights: 255 of them over
     seven decades for the second moment, 127 and a sign over five for the first. Linear codes would
     round small entries to 0: without a first moment a weight stands still, without a second one
     the update m / sqrt(v) explodes. Below its range a second moment is taken for larger than it
     is: a gradient 3.5 decades below the largest of its block moves its weight less than AdamW's.
  2. A code must be able to forget. Each step takes 10 % from the first moment and 5 % from the
     second, 1.2 and 0.8 codes wherever it stands, so that rounding to nearest moves it. A linear
     code k would stick below 5 and 10: 0.95·10 rounds back to 10.
  3. bf16 weights have 8 bits of significand: an update below 0.2 to 0.4 % of a weight rounds to
     nothing, and training stands still while its loss looks almost right. Rounded *stochastically*,
     up with the probability of how far it is on the way, each update counts on average.

The random bits are a hash of (key, the weight's place in its parameter), and the key one of (seed,
step, the parameter's name): no generator, whose numbers would depend on what was drawn before. So
it does not matter who makes an update, in which pieces, or on how many processes.

A weight may be a share of a stack of experts, from expert `first` on: places count from the stack's
beginning, and no block of 256 reaches into the next expert.

What is computed is AdamW as torch has it (section 3.1.2: betas 0.9 and 0.95, decay 0.1), decoupled
decay and bias correction included; a test compares the two. The paper says nothing of precision:
that is ours. This file is plain torch, in some 60 operations on the whole of a weight; the kernel
that equals `update_in_pieces` in one pass is adamw8_update.py.

Shapes: a weight is E stacked matrices of n numbers (E = 1 below three dimensions), padded to R
blocks: moments m (R, 256) int8, v (R, 256) uint8, m_largest and v_largest (R, 1) fp32.
Copy with: nothing.  Needs: torch.

Wiring, once copied:
    import torch
    from eight_bit_moments import new_moments, rounding_key, update_in_pieces
    W = torch.randn(5, 40, 30).bfloat16()                            # five experts
    moments = new_moments(W)
    for t in (1, 2, 3):
        update_in_pieces(W, torch.randn_like(W), moments, t, lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
                         weight_decay=0.1, key=rounding_key(0, t, "W"))
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 256                            # weights that share a scale
PIECE = 16_777_216                     # weights that are updated at a time, a multiple of BLOCK
M_CODES, M_DECADES = 127, 5
V_CODES, V_DECADES = 255, 7


def encode(x: Tensor, n_codes: int, decades: float) -> tuple[Tensor, Tensor]:
    """x (..., BLOCK) fp32 -> codes, of the numbers' signs, and their largest sizes (..., 1).

    int16 codes from -n_codes to n_codes: 0 for 0, n_codes for the largest, 1 for all below range.
    """
    step = math.log(10.0) * decades / (n_codes - 1)
    largest = x.abs().amax(-1, keepdim=True)
    codes = n_codes + (x.abs() / largest.clamp(min=2.0**-126)).log() / step     # -inf for 0
    return (codes.round().clamp(1, n_codes) * x.sign()).to(torch.int16), largest


def decode(codes: Tensor, largest: Tensor, n_codes: int, decades: float) -> Tensor:
    """What `encode` took, within half a step of its logarithm."""
    step, codes = math.log(10.0) * decades / (n_codes - 1), codes.float()
    return codes.sign() * largest * ((codes.abs() - n_codes) * step).exp()


def rounding_key(seed: int, step: int, name: str) -> int:
    """Of the bits that a parameter's weights are rounded with at a step; 64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest())


def noise(key: int, start: int, n: int, device: torch.device | str | None = None) -> Tensor:
    """(n,) int32 from 0 to 2^16 - 1: those of the places from `start` on, each a hash of its own.

    Places 2^32 apart have the same.
    """
    x = torch.arange(n, dtype=torch.int32, device=device).add_(int32(start + key))
    return _mix(_mix(x).add_(int32(key >> 32))).bitwise_and_(0xFFFF)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits, in place: a changed bit changes each of the others half of the time.

    Multiplications wrap around; the constants are C. Wellons', found by search ("lowbias32").
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(int32(factor))
    return x


def int32(number: int) -> int:
    """The int32 with its lower 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


def round_stochastically(x: Tensor, key: int, start: int = 0) -> Tensor:
    """fp32 -> bf16, to one of the two neighbours, so that the mean over keys is x.

    `start` is the place of x's first number in the parameter that it is a piece of.
    """
    bits = x.contiguous().view(torch.int32) + noise(key, start, x.numel(), x.device).view(x.shape)
    # a carry into the upper half rounds away from 0
    return (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def new_moments(W: Tensor) -> dict[str, Tensor]:
    """Those of a weight that was never updated: zeros, by name."""
    blocks = blocks_of(W.shape)
    return {
        "m": torch.zeros(blocks, BLOCK, dtype=torch.int8, device=W.device),
        "v": torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=W.device),
        "m_largest": torch.zeros(blocks, 1, device=W.device),
        "v_largest": torch.zeros(blocks, 1, device=W.device),
    }


def update_in_pieces(
    W: Tensor, gradient: Tensor, moments: dict[str, Tensor], t: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, key: int, first: int = 0,
    clip: Tensor | None = None,
) -> None:
    """Step t (from 1) of AdamW: W and its moments, in place. bf16 weights are rounded with `key`.

    A stack begins with expert `first`. The gradient, of W's shape, counts `clip` () times. Taken in
    pieces, so that the fp32 temporaries stay small.
    """
    E, n = parts(W.shape)
    flat, gradient = W.view(E, n), gradient.reshape(E, n)
    kept = {name: moments[name].view(E, -1, moments[name].shape[1])
            for name in ("m", "v", "m_largest", "v_largest")}
    beta_1, beta_2 = betas
    for experts, piece in _pieces(E, n):
        w = flat[experts, piece].float()                                             # (e, p)
        rows = experts, slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
        g = torch.zeros_like(kept["m"][rows], dtype=torch.float32)                   # (e, r, BLOCK)
        g.view(len(w), -1)[:, : w.shape[1]] = gradient[experts, piece]               # a rest is 0
        if clip is not None:
            g.mul_(clip)
        m = decode(kept["m"][rows], kept["m_largest"][rows], M_CODES, M_DECADES)
        m.lerp_(g, 1 - beta_1)
        v = decode(kept["v"][rows], kept["v_largest"][rows], V_CODES, V_DECADES)
        v.mul_(beta_2).addcmul_(g, g, value=1 - beta_2)
        kept["m"][rows], kept["m_largest"][rows] = encode(m, M_CODES, M_DECADES)
        kept["v"][rows], kept["v_largest"][rows] = encode(v, V_CODES, V_DECADES)
        v.div_(1 - beta_2**t).sqrt_().add_(eps)
        m, v = (x.view(len(w), -1)[:, : w.shape[1]] for x in (m, v))
        w.mul_(1 - lr * weight_decay)
        w.addcdiv_(m, v, value=-lr / (1 - beta_1**t))
        if W.dtype == torch.bfloat16:
            w = round_stochastically(w, key, (first + experts.start) * n + piece.start)
        flat[experts, piece] = w


def parts(shape: torch.Size) -> tuple[int, int]:
    """Experts of a stack and weights of each; anything but a stack is one part."""
    return (shape[0], shape[1:].numel()) if len(shape) > 2 else (1, shape.numel())


def blocks_of(shape: torch.Size) -> int:
    """Blocks that a weight of this shape has; no block crosses experts of a stack."""
    E, n = parts(shape)
    return E * -(-n // BLOCK)


def _pieces(E: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Whole experts, or parts of one, with PIECE weights at the most: consecutive ones."""
    several = max(1, PIECE // n)
    for first in range(0, E, several):
        for start in range(0, n, PIECE):
            yield slice(first, min(first + several, E)), slice(start, min(start + PIECE, n))

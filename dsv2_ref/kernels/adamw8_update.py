# SPDX-License-Identifier: MIT
"""One step of AdamW with eight-bit moments: a weight and all that belongs to it touched once.

An update has no arithmetic to speak of; what it costs is traffic. In plain torch each of its some
60 operations reads and writes the whole weight in fp32. Here a program takes four blocks of 256
weights into registers, and of a bf16 weight there go

    2 weight + 2 gradient + 1 m + 1 v   read,   2 weight + 1 m + 1 v   written:   10 bytes

and 16 more for the two scales of each 256. With fp32 weights and gradients it is 16 bytes.
eight_bit_moments.py says what is computed and why; its `update_in_pieces` is the naive twin.

How it differs from the twin, which it equals but for the last bits of fp32 arithmetic:
  1. The factor that clips the gradients' norm is multiplied in here: () on the device, so that no
     host waits for it and the gradient needs no pass of its own. The twin does so too.
  2. Numbers in bf16 come and go as int16, and become fp32 by a shift. So a carry is visible where
     one rounds stochastically, and Triton's interpreter, which is wrong in bf16, can test it.
  3. A code's place on the scale becomes an integer by adding 1.5·2^23: the sum has no room for a
     fraction, rounds to even as the twin does, and its last byte is the code. A number below the
     range is raised to the range's end before its logarithm is taken.
  4. On NVIDIA exp, log, square root and 1/x are single instructions, right to about 2^-22. So a
     code may differ from the twin's by one, where its place on the scale is near the middle between
     two codes: in the interpreter within 1e-5 of a code (3 of a million differ), more where the old
     moment and the gradient almost cancel; on a card 1e-4 is expected and not measured yet.
  5. The random bits are the twin's, bit for bit: places are counted modulo 2^32.

Offsets are 64-bit: a weight may have any size. Beyond its last block, and in the rest of an
expert's, nothing is read or written. Sizes are no constants of the kernel: it is compiled once for
weights that are whole blocks and once for others.
Launch: 4 blocks for 4 warps, 8 weights a thread: 16 bytes of bf16 at once. For sm_90 that is 690
instructions and 48 registers a thread, no spills: 86 instructions a weight where, by arithmetic, an
H200 issues 68 while it moves 10 bytes, so that they are expected to bind first. Not timed yet.

Shapes: E experts of n weights, in R blocks of 256: m (R, 256) int8, v (R, 256) uint8, m_largest and
v_largest (R, 1) fp32.
Copy with: eight_bit_moments.py, target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from adamw8_update import update_fused
    from eight_bit_moments import new_moments, rounding_key
    W, gradient = torch.randn(5, 40, 30).bfloat16(), torch.randn(5, 40, 30).bfloat16()
    moments, clip = new_moments(W), 1.0 / gradient.float().norm()
    for t in (1, 2, 3):
        update_fused(W, gradient, moments, t, lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
                     weight_decay=0.1, key=rounding_key(0, t, "W"), clip=clip)
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_ref.kernels.eight_bit_moments import (
    BLOCK,
    M_CODES,
    M_DECADES,
    V_CODES,
    V_DECADES,
    blocks_of,
    int32,
    parts,
)
from dsv2_ref.kernels.target import check_device, target_of

ROWS = 4                               # blocks a program takes, one for each warp


@triton.jit
def _widened(x):
    """fp32 of numbers, or of the bits of bf16 ones."""
    if x.dtype == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _asm(x, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(CODE, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _decoded(size, largest, CODES: tl.constexpr, LOG_STEP: tl.constexpr, PTX: tl.constexpr):
    """fp32 of int32 codes from 0 to CODES."""
    whole = (size + 0x4B000000).to(tl.float32, bitcast=True)             # 2^23 + size
    power = (whole - (8388608.0 + CODES)) * LOG_STEP
    power = _asm(power, "ex2.approx.ftz.f32 $0, $1;") if PTX else tl.exp2(power)
    return tl.where(size > 0, largest * power, 0.0)


@triton.jit
def _signed(size, sign):
    """size, at least 0, with the sign of the int32 `sign`."""
    return (size.to(tl.int32, bitcast=True) | (sign & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _encoded(x, SIGNED: tl.constexpr, CODES: tl.constexpr, LOG_STEP: tl.constexpr,
             LEAST: tl.constexpr, PTX: tl.constexpr):
    """int32 numbers whose last bytes are the codes of x; the largest size of each row (ROWS, 1)."""
    size = tl.abs(x)
    largest = tl.max(size, 1)[:, None]
    share = tl.maximum(size * (1.0 / tl.maximum(largest, 2.0**-126)), LEAST)
    log = _asm(share, "lg2.approx.ftz.f32 $0, $1;") if PTX else tl.log2(share)
    place = tl.where(size > 0, CODES + log * (1.0 / LOG_STEP), 0.0)
    if SIGNED:
        place = _signed(place, x.to(tl.int32, bitcast=True))
    return (place + 12582912.0).to(tl.int32, bitcast=True), largest


@triton.jit
def _direction(m, v, eps, PTX: tl.constexpr):
    """m / (sqrt(v) + eps)"""
    if PTX:
        return m * _asm(_asm(v, "sqrt.approx.ftz.f32 $0, $1;") + eps, "rcp.approx.ftz.f32 $0, $1;")
    return m / (tl.sqrt(v) + eps)


@triton.jit
def _mix(x):
    """`_mix` of eight_bit_moments.py, on uint32."""
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _noise(place, low, high):
    """16 random bits for each place; key and first place are in low, the key's rest in high."""
    x = tl.add(place, low.to(tl.uint32), sanitize_overflow=False)
    return _mix(tl.add(_mix(x), high.to(tl.uint32), sanitize_overflow=False)) & 0xFFFF


@triton.jit(do_not_specialize=["n", "blocks", "low", "high"])
def _update_kernel(
    W, gradient, m, v, m_largest, v_largest, clip, n, blocks, low, high, beta_1, new_1, beta_2,
    new_2, keep, rate, eps, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    M_CODES: tl.constexpr, M_STEP: tl.constexpr, M_LEAST: tl.constexpr,
    V_CODES: tl.constexpr, V_STEP: tl.constexpr, V_LEAST: tl.constexpr, PTX: tl.constexpr,
):
    """A moment is beta times the old one and new times the gradient; keep: the same of a weight.

    rate and eps are bias corrected. WHOLE: n is a multiple of BLOCK.
    """
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)                             # (ROWS,)
    here, lane = (block < blocks)[:, None], tl.arange(0, BLOCK)[None]
    scale = block.to(tl.int64)[:, None]                                              # (ROWS, 1)
    at = scale * BLOCK + lane                                                        # (ROWS, BLOCK)
    if WHOLE:
        place, inside = at, here
    else:
        n = n.to(tl.int64)
        each = ((n + BLOCK - 1) // BLOCK).to(tl.int32)
        start = (block % each).to(tl.int64)[:, None] * BLOCK             # within the expert
        place = (block // each).to(tl.int64)[:, None] * n + start + lane
        inside = here & (start + lane < n)
    w = _widened(tl.load(W + place, mask=inside, other=0))
    g = _widened(tl.load(gradient + place, mask=inside, other=0))
    if clip is not None:
        g *= tl.load(clip).to(tl.float32)

    code = tl.load(m + at, mask=here, other=0).to(tl.int32)
    largest = tl.load(m_largest + scale, mask=here, other=0)
    old = _signed(_decoded(tl.abs(code), beta_1 * largest, M_CODES, M_STEP, PTX), code)
    new_m = old + new_1 * g
    code, largest = _encoded(new_m, True, M_CODES, M_STEP, M_LEAST, PTX)
    tl.store(m + at, code.to(tl.int8), mask=here)
    tl.store(m_largest + scale, largest, mask=here)

    code = tl.load(v + at, mask=here, other=0).to(tl.int32)
    largest = tl.load(v_largest + scale, mask=here, other=0)
    new_v = _decoded(code, beta_2 * largest, V_CODES, V_STEP, PTX) + new_2 * g * g
    code, largest = _encoded(new_v, False, V_CODES, V_STEP, V_LEAST, PTX)
    tl.store(v + at, code.to(tl.uint8), mask=here)
    tl.store(v_largest + scale, largest, mask=here)

    w = keep * w - rate * _direction(new_m, new_v, eps, PTX)
    if W.dtype.element_ty == tl.int16:
        bits = tl.add(w.to(tl.uint32, bitcast=True), _noise(place.to(tl.uint32), low, high),
                      sanitize_overflow=False)
        tl.store(W + place, (bits >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(W + place, w.to(W.dtype.element_ty), mask=inside)


def update_fused(
    W: Tensor, gradient: Tensor, moments: dict[str, Tensor], t: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, key: int, first: int = 0,
    clip: Tensor | None = None,
) -> None:
    """Step t (from 1) of AdamW: W and its moments, in place. bf16 weights are rounded with `key`.

    A stack begins with expert `first`. The gradient, of W's shape, counts `clip` () times.
    """
    _check(W, gradient, moments, clip)
    (_, n), blocks = parts(W.shape), blocks_of(W.shape)
    if not blocks:
        return
    (beta_1, beta_2), ptx = betas, target_of(W.device) not in ("cpu", "gfx942")
    bias = math.sqrt(1 - beta_2**t)          # 1 / (sqrt(v / bias²) + eps) is bias / (sqrt(v) + …)
    with torch.cuda.device_of(W):
        _update_kernel[triton.cdiv(blocks, ROWS),](
            _bits(W), _bits(gradient.contiguous()), moments["m"], moments["v"],
            moments["m_largest"], moments["v_largest"], clip, n, blocks, int32(key + first * n),
            int32(key >> 32), beta_1, 1 - beta_1, beta_2, 1 - beta_2, 1 - lr * weight_decay,
            lr / (1 - beta_1**t) * bias, eps * bias, WHOLE=n % BLOCK == 0, **constants(ptx),
            num_warps=ROWS,
        )


def constants(ptx: bool) -> dict[str, int | float | bool]:
    """What the kernel is compiled for, beside WHOLE; ptx: NVIDIA's assembly is understood."""
    def log_step(n_codes: int, decades: int) -> float:
        return math.log2(10.0) * decades / (n_codes - 1)

    return dict(
        ROWS=ROWS, BLOCK=BLOCK, PTX=ptx,
        M_CODES=M_CODES, M_STEP=log_step(M_CODES, M_DECADES), M_LEAST=10.0**-M_DECADES,
        V_CODES=V_CODES, V_STEP=log_step(V_CODES, V_DECADES), V_LEAST=10.0**-V_DECADES,
    )


def _bits(x: Tensor) -> Tensor:
    """bf16 numbers as int16; others as they are."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _check(W: Tensor, gradient: Tensor, moments: dict[str, Tensor], clip: Tensor | None) -> None:
    """ValueError for what the kernel would read or write wrongly."""
    kinds, R = (torch.float32, torch.bfloat16, torch.float16), blocks_of(W.shape)
    if W.dtype not in kinds or not W.is_contiguous():
        raise ValueError(f"W: {W.dtype} of strides {W.stride()}, expected contiguous fp32, bf16 "
                         "or fp16")
    if gradient.dtype not in kinds or gradient.shape != W.shape:
        raise ValueError(f"gradient: {gradient.dtype} of shape {tuple(gradient.shape)}, expected "
                         f"fp32, bf16 or fp16 of {tuple(W.shape)}")
    if clip is not None and (clip.numel() != 1 or not clip.is_floating_point()):
        raise ValueError(f"clip: {clip.dtype} of shape {tuple(clip.shape)}, expected one number")
    for name, dtype, width in (("m", torch.int8, BLOCK), ("v", torch.uint8, BLOCK),
                               ("m_largest", torch.float32, 1), ("v_largest", torch.float32, 1)):
        found = moments[name]
        if (found.dtype, found.shape) != (dtype, (R, width)) or not found.is_contiguous():
            raise ValueError(f"{name}: {found.dtype} of shape {tuple(found.shape)}, expected "
                             f"contiguous {dtype} of {(R, width)}")
    for name, x in {"gradient": gradient, "clip": clip, **moments}.items():
        if x is not None and x.ndim and x.device != W.device:
            raise ValueError(f"{name}: on {x.device}, expected {W.device}, where W is")
    check_device("W", _bits(W), _update_kernel)

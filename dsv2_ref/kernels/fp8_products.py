# SPDX-License-Identifier: MIT
"""Products with FP8 weights that stay FP8 on their way to the multiplication.

Section 3.2.3: V2 is deployed with FP8 parameters. Decoding reads every weight to use it for a few
tokens, and lasts as long as the reading; so half the bytes are worth half the time, if the codes
of kernels/fp8.py are turned into numbers where they are multiplied, and not in memory before:

  linear_fp8                  x·Wᵀ = Σ over blocks k of s[k] · (x[k] · codes[k]ᵀ), summed in fp32
  linear_fp8_quantised_input  the same with x in FP8 too, by the card's FP8 units
  dequantise_fp8              W itself, where W is asked for (absorption), in one pass

How this file differs from its twins in fp8.py, and from published kernels:
  1. A scale is a factor of 128 terms of the sum, so it enters once a block, in fp32. W is never
     rounded to x's dtype: codes are exact there, and in bf16 the result is nearer to exact.
  2. Codes are decoded by integer arithmetic, on any card. Sign, exponent and mantissa of e4m3 are
     shifted to their places in a wider type, which is the number times a power of two, subnormal
     codes included; one multiplication takes the power away, exactly. On NVIDIA that is one piece
     of PTX for four codes, two instructions a code; the compiler's own cast to bf16 takes a
     conversion instruction for each code, and cards before capability 8.9 have none. The two codes
     of NaN, which `quantise` never makes, read as ±480.
  3. A matrix with few rows has few tiles, and they would not occupy the card: the blocks along c
     are then split among programs, whose fp32 sums a second kernel adds in order. No atomics, so
     the same bits every time.
  4. To quantise x changes the result, by about 2⁻⁴ of each number at most: so it is a function of
     its own, never chosen silently. Scales of x belong to one row and 128 columns, as DeepSeek-V3
     has published it. The FP8 units of sm_90 keep fewer bits of a sum than fp32 has; each block
     of 128 therefore starts from zero, and the blocks are added in fp32.
  5. No gradient: the weights are frozen, and for x's the twins serve.

Not timed yet. From the code for sm_90 at V2-Lite's W_O: a step of 64×128 codes for up to 16 rows is
295 instructions in each of 4 warps, so issue slots allow 27 codes a clock and multiprocessor, where
memory brings 21 at most on an H200 (4.8 TB/s, 132 of them, 1.75 GHz).

Shapes: M rows of x, r rows and c columns of W, R = ⌈r/128⌉, C = ⌈c/128⌉ blocks, the last ragged.
Copy with: fp8.py, target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from fp8 import Fp8Linear
    from fp8_products import linear_fp8
    layer = Fp8Linear(torch.randn(96, 200), multiply=linear_fp8)     # W (r, c)
    y = layer(torch.randn(3, 200))                                   # (3, 96)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_ref.kernels.fp8 import BLOCK, quantise_rows, scale_shape
from dsv2_ref.kernels.fp8 import Fp8Stack as Fp8Stack  # fp8_experts.py has it from here
from dsv2_ref.kernels.target import check_device, multiprocessors, target_of


class Tile(NamedTuple):
    """BM rows of x by BR of W, BK columns a step; `blocks` of them are to run at once on an SM."""

    BM: int
    BR: int
    BK: int
    warps: int
    stages: int
    blocks: int


# for up to 16 rows, for more, for two products with more; for input in FP8. "small" is for fp32 and
# for rows whose codes are not whole 16 bytes
TILES = {
    "sm_90": {"few": (16, 64, 128, 4, 4, 2), "many": (64, 128, 128, 8, 3, 2),
              "pair": (64, 64, 128, 4, 3, 2), "fp8": (128, 128, 128, 8, 4, 1)},
    "sm_80": {"few": (16, 64, 128, 4, 4, 2), "many": (64, 64, 128, 4, 3, 2),
              "pair": (64, 32, 128, 4, 3, 2)},
    "consumer": {"few": (16, 64, 128, 4, 3, 2), "many": (64, 64, 128, 4, 2, 2),
                 "pair": (64, 32, 128, 4, 2, 2)},
    "gfx942": {"few": (16, 64, 128, 4, 2, 2), "many": (64, 64, 128, 4, 2, 2),
               "pair": (64, 64, 128, 4, 2, 1)},
    "small": {"few": (16, 32, 32, 4, 2, 2), "many": (32, 32, 32, 4, 2, 2),
              "pair": (16, 32, 32, 4, 2, 2)},
    "cpu": {"few": (16, 32, 64, 1, 1, 1), "many": (32, 64, 128, 1, 1, 1),
            "pair": (16, 64, 64, 1, 1, 1), "fp8": (16, 32, 128, 1, 1, 1)},
}


@triton.constexpr_function
def assembly(BF16):
    """PTX: four codes in a register to two pairs of numbers.

    A pair's codes become int16, so that their signs are at bit 15 and stay there. What a shift
    carries from one into the other is not under the mask.
    """
    shift, mask, power, kind = (4, 0x87F0, 0x7B80, "bf16x2") if BF16 else (7, 0xBF80, 0x5C00,
                                                                            "f16x2")
    pair = 0x10001
    lanes = [f"prmt.b32 a, $2, 0, {select}; shl.b32 a, a, {shift}; and.b32 a, a, {mask * pair}; "
             f"fma.rn.{kind} ${i}, a, p, z;" for i, select in enumerate(("0x9180", "0xB3A2"))]
    return (f"{{ .reg .b32 a, p, z; mov.b32 p, {power * pair}; mov.b32 z, {0x8000 * pair}; "
            f"{' '.join(lanes)} }}")


@triton.jit
def decode(codes, dtype: tl.constexpr, PTX: tl.constexpr):
    """int8 codes of e4m3 -> the same numbers in dtype, exactly; ±480 for NaN."""
    if PTX and dtype == tl.bfloat16:
        number = tl.inline_asm_elementwise(assembly(True), "=r,=r,r", [codes], tl.bfloat16,
                                           is_pure=True, pack=4)
    elif PTX:
        number = tl.inline_asm_elementwise(assembly(False), "=r,=r,r", [codes], tl.float16,
                                           is_pure=True, pack=4)
    else:
        # sign to bit 31, exponent and mantissa to bits 20 to 26: the number times 2⁻¹²⁰ in fp32
        bits = codes.to(tl.int32) << 20 & -0x78100000
        number = (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)
    return number


@triton.jit
def read(matrix, rows, columns, width: tl.constexpr):
    """matrix[rows, columns] of one that is `width` wide; zeros past its edge."""
    at = matrix + rows.to(tl.int64)[:, None] * width + columns[None]
    return (tl.load(at) if width % 128 == 0 else
            tl.load(at, mask=(columns < width)[None], other=0.0))


@triton.jit
def read_some(matrix, rows, real, columns, width: tl.constexpr):
    """The same of those rows that are `real`, else zeros."""
    at = matrix + rows.to(tl.int64)[:, None] * width + columns[None]
    return tl.load(at, mask=real[:, None] & (columns < width)[None], other=0.0)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, codes, scale, out, M, r: tl.constexpr, c: tl.constexpr, EACH: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr,
):
    """out[split] = x · Wᵀ over EACH of the C blocks of columns."""
    C: tl.constexpr = (c + 127) // 128
    STEPS: tl.constexpr = (c + BK - 1) // BK
    i, split = tl.program_id(0) * BR, tl.program_id(2)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    outputs = i + tl.arange(0, BR)
    scale += i // 128 * C
    first = split * EACH * (128 // BK)
    s = tl.load(scale + first * BK // 128)
    acc = tl.zeros((BM, BR), tl.float32)
    for step in range(first, tl.minimum(first + EACH * (128 // BK), STEPS)):
        columns = step * BK + tl.arange(0, BK)
        a = read_some(x, rows, rows < M, columns, c)
        w = decode(read(codes, tl.minimum(outputs, r - 1), columns, c), x.dtype.element_ty, PTX)
        acc += s * tl.dot(a, w.T, input_precision="ieee")
        s = tl.load(scale + tl.minimum(step + 1, STEPS - 1) * BK // 128)       # ahead of its use
    at = out + split.to(tl.int64) * M * r + rows.to(tl.int64)[:, None] * r + outputs[None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (outputs < r)[None])


@triton.jit(do_not_specialize=["n"])
def _sum_kernel(parts, out, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of SPLITS parts of n numbers each."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts + split * n + at, mask=at < n, other=0.0)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["M"])
def _quantised_kernel(
    x, x_scale, codes, scale, out, M, r: tl.constexpr, c: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr,
):
    """x and W as e4m3, scales (M, C) and (R, C)."""
    C: tl.constexpr = (c + 127) // 128
    i = tl.program_id(0) * BR
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    outputs = i + tl.arange(0, BR)
    inside = tl.minimum(rows, M - 1)
    s, s_x = tl.load(scale + i // 128 * C), tl.load(x_scale + inside * C)
    acc = tl.zeros((BM, BR), tl.float32)
    for k in range(C):
        columns = k * 128 + tl.arange(0, 128)
        a = read(x, inside, columns, c)
        w = read(codes, tl.minimum(outputs, r - 1), columns, c)
        acc += (s * s_x)[:, None] * tl.dot(a, w.T)
        s = tl.load(scale + i // 128 * C + tl.minimum(k + 1, C - 1))
        s_x = tl.load(x_scale + inside * C + tl.minimum(k + 1, C - 1))
    at = out + rows.to(tl.int64)[:, None] * r + outputs[None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (outputs < r)[None])


@triton.jit
def _dequantise_kernel(codes, scale, out, r: tl.constexpr, c: tl.constexpr, BR: tl.constexpr):
    """A tile of BR rows of one block, of matrix program_id(2)."""
    R: tl.constexpr = (r + 127) // 128
    C: tl.constexpr = (c + 127) // 128
    rows, k = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1)
    e, columns = tl.program_id(2).to(tl.int64), k * 128 + tl.arange(0, 128)
    at = e * r * c + rows.to(tl.int64)[:, None] * c + columns[None]
    inside = (rows < r)[:, None] & (columns < c)[None]
    s = tl.load(scale + (e * R + tl.program_id(0) * BR // 128) * C + k)
    number = s * decode(tl.load(codes + at, mask=inside, other=0.0), tl.float32, False)
    tl.store(out + at, number.to(out.dtype.element_ty), mask=inside)


class Plan(NamedTuple):
    """A tile, whether codes are decoded in PTX, and how many programs a card runs at once."""

    tile: Tile
    PTX: bool
    programs: int

    def grid(self, slots: int, E: int, width: int) -> tuple[int, int]:
        """Tiles of `width` rows of W, and the most tiles of slots that E experts can have."""
        return triton.cdiv(width, self.tile.BR), slots // self.tile.BM + min(E, slots)

    def options(self) -> dict[str, int]:
        tile = self.tile
        return dict(BM=tile.BM, BR=tile.BR, BK=tile.BK, num_warps=tile.warps,
                    num_stages=tile.stages)


def plan(x: Tensor, name: str, *widths: int) -> Plan:
    """The tile "few", "many" or "pair" for x's device and dtype and rows of so many codes."""
    check_device("x", x, _linear_kernel)
    target = target_of(x.device)
    small = x.dtype == torch.float32 or any(width % 16 for width in widths)
    tile = Tile(*TILES["small" if small and target != "cpu" else target][name])
    half = x.dtype in (torch.bfloat16, torch.float16)
    PTX = half and target in ("sm_90", "sm_80", "consumer")
    return Plan(tile, PTX, tile.blocks * multiprocessors(x.device))


def split(C: int, tiles: int, programs: int) -> int:
    """How many of C blocks one program sums, so that about `programs` have work."""
    return triton.cdiv(C, min(C, max(1, programs // tiles)))


def linear_fp8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """`linear` of fp8.py: x (..., c), codes (r, c) e4m3, scales (R, C) fp32 -> x·Wᵀ (..., r).

    x is fp32, bf16 or fp16, and the result of its dtype. ValueError for anything else.
    """
    (r, c), flat = _checked(x, codes, scale), x.reshape(-1, x.shape[-1]).contiguous()
    M, C = len(flat), scale.shape[1]
    how = plan(x, "few" if M <= 16 else "many", c)
    across = triton.cdiv(r, how.tile.BR), triton.cdiv(M, how.tile.BM)
    each = split(C, max(1, across[0] * across[1]), how.programs)
    splits = triton.cdiv(C, each)
    out = x.new_empty(M, r)
    parts = out if splits == 1 else x.new_empty(splits, M, r, dtype=torch.float32)
    if M:
        _linear_kernel[(*across, splits)](
            flat, codes.view(torch.int8), scale, parts, M, r, c, each, PTX=how.PTX, **how.options())
    if M and splits > 1:
        _sum_kernel[(triton.cdiv(M * r, 1024),)](parts, out, M * r, splits, 1024)
    return out.view(*x.shape[:-1], r)


def linear_fp8_quantised_input(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """`linear_quantised_input` of fp8.py; arguments as above. ValueError for a card but sm_90."""
    (r, c), flat = _checked(x, codes, scale), x.reshape(-1, x.shape[-1])
    if "fp8" not in TILES[target := target_of(x.device)]:
        raise ValueError(f"x: on a card of kind {target}, expected sm_90, for its FP8 units")
    check_device("x", x, _quantised_kernel)
    small, x_scale = quantise_rows(flat)
    out, tile = x.new_empty(len(flat), r), Tile(*TILES[target]["fp8"])
    if len(flat):
        _quantised_kernel[(triton.cdiv(r, tile.BR), triton.cdiv(len(flat), tile.BM))](
            small, x_scale, codes, scale, out, len(flat), r, c, tile.BM, tile.BR,
            num_warps=tile.warps, num_stages=tile.stages)
    return out.view(*x.shape[:-1], r)


def dequantise_fp8(
    codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dequantise` of fp8.py: codes (..., r, c), scales (..., R, C) -> W (..., r, c) of `dtype`."""
    out = torch.empty_like(codes, dtype=dtype)
    check_device("out", out, _dequantise_kernel)
    _expect(codes, scale)
    r, c = codes.shape[-2:]
    if codes.numel():
        _dequantise_kernel[(triton.cdiv(r, 32), scale.shape[-1], codes[..., 0, 0].numel())](
            codes.view(torch.int8), scale, out, r, c, 32)
    return out


def _checked(x: Tensor, codes: Tensor, scale: Tensor) -> torch.Size:
    """The shape (r, c) of the weight."""
    _expect(codes, scale)
    if codes.ndim != 2 or x.ndim == 0 or x.shape[-1] != codes.shape[1]:
        raise ValueError(f"x: shape {tuple(x.shape)} with a weight {tuple(codes.shape)}, expected "
                         "(..., columns) and (rows, columns)")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x: {x.dtype}, expected one of float32, bfloat16 and float16")
    return codes.shape


def _expect(codes: Tensor, scale: Tensor) -> None:
    shape = scale_shape(codes.shape, BLOCK)
    if codes.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise ValueError(f"codes and scale: {codes.dtype} and {scale.dtype}, expected "
                         "float8_e4m3fn and float32")
    if tuple(scale.shape) != shape:
        raise ValueError(f"scale: shape {tuple(scale.shape)}, expected {shape} for a weight "
                         f"{tuple(codes.shape)}")
    if not codes.is_contiguous() or not scale.is_contiguous():
        raise ValueError("codes and scale: not contiguous, expected rows one after the other")

# SPDX-License-Identifier: MIT
"""FP8 weights: one byte per number, and one scale for every 128×128 block of a matrix.

Section 3.2.3 says only that V2's parameters are converted "into the precision of FP8" for
deployment. How is not told; this file does it as DeepSeek-V3 has published it: format e4m3, blocks
of 128×128, and a file's `weight_scale_inv` is the number that codes are *multiplied* with.

e4m3 has a sign, 4 bits of exponent and 3 of mantissa: ±448 the largest, 2⁻⁶ the smallest normal
number, steps of 2⁻⁹ below it, one NaN of each sign and no infinity. Weights lie where those steps
are coarse, so each block is divided by its own scale s, the block's largest magnitude over 448. A
number ten thousand times the others then costs its own block the small ones (they fall below the
steps), and not the whole matrix, as it would with one scale per tensor.

  |W - code·s| <= max(2⁻⁴·|W|, 2⁻¹⁰·s)      half a step of a normal or subnormal code

How this file differs from the published code:
  1. No scale is below 2⁻¹⁰⁰, so that a block of zeros needs no case of its own and nothing
     depends on whether a processor has subnormal fp32 numbers. A number takes one division or
     one multiplication in fp32, and quantising a dequantised matrix changes no bit.
  2. Only storage is FP8. `linear` dequantises one matrix at a time and multiplies in the dtype
     of its input, on any device that has the type: memory is halved and time is lost, most of
     it where torch casts codes one by one (decoding on a CPU takes about ten times as long).
     On a card fp8_products.py decodes where it multiplies. V3 quantises activations too, 1×128
     at a time, and multiplies FP8 matrices: `linear_quantised_input`, which nothing chooses.
  3. NaN and infinity are refused. A NaN would spread over its block; what a cast makes of too
     large a number depends on the program (torch 2.13 makes it 448), so none is cast.

What to leave alone: the router, the norms, the embedding and the head, as V3 does. They are few,
and a router's close scores decide which experts are read at all.

Shapes: r rows, c columns, R = ⌈r/128⌉, C = ⌈c/128⌉ blocks, the last ones ragged (576 rows are
4½ blocks, 96 columns ¾ of one); `...` any further dimensions, such as E experts.
Copy with: nothing.  Needs: torch.

Wiring, once copied:
    import torch
    from fp8 import Fp8Linear
    layer = torch.nn.Linear(256, 128, bias=False)
    small = Fp8Linear(layer.weight)                   # 1 byte a weight instead of 4
    x = torch.randn(3, 256)
    error = (small(x) - layer(x)).norm() / layer(x).norm()        # about 0.03
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 128
LARGEST = 448.0                                            # of e4m3
SMALLEST_SCALE = 7.888609052210118e-31                     # 2⁻¹⁰⁰


def scale_shape(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
    """(..., r, c) -> (..., R, C), one scale per block."""
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"weight: shape {tuple(shape)}, expected (..., rows, columns)")
    return (*shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block))


def block_scales(W: Tensor, block: int = BLOCK) -> Tensor:
    """W (..., r, c) -> (..., R, C) fp32: each block's largest magnitude over 448."""
    R, C = scale_shape(W.shape, block)[-2:]
    r, c = W.shape[-2:]
    whole = F.pad(W.float(), (0, C * block - c, 0, R * block - r))          # zeros change no amax
    blocks = whole.unflatten(-1, (C, block)).unflatten(-3, (R, block))      # (..., R, ·, C, ·)
    return (blocks.abs().amax((-3, -1)) / LARGEST).clamp(min=SMALLEST_SCALE)


def spread(scale: Tensor, rows: int, columns: int, block: int = BLOCK) -> Tensor:
    """Scales (..., R, C) -> (..., rows, columns): to every number that of its block."""
    scale = scale.repeat_interleave(block, -2)[..., :rows, :]
    return scale.repeat_interleave(block, -1)[..., :columns]


def quantise(
    W: Tensor, block: int = BLOCK, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """W (..., r, c) -> codes (..., r, c) float8_e4m3fn and scales (..., R, C) fp32.

    ValueError with its name for anything but finite numbers, also when fp64 is infinite in fp32.
    """
    scale_shape(W.shape, block)
    if not W.is_floating_point():
        raise ValueError(f"{name}: dtype {W.dtype}, expected floating point")
    W = W.detach().float()
    bad = int((~W.isfinite()).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {W.numel()} numbers are NaN or infinite, expected "
                         "finite ones")
    scale = block_scales(W, block)                                          # (..., R, C)
    # at most 448 but for fp32's rounding, so no cast overflows
    codes = (W / spread(scale, *W.shape[-2:], block)).to(torch.float8_e4m3fn)
    return codes, scale


def dequantise(
    codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, block: int = BLOCK
) -> Tensor:
    """codes (..., r, c), scales (..., R, C) -> W (..., r, c): a product in fp32, then cast."""
    if tuple(scale.shape) != scale_shape(codes.shape, block):
        raise ValueError(f"scale: shape {tuple(scale.shape)}, expected "
                         f"{scale_shape(codes.shape, block)} for a weight {tuple(codes.shape)}")
    return (codes.float() * spread(scale, *codes.shape[-2:], block)).to(dtype)


def linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (..., c), codes (r, c), scales (R, C) -> x·Wᵀ (..., r), W dequantised to x's dtype."""
    return F.linear(x, dequantise(codes, scale, x.dtype))


def quantise_rows(x: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """x (M, c) -> codes (M, c) float8_e4m3fn and scales (M, C) fp32, one for each 1×128 block.

    As V3 does with activations. What is not finite stays so: no device waits to look for it.
    """
    M, c = x.shape
    C = -(-c // block)
    blocks = F.pad(x.float(), (0, C * block - c)).view(M, C, block)
    scale = (blocks.abs().amax(-1) / LARGEST).clamp(min=SMALLEST_SCALE)     # (M, C)
    codes = (blocks / scale[..., None]).to(torch.float8_e4m3fn)
    return codes.view(M, C * block)[:, :c].contiguous(), scale


def linear_quantised_input(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The same with x (..., c) in FP8 too, 1×128 at a time, multiplied and summed in fp32."""
    small, x_scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    rounded = small.float() * x_scale.repeat_interleave(BLOCK, 1)[:, : x.shape[-1]]
    return F.linear(rounded, dequantise(codes, scale)).to(x.dtype).view(*x.shape[:-1], len(codes))


class Fp8Weight(nn.Module):
    """Codes and scales of a matrix (r, c) or a stack (E, r, c), and the dtype it is read in.

    `.to(dtype)` changes the dtype that dequantised weights come in; codes and scales stay.
    """

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        codes, scale = quantise(W)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.dtype = W.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes kept: one per number and four per block."""
        return self.codes.nbytes + self.scale.nbytes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8Weight":
        # nn.Module moves and casts through here: codes and scales move, but are never cast; a cast
        # changes only the dtype that the weight is read in
        like = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device))
        self.dtype = like.dtype
        for name in ("codes", "scale"):
            kept = getattr(self, name).to(like.device)
            setattr(self, name, nn.Parameter(kept, requires_grad=False))
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, read as {self.dtype}"


class Fp8Linear(Fp8Weight):
    """In place of nn.Linear without bias; `weight` is made anew each time it is asked for.

    `multiply` (x, codes, scale) and `read` (codes, scale, dtype) are forms of the two functions
    above.
    """

    is_its_weight = True         # x·weightᵀ and nothing else: so attention may read `weight`

    def __init__(
        self, W: Tensor, multiply: Callable[..., Tensor] = linear,
        read: Callable[..., Tensor] = dequantise,
    ) -> None:
        super().__init__(W)
        self.multiply, self.read = multiply, read

    @property
    def weight(self) -> Tensor:
        return self.read(self.codes, self.scale, self.dtype)                # (r, c)

    def forward(self, x: Tensor) -> Tensor:
        """(..., c) -> (..., r)."""
        return self.multiply(x, self.codes, self.scale)


class Fp8Stack(Fp8Weight):
    """In place of a stacked parameter (E, r, c), as far as the forms of the experts use one.

    `stack[e]` dequantises expert e alone, so that few tokens read few experts; `mT` all of them.
    """

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, e: int) -> Tensor:
        return dequantise(self.codes[e], self.scale[e], self.dtype)         # (r, c)

    def unbind(self) -> "Fp8Stack":
        return self

    @property
    def mT(self) -> Tensor:
        return dequantise(self.codes, self.scale, self.dtype).mT            # (E, c, r)

# SPDX-License-Identifier: MIT
"""Changes of weights that leave MLA's output as it is and make its cache easier to quantise.

A row that is quantised with one scale pays for its largest number. The latent and the RoPE key can
be written in another basis, in which no number is much larger than the others, and the change be
undone in the next matrix: it is done once, in the weights, and costs nothing at decode time.

  rotate_latent   turns the latent by an orthogonal matrix, as a Hadamard matrix that spreads an
                  outlier channel over all. The norm stands in the way only by its gain, which
                  moves on: R·norm(x) = norm(R·x). Insurance for large models: small ones have no
                  outlier channels and gain nothing.
  even_pairs      divides each pair of the RoPE key by what the weights say about its magnitude,
                  and multiplies the query's pair by it. RoPE turns a pair and keeps its magnitude,
                  so one factor is right at every position. A pair cannot be rotated into another:
                  they turn at different speeds.

How it differs from others: 1. no text is read for it; the rows of W_KR stand for the magnitudes,
which is right up to the correlation of the stream's channels; 2. published implementations rotate
at run time. The paper does neither.

Shapes: d width, d_c latent, d_r RoPE key, n_h heads, d_q what queries are made from.
Copy with: nothing.  Needs: torch.

Wiring, once copied:
    import torch
    from latent_basis import even_pairs, hadamard, rotate_latent
    W_DKV, gain = torch.randn(32, 64), torch.rand(32)                # (d_c, d), norm_kv's gain
    W_UK, W_UV = torch.randn(4 * 8, 32), torch.randn(4 * 6, 32)     # (n_h·d_h, d_c), (n_h·d_v, d_c)
    W_DKV, gain, W_UK, W_UV = rotate_latent(hadamard(32), W_DKV, gain, W_UK, W_UV)
    W_KR, W_QR = torch.randn(10, 64), torch.randn(4 * 10, 48)        # (d_r, d), (n_h·d_r, d_q)
    W_KR, W_QR = even_pairs(W_KR, W_QR, gain=torch.rand(64))         # the gain before the layer
"""

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor:
    """The orthogonal matrix of ±1/sqrt(n), (n, n) fp64; n a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"n: {n}, expected a power of two")
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / n**0.5


def rotate_latent(
    R: Tensor, W_DKV: Tensor, gain: Tensor, W_UK: Tensor, W_UV: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same attention with a latent turned by the orthogonal R (d_c, d_c): new weights.

    A norm without gain commutes with R, so the gain (d_c,) goes where R's inverse goes: into W_UK
    (·, d_c) and W_UV (·, d_c). Nothing is left to do at decode time.
    """
    back = gain[:, None].to(R.dtype) * R.T                                   # (d_c, d_c)
    turned = (R @ W_DKV.to(R.dtype), torch.ones_like(gain), W_UK.to(R.dtype) @ back,
              W_UV.to(R.dtype) @ back)
    return tuple(x.to(W_DKV.dtype) for x in turned)


def even_pairs(W_KR: Tensor, W_QR: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """W_KR (d_r, d), W_QR (n_h·d_r, d_q) -> both, with pairs of the key about equally large.

    gain (d,): of the norm before the attention, whose output W_KR reads.
    """
    size = (W_KR * gain).double().unflatten(0, (-1, 2)).square().sum((1, 2)).sqrt()     # (d_r/2,)
    if not (size > 0).all():
        raise ValueError("W_KR: a pair of rows is zero, expected none")
    size = (size / size.log().mean().exp()).repeat_interleave(2)[:, None]               # (d_r, 1)
    n_h = len(W_QR) // len(W_KR)
    return (W_KR / size).to(W_KR.dtype), (W_QR * size.repeat(n_h, 1)).to(W_QR.dtype)

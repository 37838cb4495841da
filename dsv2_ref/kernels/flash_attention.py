# SPDX-License-Identifier: MIT
"""Causal attention in one pass over the keys, forward and backward, without a T×S matrix.

This is `attend_expanded` of attention/mla.py, equations (40), (44) and (46), as Triton kernels in
the manner of FlashAttention-2 (Dao, 2023; section 3.1.3 of the paper says that V2 was trained with
an improved version of it). A program owns a tile of queries of one head and walks over tiles of
keys. A softmax can be had in pieces: keep the largest score m so far, the sum l of exp(s - m) and
the weighted sum of values; when a tile brings a larger score, multiply both by exp(m - m_new). At
the end o = acc / l, and of all scores only log-sum-exp, one number per query and head, is kept.

The backward pass makes the scores again, P = exp(s - lse), and needs five products per tile:
  dV = Pᵀ·dO,  dP = dO·Vᵀ,  dS = P∘(dP - δ) with δ = rowsum(dO∘O),  dQ = dS·K,  dK = dSᵀ·Q.
dQ is a sum over keys and dK, dV are sums over queries, so two kernels each own what they sum up.
S and dP are made twice, seven products instead of five; no atomics, hence the same bits each time.

How it differs from the famous version:
  1. A key is two pieces, k_c of each head and the RoPE key k_r that all heads share, and a score is
     q_c·k_c + q_r·k_r. k_r is read as it lies, (Nk, d_r), never repeated for every head: for V2 in
     bf16, 32 KB of keys per token and layer instead of 48. Widths 128 and 64 are powers of two, as
     Triton wants them; one key of 192 would be padded to 256, a fifth more work. Other widths are
     padded inside the kernels, each piece by itself.
  2. The gradient of k_r is the sum over heads of dSᵀ·q_r. Each head writes its own part, in fp32,
     and one plain sum outside adds them: deterministic, for 4·n_h·d_r bytes per token while the
     backward pass runs (32 KB for V2, as many as the gradient of k_c has).
  3. Sequences are packed, one behind the other, with `cu_q`, `cu_k` their starts. Query i of T
     stands at position i + S - T of its S keys, or where `positions` says, in any order.
  4. Tiles that are seen in full run in a loop without masks, the others (on the diagonal, at the
     end of a sequence) in a second loop of the same text. Rows past the end are not masked when
     read: the last row is read again there, and its score is not seen.
  5. Scores are taken in base 2: exp2 is what the hardware has. m, l, lse, δ and all sums are fp32.
     A query that sees nothing has lse = +inf and output 0 (the twin: NaN).
  6. δ is made by the dq kernel, which has dO at hand, and left for the dk/dv kernel.

Shapes: B sequences of T queries and S keys each, Nq and Nk those of all, n_h (H) heads, d_h + d_r
(query, key) and d_v (value) numbers; BM queries and BN keys per tile. In the kernels capitals lie
in memory and small letters are tiles; the shapes at the margin leave the padding out.
Copy with: target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from flash_attention import attend_flash
    q_c, q_r = torch.randn(2, 20, 4, 32), torch.randn(2, 20, 4, 16)   # (B, T, n_h, d_h), (…, d_r)
    c_kv, k_r = torch.randn(2, 20, 64), torch.randn(2, 20, 16)       # (B, S, d_c), (B, S, d_r)
    W_UK, W_UV = torch.randn(4, 32, 64), torch.randn(4, 24, 64)      # (n_h, d_h or d_v, d_c)
    o = attend_flash(q_c, q_r, c_kv, k_r, W_UK, W_UV, scale=48**-0.5)      # (B, T, n_h, d_v)
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv2_ref.kernels.target import check_device, on_its_device, target_of

# kernel -> (BM queries, BN keys, num_warps, num_stages), not timed yet. The first three rows have
# the large tiles that their cards have room for: with widths 128, 64, 128 in 16 bits no register is
# spilled and no product is computed twice (tests/audit/flash_attention.py). On sm_90 the kernels
# take 234, 229 and 247 registers and 213, 164 and 144 KB; dkdv with 64 queries would spill in its
# loop. "small" is for fp32 and for wider rows: in fp32 large tiles do not compile, and no card is
# fast. The other names are those of target.py.
TILES = {
    "sm_90": {"forward": (128, 128, 8, 2), "dq": (128, 64, 8, 2), "dkdv": (32, 128, 8, 3)},
    "sm_80": {"forward": (128, 64, 8, 3), "dq": (128, 32, 8, 2), "dkdv": (16, 64, 4, 2)},
    "gfx942": {"forward": (128, 64, 4, 1), "dq": (128, 32, 4, 1), "dkdv": (16, 64, 4, 1)},
    "consumer": {"forward": (64, 64, 4, 2), "dq": (64, 32, 4, 2), "dkdv": (16, 64, 4, 2)},
    "small": {"forward": (16, 32, 4, 1), "dq": (16, 32, 4, 1), "dkdv": (16, 32, 4, 1)},
    "cpu": {"forward": (64, 32, 4, 1), "dq": (32, 64, 4, 1), "dkdv": (32, 64, 4, 1)},
}


@triton.constexpr_function
def padded(width: int) -> int:
    """A tile's width: the next power of two, and no less than tl.dot takes."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _load(X, first, rows, head, H: tl.constexpr, D: tl.constexpr):
    """Rows first + rows of one head of a packed (N, H, D), with zeros up to the padded width."""
    columns = tl.arange(0, padded(D))[None, :]
    at = X + (first * H + head) * D + rows[:, None] * (H * D) + columns    # first is int64
    if padded(D) == D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=columns < D, other=0.0)
    return x


@triton.jit
def _store(X, x, first, rows, n, head, H: tl.constexpr, D: tl.constexpr):
    """Write those of the rows that are below n."""
    columns = tl.arange(0, padded(D))[None, :]
    at = X + (first * H + head) * D + rows[:, None] * (H * D) + columns
    tl.store(at, x.to(X.dtype.element_ty), mask=(rows[:, None] < n) & (columns < D))


@triton.jit
def _sequence(cu, b):
    """Where sequence b starts, and how many rows it has."""
    first = tl.load(cu + b)
    return first.to(tl.int64), tl.load(cu + b + 1) - first


@triton.jit
def _positions(positions, first, rows, shift):
    """The last key that each query sees."""
    if positions is None:
        at = rows + shift
    else:
        at = tl.load(positions + first + rows)
    return at


@triton.jit
def _key_range(at, S, BN: tl.constexpr):
    """Keys 0..whole, in whole tiles, are seen by all queries; keys up to end by some."""
    whole = tl.maximum(tl.minimum(tl.min(at, 0) + 1, S), 0) // BN * BN
    return whole, tl.minimum(tl.max(at, 0) + 1, S)


@triton.jit
def _forward(
    Q_c, Q_r, K_c, K_r, V, O, LSE, cu_q, cu_k, positions, scale_2, N, H: tl.constexpr,
    D_H: tl.constexpr, D_R: tl.constexpr, D_V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """O and LSE (H, Nq): a program takes a query tile of one head and walks over its keys."""
    head, b = tl.program_id(1), tl.program_id(2)
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM          # the longest walks go first
    first, T = _sequence(cu_q, b)
    first_k, S = _sequence(cu_k, b)
    if m0 >= T:
        return
    first, left = first + m0, T - m0
    rows = tl.arange(0, BM)
    inside = tl.minimum(rows, left - 1)
    q_c = _load(Q_c, first, inside, head, H, D_H)                           # (BM, D_H)
    q_r = _load(Q_r, first, inside, head, H, D_R)                           # (BM, D_R)
    at = _positions(positions, first, inside, S - T + m0)
    whole, end = _key_range(at, S, BN)
    acc = tl.zeros((BM, padded(D_V)), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), -float("inf"), tl.float32)                           # of s·scale_2
    for masked in tl.static_range(2):
        for n in range(whole if masked else 0, end if masked else whole, BN):
            j = tl.arange(0, BN)
            keys = tl.minimum(j, S - 1 - n) if masked else j
            k_c = _load(K_c, first_k + n, keys, head, H, D_H)               # (BN, D_H)
            k_r = _load(K_r, first_k + n, keys, 0, 1, D_R)                  # (BN, D_R)
            v = _load(V, first_k + n, keys, head, H, D_V)                   # (BN, D_V)
            s = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")          # (BM, BN)
            s = tl.dot(q_r, tl.trans(k_r), s, input_precision="ieee")
            if masked:
                seen = (n + j[None, :] <= at[:, None]) & (n + j[None, :] < S)
                s = tl.where(seen, s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * scale_2)
            # where nothing has been seen yet, -inf - -inf must not be taken
            top = tl.where(m_new == -float("inf"), 0.0, m_new) if masked else m_new
            p = tl.exp2(s * scale_2 - top[:, None])
            shrink = tl.exp2(m - top)
            l = l * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            m = m_new
    something = l > 0                                                       # was seen
    l = tl.where(something, l, 1.0)
    _store(O, acc / l[:, None], first, rows, left, head, H, D_V)
    lse = tl.where(something, m + tl.log2(l), float("inf"))
    tl.store(LSE + head * N + first + rows, lse, mask=rows < left)


@triton.jit
def _backward_dq(
    Q_c, Q_r, K_c, K_r, V, O, dO, LSE, Delta, dQ_c, dQ_r, cu_q, cu_k, positions, scale, scale_2, N,
    H: tl.constexpr, D_H: tl.constexpr, D_R: tl.constexpr, D_V: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dQ_c, dQ_r and Delta (H, Nq): the same walk with the softmax known."""
    head, b = tl.program_id(1), tl.program_id(2)
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    first, T = _sequence(cu_q, b)
    first_k, S = _sequence(cu_k, b)
    if m0 >= T:
        return
    first, left = first + m0, T - m0
    rows = tl.arange(0, BM)
    inside = tl.minimum(rows, left - 1)
    q_c = _load(Q_c, first, inside, head, H, D_H)                           # (BM, D_H)
    q_r = _load(Q_r, first, inside, head, H, D_R)                           # (BM, D_R)
    do = _load(dO, first, inside, head, H, D_V)                             # (BM, D_V)
    o = _load(O, first, inside, head, H, D_V)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)                 # (BM,)
    tl.store(Delta + head * N + first + rows, delta, mask=rows < left)
    lse = tl.load(LSE + head * N + first + inside)
    at = _positions(positions, first, inside, S - T + m0)
    whole, end = _key_range(at, S, BN)
    dq_c = tl.zeros((BM, padded(D_H)), tl.float32)
    dq_r = tl.zeros((BM, padded(D_R)), tl.float32)
    for masked in tl.static_range(2):
        for n in range(whole if masked else 0, end if masked else whole, BN):
            j = tl.arange(0, BN)
            keys = tl.minimum(j, S - 1 - n) if masked else j
            k_c = _load(K_c, first_k + n, keys, head, H, D_H)               # (BN, D_H)
            k_r = _load(K_r, first_k + n, keys, 0, 1, D_R)                  # (BN, D_R)
            v = _load(V, first_k + n, keys, head, H, D_V)                   # (BN, D_V)
            s = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")          # (BM, BN)
            s = tl.dot(q_r, tl.trans(k_r), s, input_precision="ieee")
            if masked:
                seen = (n + j[None, :] <= at[:, None]) & (n + j[None, :] < S)
                s = tl.where(seen, s, -float("inf"))
            p = tl.exp2(s * scale_2 - lse[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = (p * (dp - delta[:, None])).to(k_c.dtype)
            dq_c = tl.dot(ds, k_c, dq_c, input_precision="ieee")
            dq_r = tl.dot(ds, k_r, dq_r, input_precision="ieee")
    _store(dQ_c, dq_c * scale, first, rows, left, head, H, D_H)
    _store(dQ_r, dq_r * scale, first, rows, left, head, H, D_R)


@triton.jit
def _query_range(positions, n0, T, S, BM: tl.constexpr, BN: tl.constexpr):
    """Query tiles a..z see some key of the tile at n0; whole..edge of them see all, unmasked."""
    z = tl.cdiv(T, BM)
    if positions is None:
        a = tl.maximum(n0 - (S - T), 0) // BM
        last = tl.minimum(n0 + BN, S) - 1 - (S - T)               # the query at the last key
        whole = tl.minimum(tl.cdiv(tl.maximum(last, 0), BM), z)
        edge = tl.maximum(T // BM, whole)
    else:                                                         # in any order: look at all
        a, whole, edge = 0, z, z
    return a, whole, edge, z


@triton.jit
def _backward_dkdv(
    Q_c, Q_r, K_c, K_r, V, dO, LSE, Delta, dK_c, dK_r, dV, cu_q, cu_k, positions, scale, scale_2, N,
    H: tl.constexpr, D_H: tl.constexpr, D_R: tl.constexpr, D_V: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dK_c, dV and each head's part of dK_r: a key tile walks over the queries that see it."""
    head, b = tl.program_id(1), tl.program_id(2)
    n0 = tl.program_id(0) * BN
    first_q, T = _sequence(cu_q, b)
    first, S = _sequence(cu_k, b)
    if n0 >= S:
        return
    first, left = first + n0, S - n0
    rows = tl.arange(0, BN)
    inside = tl.minimum(rows, left - 1)
    k_c = _load(K_c, first, inside, head, H, D_H)                           # (BN, D_H)
    k_r = _load(K_r, first, inside, 0, 1, D_R)                              # (BN, D_R)
    v = _load(V, first, inside, head, H, D_V)                               # (BN, D_V)
    a, whole, edge, z = _query_range(positions, n0, T, S, BM, BN)
    dk_c = tl.zeros((BN, padded(D_H)), tl.float32)
    dk_r = tl.zeros((BN, padded(D_R)), tl.float32)
    dv = tl.zeros((BN, padded(D_V)), tl.float32)
    for masked in tl.static_range(2):
        for tile in range(a if masked else whole, z - (edge - whole) if masked else edge):
            m = (tile + tl.where(tile < whole, 0, edge - whole) if masked else tile) * BM
            i = tl.arange(0, BM)
            queries = tl.minimum(i, T - 1 - m) if masked else i
            q_c = _load(Q_c, first_q + m, queries, head, H, D_H)            # (BM, D_H)
            q_r = _load(Q_r, first_q + m, queries, head, H, D_R)            # (BM, D_R)
            do = _load(dO, first_q + m, queries, head, H, D_V)              # (BM, D_V)
            lse = tl.load(LSE + head * N + first_q + m + queries)
            delta = tl.load(Delta + head * N + first_q + m + queries)
            s = tl.dot(k_c, tl.trans(q_c), input_precision="ieee")          # (BN, BM)
            s = tl.dot(k_r, tl.trans(q_r), s, input_precision="ieee")
            if masked:
                at = _positions(positions, first_q + m, queries, S - T + m)
                seen = (n0 + rows[:, None] <= at[None, :]) & (m + i[None, :] < T)
                s = tl.where(seen, s, -float("inf"))
            p = tl.exp2(s * scale_2 - lse[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q_c.dtype)
            dk_c = tl.dot(ds, q_c, dk_c, input_precision="ieee")
            dk_r = tl.dot(ds, q_r, dk_r, input_precision="ieee")
    _store(dK_c, dk_c * scale, first, rows, left, head, H, D_H)
    _store(dK_r, dk_r * scale, first, rows, left, head, H, D_R)
    _store(dV, dv, first, rows, left, head, H, D_V)


def tile(kernel: str, name: str, widths: tuple[int, int, int], itemsize: int) -> dict[str, int]:
    """Launch options of a kernel ("forward", "dq", "dkdv") for widths d_h, d_r, d_v."""
    if name != "cpu" and (itemsize > 2 or sum(padded(width) for width in widths) > 320):
        name = "small"
    BM, BN, num_warps, num_stages = TILES[name][kernel]
    return {"BM": BM, "BN": BN, "num_warps": num_warps, "num_stages": num_stages}


class _FlashAttention(torch.autograd.Function):
    """Launches the kernels; all tensors contiguous and checked."""

    @staticmethod
    def forward(ctx, q_c, q_r, k_c, k_r, v, scale, cu_q, cu_k, max_q, max_k, positions):
        N, H, D_V = len(q_c), q_c.shape[1], v.shape[-1]
        widths = q_c.shape[-1], q_r.shape[-1], D_V
        ctx.sizes = dict(zip(("D_H", "D_R", "D_V"), widths), N=N, H=H)
        ctx.options = {kernel: tile(kernel, target_of(q_c.device), widths, q_c.element_size())
                       for kernel in ("forward", "dq", "dkdv")}
        ctx.scale, ctx.max_q, ctx.max_k, ctx.sequences = scale, max_q, max_k, len(cu_q) - 1
        o = q_c.new_empty(N, H, D_V)
        lse = q_c.new_empty(H, N, dtype=torch.float32)
        options = ctx.options["forward"]
        with torch.cuda.device_of(q_c):
            _forward[triton.cdiv(max_q, options["BM"]), H, ctx.sequences](
                q_c, q_r, k_c, k_r, v, o, lse, cu_q, cu_k, positions, scale * math.log2(math.e),
                **ctx.sizes, **options)
        ctx.save_for_backward(q_c, q_r, k_c, k_r, v, o, lse, cu_q, cu_k, positions)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q_c, q_r, k_c, k_r, v, o, lse, cu_q, cu_k, positions = ctx.saved_tensors
        do, H = do.contiguous(), ctx.sizes["H"]
        dq_c, dq_r, dk_c, dv = (torch.empty_like(x) for x in (q_c, q_r, k_c, v))
        parts = k_r.new_empty(len(k_r), H, k_r.shape[-1], dtype=torch.float32)    # (Nk, n_h, d_r)
        delta = torch.empty_like(lse)
        last = cu_q, cu_k, positions, ctx.scale, ctx.scale * math.log2(math.e)
        with torch.cuda.device_of(q_c):
            options = ctx.options["dq"]
            _backward_dq[triton.cdiv(ctx.max_q, options["BM"]), H, ctx.sequences](
                q_c, q_r, k_c, k_r, v, o, do, lse, delta, dq_c, dq_r, *last,
                **ctx.sizes, **options)
            options = ctx.options["dkdv"]
            _backward_dkdv[triton.cdiv(ctx.max_k, options["BN"]), H, ctx.sequences](
                q_c, q_r, k_c, k_r, v, do, lse, delta, dk_c, parts, dv, *last,
                **ctx.sizes, **options)
        return dq_c, dq_r, dk_c, parts.sum(1).to(k_r.dtype), dv, *[None] * 6


def flash_attention(
    q_c: Tensor, q_r: Tensor, k_c: Tensor, k_r: Tensor, v: Tensor, scale: float, cu_q: Tensor,
    cu_k: Tensor, max_q: int, max_k: int, positions: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed sequences; differentiable in the first five arguments.

    q_c (Nq, n_h, d_h), q_r (Nq, n_h, d_r), k_c (Nk, n_h, d_h), k_r (Nk, d_r), v (Nk, n_h, d_v) ->
    (Nq, n_h, d_v). Sequence b has the queries cu_q[b] to cu_q[b + 1] and the keys cu_k[b] to
    cu_k[b + 1], any number of each, none too; cu_q, cu_k (B + 1,) start at 0, end at Nq, Nk, and
    are not looked at here, where a GPU would have to be waited for; max_q, max_k are the longest.
    Query i of T sees keys up to i + S - T, or up to positions[i] where `positions` (Nq,) is given.
    """
    _check(q_c, q_r, k_c, k_r, v, scale, cu_q, cu_k, positions)
    tensors = (x.contiguous() for x in (q_c, q_r, k_c, k_r, v))
    cu_q, cu_k = (x.to(torch.int32).contiguous() for x in (cu_q, cu_k))
    if positions is not None:
        positions = positions.to(torch.int32).contiguous()
    return _FlashAttention.apply(*tensors, scale, cu_q, cu_k, max_q, max_k, positions)


@on_its_device
def attend_flash(
    q_c: Tensor, q_r: Tensor, c_kv: Tensor, k_r: Tensor, W_UK: Tensor, W_UV: Tensor,
    scale: float, positions: Tensor | None = None,
) -> Tensor:
    """In place of `attend_expanded`, for fp16, bf16 and fp32.

    q_c (B, T, n_h, d_h), q_r (B, T, n_h, d_r), c_kv (B, S, d_c), k_r (B, S, d_r),
    W_UK (n_h, d_h, d_c), W_UV (n_h, d_v, d_c), positions (B, T) of the queries -> (B, T, n_h, d_v).
    """
    (B, T, n_h, _), S = q_c.shape, c_kv.shape[1]
    k_c = F.linear(c_kv, W_UK.flatten(0, 1)).unflatten(-1, (n_h, -1))        # (B, S, n_h, d_h)
    v = F.linear(c_kv, W_UV.flatten(0, 1)).unflatten(-1, (n_h, -1))          # (B, S, n_h, d_v)
    packed = (x.flatten(0, 1) for x in (q_c, q_r, k_c, k_r, v))
    starts = torch.arange(B + 1, device=q_c.device, dtype=torch.int32)
    if positions is not None:
        positions = positions.expand(B, T).flatten()
    o = flash_attention(*packed, scale, starts * T, starts * S, T, S, positions)
    return o.unflatten(0, (B, T))


def _check(q_c, q_r, k_c, k_r, v, scale, cu_q, cu_k, positions) -> None:
    (Nq, n_h, d_h), (Nk, d_r), d_v = q_c.shape, k_r.shape, v.shape[-1]
    shapes = {"q_r": (q_r, (Nq, n_h, d_r)), "k_c": (k_c, (Nk, n_h, d_h)), "v": (v, (Nk, n_h, d_v)),
              "cu_k": (cu_k, tuple(cu_q.shape))}
    if positions is not None:
        shapes["positions"] = positions, (Nq,)
    for name, (x, expected) in shapes.items():
        if x.shape != expected:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {expected}")
    for name, x in {"q_r": q_r, "k_c": k_c, "k_r": k_r, "v": v}.items():
        if x.dtype != q_c.dtype:
            raise ValueError(f"{name}: dtype {x.dtype}, expected q_c's {q_c.dtype}")
    if q_c.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q_c: dtype {q_c.dtype}, expected float16, bfloat16 or float32")
    if not scale > 0:
        raise ValueError(f"scale: {scale}, expected a positive number")
    check_device("q_c", q_c, _forward)

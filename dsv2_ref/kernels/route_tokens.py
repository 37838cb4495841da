# SPDX-License-Identifier: MIT
"""Which experts each token goes to, its slots sorted by expert, and their rows summed again: where
a grouped GEMM begins and ends.

Sections 2.2.1-2.2.2. The affinities come from moe/routing.py; what follows is small work on many
tiny rows, where general sorts and a host that waits for counts cost more than the work itself:

  select_greedy_fused           K times: take the largest of a row, cross it out.
  select_device_limited_fused   the same M times over each device's best expert first; experts of
                                the other devices are then crossed out before the K rounds begin.
  sort_slots_fused              a counting sort. Each block of slots counts its experts; one running
                                sum over (expert, block) turns the counts into first places; each
                                block then puts its slots down in the order in which they stand.
  route_fused                   all of it for up to 16 tokens, in two launches: products with the
                                centroids, a program an expert, since one alone would read all the
                                3 MB of V2's; then softmax, the choice, gates and the sort in one
                                program. There a column of the table of tokens by experts holds all
                                of an expert's slots, and no counts need to meet.
  sum_slots, add_up_fused       each token's K rows summed in fp32, alone or with what they join.

The sort is stable because a slot's place is the number of slots that must stand before it: all of
smaller experts, those of its expert in earlier blocks (the running sum), and those in its own block
(a running sum down the columns of a table of zeros and ones, slots by experts). No atomics, so the
same input gives the same order, and the sums of a backward pass the same bits.

How this file differs from its twins in moe/:
  1. Equal affinities go to the smaller index; `torch.topk` promises nothing there. NaN counts as
     the largest number, as with torch, so that no index is ever out of range.
  2. The order has room for all N·K slots, and its first `offsets[E]` places are filled: to cut it
     there, the host would have to wait for a number that only the device knows.
  3. Offsets take the place of counts: expert e's slots stand at offsets[e] to offsets[e + 1].
  4. Products with the centroids are summed in fp32 in an order of their own: affinities differ from
     the twin's in the last bits, and of two experts as near as that the other one may win.

A device is one of the D groups of experts in device-limited routing. A slot is one (token, expert)
pair, numbered n·K + k.
Launch: 32 tokens, 64 slots or 1,024 columns of a sum per program, 4 warps. Not timed yet.

Shapes: N flat tokens, d width, E routed experts, K slots per token, D devices, M devices per token,
R kept slots.
Copy with: target.py.  Needs: torch, triton.

Wiring, once copied:
    import torch                       # on a CPU, first set TRITON_INTERPRET=1
    from route_tokens import select_device_limited_fused, sort_slots_fused
    s = torch.randn(40, 8).softmax(-1)                               # (N, E) affinities
    indices = select_device_limited_fused(s, top_k=3, n_devices=4, max_devices=2)     # (N, K)
    gates = s.gather(-1, indices)                                    # (N, K)
    order, offsets = sort_slots_fused(indices, n_routed=8)
    first = order[offsets[0]:offsets[1]] // 3                        # the tokens of expert 0
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2_ref.kernels.target import check_device, on_its_device

BLOCK_TOKENS = 32
BLOCK_SLOTS = 64
FEW = 16                             # tokens that one program routes


@triton.jit
def _in_reach(values, device, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
              DEVICES: tl.constexpr, EACH: tl.constexpr):
    """values (BLOCK, DEVICES, EACH), -inf outside the M best devices -> (BLOCK, DEVICES·EACH)."""
    if M < D:
        best = tl.max(values, 2)                                    # (BLOCK, DEVICES)
        allowed = tl.zeros((BLOCK, DEVICES), tl.int1)
        for _ in tl.static_range(M):
            winner = device[None] == tl.argmax(best, 1)[:, None]
            allowed = allowed | winner
            best = tl.where(winner, -float("inf"), best)
        values = tl.where(allowed[:, :, None], values, -float("inf"))
    return tl.reshape(values, (BLOCK, DEVICES * EACH))


@triton.jit
def _select_kernel(
    s, indices, N, E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, DEVICES: tl.constexpr, EACH: tl.constexpr,
):
    """Rows as (devices, experts of each), both padded to powers of two with -inf."""
    each: tl.constexpr = E // D
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    device, place = tl.arange(0, DEVICES), tl.arange(0, EACH)
    expert = device[:, None] * each + place[None]                   # (DEVICES, EACH)
    real = (device < D)[:, None] & (place < each)[None]
    values = tl.load(s + n.to(tl.int64)[:, None, None] * E + expert[None],
                     mask=(n < N)[:, None, None] & real[None], other=-float("inf"))
    values = tl.where(values == values, values, float("inf"))       # NaN is the largest
    values = _in_reach(values, device, M, D, BLOCK, DEVICES, EACH)
    column = tl.arange(0, DEVICES * EACH)
    for k in tl.static_range(K):
        winner = tl.argmax(values, 1)                               # (BLOCK,)
        chosen = winner // EACH * each + winner % EACH
        tl.store(indices + n.to(tl.int64) * K + k, chosen.to(tl.int64), mask=n < N)
        values = tl.where(column[None] == winner[:, None], -float("inf"), values)


@triton.jit(do_not_specialize=["N"])
def _similarity_kernel(u, centroids, z, N, E: tl.constexpr, d: tl.constexpr, TOKENS: tl.constexpr,
                       BLOCK: tl.constexpr):
    """z[n, e] = u[n]·centroids[e] for this program's e and all N <= TOKENS tokens, in fp32."""
    n, e = tl.arange(0, TOKENS)[:, None], tl.program_id(0)
    acc = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in tl.range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)[None]
        x = tl.load(u + n * d + column, mask=(n < N) & (column < d), other=0.0).to(tl.float32)
        acc += x * tl.load(centroids + e * d + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(z + n * E + e, tl.sum(acc, 1)[:, None], mask=n < N)


@triton.jit(do_not_specialize=["N"])
def _route_kernel(
    z, s_out, indices, gates, order, offsets, factor, N, E: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, DEVICES: tl.constexpr,
    EACH: tl.constexpr,
):
    """One program for all N <= BLOCK tokens; rows as in `_select_kernel`."""
    each: tl.constexpr = E // D
    n = tl.arange(0, BLOCK)
    device, place = tl.arange(0, DEVICES), tl.arange(0, EACH)
    real = (device < D)[:, None] & (place < each)[None]
    at = n[:, None, None] * E + (device[:, None] * each + place[None])[None]
    inside = (n < N)[:, None, None] & real[None]
    values = tl.where(real[None], tl.load(z + at, mask=inside, other=0.0), -float("inf"))
    values = tl.exp(values - tl.max(tl.max(values, 2), 1)[:, None, None])
    values /= tl.sum(tl.sum(values, 2), 1)[:, None, None]
    tl.store(s_out + at, values, mask=inside)
    s = tl.reshape(values, (BLOCK, DEVICES * EACH))
    values = tl.where(values == values, values, float("inf"))       # NaN is the largest
    values = _in_reach(tl.where(real[None], values, -float("inf")), device, M, D, BLOCK, DEVICES,
                       EACH)
    column = tl.arange(0, DEVICES * EACH)
    expert = column // EACH * each + column % EACH
    slot, taken = tl.zeros_like(values).to(tl.int32), tl.zeros_like(values).to(tl.int32)
    for k in tl.static_range(K):
        winner = tl.argmax(values, 1)                               # (BLOCK,)
        hit = column[None] == winner[:, None]
        tl.store(indices + n * K + k, tl.sum(tl.where(hit, expert[None], 0), 1).to(tl.int64),
                 mask=n < N)
        tl.store(gates + n * K + k, tl.sum(tl.where(hit, s, 0.0), 1) * factor, mask=n < N)
        slot, taken = tl.where(hit, n[:, None] * K + k, slot), tl.where(hit, 1, taken)
        values = tl.where(hit, -float("inf"), values)
    taken = tl.where((n < N)[:, None], taken, 0)
    counts = tl.sum(taken, 0)                                       # (DEVICES·EACH,)
    first = tl.cumsum(counts, 0) - counts
    earlier = tl.cumsum(taken, 0) - taken                           # of this expert
    tl.store(order + first[None] + earlier, slot, mask=taken > 0)
    tl.store(offsets + expert, first, mask=(column // EACH < D) & (column % EACH < each))
    tl.store(offsets + E, N * K)


@triton.jit
def _table(indices, keep, slots, E: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
           EXPERTS: tl.constexpr):
    """This block's slots (BLOCK,), and 1 where slot i goes to expert e (BLOCK, EXPERTS)."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = slot < slots
    if KEEP:
        kept = kept & (tl.load(keep + slot, mask=kept, other=0) != 0)
    expert = tl.load(indices + slot, mask=kept, other=-1)
    column = tl.arange(0, EXPERTS)
    return slot, ((expert[:, None] == column[None]) & (column < E)[None]).to(tl.int32)


@triton.jit
def _count_kernel(
    indices, keep, counts, slots, blocks, E: tl.constexpr, KEEP: tl.constexpr,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):
    _, table = _table(indices, keep, slots, E, KEEP, BLOCK, EXPERTS)
    e = tl.arange(0, EXPERTS)
    tl.store(counts + e * blocks + tl.program_id(0), tl.sum(table, 0), mask=e < E)


@triton.jit
def _place_kernel(
    indices, keep, edges, order, slots, blocks, E: tl.constexpr, KEEP: tl.constexpr,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):
    slot, table = _table(indices, keep, slots, E, KEEP, BLOCK, EXPERTS)
    e = tl.arange(0, EXPERTS)
    first = tl.load(edges + e * blocks + tl.program_id(0), mask=e < E, other=0)
    earlier = tl.cumsum(table, 0) - table                           # of this expert in this block
    place = tl.sum(table * (first[None] + earlier), 1)              # (BLOCK,)
    tl.store(order + place, slot, mask=tl.sum(table, 1) > 0)


@triton.jit
def _sum_kernel(rows, keep, u, shared, y, d: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr,
                ADD: tl.constexpr, BLOCK: tl.constexpr):
    """y[n] = the sum of rows n·K to n·K + K - 1 but for the dropped ones, u and shared if ADD."""
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        mask = column < d
        if KEEP:
            mask = mask & (tl.load(keep + n * K + k) != 0)
        acc += tl.load(rows + (n * K + k) * d + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        acc += tl.load(shared + n * d + column, mask=column < d, other=0.0).to(tl.float32)
        acc += tl.load(u + n * d + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(y + n * d + column, acc.to(y.dtype.element_ty), mask=column < d)


def _check(
    name: str, s: Tensor, top_k: int, n_devices: int, max_devices: int
) -> tuple[int, int, int]:
    """N, E and the experts of a device; ValueError for what cannot be chosen from s (N, E)."""
    if s.ndim != 2 or not s.is_floating_point():
        raise ValueError(f"{name}: {s.dtype} of shape {tuple(s.shape)}, expected affinities (N, E)")
    N, E = s.shape
    if n_devices < 1 or E % n_devices:
        raise ValueError(f"n_devices: {n_devices}, expected a divisor of E = {E}")
    if not 1 <= max_devices <= n_devices:
        raise ValueError(f"max_devices: {max_devices}, expected 1 to n_devices = {n_devices}")
    check_device(name, s, _select_kernel)
    each = E // n_devices
    if not 1 <= top_k <= each * max_devices:
        raise ValueError(f"top_k: {top_k}, expected 1 to {each * max_devices}, the experts in "
                         "reach")
    return N, E, each


def select_greedy_fused(
    s: Tensor, top_k: int, n_devices: int = 1, max_devices: int = 1
) -> Tensor:
    """The K experts of highest affinity: (N, E) -> (N, K) int64, best first."""
    return select_device_limited_fused(s, top_k, 1, 1)


@on_its_device
def select_device_limited_fused(
    s: Tensor, top_k: int, n_devices: int, max_devices: int
) -> Tensor:
    """The K best experts on the M best devices: (N, E) -> (N, K) int64, best first.

    Expert i lies on device i // (E / n_devices). No gradient: gates are gathered from s.
    """
    N, E, each = _check("s", s, top_k, n_devices, max_devices)
    indices = torch.empty(N, top_k, dtype=torch.int64, device=s.device)
    if N:
        _select_kernel[(triton.cdiv(N, BLOCK_TOKENS),)](
            s.detach().contiguous(), indices, N, E, top_k, n_devices, max_devices, BLOCK_TOKENS,
            triton.next_power_of_2(n_devices), triton.next_power_of_2(each),
        )
    return indices


@on_its_device
def sort_slots_fused(
    indices: Tensor, n_routed: int, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Slots grouped by expert, in their own order within an expert; nothing waits for the device.

    indices (N, K), keep (N, K) bool -> order (N·K,) int32, of which the first R are the kept slots
    n·K + k sorted by expert and the rest mean nothing, and offsets (E + 1,) int32.
    """
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"indices: dtype {indices.dtype}, expected int64 or int32")
    if keep is not None and (keep.dtype != torch.bool or keep.shape != indices.shape):
        raise ValueError(f"keep: {keep.dtype} of shape {tuple(keep.shape)}, expected bool of "
                         f"{tuple(indices.shape)}")
    check_device("indices", indices, _place_kernel)
    slots, device = indices.numel(), indices.device
    blocks = max(1, triton.cdiv(slots, BLOCK_SLOTS))
    counts = torch.empty(n_routed * blocks, dtype=torch.int32, device=device)
    edges = torch.zeros(n_routed * blocks + 1, dtype=torch.int32, device=device)
    order = torch.empty(slots, dtype=torch.int32, device=device)
    flat = indices.contiguous()
    kept = flat if keep is None else keep.contiguous().view(torch.uint8)
    sizes = (slots, blocks, n_routed, keep is not None, BLOCK_SLOTS,
             triton.next_power_of_2(n_routed))
    _count_kernel[(blocks,)](flat, kept, counts, *sizes)
    torch.cumsum(counts, 0, dtype=torch.int32, out=edges[1:])
    _place_kernel[(blocks,)](flat, kept, edges, order, *sizes)
    return order, edges[::blocks].contiguous()


@on_its_device
def route_fused(
    u: Tensor, centroids: Tensor, top_k: int, n_devices: int = 1, max_devices: int | None = None,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """`Router` of routing.py and the sort, for few tokens. There is no gradient.

    u (N, d), N from 1 to 16, and centroids (E, d), in fp32, bf16 or fp16 -> indices (N, K) int64,
    gates (N, K) and affinities (N, E) fp32, and order (N·K,) and offsets (E + 1,) as
    `sort_slots_fused`.
    """
    for name, x in (("u", u), ("centroids", centroids)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name}: dtype {x.dtype}, expected float32, bfloat16 or float16")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: requires a gradient, expected none (the twin for training)")
        check_device(name, x, _route_kernel)
    if not 1 <= len(u) <= FEW or u.ndim != 2 or u.shape[1:] != centroids.shape[1:]:
        raise ValueError(f"u, centroids: shapes {tuple(u.shape)}, {tuple(centroids.shape)}, "
                         f"expected (N, d), (E, d), N from 1 to {FEW}")
    (N, d), E = u.shape, len(centroids)
    z, s = (torch.empty(N, E, device=u.device) for _ in range(2))
    n_devices, max_devices = (1, 1) if max_devices is None else (n_devices, max_devices)
    _, _, each = _check("z", z, top_k, n_devices, max_devices)
    few = 1 if N == 1 else FEW
    _similarity_kernel[(E,)](u.contiguous(), centroids.contiguous(), z, N, E, d, few,
                             triton.next_power_of_2(min(d, 1024 if few == 1 else 256)))
    indices = torch.empty(N, top_k, dtype=torch.int64, device=u.device)
    gates = torch.empty(N, top_k, device=u.device)
    order = torch.empty(N * top_k, dtype=torch.int32, device=u.device)
    offsets = torch.empty(E + 1, dtype=torch.int32, device=u.device)
    _route_kernel[(1,)](
        z, s, indices, gates, order, offsets, float(scaling_factor), N, E, top_k, n_devices,
        max_devices, few, triton.next_power_of_2(n_devices), triton.next_power_of_2(each),
        num_warps=1 if few == 1 else 4)
    return indices, gates, s, (order, offsets)


def sum_slots(rows: Tensor, top_k: int, keep: Tensor | None = None) -> Tensor:
    """rows (N·K, d), keep (N, K) -> (N, d): each token's kept rows, summed in fp32."""
    kept = rows if keep is None else keep.contiguous()
    return _sum(rows, top_k, kept, rows, rows, keep is not None, False)


@on_its_device
def add_up_fused(u: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
    """`add_up` of experts.py: u + shared + routed, (N, d) each, or routed (N, K, d) not summed yet.

    Summed in fp32 and rounded once, where the twin rounds twice. There is no gradient.
    """
    if u.shape != shared.shape or (*routed.shape[:1], *routed.shape[-1:]) != tuple(u.shape):
        raise ValueError(f"u, shared, routed: shapes {tuple(u.shape)}, {tuple(shared.shape)}, "
                         f"{tuple(routed.shape)}, expected (N, d) twice and (N, K, d)")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u, shared, routed)):
        raise ValueError("add_up_fused: an input requires a gradient, expected none (add_up for "
                         "training)")
    check_device("u", u, _sum_kernel)
    top_k = routed.shape[1] if routed.ndim == 3 else 1
    rows = routed.contiguous().view(-1, u.shape[1])
    return _sum(rows, top_k, rows, u.contiguous(), shared.contiguous(), False, True)


def _sum(
    rows: Tensor, top_k: int, keep: Tensor, u: Tensor, shared: Tensor, drops: bool, adds: bool
) -> Tensor:
    y = u.new_empty(len(rows) // top_k, rows.shape[1])
    if len(y):
        block = min(1024, triton.next_power_of_2(y.shape[1]))
        _sum_kernel[(len(y), triton.cdiv(y.shape[1], block))](
            rows, keep, u, shared, y, y.shape[1], top_k, drops, adds, block)
    return y

# SPDX-License-Identifier: MIT
"""Which experts each token goes to, and its slots sorted by expert: where a grouped GEMM begins.

Sections 2.2.1-2.2.2. The affinities come from moe/routing.py; what follows is small work on many
tiny rows, where general sorts and a host that waits for counts cost more than the work itself:

  select_greedy_fused           K times: take the largest of a row, cross it out.
  select_device_limited_fused   the same M times over each device's best expert first; experts of
                                the other devices are then crossed out before the K rounds begin.
  sort_slots_fused              a counting sort. Each block of slots counts its experts; one running
                                sum over (expert, block) turns the counts into first places; each
                                block then puts its slots down in the order in which they stand.

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

A device is one of the D groups of experts in device-limited routing. A slot is one (token, expert)
pair, numbered n·K + k.
Launch: 32 tokens or 64 slots per program, 4 warps. Not timed yet.

Shapes: N flat tokens, E routed experts, K slots per token, D devices, M devices per token, R kept
slots.
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
    if M < D:
        best = tl.max(values, 2)                                    # (BLOCK, DEVICES)
        allowed = tl.zeros((BLOCK, DEVICES), tl.int1)
        for _ in tl.static_range(M):
            winner = device[None] == tl.argmax(best, 1)[:, None]
            allowed = allowed | winner
            best = tl.where(winner, -float("inf"), best)
        values = tl.where(allowed[:, :, None], values, -float("inf"))
    values = tl.reshape(values, (BLOCK, DEVICES * EACH))
    column = tl.arange(0, DEVICES * EACH)
    for k in tl.static_range(K):
        winner = tl.argmax(values, 1)                               # (BLOCK,)
        chosen = winner // EACH * each + winner % EACH
        tl.store(indices + n.to(tl.int64) * K + k, chosen.to(tl.int64), mask=n < N)
        values = tl.where(column[None] == winner[:, None], -float("inf"), values)


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
    if s.ndim != 2 or not s.is_floating_point():
        raise ValueError(f"s: {s.dtype} of shape {tuple(s.shape)}, expected affinities (N, E)")
    N, E = s.shape
    if n_devices < 1 or E % n_devices:
        raise ValueError(f"n_devices: {n_devices}, expected a divisor of E = {E}")
    if not 1 <= max_devices <= n_devices:
        raise ValueError(f"max_devices: {max_devices}, expected 1 to n_devices = {n_devices}")
    check_device("s", s, _select_kernel)
    each = E // n_devices
    if not 1 <= top_k <= each * max_devices:
        raise ValueError(f"top_k: {top_k}, expected 1 to {each * max_devices}, the experts in "
                         "reach")
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

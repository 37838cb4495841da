# SPDX-License-Identifier: MIT
"""Shared and routed experts: the computation of DeepSeekMoE once the router has spoken.

Section 2.2.1, equation (20): h' = u + sum of the shared experts + gated sum of the chosen routed
experts. An expert is a small SwiGLU feed-forward network. DeepSeekMoE cuts experts fine (160 of
width 1536 where others have 8 of width 14336), so that a token combines six specialists, and keeps
two experts that every token passes, so that the others need not all learn the same common things.

The routed sum is computed in three ways, three functions with one signature:

  experts_loop      one expert after the other, on the tokens that chose it. Reads only the experts
                    that were chosen: right for few tokens, and the plainest to read.
  experts_padded    all experts at once in a batched matmul, each padded to the fullest one. Works
                    for every dtype and device; right on a CPU under bf16 autocast, where row
                    counts that change at every step cost more than the padding.
  experts_grouped   `torch.nn.functional.grouped_mm` over slots sorted by expert: no padding. Right
                    on a GPU in bf16 and on a CPU in fp32; refuses fp64 and rows that are not
                    multiples of 16 bytes.

How this file differs from the famous versions:
  1. Weights of all experts are stacked, (E, w, d); an expert that gets no token therefore gets a
     gradient of zeros, never None, and nobody waits for it.
  2. Shared experts are *summed*: N_s networks of width w are one of width N_s·w, as published.
  3. Router and experts read the normed stream x, while `MixtureOfExperts` adds its result to the
     un-normed u and returns the sum: (20) leaves the pre-norm out. Do not add u once more.
  4. Experts may be a share of all, those that one process holds: `of_share`.

A slot is one (token, expert) pair.
Shapes: N flat tokens, d width, w expert width, E routed experts, K slots a token, R kept slots.
Copy with: nothing.  Needs: torch (2.10 or later for `experts_grouped`).

Wiring, once copied:
    import torch
    from experts import MixtureOfExperts, experts_padded
    moe = MixtureOfExperts(d=48, w=16, n_shared=1, n_routed=8)
    u = torch.randn(40, 48)                                          # (N, d) residual stream
    x = torch.nn.functional.rms_norm(u, (48,))                       # (N, d) its norm
    gates, indices = torch.rand(40, 8).softmax(-1).topk(2)           # (N, K) each, from the router
    h = moe(u, x, indices, gates, experts_padded)                    # (N, d), u included
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """SwiGLU: W_down(silu(W_gate x) * W_up x), of width w over d."""

    def __init__(self, d: int, w: int) -> None:
        super().__init__()
        self.W_gate = nn.Linear(d, w, bias=False)
        self.W_up = nn.Linear(d, w, bias=False)
        self.W_down = nn.Linear(w, d, bias=False)

    def forward(self, x: Tensor, swiglu: Callable[..., Tensor] = swiglu) -> Tensor:
        """(..., d) -> (..., d).  `swiglu` is a function equal to the one above."""
        return self.W_down(swiglu(self.W_gate(x), self.W_up(x)))


def sort_slots(
    indices: Tensor, n_routed: int, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Slots grouped by expert.

    indices (N, K), keep (N, K) bool -> order (R,), the kept slots n·K + k sorted by expert, and
    counts (E,), how many each expert got.
    """
    expert = indices.flatten()
    # on a GPU the question would wait; under the compiler it would cut the graph
    if expert.device.type == "cpu" and not torch.compiler.is_compiling() and len(expert):
        low, high = (int(e) for e in expert.aminmax())
        if low < 0 or high >= n_routed:
            raise ValueError(f"indices: expert {low if low < 0 else high}, expected 0 to "
                             f"{n_routed - 1}")
    if keep is not None:
        expert = expert.masked_fill(~keep.flatten(), n_routed)   # dropped slots sort to the end
    # not bincount, for whose result a GPU waits
    counts = expert.new_zeros(n_routed + 1).scatter_add_(0, expert, torch.ones_like(expert))
    counts = counts[:n_routed]                                   # dropped slots are the last
    order = expert.argsort(stable=True)
    return (order if keep is None else order[: int(counts.sum())]), counts


def experts_loop(
    x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """Gated sum of the chosen experts, one expert at a time.

    x (N, d), indices and gates (N, K), W_gate and W_up (E, w, d), W_down (E, d, w), keep (N, K)
    bool or None for all -> (N, d), summed in at least fp32.
    """
    order, counts = sort_slots(indices, len(W_gate), keep)
    rows = _rows(x, order, indices).split(counts.tolist())                           # E of (·, d)
    out = []
    # unbind, not W[e]: the gradient of all experts is put together once, not once an expert
    experts = [W.unbind() if torch.is_grad_enabled() else W for W in (W_gate, W_up, W_down)]
    for e, h in enumerate(rows):
        if len(h) or e == 0:                 # no slot at all must still give gradients of zero
            gate, up, down = (W[e] for W in experts)
            out.append(F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down))
    return _gated_sum(torch.cat(out), order, gates, x)                               # cat (R, d)


def experts_padded(
    x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """The same with every expert padded to the fullest one's C tokens; arguments as above."""
    order, counts = sort_slots(indices, len(W_gate), keep)
    # an exported graph may not depend on the counts: no expert gets more than all N tokens
    E, C = len(W_gate), x.shape[0] if torch.compiler.is_exporting() else int(counts.max())
    expert = indices.flatten()[order]                                                # (R,)
    before = counts.cumsum(0) - counts                                               # (E,)
    rank = torch.arange(order.shape[0], device=x.device) - before[expert]            # (R,) below C
    place = expert * C + rank                                                        # (R,) in E·C
    padded = x.new_zeros(E * C, x.shape[1]).index_copy(0, place, _rows(x, order, indices))
    padded = padded.view(E, C, x.shape[1])                                           # (E, C, d)
    hidden = F.silu(padded @ W_gate.mT) * (padded @ W_up.mT)                         # (E, C, w)
    out = (hidden @ W_down.mT).flatten(0, 1)[place]                                  # (R, d)
    return _gated_sum(out, order, gates, x)


def experts_grouped(
    x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """The same with grouped matmuls over the sorted slots; arguments as above, bf16 or fp32."""
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return experts_padded(x, indices, gates, W_gate, W_up, W_down, keep)   # it knows bf16 alone
    order, counts = sort_slots(indices, len(W_gate), keep)
    ends = counts.cumsum(0).to(torch.int32)
    rows = _rows(x, order, indices)                                                  # (R, d)
    gate = F.grouped_mm(rows, W_gate.mT, offs=ends)                                  # (R, w)
    up = F.grouped_mm(rows, W_up.mT, offs=ends)                                      # (R, w)
    out = F.grouped_mm(F.silu(gate) * up, W_down.mT, offs=ends)                      # (R, d)
    return _gated_sum(out, order, gates, x)


def _rows(x: Tensor, order: Tensor, indices: Tensor) -> Tensor:
    """The token's row for each slot, (R, d).

    Not x[...]: its gradient is added up by several threads at once, in an order of their own.
    """
    return x.index_select(0, order // indices.shape[1])


def _gated_sum(out: Tensor, order: Tensor, gates: Tensor, x: Tensor) -> Tensor:
    """Slots (R, d) back to their tokens, each times its gate: (N, d) in x's dtype."""
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, gates.dtype))
    out = out * gates.reshape(-1, 1).index_select(0, order)                          # (R, d)
    return y.index_add(0, order // gates.shape[1], out.to(y.dtype)).to(x.dtype)


def of_share(form: Callable[..., Tensor], held: range) -> Callable[..., Tensor]:
    """A form for the experts `held` alone, W_gate and the others being theirs.

    It gives their part of the sum: the parts of shares that make up 0 .. E-1 add up to the whole.
    """

    def part(
        x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        inside = (indices >= held.start) & (indices < held.stop)
        local = (indices - held.start).masked_fill(~inside, 0)
        inside = inside if keep is None else keep & inside
        return form(x, local, gates, W_gate, W_up, W_down, inside)

    return part


def add_up(u: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
    """The stream u, the shared and the routed experts' sum, (N, d) each -> (N, d)."""
    return u + shared + routed                                               # (N, d)           (20)


class MixtureOfExperts(nn.Module):
    """N_s shared and E routed experts of width w over d, without a router.

    `held`: the routed experts whose weights are here; None for all. With a share, `form` has
    to be one for it.
    """

    def __init__(
        self, d: int, w: int, n_shared: int, n_routed: int, held: range | None = None
    ) -> None:
        super().__init__()
        self.held = range(n_routed) if held is None else held
        if not 0 <= self.held.start < self.held.stop <= n_routed or self.held.step != 1:
            raise ValueError(f"held: {self.held}, expected a part of range(0, {n_routed})")
        self.shared = FeedForward(d, n_shared * w)
        self.W_gate = nn.Parameter(torch.empty(len(self.held), w, d))
        self.W_up = nn.Parameter(torch.empty(len(self.held), w, d))
        self.W_down = nn.Parameter(torch.empty(len(self.held), d, w))
        for W in (self.W_gate, self.W_up, self.W_down):
            nn.init.normal_(W, std=(3 * W.shape[-1]) ** -0.5)     # as large as nn.Linear's own

    def forward(
        self, u: Tensor, x: Tensor, indices: Tensor, gates: Tensor,
        form: Callable[..., Tensor] = experts_loop, keep: Tensor | None = None,
        swiglu: Callable[..., Tensor] = swiglu, add_up: Callable[..., Tensor] = add_up,
    ) -> Tensor:
        """u (N, d) residual stream, x (N, d) its norm, indices and gates (N, K) -> (N, d).

        `form` is one of the functions above, `swiglu` and `add_up` are equal to them; `keep` (N, K)
        says which slots were not dropped. A form for several ranks may return before its result is
        there, with a function that waits for it.
        """
        routed = form(x, indices, gates, self.W_gate, self.W_up, self.W_down, keep)
        shared = self.shared(x, swiglu)              # while the rows of others are on their way
        if not isinstance(routed, Tensor):
            routed = routed()
        return add_up(u, shared, routed)

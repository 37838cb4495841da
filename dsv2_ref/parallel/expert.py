# SPDX-License-Identifier: MIT
"""Routed experts on several ranks: a token's row goes once to each rank that it needs.

Expert parallelism, sections 2.2.2 and 3.1.3, for the routed part of equation (20). Rank r of D
holds the experts r·E/D to (r+1)·E/D - 1, and the tokens of its own sequences. A layer is then

  dispatch   the rows of my tokens go to the ranks of their experts, all to all
  experts    a rank computes what came, with a form for one process, its experts numbered from 0
  combine    the sums go back, all to all
  add        a token adds up what came back from each of its ranks

A row is d numbers. Sent once a slot it would travel K times; sent once a rank, M times at most
under device-limited routing (V2: 3 instead of 6): that bound is what the limit is for. With a row
go its K gates and the K numbers that its experts have over there. One row comes back, the gated sum
of all that this rank's experts made of it.

While rows are on their way the shared experts are computed, which need no other rank:
`experts_begun_across` returns when the rows have left, with a function that does the rest. The
backward pass overlaps by itself: gradients leave where rows arrived and are waited for where rows
left, and autograd goes through the shared experts in between.

How this file differs from the famous versions:
  1. A dropped slot is not sent, and a row without any slot left goes nowhere.
  2. A rank adds up its part in at least fp32 and sends it in x's dtype: in bf16 a token's sum is
     rounded once a rank, where one process rounds it once.
  3. All ranks call the same collectives in the same order whatever the routing is; a rank that
     sends or gets nothing takes part with zero rows. So each rank has to go forward through the
     layer, and backward through its output, be its gradient zero.
  4. How many rows will come is asked first, and the host waits for the answer.

A slot is one (token, expert) pair.
Shapes: N flat tokens of this rank, d width, w expert width, E routed experts, K slots per token,
D ranks, R rows that this rank sends.
Copy with: nothing; a form is one of `experts`, indices and gates come from `routing`.
Needs: torch.

Wiring, once copied:
    import torch
    from expert import experts_across
    def form(x, indices, gates, W_gate, W_up, W_down, keep):             # or one of experts.py
        return x * (gates * keep).sum(1, keepdim=True) * W_gate.mean()
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
    gates, indices = torch.rand(40, 8).softmax(-1).topk(2)               # (N, K), from the router
    x, W = torch.randn(40, 48), torch.randn(8, 16, 48)                   # this rank holds all of 8
    y = experts_across(form, torch.distributed.group.WORLD)(x, indices, gates, W, W, W.mT)
    torch.distributed.destroy_process_group()
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Ledger:
    """What a rank has sent to each rank of its group, itself included, as the exchanges count it.

    By purpose: "counts" of rows to come, "tokens" to experts, "sums" back, and the "gradients of
    sums" and "of tokens"; "choices" for `keep_across`. Nothing that is empty is a message. `slots`
    are the kept slots that the tokens had there: their rows, had each slot brought its own.
    """

    rows: dict[str, list[int]] = field(default_factory=dict)         # purpose -> D numbers
    messages: dict[str, list[int]] = field(default_factory=dict)
    bytes: dict[str, list[int]] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)

    def sent(self, purpose: str, rows: list[int], sizes: list[int]) -> None:
        """rows (D,) have left, of so many bytes each in each of their parts, a message a part."""
        for table, unit in ((self.rows, 1), (self.bytes, sum(sizes))):
            table[purpose] = _added(table.get(purpose), [unit * n for n in rows])
        self.messages[purpose] = _added(self.messages.get(purpose),
                                        [len(sizes) * (n > 0) for n in rows])

    def meant(self, slots: list[int]) -> None:
        """slots (D,) that the rows stand for."""
        self.slots = _added(self.slots, slots)


def _added(old: list[int] | None, new: list[int]) -> list[int]:
    return [a + b for a, b in zip(old or [0] * len(new), new, strict=True)]


class _Exchange:
    """One exchange of rows between the ranks of a group, all to all, and its way back.

    out (D,): rows for each rank, in order of ranks. `transport` has the signature of
    `torch.distributed.all_to_all_single`, and returns something to wait for.
    """

    def __init__(
        self, out: Tensor, group: dist.ProcessGroup, transport: Callable[..., dist.Work],
        ledger: Ledger | None,
    ) -> None:
        self.group, self.transport, self.ledger = group, transport, ledger
        self.out = self.into = [1] * group.size()
        self.leave("counts", [out[:, None]])
        (coming,) = self.arrive()
        self.out, self.into = out.tolist(), coming[:, 0].tolist()

    def leave(self, purpose: str, parts: list[Tensor], back: bool = False) -> None:
        """Rows (R, ·), in several parts, are on their way when this returns."""
        out, into = (self.into, self.out) if back else (self.out, self.into)
        self.flights = []
        for part in parts:
            rows, received = part.contiguous(), part.new_empty(sum(into), part.shape[1])
            work = self.transport(received, rows, into, out, group=self.group, async_op=True)
            self.flights.append((received, work))
        if self.ledger is not None:
            self.ledger.sent(purpose, out, [p.element_size() * p.shape[1] for p in parts])

    def arrive(self) -> list[Tensor]:
        """Wait for the rows that left last: those that came here, in the same parts."""
        flights, self.flights = self.flights, []
        for _, work in flights:
            work.wait()
        return [received for received, _ in flights]


class _Leave(torch.autograd.Function):
    """Rows leave; backward, their gradients are waited for. Gives a ticket for `_Arrive`."""

    @staticmethod
    def forward(ctx, x: Tensor, gates: Tensor, numbers: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.leave("tokens", [x, gates, numbers])
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dgates = ctx.exchange.arrive()
        return dx, dgates, None, None


class _Arrive(torch.autograd.Function):
    """Rows are waited for; backward, their gradients leave."""

    @staticmethod
    def forward(ctx, ticket: Tensor, exchange: _Exchange) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        x, gates, numbers = exchange.arrive()
        ctx.mark_non_differentiable(numbers)
        return x, gates, numbers

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor, dgates: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.leave("gradients of tokens", [dx, dgates], back=True)
        return dx.new_zeros(()), None


class _Return(torch.autograd.Function):
    """Sums go back where their tokens live; backward, the gradients of these sums come."""

    @staticmethod
    def forward(ctx, sums: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.leave("sums", [sums], back=True)
        return exchange.arrive()[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.leave("gradients of sums", [d])
        return ctx.exchange.arrive()[0], None


def sort_rows(
    indices: Tensor, n_ranks: int, held: int, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which rows go where, each once to a rank.

    indices (N, K), `held` experts on each rank, keep (N, K) bool -> the tokens (R,) of the rows,
    sorted by rank; the numbers (R, K) int32 that their experts have there, -1 for slots that are
    elsewhere or dropped; rows (D,) and kept slots (D,) for each rank.
    """
    if indices.device.type == "cpu" and len(indices):      # on a GPU the question would wait
        low, high = (int(e) for e in indices.aminmax())
        if low < 0 or high >= n_ranks * held:
            raise ValueError(f"indices: expert {low if low < 0 else high}, expected 0 to "
                             f"{n_ranks * held - 1}, {held} on each of {n_ranks} ranks")
    ranks = torch.arange(n_ranks, device=indices.device)[:, None, None]
    here = indices // held == ranks                                          # (D, N, K)
    if keep is not None:
        here = here & keep
    sent = here.any(-1)                                                      # (D, N)
    rank, token = sent.nonzero(as_tuple=True)                                # (R,) each
    numbers = (indices[token] - held * rank[:, None]).masked_fill(~here[rank, token], -1)
    return token, numbers.int(), sent.sum(1), here.sum((1, 2))


def experts_begun_across(
    form: Callable[..., Tensor], group: dist.ProcessGroup,
    transport: Callable[..., dist.Work] = dist.all_to_all_single, ledger: Ledger | None = None,
) -> Callable[..., Callable[[], Tensor]]:
    """`form` for the experts of all ranks of `group`, in two steps.

    What is returned has form's arguments: x (N, d), indices and gates (N, K) and keep (N, K) of
    this rank's tokens, N may be 0, and W_gate, W_up (E/D, w, d), W_down (E/D, d, w) of its experts.
    It returns when the rows have left, with a function that waits for all there is to wait for and
    gives the sum (N, d).
    """

    def begin(
        x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
        keep: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        token, numbers, out, slots = sort_rows(indices, group.size(), len(W_gate), keep)
        exchange = _Exchange(out, group, transport, ledger)
        if ledger is not None:
            ledger.meant(slots.tolist())
        ticket = _Leave.apply(x.index_select(0, token), gates.index_select(0, token), numbers,
                              exchange)

        def finish() -> Tensor:
            rows, their_gates, theirs = _Arrive.apply(ticket, exchange)
            sums = form(rows, theirs.clamp(min=0).long(), their_gates, W_gate, W_up, W_down,
                        theirs >= 0)
            back = _Return.apply(sums, exchange)                             # (R, d)
            y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, gates.dtype))
            return y.index_add(0, token, back.to(y.dtype)).to(x.dtype)

        return finish

    return begin


def experts_across(
    form: Callable[..., Tensor], group: dist.ProcessGroup,
    transport: Callable[..., dist.Work] = dist.all_to_all_single, ledger: Ledger | None = None,
) -> Callable[..., Tensor]:
    """`experts_begun_across` in one step: a form with form's signature, that gives the sum."""
    begin = experts_begun_across(form, group, transport, ledger)

    def across(*arguments: Tensor, **named: Tensor) -> Tensor:
        return begin(*arguments, **named)()

    return across


def keep_across(
    keep: Callable[..., Tensor], group: dist.ProcessGroup,
    transport: Callable[..., dist.Work] = dist.all_to_all_single, ledger: Ledger | None = None,
) -> Callable[..., Tensor]:
    """`keep`, such as `dropping.keep_within_budget`, with the budget of all ranks' tokens.

    What is returned has keep's signature, for the slots (N, K) of this rank; N may differ from rank
    to rank. All ranks get all choices, tokens in order of ranks, rank them as one process would,
    and take their own.
    """

    def of_all(
        indices: Tensor, affinity: Tensor, n_routed: int, n_devices: int,
        protected: Tensor | None = None, capacity: float = 1.0,
    ) -> Tensor:
        mine = [indices, affinity.detach()]
        mine += [] if protected is None else [protected[:, None].to(indices.dtype)]
        D, N = group.size(), len(indices)
        exchange = _Exchange(indices.new_full((D,), N), group, transport, ledger)
        exchange.leave("choices", [part.repeat(D, 1) for part in mine])
        indices, affinity, *rest = exchange.arrive()
        protected = rest[0][:, 0].bool() if rest else None
        kept = keep(indices, affinity, n_routed, n_devices, protected, capacity)
        first = sum(exchange.into[: group.rank()])
        return kept[first : first + N]

    return of_all

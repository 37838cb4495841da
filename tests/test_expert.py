# SPDX-License-Identifier: MIT
"""Experts on several ranks against one process: values, gradients, what is sent, in which order.

The ranks are threads of this process, and what goes between them goes through a `Hub`, which takes
the place of `all_to_all_single`: where processes would wait for each other for ever, it fails.
"""

import threading

import pytest
import torch
from oracles import loops
from refusals import refused
from torch.utils.checkpoint import checkpoint

from dsv2_ref.moe.dropping import keep_within_budget
from dsv2_ref.moe.experts import (
    MixtureOfExperts,
    experts_grouped,
    experts_loop,
    experts_padded,
)
from dsv2_ref.moe.routing import Router
from dsv2_ref.parallel.expert import (
    Ledger,
    experts_across,
    experts_begun_across,
    keep_across,
    sort_rows,
)

E, K, D_MODEL, W = 12, 3, 10, 7
ROWS = {2: (5, 8), 4: (5, 8, 1, 6)}                      # tokens of each rank
SIZES = pytest.mark.parametrize("size", [2, 4])
BOTH = pytest.mark.parametrize("form", [experts_loop, experts_padded])


class Member:
    """One rank as `experts_across` sees its group."""

    def __init__(self, hub, rank):
        self.hub, self._rank, self.calls, self.waiting = hub, rank, 0, 0

    def rank(self):
        return self._rank

    def size(self):
        return self.hub.size


class Hub:
    """`hub(function, *arguments)` calls function(member, *arguments) in a thread for each rank."""

    def __init__(self, size):
        self.size = size

    def __call__(self, function, *arguments):
        self.posted, self.changed, self.errors = {}, threading.Condition(), []
        self.members = [Member(self, rank) for rank in range(self.size)]
        answers = [None] * self.size

        def work(rank):
            try:
                answers[rank] = function(self.members[rank], *arguments)
            except BaseException as error:
                with self.changed:
                    self.errors.append(error)
                    self.changed.notify_all()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        assert len({m.calls for m in self.members}) == 1          # the same calls on all ranks
        assert not any(m.waiting for m in self.members)           # and each was waited for
        return answers


class Arrival:
    """What a transport returns: something to wait for."""

    def __init__(self, group, number, output, into):
        self.group, self.number, self.output, self.into = group, number, output, into

    def wait(self):
        hub, me = self.group.hub, self.group.rank()
        with hub.changed:
            here = hub.changed.wait_for(
                lambda: hub.errors or all((self.number, r) in hub.posted for r in range(hub.size)),
                timeout=20)
        assert here and not hub.errors, f"call {self.number}: somebody never came"
        for sender, place in enumerate(self.output.split(self.into)):
            rows, out = hub.posted[self.number, sender]
            assert out[me] == self.into[sender], f"call {self.number}: {out[me]} rows, not awaited"
            assert rows.dtype == self.output.dtype and rows.shape[1:] == place.shape[1:]
            place.copy_(rows.split(out)[me])
        self.group.waiting -= 1


def transport(output, rows, into, out, group, async_op):
    """In place of torch.distributed.all_to_all_single."""
    assert async_op and len(rows) == sum(out) and len(output) == sum(into)
    with group.hub.changed:
        group.hub.posted[group.calls, group.rank()] = rows, out
        group.hub.changed.notify_all()
    group.calls, group.waiting = group.calls + 1, group.waiting + 1
    return Arrival(group, group.calls - 1, output, into)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def case(seed, rows, dropping=False, avoid=()):
    """x, indices, gates, keep, direction of all ranks' tokens, and the experts' weights."""
    n = sum(rows)
    s = loops.normal(seed, n, E)
    s[:, list(avoid)] = -100.0
    gates, indices = s.softmax(-1).topk(K, -1)
    keep = loops.normal(seed + 1, n, K) > -0.4 if dropping else None
    weights = [loops.normal(seed + 2 + i, *shape) / 2
               for i, shape in enumerate([(E, W, D_MODEL), (E, W, D_MODEL), (E, D_MODEL, W)])]
    return loops.normal(seed + 5, n, D_MODEL), indices, gates, keep, weights, loops.normal(
        seed + 6, n, D_MODEL)


def backward(form, x, indices, gates, keep, weights, direction):
    """y and the gradients of x, gates and weights along a direction."""
    x, gates, *weights = (t.clone().requires_grad_() for t in (x, gates, *weights))
    y = form(x, indices, gates, *weights, keep)
    (y * direction).sum().backward()
    return [y.detach(), x.grad, gates.grad, *(w.grad for w in weights)]


def of_rank(member, rows, x, indices, gates, keep, weights, direction):
    """What of all this rank has: its tokens, its experts."""
    rank, held = member.rank(), E // member.size()
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    tokens = [None if t is None else t[mine] for t in (x, indices, gates, keep)]
    return *tokens, [w[rank * held :][:held] for w in weights], direction[mine]


def across(member, form, rows, given, ledger=None):
    made = experts_across(form, member, transport, ledger)
    return backward(made, *of_rank(member, rows, *given))


def compare(size, form, rows, given):
    expected = backward(form, *given)
    got = [torch.cat(parts) for parts in zip(*Hub(size)(across, form, rows, given), strict=True)]
    for a, b in zip(got, expected, strict=True):
        close(a, b)
    return got


@SIZES
@BOTH
@pytest.mark.parametrize("dropping", [False, True])
def test_equals_one_process(size, form, dropping):
    for value in compare(size, form, ROWS[size], case(1, ROWS[size], dropping)):
        assert value.abs().max() > 1e-3


@SIZES
def test_grouped_products_inside(size):
    """They want fp32 and widths of whole 16 bytes."""
    n, d, w = sum(ROWS[size]), 16, 8
    x, direction = loops.normal(11, n, d).float(), loops.normal(12, n, d).float()
    gates, indices = loops.normal(13, n, E).softmax(-1).float().topk(K)
    weights = [loops.normal(14 + i, *shape).float() / 4
               for i, shape in enumerate([(E, w, d), (E, w, d), (E, d, w)])]
    given = x, indices, gates, loops.normal(17, n, K) > -0.4, weights, direction
    expected = backward(experts_loop, *given)
    parts = Hub(size)(across, experts_grouped, ROWS[size], given)
    for a, b in zip(map(torch.cat, zip(*parts, strict=True)), expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


EMPTY = {
    "a rank without tokens": ((0, 8, 1, 6), ()),
    "one rank has all tokens": ((0, 0, 9, 0), ()),
    "one token": ((0, 1, 0, 0), ()),
    "no token at all": ((0, 0, 0, 0), ()),
    "an expert that nobody wants": ((5, 8, 1, 6), (4,)),
    "a rank whose experts nobody wants": ((5, 8, 1, 6), (3, 4, 5)),
    "all experts on one rank are wanted, no others": ((5, 0, 1, 6), (0, 1, 2, 3, 4, 5, 9, 10, 11)),
}


@BOTH
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_send_or_to_get(name, form):
    rows, avoid = EMPTY[name]
    *_, W_gate, W_up, W_down = compare(4, form, rows, case(21, rows, avoid=avoid))
    idle = list(avoid) if sum(rows) else list(range(E))
    for gradient in (W_gate, W_up, W_down):
        assert not gradient[idle].any()
    assert not sum(rows) > 9 or W_gate.flatten(1).any(1).sum() == E - len(idle)


@BOTH
def test_a_rank_that_drops_everything(form):
    rows = ROWS[4]
    x, indices, gates, _, weights, direction = case(31, rows)
    keep = torch.ones_like(indices, dtype=torch.bool)
    keep[:5] = False                                             # all of rank 0
    got = compare(4, form, rows, (x, indices, gates, keep, weights, direction))
    assert not got[0][:5].any() and not got[1][:5].any() and not got[2][:5].any()
    compare(4, form, rows, (x, indices, gates, torch.zeros_like(keep), weights, direction))


def moe(member, rows, given, router, whole, begun):
    """Router, shared and routed experts of one rank; gradients of all that it has."""
    x, _, _, keep, _, direction = of_rank(member, rows, *given)
    rank, held = member.rank(), E // member.size()
    mine = MixtureOfExperts(D_MODEL, W, 2, E, range(rank * held, (rank + 1) * held)).double()
    mine.shared.load_state_dict(whole.shared.state_dict())
    for name in ("W_gate", "W_up", "W_down"):
        getattr(mine, name).data.copy_(getattr(whole, name)[rank * held :][:held])
    across_ranks = experts_begun_across if begun else experts_across
    return gradients(mine, router, x, keep, direction,
                     across_ranks(experts_padded, member, transport))


def gradients(mixture, router, x, keep, direction, form):
    x, own = x.clone().requires_grad_(), loops.randomize(Router(D_MODEL, E, K, 4, 2, 2.5), 3)
    own.load_state_dict(router.state_dict())
    routing = own(x)
    y = mixture(x * 2, x, routing.indices, routing.gates, form, keep)
    (y * direction).sum().backward()
    return [y.detach(), x.grad], [w.grad for w in mixture.shared.parameters()] + [
        own.weight.grad], [mixture.W_gate.grad, mixture.W_up.grad, mixture.W_down.grad]


@SIZES
def test_routers_and_shared_experts_learn_what_one_process_teaches(size):
    rows = ROWS[size]
    given = case(41, rows, dropping=True)
    router = loops.randomize(Router(D_MODEL, E, K, 4, 2, 2.5), 4)
    whole = loops.randomize(MixtureOfExperts(D_MODEL, W, 2, E), 5)
    x, _, _, keep, _, direction = given
    expected = gradients(whole, router, x, keep, direction, experts_padded)
    found = [Hub(size)(moe, rows, given, router, whole, begun) for begun in (False, True)]
    for parts in found:
        tokens, common, held = zip(*parts, strict=True)
        for a, b in zip(map(torch.cat, zip(*tokens, strict=True)), expected[0], strict=True):
            close(a, b)
        for a, b in zip((sum(g) for g in zip(*common, strict=True)), expected[1], strict=True):
            assert b.abs().max() > 1e-3
            close(a, b)
        for a, b in zip(map(torch.cat, zip(*held, strict=True)), expected[2], strict=True):
            close(a, b)
    for one, other in zip(*found, strict=True):                  # whatever is computed first
        for a, b in zip(sum(one, []), sum(other, []), strict=True):
            assert torch.equal(a, b)


class Watched:
    """A transport on a clock of its own: what is sent arrives `delay` later, however early it is
    asked for. Work moves the clock too, and the log says what happened when."""

    def __init__(self, delay):
        self.delay, self.now, self.log = delay, 0.0, []

    def work(self, name, seconds):
        self.now += seconds
        self.note(name)

    def note(self, name):
        if self.log[-1:] != [name]:                      # the parts of rows are one thing here
            self.log.append(name)

    def __call__(self, output, rows, into, out, **named):
        arrival, watched, due = transport(output, rows, into, out, **named), self, (
            self.now + self.delay)
        what = "counts" if rows.shape[1] == 1 else "rows"
        self.note(f"{what} leave")

        class Late:
            def wait(self):
                arrival.wait()
                watched.now = max(watched.now, due)
                watched.note(f"{what} arrive")

        return Late()


def timed(member, begun, delay, seconds):
    """Forward and backward of one layer whose shared experts take so long each way."""
    link = Watched(delay)
    x, indices, gates, _, weights, direction = of_rank(member, ROWS[2], *case(51, ROWS[2]))
    held = E // 2
    mine = loops.randomize(MixtureOfExperts(
        D_MODEL, W, 1, E, range(member.rank() * held, (member.rank() + 1) * held)), 6)
    mine.shared.register_forward_hook(lambda *_: link.work("shared", seconds))
    mine.shared.W_up.weight.register_hook(lambda _: link.work("shared, backward", seconds))
    x = x.requires_grad_()
    across_ranks = experts_begun_across if begun else experts_across
    y = mine(x, x, indices, gates, across_ranks(experts_loop, member, link))
    (y * direction).sum().backward()
    return link.log, link.now


def test_shared_experts_are_computed_while_rows_are_under_way():
    """Forward and backward; and where the link is slow that is what is saved."""
    (log, begun), _ = Hub(2)(timed, True, 5.0, 3.0)
    assert log == ["counts leave", "counts arrive", "rows leave", "shared", "rows arrive",
                   "rows leave", "rows arrive",                           # the sums
                   "rows leave", "rows arrive", "rows leave", "shared, backward", "rows arrive"]
    (log, after), _ = Hub(2)(timed, False, 5.0, 3.0)
    assert log[2:5] == ["rows leave", "rows arrive", "rows leave"]
    assert (begun, after) == (5 * 5.0, 5 * 5.0 + 2 * 3.0)
    (_, begun), _ = Hub(2)(timed, True, 2.0, 3.0)
    (_, after), _ = Hub(2)(timed, False, 2.0, 3.0)
    assert (begun, after) == (3 * 2.0 + 2 * 3.0, 5 * 2.0 + 2 * 3.0)


def brute_force(rows, indices, keep, size):
    """Rows and kept slots from each rank to each, slot by slot."""
    held, sets, slots, start = E // size, [], [], 0
    for n in rows:
        reached, count = [set() for _ in range(size)], [0] * size
        for t in range(start, start + n):
            for k in range(K):
                if keep is None or keep[t, k]:
                    reached[int(indices[t, k]) // held].add(t)
                    count[int(indices[t, k]) // held] += 1
        sets.append([len(r) for r in reached])
        slots.append(count)
        start += n
    return sets, slots


def counted(member, rows, given):
    ledger = Ledger()
    across(member, experts_loop, rows, given, ledger)
    return ledger


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("size, rows", [(2, (5, 8)), (4, (5, 8, 1, 6)), (4, (0, 40, 3, 1)),
                                        (1, (9,))])
def test_a_row_is_sent_once_a_rank(size, rows, dropping):
    given = case(61, rows, dropping)
    sets, slots = brute_force(rows, given[1], given[3], size)
    assert size == 1 or sum(map(sum, sets)) < sum(map(sum, slots))
    ledgers = Hub(size)(counted, rows, given)
    there, back = {"tokens", "gradients of sums"}, {"sums", "gradients of tokens"}
    bytes_of = {"tokens": 8 * D_MODEL + 12 * K, "sums": 8 * D_MODEL,
                "gradients of sums": 8 * D_MODEL, "gradients of tokens": 8 * (D_MODEL + K),
                "counts": 8}
    for rank, ledger in enumerate(ledgers):
        assert ledger.slots == slots[rank]
        assert ledger.rows.keys() == there | back | {"counts"}
        for purpose in ledger.rows:
            expected = ([1] * size if purpose == "counts" else sets[rank] if purpose in there
                        else [sets[other][rank] for other in range(size)])
            assert ledger.rows[purpose] == expected, purpose
            assert ledger.bytes[purpose] == [bytes_of[purpose] * n for n in expected]
            parts = {"tokens": 3, "gradients of tokens": 2}.get(purpose, 1)
            assert ledger.messages[purpose] == [parts * (n > 0) for n in expected]


def test_a_ledger_adds_up():
    ledger = Ledger()
    ledger.sent("tokens", [0, 3], [4, 3])
    ledger.sent("tokens", [2, 1], [5])
    assert (ledger.rows, ledger.messages) == ({"tokens": [2, 4]}, {"tokens": [1, 3]})
    assert ledger.bytes == {"tokens": [10, 26]}
    ledger.meant([4, 4])
    ledger.meant([1, 0])
    assert ledger.slots == [5, 4]


def test_sort_rows():
    """Four tokens, experts 0 1 on rank 0 and 2 3 on rank 1."""
    indices = torch.tensor([[0, 1], [3, 0], [2, 3], [1, 2]])
    token, numbers, rows, slots = sort_rows(indices, 2, 2)
    assert token.tolist() == [0, 1, 3, 1, 2, 3] and rows.tolist() == [3, 3]
    assert numbers.tolist() == [[0, 1], [-1, 0], [1, -1], [1, -1], [0, 1], [-1, 0]]
    assert slots.tolist() == [4, 4] and numbers.dtype == torch.int32
    keep = torch.tensor([[1, 0], [1, 0], [0, 0], [1, 1]]).bool()
    token, numbers, rows, slots = sort_rows(indices, 2, 2, keep)
    assert token.tolist() == [0, 3, 1, 3] and rows.tolist() == [2, 2]
    assert numbers.tolist() == [[0, -1], [1, -1], [1, -1], [-1, 0]] and slots.tolist() == [2, 2]


def test_experts_that_no_rank_has_are_refused():
    refused(lambda: sort_rows(torch.tensor([[0, 12]]), 4, 3), "indices: expert 12",
            "expected 0 to 11, 3 on each of 4 ranks")
    refused(lambda: sort_rows(torch.tensor([[-1, 2]]), 4, 3), "indices: expert -1")


CHOICES = pytest.mark.parametrize("rows", [(5, 8, 1, 6), (0, 9, 0, 4), (0, 0, 7, 0), (0, 0, 0, 0)])


def kept(member, rows, indices, affinity, protected, capacity):
    mine = slice(sum(rows[: member.rank()]), sum(rows[: member.rank() + 1]))
    keep = keep_across(keep_within_budget, member, transport)
    return keep(indices[mine], affinity[mine], E, 4,
                None if protected is None else protected[mine], capacity)


@CHOICES
@pytest.mark.parametrize("protection", [False, True])
def test_the_budget_is_that_of_all_ranks(rows, protection):
    n = sum(rows)
    affinity, indices = (loops.normal(71, n, E) + loops.normal(72, E)).softmax(-1).topk(K, -1)
    protected = loops.normal(73, n) > 0.5 if protection else None
    if n:
        affinity[n // 2] = affinity[0]                       # ties: the earlier rank's are kept
        indices[n // 2] = indices[0]
    expected = keep_within_budget(indices, affinity, E, 4, protected, 0.8)
    parts = Hub(4)(kept, rows, indices, affinity.requires_grad_(), protected, 0.8)
    assert [len(part) for part in parts] == list(rows)
    assert torch.equal(torch.cat(parts), expected) and expected.dtype == parts[0].dtype
    alone = torch.cat([keep_within_budget(
        indices[a : a + m], affinity[a : a + m], E, 4,
        None if protected is None else protected[a : a + m], 0.8)
        for a, m in zip([sum(rows[:r]) for r in range(4)], rows, strict=True)])
    assert sum(m > 0 for m in rows) < 2 or not torch.equal(alone, expected)


def silent(member, rows, given):
    """Rank 1 makes nothing of its output."""
    x, indices, gates, keep, weights, direction = of_rank(member, rows, *given)
    if member.rank() == 1:
        direction = direction * 0
    return backward(experts_across(experts_loop, member, transport), x, indices, gates, keep,
                    weights, direction)


def test_an_output_of_no_use_is_no_hang():
    rows = ROWS[4]
    *tokens, direction = case(81, rows)
    direction = direction.clone()
    direction[5:13] = 0
    expected = backward(experts_loop, *tokens, direction)
    parts = Hub(4)(silent, rows, (*tokens, direction))
    for a, b in zip(map(torch.cat, zip(*parts, strict=True)), expected, strict=True):
        close(a, b)


def again(member, rows, given, way):
    """Computed anew in the backward pass; gone backward through twice; without a graph."""
    x, indices, gates, keep, weights, direction = of_rank(member, rows, *given)
    form = experts_across(experts_loop, member, transport)
    if way == "no graph":
        with torch.no_grad():
            return [form(x, indices, gates, *weights, keep)]
    if way == "tokens are constant":
        weights = [w.clone().requires_grad_() for w in weights]
        (form(x, indices, gates, *weights, keep) * direction).sum().backward()
        return [w.grad for w in weights]
    if way == "recomputed":
        return backward(lambda *a: checkpoint(form, *a, use_reentrant=False), x, indices, gates,
                        keep, weights, direction)
    x, gates, *weights = (t.clone().requires_grad_() for t in (x, gates, *weights))
    loss = (form(x, indices, gates, *weights, keep) * direction).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return [t.grad / 2 for t in (x, gates, *weights)]


WAYS = {"no graph": slice(0, 1), "tokens are constant": slice(3, None), "recomputed": slice(None),
        "twice": slice(1, None)}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_through_the_graph(way):
    rows = ROWS[4]
    given = case(91, rows, dropping=True)
    expected = backward(experts_loop, *given)[WAYS[way]]
    parts = Hub(4)(again, rows, given, way)
    for a, b in zip(map(torch.cat, zip(*parts, strict=True)), expected, strict=True):
        close(a, b)


def test_second_derivatives_are_refused():
    def twice(member):
        x, indices, gates, _, weights, _ = of_rank(member, (3,), *case(95, (3,)))
        y = experts_across(experts_loop, member, transport)(x.requires_grad_(), indices, gates,
                                                           *weights)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.sum().backward()

    with pytest.raises(RuntimeError, match="once_differentiable"):
        Hub(1)(twice)


def halved(member, rows, given):
    x, indices, gates, keep, weights, _ = of_rank(member, rows, *given)
    form = experts_across(experts_loop, member, transport)
    return form(x.bfloat16(), indices, gates.float(), *(w.bfloat16() for w in weights), keep)


def test_half_precision_rounds_a_sum_once_a_rank():
    """Experts that give a known row, without rounding: silu(64)·2⁻⁶ is 1, and W_down the row."""
    rows, given = (50, 90), case(96, (50, 90))
    x, indices, gates, _, (W_gate, W_up, W_down), _ = given
    x, W_gate, W_up, W_down = x * 0, W_gate * 0, W_up * 0, W_down.bfloat16().double()
    x[:, 0], W_gate[:, 0, 0], W_up[:, 0, 0] = 1.0, 64.0, 2.0**-6
    y = torch.cat(Hub(2)(halved, rows, (x, indices, gates, None, [W_gate, W_up, W_down], x)))
    terms = gates.float().double()[:, :, None] * W_down[:, :, 0][indices]             # (N, K, d)
    there = torch.stack([terms.where((indices // 6 == r)[..., None], 0).sum(1) for r in (0, 1)])
    bound = 2.0**-8 * (there.abs().sum(0) * 1.01 + there.sum(0).abs()) + 1e-5
    assert y.dtype == torch.bfloat16 and ((y.double() - terms.sum(1)).abs() <= bound).all()

# SPDX-License-Identifier: MIT
"""What the ranks of notebook 16 run: what a cell defines cannot be sent to a process.

Each function below is what one rank does; all of them find their group in `dist.group.WORLD`.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from dsv2_ref.config import Config
from dsv2_ref.forms import Forms
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.moe.dropping import keep_within_budget
from dsv2_ref.moe.experts import MixtureOfExperts, experts_padded
from dsv2_ref.parallel.expert import (
    Ledger,
    experts_across,
    experts_begun_across,
    keep_across,
)


def rows_of(rows: Sequence[int]) -> slice:
    """This rank's tokens, if rank r has rows[r] of them in order."""
    rank = dist.get_rank()
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


class Layer(NamedTuple):
    """What one rank has found."""

    y: Tensor                   # (N, d) the routed sum of its tokens
    dx: Tensor                  # (N, d) gradients along a direction
    dgates: Tensor              # (N, K)
    dW: list[Tensor]            # of its experts
    ledger: Ledger


def layer(
    rows: Sequence[int], x: Tensor, indices: Tensor, gates: Tensor, weights: Sequence[Tensor],
    direction: Tensor, keep: Tensor | None = None,
) -> Layer:
    """Routed experts forward and backward, everything given for all ranks together."""
    mine, ledger = rows_of(rows), Ledger()
    held = len(weights[0]) // dist.get_world_size()
    own = slice(dist.get_rank() * held, (dist.get_rank() + 1) * held)
    x, gates = (t[mine].clone().requires_grad_() for t in (x, gates))
    W = [weight[own].clone().requires_grad_() for weight in weights]
    form = experts_across(experts_padded, dist.group.WORLD, ledger=ledger)
    y = form(x, indices[mine], gates, *W, None if keep is None else keep[mine])
    (y * direction[mine]).sum().backward()
    return Layer(y.detach(), x.grad, gates.grad, [w.grad for w in W], ledger)


def keep(rows: Sequence[int], across: bool, indices: Tensor, affinity: Tensor, n_routed: int,
         n_devices: int) -> Tensor:
    """This rank's kept slots: within the budget of all ranks, or within one of its own."""
    mine = rows_of(rows)
    rule = keep_across(keep_within_budget, dist.group.WORLD) if across else keep_within_budget
    return rule(indices[mine], affinity[mine], n_routed, n_devices)


def traffic(config: Config, seed: int, tokens: Tensor) -> Ledger:
    """What a pass of a new model, forward and backward, sends; tokens (B, T) of all ranks.

    B is a multiple of the ranks; each has as many sequences.
    """
    D, rank, ledger = dist.get_world_size(), dist.get_rank(), Ledger()
    held = config.n_routed // D
    torch.manual_seed(seed)
    model = DeepSeekV2(config, held=range(rank * held, (rank + 1) * held)).train()

    def across(forms: Forms) -> Forms:
        experts = experts_begun_across(forms.experts, dist.group.WORLD, ledger=ledger)
        return replace(forms, experts=experts, keep=keep_across(forms.keep, dist.group.WORLD))

    model.across = across
    mine = tokens.chunk(D)[rank]
    model.losses(mine, mine).total.backward()
    return ledger


class SlowLink:
    """A transport whose rows arrive `delay` seconds after they left, or later; and its diary."""

    def __init__(self, delay: float) -> None:
        self.delay, self.spans = delay, []

    def __call__(self, output: Tensor, rows: Tensor, *splits: list[int], **named: Any) -> "_Late":
        work = dist.all_to_all_single(output, rows, *splits, **named)
        left, what = time.perf_counter(), "counts" if rows.dtype == torch.int64 else "rows"
        self.spans.append((what, left, left + self.delay))
        return _Late(work, left + self.delay)


class _Late:
    def __init__(self, work: dist.Work, due: float) -> None:
        self.work, self.due = work, due

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.due - time.perf_counter()))


Span = tuple[str, float, float]          # what, from, to; in seconds since the layer began


class _Timed:
    """A layer with two routed experts of width w per rank, shared ones of 4·w; n tokens per rank.

    `begun`: the shared experts are computed while rows are on their way, or after all else.
    """

    def __init__(self, n: int, d: int, w: int, begun: bool, transport: Callable[..., Any]) -> None:
        D, rank = dist.get_world_size(), dist.get_rank()
        torch.manual_seed(rank)
        self.moe = MixtureOfExperts(d, w, 4, 2 * D, range(2 * rank, 2 * rank + 2))
        across = experts_begun_across if begun else experts_across
        self.form = across(experts_padded, dist.group.WORLD, transport)
        self.x = torch.randn(n, d, requires_grad=True)
        self.gates, self.indices = torch.rand(n, 2 * D).softmax(-1).topk(2)

    def run(self) -> None:
        """Forward and backward."""
        y = self.moe(self.x, self.x, self.indices, self.gates, self.form)
        y.square().mean().backward()

    def on_shared(self, enter: Callable[[str], None], leave: Callable[[str], None]) -> None:
        """Call these around the forward and around the backward pass of the shared experts."""
        shared = self.moe.shared
        shared.register_forward_pre_hook(lambda *_: enter("shared"))
        shared.register_forward_hook(lambda *_: leave("shared"))
        shared.register_full_backward_pre_hook(lambda *_: enter("shared, backward"))
        shared.register_full_backward_hook(lambda *_: leave("shared, backward"))


def overlap(n: int, d: int, w: int, delay: float, begun: bool, repeats: int) -> list[Span]:
    """A layer on a `SlowLink`, forward and backward: the spans of the fastest of some repeats.

    "counts" and "rows" are the link's, "shared" and "shared, backward" this rank's, "layer" is all.
    """
    link = SlowLink(delay)
    layer, best, marks = _Timed(n, d, w, begun, link), [], {}
    layer.on_shared(lambda name: marks.update({name: time.perf_counter()}),
                    lambda name: link.spans.append((name, marks[name], time.perf_counter())))
    for _ in range(repeats):
        link.spans.clear()
        dist.barrier()
        began = time.perf_counter()
        layer.run()
        spans = [("layer", began, time.perf_counter()), *link.spans]
        if not best or spans[0][2] - began < best[0][2]:
            best = [(name, a - began, b - began) for name, a, b in spans]
    return best


def trace(n: int, d: int, w: int, late: float, begun: bool) -> list[Span]:
    """A layer, forward and backward, in the trace of torch's profiler; odd ranks send rows late.

    "all_to_all" from when it was called to the end that the profiler saw, "shared" and "shared,
    backward"; in order of their beginnings.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")      # or it writes that it starts and stops

    def transport(output: Tensor, rows: Tensor, *splits: list[int], **named: Any) -> dist.Work:
        if dist.get_rank() % 2 and rows.shape[1] == d:
            time.sleep(late)
        with record_function("call"):
            return dist.all_to_all_single(output, rows, *splits, **named)

    layer, open_spans = _Timed(n, d, w, begun, transport), {}

    def enter(name: str) -> None:
        open_spans[name] = record_function(name)
        open_spans[name].__enter__()

    layer.on_shared(enter, lambda name: open_spans.pop(name).__exit__(None, None, None))
    layer.run()                                          # without the first time's surprises
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        layer.run()
    found: dict[str, list[tuple[float, float]]] = {}
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        span = event.time_range.start / 1e6, event.time_range.end / 1e6
        found.setdefault(event.name, []).append(span)
    calls, ends = found["call"], found["gloo:all_to_all"]
    spans = [("all_to_all", a, b) for (a, _), (_, b) in zip(calls, ends, strict=True)]
    spans += [(name, *found[name][0]) for name in ("shared", "shared, backward")]
    spans, began = sorted(spans, key=lambda span: span[1]), calls[0][0]
    return [(name, a - began, b - began) for name, a, b in spans]

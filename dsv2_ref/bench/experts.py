# SPDX-License-Identifier: MIT
"""The routed experts of one layer on a GPU: our kernels beside what torch and transformers have.

Cases: the shape of V2-Lite with 32K tokens and that of V2 with 8K, forward alone and forward with
backward (gradients of tokens, gates and all weights); V2-Lite with 64 tokens, as in decoding,
forward alone; and, for both shapes, choosing the experts and sorting the slots.

Comparators: `experts_grouped` (torch's grouped_mm), `experts_padded` (bmm; for decoding also
`experts_loop`), and the experts of transformers on the same weights with each of its own forms that
fits the case. Experts are drawn at random, so no expert is far from its share; every form pays for
its own sorting. `waits` names those that read a number from the GPU and so wait for it; that is in
their time, and ours and the grouped forms have nothing of it. TFLOP/s count 6·d·w a slot forward,
three times that with backward. Values and gradients of ours are checked in fp32 before anything is
timed, one expert after the other: V2's weights with their gradients are 30 GB in fp32, and as much
again for the difference. The others are checked forward.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv2_ref.bench.harness.cases import measured
from dsv2_ref.bench.harness.gpu import (
    PEER_TOLERANCE,
    Step,
    below,
    growing,
    medians,
    ratio,
    rotated,
    row,
    sound,
    squares,
)
from dsv2_ref.moe.experts import experts_grouped, experts_loop, experts_padded, sort_slots
from dsv2_ref.moe.routing import select_device_limited

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")            # for `quick`, before triton

Form = Callable[..., Tensor]
Made = tuple[Tensor, ...]                            # x (N, d), indices and gates (N, K), dy (N, d)
WAIT = ("padded", "loop", "transformers eager")      # how many rows an expert got decides a shape


class Case(NamedTuple):
    """Sizes; D devices of which M are reached; with or without backward."""

    name: str
    N: int
    d: int
    w: int
    E: int
    K: int
    D: int
    M: int
    backward: bool
    theirs: tuple[str, ...]                          # forms of transformers

    @property
    def needs(self) -> int:
        return self.bytes_needed(2)

    def bytes_needed(self, itemsize: int) -> int:
        """At the peak: weights, gradients and transformers' own weights; what is kept of each slot.

        Counted at small sizes. Where weights are copied for every slot (`batched_mm`), those.
        """
        one, slots = self.w * self.d * itemsize, self.N * self.K
        weights = (10 if self.backward else 6) * self.E * one
        copied = 3 * slots * one if "batched_mm" in self.theirs else 0
        kept = slots * (7 * self.d + 6 * self.w) * 4
        return weights + copied + kept + 16 * self.w * self.d * 4


CASES = [
    Case("V2-Lite", 32768, 2048, 1408, 64, 6, 1, 1, True, ("grouped_mm",)),
    Case("V2", 8192, 5120, 1536, 160, 6, 8, 3, True, ("grouped_mm",)),
    Case("V2-Lite decode", 64, 2048, 1408, 64, 6, 1, 1, False,
         ("grouped_mm", "batched_mm", "eager")),
]
QUICK = [
    Case("V2-Lite", 21, 32, 24, 4, 2, 1, 1, True, ("grouped_mm",)),
    Case("V2", 9, 40, 16, 6, 2, 3, 2, True, ("grouped_mm",)),
    Case("V2-Lite decode", 3, 32, 24, 4, 2, 1, 1, False, ("grouped_mm", "batched_mm", "eager")),
]


def run(quick: bool = False) -> dict[str, Any]:
    """All cases as one JSON-able record; `quick` is a smoke test whose numbers mean nothing.

    ValueError without a CUDA device (unless `quick`).
    """
    return measured("experts", quick)


def rows(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    from dsv2_ref.kernels.grouped_experts import experts_fused

    W, inputs = made(case, device)
    error, y = checked(experts_fused, inputs[0], W, case.backward)
    forms: dict[str, Form] = {"grouped_mm": experts_grouped, "padded": experts_padded}
    if not case.backward:
        forms["loop"] = experts_loop
    module = cache(lambda name: _module(name, case, W))
    right: dict[str, Step | str] = {}

    def others(backward: bool) -> dict[str, Step]:
        steps = {name: _step(form, W, backward) for name, form in forms.items()}
        return steps | {f"transformers {name}": _of_transformers(name, module, backward)
                        for name in case.theirs}

    def stages(backward: bool) -> Iterator[dict[str, Step | str]]:
        yield {"ours": _step(experts_fused, W, backward)}
        if not right:
            right.update(sound(others(False), inputs[0], lambda _: y, PEER_TOLERANCE))
        yield {name: why if isinstance(why := right[name], str) else step
               for name, step in others(backward).items()}

    for backward in (False, True)[: 1 + case.backward]:
        for ms in growing(stages(backward), inputs, device):
            yield _row(case, backward, ms, error, W[0].itemsize)
    if case.backward:
        yield _routing(case, device)


def _row(case: Case, backward: bool, ms: dict[str, Any], error: float, itemsize: int) -> dict:
    flops = 6 * case.N * case.K * case.d * case.w
    weights = min(case.E, case.N * case.K) * 3 * case.d * case.w * itemsize
    stream = case.N * case.d * itemsize
    return row(f"{case.name}, forward" + " and backward" * backward, ms,
               flops * (3 if backward else 1),
               3 * weights + 4 * stream if backward else weights + 2 * stream, error,
               waits=[name for name in WAIT if name in ms],
               **{name: getattr(case, name) for name in "N d w E K".split()})


def made(case: Case, device: torch.device) -> tuple[list[Tensor], list[Made]]:
    """W_gate, W_up (E, w, d), W_down (E, d, w); rotated inputs."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    random = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).mul_(scale).to(dtype)

    def tokens(_: int) -> Made:
        s = torch.randn(case.N, case.E, generator=random, device=device).softmax(-1)
        gates, indices = s.topk(case.K, -1)
        return normal(case.N, case.d), indices, gates, normal(case.N, case.d)

    W = [normal(case.E, case.w, case.d, scale=case.d**-0.5) for _ in range(2)]
    W.append(normal(case.E, case.d, case.w, scale=case.w**-0.5))
    return W, rotated(tokens, 2 * case.N * case.d * dtype.itemsize, device)


def checked(ours: Form, inputs: Made, W: list[Tensor], backward: bool) -> tuple[float, Tensor]:
    """The largest relative RMS error of ours against the loop in fp32, and the latter's output.

    One expert at a time, so that nothing in fp32 is larger than one expert or the stream.
    """
    x, indices, gates, dy = inputs
    names = ("y", "dx", "dg", "dW_gate", "dW_up", "dW_down")[: 6 if backward else 1]
    y, *grads = _with_gradients(ours, x, indices, gates, W, dy, backward)
    expected = [torch.zeros_like(t, dtype=torch.float32) for t in (x, x, gates)]
    sums = [torch.zeros(2, dtype=torch.float64, device=x.device) for _ in names]
    for e in range(len(W[0])):
        n, k = (indices == e).nonzero(as_tuple=True)
        part, *own = _with_gradients(
            experts_loop, x[n].float(), torch.zeros_like(n)[:, None], gates[n, k][:, None].float(),
            [w[e : e + 1].float() for w in W], dy[n].float(), backward)
        expected[0].index_add_(0, n, part)
        if backward:
            expected[1].index_add_(0, n, own[0])
            expected[2][n, k] = own[1][:, 0]
            for total, got, wanted in zip(sums[3:], grads[2:], own[2:], strict=True):
                total += squares(got[e], wanted[0])
    for total, got, wanted in zip(sums, (y, *grads[:2]), expected):
        total += squares(got, wanted)
    error = max(below(ratio(total), f"experts_fused, {name}")
                for name, total in zip(names, sums, strict=True))
    return error, expected[0]


def _with_gradients(
    form: Form, x: Tensor, indices: Tensor, gates: Tensor, W: list[Tensor], dy: Tensor,
    backward: bool,
) -> list[Tensor]:
    """y, and of x, gates and the three weights the gradients."""
    leaves = [t.detach().requires_grad_(backward) for t in (x, gates, *W)]
    y = form(leaves[0], indices, *leaves[1:])
    return [y.detach(), *(torch.autograd.grad(y, leaves, dy) if backward else ())]


def _step(form: Form, W: list[Tensor], backward: bool) -> Step:
    def step(inputs: Made) -> object:
        x, indices, gates, dy = inputs
        with torch.set_grad_enabled(backward):
            y, *grads = _with_gradients(form, x, indices, gates, W, dy, backward)
        return grads or y
    return step


def _of_transformers(name: str, module: Callable[[str], Any], backward: bool) -> Step:
    """A step that builds the module when it first runs, so that what fails is a reason."""
    def step(inputs: Made) -> object:
        x, indices, gates, dy = inputs
        with torch.set_grad_enabled(backward):
            leaves = [t.detach().requires_grad_(backward) for t in (x, gates)]
            y = module(name)(leaves[0], indices, leaves[1])
            return torch.autograd.grad(
                y, [*leaves, *module(name).parameters()], dy) if backward else y
    return step


def _module(name: str, case: Case, W: list[Tensor]) -> Any:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

    config = DeepseekV2Config(hidden_size=case.d, moe_intermediate_size=case.w,
                              n_routed_experts=case.E, num_experts_per_tok=case.K,
                              num_attention_heads=1)
    config._experts_implementation = name
    with torch.device("meta"):
        module = DeepseekV2Experts(config)
    module.gate_up_proj = torch.nn.Parameter(torch.cat(W[:2], 1))
    module.down_proj = torch.nn.Parameter(W[2])
    return module


def _routing(case: Case, device: torch.device) -> dict[str, Any]:
    """From affinities to sorted slots."""
    ours, theirs = _routers(case)
    inputs = rotated(scores(case, device), case.N * case.E * 4, device)
    routed_alike(case, inputs[0])
    ms = medians({"ours": ours, "torch": theirs}, inputs, device)
    nbytes = case.N * (4 * case.E + 8 * case.K + 4 * case.K)
    return row(f"{case.name}, routing and sort", ms, 0, nbytes, 0.0, N=case.N, E=case.E, K=case.K)


def scores(case: Case, device: torch.device) -> Callable[[int], Tensor]:
    random = torch.Generator(device).manual_seed(2)
    return lambda _: torch.randn(case.N, case.E, generator=random, device=device).softmax(-1)


def _routers(case: Case) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """Ours and torch's: s (N, E) -> indices (N, K), order (N·K,), counts (E,)."""
    from dsv2_ref.kernels.route_tokens import select_device_limited_fused, sort_slots_fused

    def router(select: Callable[..., Tensor], sort: Callable[..., Any]) -> Callable[[Tensor], Any]:
        def route(s: Tensor) -> tuple[Tensor, ...]:
            indices = select(s, case.K, case.D, case.M)
            return indices, *sort(indices, case.E)
        return route

    return (router(select_device_limited_fused, sort_slots_fused),
            router(select_device_limited, sort_slots))


def routed_alike(case: Case, s: Tensor) -> None:
    """RuntimeError unless ours routes as torch does; of equal affinities either may be chosen."""
    ours, theirs = _routers(case)
    chosen, order, _ = ours(s)
    if not (torch.equal(s.gather(-1, chosen), s.gather(-1, theirs(s)[0]))
            and torch.equal(order.long(), sort_slots(chosen, case.E)[0])):
        raise RuntimeError(f"routing of {case.name}: other experts or another order than the twin")

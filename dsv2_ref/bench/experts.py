# SPDX-License-Identifier: MIT
"""The routed experts of one layer on a GPU: our kernels beside what torch and transformers have.

Cases: the shape of V2-Lite with 32K tokens and that of V2 with 8K, forward alone and forward with
backward (gradients of tokens, gates and all weights); V2-Lite with 64 tokens, as in decoding,
forward alone; and, for both shapes, choosing the experts and sorting the slots.

Comparators: `experts_grouped` (torch's grouped_mm), `experts_padded` (bmm; for decoding also
`experts_loop`), and the experts of transformers on the same weights with each of its own forms that
fits the case. Experts are drawn at random, so no expert is far from its share; every form pays for
its own sorting. TFLOP/s count 6·d·w a slot forward, three times that with backward. Values and
gradients of ours are checked against `experts_loop` in fp32 before anything is timed.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv2_ref.bench.harness.gpu import check, device_for, medians, record, rotated, row
from dsv2_ref.moe.experts import experts_grouped, experts_loop, experts_padded, sort_slots
from dsv2_ref.moe.routing import select_device_limited

Form = Callable[..., Tensor]


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
TIMES = {"cuda": (20, 3), "cpu": (2, 1)}            # timed and not timed; an interpreter is slow


def run(quick: bool = False) -> dict[str, Any]:
    """All cases as one JSON-able record; `quick` is a smoke test whose numbers mean nothing.

    ValueError without a CUDA device (unless `quick`); RuntimeError if ours is wrong.
    """
    device = device_for("experts", quick)
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")           # before a kernel is imported
    rows = []
    for case in QUICK if quick else CASES:
        rows += _experts(case, device)
        if case.backward:
            rows.append(_routing(case, device))
    return {"name": "experts", "quick": quick, **record(device), "rows": rows}


def _experts(case: Case, device: torch.device) -> list[dict[str, Any]]:
    from dsv2_ref.kernels.grouped_experts import experts_fused

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    random = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random, device=device) * scale).to(dtype)

    def tokens(_: int) -> tuple[Tensor, ...]:
        s = torch.randn(case.N, case.E, generator=random, device=device).softmax(-1)
        gates, indices = s.topk(case.K, -1)
        return normal(case.N, case.d), indices, gates, normal(case.N, case.d)

    W = [normal(case.E, case.w, case.d, scale=case.d**-0.5) for _ in range(2)]
    W.append(normal(case.E, case.d, case.w, scale=case.w**-0.5))
    inputs = rotated(tokens, 2 * case.N * case.d * dtype.itemsize, device)
    error = _compare(experts_fused, inputs[0], W, case.backward)
    forms: dict[str, Form] = {"ours": experts_fused, "grouped_mm": experts_grouped,
                              "padded": experts_padded}
    if not case.backward:
        forms["loop"] = experts_loop
    sizes = {name: getattr(case, name) for name in "N d w E K".split()}
    flops = 6 * case.N * case.K * case.d * case.w
    weights = min(case.E, case.N * case.K) * 3 * case.d * case.w * dtype.itemsize
    stream = case.N * case.d * dtype.itemsize
    rows = []
    for backward in (False, True)[: 1 + case.backward]:
        steps = {name: _step(form, W, backward) for name, form in forms.items()}
        steps |= {f"transformers {name}": _of_transformers(name, case, W, backward)
                  for name in case.theirs}
        ms = medians(steps, inputs, device, *TIMES[device.type])
        what = f"{case.name}, forward" + " and backward" * backward
        nbytes = 3 * weights + 4 * stream if backward else weights + 2 * stream
        rows.append(row(what, ms, flops * (3 if backward else 1), nbytes, error, **sizes))
    return rows


def _compare(ours: Form, inputs: tuple[Tensor, ...], W: list[Tensor], backward: bool) -> float:
    """The largest relative RMS error of ours against the loop in fp32."""
    x, indices, gates, dy = inputs
    names, results = ("y", "dx", "dg", "dW_gate", "dW_up", "dW_down"), []
    for form, dtype in ((ours, x.dtype), (experts_loop, torch.float32)):
        leaves = [t.detach().to(t.dtype if t is gates else dtype).requires_grad_(backward)
                  for t in (x, gates, *W)]
        y = form(leaves[0], indices, *leaves[1:])
        results.append([y, *(torch.autograd.grad(y, leaves, dy.to(dtype)) if backward else ())])
    return max(check(a, b, f"experts_fused, {name}")
               for name, a, b in zip(names, *results))


def _step(form: Form, W: list[Tensor], backward: bool) -> Callable[[tuple[Tensor, ...]], object]:
    def step(inputs: tuple[Tensor, ...]) -> object:
        x, indices, gates, dy = inputs
        with torch.set_grad_enabled(backward):
            leaves = [t.detach().requires_grad_(backward) for t in (x, gates, *W)]
            y = form(leaves[0], indices, *leaves[1:])
            return torch.autograd.grad(y, leaves, dy) if backward else y
    return step


def _of_transformers(
    name: str, case: Case, W: list[Tensor], backward: bool
) -> Callable[[tuple[Tensor, ...]], object]:
    """A step that builds the module when it first runs, so that what fails is told by `medians`."""
    built: list[Any] = []

    def step(inputs: tuple[Tensor, ...]) -> object:
        if not built:
            built.append(_module(name, case, W))
        x, indices, gates, dy = inputs
        with torch.set_grad_enabled(backward):
            leaves = [t.detach().requires_grad_(backward) for t in (x, gates)]
            y = built[0](leaves[0], indices, leaves[1])
            return torch.autograd.grad(y, [*leaves, *built[0].parameters()], dy) if backward else y
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
    """From affinities to sorted slots; of equal affinities either may be chosen."""
    from dsv2_ref.kernels.route_tokens import select_device_limited_fused, sort_slots_fused

    random = torch.Generator(device).manual_seed(2)
    limit = (case.K, case.D, case.M)

    def scores(_: int) -> Tensor:
        return torch.randn(case.N, case.E, generator=random, device=device).softmax(-1)

    def theirs(s: Tensor) -> object:
        return sort_slots(select_device_limited(s, *limit), case.E)

    def ours(s: Tensor) -> object:
        return sort_slots_fused(select_device_limited_fused(s, *limit), case.E)

    inputs = rotated(scores, case.N * case.E * 4, device)
    s = inputs[0]
    chosen = select_device_limited_fused(s, *limit)
    expected = s.gather(-1, select_device_limited(s, *limit))
    order, _ = sort_slots_fused(chosen, case.E)
    if not (torch.equal(s.gather(-1, chosen), expected)
            and torch.equal(order.long(), sort_slots(chosen, case.E)[0])):
        raise RuntimeError(f"routing of {case.name}: other experts or another order than the twin")
    ms = medians({"ours": ours, "torch": theirs}, inputs, device, *TIMES[device.type])
    nbytes = case.N * (4 * case.E + 8 * case.K + 4 * case.K)
    return row(f"{case.name}, routing and sort", ms, 0, nbytes, 0.0, N=case.N, E=case.E, K=case.K)

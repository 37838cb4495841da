# SPDX-License-Identifier: MIT
"""One step of AdamW with 8-bit moments on a GPU: our kernel beside its twin and torchao's.

Cases: a stack of experts of V2-Lite in bf16, weights and gradients, and its embedding in
fp32. Comparators: `update_in_pieces`, the twin in plain torch; torchao's AdamW8bit with stochastic
rounding, if it is installed (it has other codes: the work is alike, the numbers are not ours);
`copy`, of as many bytes as an update reads and writes.

`bytes` is what an update must move at least: 10 a bf16 weight, 16 an fp32 one, and the scales. Its
rate over the record's `copy_tb_per_s` is `share_of_copy`. Before anything is timed three steps of
ours are compared with the twin's: fp32 weights, codes and scales, from the same weights.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv2_ref.bench.harness.cases import measured
from dsv2_ref.bench.harness.gpu import Step, check, growing, record, rotated, row
from dsv2_ref.kernels.eight_bit_moments import BLOCK, new_moments, rounding_key, update_in_pieces


class Case(NamedTuple):
    name: str
    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def needs(self) -> int:
        """Two gradients, the weights of four steps with moments, the copy, fp32 of the check."""
        return 64 * torch.Size(self.size).numel()


CASES = [Case("V2-Lite experts, bf16", (64, 1408, 2048), torch.bfloat16),
         Case("V2-Lite embedding, fp32", (102_400, 2048), torch.float32)]
QUICK = [Case("V2-Lite experts, bf16", (3, 16, 32), torch.bfloat16),
         Case("V2-Lite embedding, fp32", (20, 64), torch.float32)]
OPTIONS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def run(quick: bool = False) -> dict[str, Any]:
    """All cases as one JSON-able record; `quick` is a smoke test whose numbers mean nothing.

    ValueError without a CUDA device (unless `quick`).
    """
    return measured("optimizer", quick)


def rows(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")           # before a kernel is imported
    from dsv2_ref.kernels.adamw8_update import update_fused

    normal = drawn(case, device)
    W = normal(0)
    error = compared(update_fused, W, normal)
    clip = torch.full((), 0.5, device=device)
    gradients = rotated(normal, W.nbytes, device)
    nbytes = W.numel() * (3 * W.element_size() + 4 + 16 / BLOCK)
    here, there = torch.zeros(2, round(nbytes / 2), dtype=torch.uint8, device=device)
    stages: list[dict[str, Step]] = [
        {"ours": _step(update_fused, W, clip), "copy": lambda _: there.copy_(here)},
        {"torch": _step(update_in_pieces, W, clip), "torchao": _of_torchao(W)}]
    for ms in growing(stages, gradients, device):
        found = row(case.name, ms, 0, nbytes, error, weights=W.numel(),
                    bytes_a_weight=nbytes / W.numel())
        found["share_of_copy"] = found["tb_per_s"] / record(device)["copy_tb_per_s"]
        yield found


def drawn(case: Case, device: torch.device) -> Callable[[int], Tensor]:
    """A function that gives other standard normal numbers, of the case's size, every time."""
    random = torch.Generator(device).manual_seed(1)
    return lambda _: torch.randn(*case.size, generator=random, device=device).to(case.dtype)


def compared(ours: Callable[..., None], like: Tensor, normal: Callable[[int], Tensor]) -> float:
    """The largest relative RMS error of ours in three steps; of fp32 weights and the moments."""
    W, worst = like.float(), 0.0
    moments = new_moments(W)
    for t in (1, 2, 3):
        gradient, mine = normal(t), W.clone()
        my_moments = {name: x.clone() for name, x in moments.items()}
        ours(mine, gradient, my_moments, t, **OPTIONS, key=t)
        update_in_pieces(W, gradient, moments, t, **OPTIONS, key=t)
        for name, got, expected in (("weights", mine, W), *(
                (name, my_moments[name], x) for name, x in moments.items())):
            worst = max(worst, check(got, expected, f"update_fused, {name}"))
    return worst


def _step(update: Callable[..., None], start: Tensor, clip: Tensor) -> Callable[[Tensor], None]:
    """Steps of a weight and moments of its own."""
    W, moments, t = start.clone(), new_moments(start), [0]

    def step(gradient: Tensor) -> None:
        t[0] += 1
        update(W, gradient, moments, t[0], **OPTIONS, key=rounding_key(0, t[0], "W"), clip=clip)
    return step


def _of_torchao(start: Tensor) -> Callable[[Tensor], None]:
    """A step that builds the optimiser when it first runs, so that `medians` tells what fails."""
    built: list[Any] = []

    def step(gradient: Tensor) -> None:
        if not built:
            from torchao.optim import AdamW8bit

            W = torch.nn.Parameter(start.clone())
            built.extend((W, AdamW8bit([W], **OPTIONS, bf16_stochastic_round=True)))
        built[0].grad = gradient
        built[1].step()
    return step

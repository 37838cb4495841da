# SPDX-License-Identifier: MIT
"""Each kernel against fp32 on one GPU, at real widths and few tokens: what comes first on a card.

Nothing is timed. A row has the relative RMS error of ours, of an attention or of experts the
largest of outputs and gradients; a kernel that is wrong or does not launch is a failed case with
its reason. The tests marked `gpu` look closer.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from dsv2_ref.bench import attention, experts, mla_decode, six_bit_decode
from dsv2_ref.bench.harness.cases import measured
from dsv2_ref.bench.harness.gpu import TOLERANCE


class Case(NamedTuple):
    name: str
    of: Any                                  # a case of the bench in question
    errors: Callable[[Any, torch.device], float]

    @property
    def needs(self) -> int:
        return self.of.needs


def _decode(case: mla_decode.Case, device: torch.device) -> float:
    return mla_decode.checked(case, mla_decode.inputs(case, device, 0))


def _six_bit(case: six_bit_decode.Case, device: torch.device) -> float:
    return six_bit_decode.checked(case, six_bit_decode.inputs(case, device, 0))


def _attention(case: attention.Case, device: torch.device) -> float:
    ours, *_ = attention.forms(case, device)
    return max(attention.checked(case, ours, attention.inputs(case, device, 0))[1:])


def _experts(case: experts.Case, device: torch.device) -> float:
    from dsv2_ref.kernels.grouped_experts import experts_fused

    W, (some, *_) = experts.made(case, device)
    return experts.checked(experts_fused, some, W, case.backward)[0]


def _routing(case: experts.Case, device: torch.device) -> float:
    experts.routed_alike(case, experts.scores(case, device)(0))
    return 0.0


LITE = experts.CASES[0]._replace(N=4096)
CASES = [
    Case("decode, 16 heads", mla_decode.Case(8, 4096, 16), _decode),
    Case("attention", attention.Case(2, 1024, 16), _attention),
    Case("experts", LITE, _experts),
    Case("experts, decode", experts.CASES[2], _experts),
    Case("routing", experts.CASES[1], _routing),
    Case("six-bit decode, 16 heads", six_bit_decode.Case(8, 4096, 16), _six_bit),
    Case("decode, 128 heads", mla_decode.Case(2, 4096, 128), _decode),
    Case("six-bit decode, 128 heads", six_bit_decode.Case(2, 4096, 128), _six_bit),
]
QUICK = [
    Case("decode", mla_decode.QUICK[0], _decode),
    Case("attention", attention.QUICK[0], _attention),
    Case("experts", experts.QUICK[0], _experts),
    Case("routing", experts.QUICK[1], _routing),
    Case("six-bit decode", six_bit_decode.QUICK[0], _six_bit),
]


def run(quick: bool = False) -> dict[str, Any]:
    """A row a kernel; ValueError without a CUDA device (unless `quick`)."""
    return measured("correct", quick)


def rows(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    yield {"case": case.name, "error": case.errors(case.of, device), "tolerance": TOLERANCE}

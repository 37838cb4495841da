# SPDX-License-Identifier: MIT
"""Each kernel against fp32 on one GPU, at real widths and few tokens: what comes first on a card.

Nothing is timed. A row has the relative RMS error of ours, of an attention or of experts the
largest of outputs and gradients; a kernel that is wrong or does not launch is a failed case with
its reason. The tests marked `gpu` look closer.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv2_ref.attention.cache_quant import SixBitCache
from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.bench import attention, experts, fp8, mla_decode, optimizer, six_bit_decode
from dsv2_ref.bench.harness.cases import measured
from dsv2_ref.bench.harness.gpu import TOLERANCE, check
from dsv2_ref.forms import add_norm, add_up, kernel, rotate_both
from dsv2_ref.kernels.fp8 import Fp8Stack, quantise
from dsv2_ref.moe.experts import swiglu


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


def _update(case: optimizer.Case, device: torch.device) -> float:
    from dsv2_ref.kernels.adamw8_update import update_fused

    normal = optimizer.drawn(case, device)
    return optimizer.compared(update_fused, normal(0), normal)


def _fp8_layer(case: fp8.Layer, device: torch.device) -> float:
    W, inputs = fp8.made(case, device)
    return max(fp8.errors_of_a_layer(case.name, inputs(case.counts[-1]), *quantise(W)))


def _fp8_experts(case: fp8.Experts, device: torch.device) -> float:
    W, inputs = fp8.made(case, device)
    return fp8.error_of_experts(case.name, inputs(case.counts[-1]), [Fp8Stack(one) for one in W])


class Between(NamedTuple):
    """B sequences of T tokens, n_h heads of d_r, latents of d_c, a stream of d, K experts."""

    B: int
    T: int
    n_h: int
    d_r: int
    d_c: int
    d: int
    K: int
    needs: int = 2**28


def _between(case: Between, device: torch.device) -> float:
    """All that runs between products: turning, SwiGLU, adding with a norm, adding up, writing."""
    random = torch.Generator(device).manual_seed(1)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    B, T, n_h, d_r, d_c, d, K, _ = case
    angles = torch.randn(T, d_r // 2, generator=random, device=device)
    queries, key = normal(B, T, n_h, d_r), normal(B, T, d_r)
    h, u, routed = normal(B * T, d), normal(B * T, d), normal(B * T, K, d)
    norm = nn.RMSNorm(d, 1e-6, device=device).requires_grad_(False)
    norm.weight.copy_(normal(d))
    tables = angles.cos(), angles.sin()
    pairs = [
        (kernel(rotate_both)(queries, key, *tables),
         rotate_both(queries.float(), key.float(), *tables)),
        ((kernel(swiglu)(h, u),), (swiglu(h.float(), u.float()),)),
        (kernel(add_norm)(h, u, norm), add_norm(h.float(), u.float(), norm)),
        ((kernel(add_up)(h, u, routed),), (add_up(h.float(), u.float(), routed.float().sum(1)),))]
    for kind in (LatentCache, SixBitCache):
        caches = [kind(1, B, T, d_c, d_r, dtype, device) for _ in range(2)]
        caches[0].fused = kernel(kind)
        c_kv = normal(B, T, d_c)
        for cache in caches:
            cache.write(0, c_kv, key)
        if not all(map(torch.equal, *(cache.stores for cache in caches))):
            raise RuntimeError(f"{kind.__name__}: other rows than the twin's")
    return max(check(ours, twins, "between products") for found in pairs
               for ours, twins in zip(*found, strict=True))


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
    Case("between products", Between(4, 33, 16, 64, 512, 2048, 6), _between),
    Case("update, bf16", optimizer.Case("", (8, 1408, 2048), torch.bfloat16), _update),
    Case("update, fp32", optimizer.Case("", (8, 1408, 2048), torch.float32), _update),
    Case("FP8 layer", fp8.CASES[2], _fp8_layer),
    Case("FP8 experts", fp8.CASES[1], _fp8_experts),
]
QUICK = [
    Case("decode", mla_decode.QUICK[0], _decode),
    Case("attention", attention.QUICK[0], _attention),
    Case("experts", experts.QUICK[0], _experts),
    Case("routing", experts.QUICK[1], _routing),
    Case("six-bit decode", six_bit_decode.QUICK[0], _six_bit),
    Case("between products", Between(2, 5, 3, 8, 24, 40, 2), _between),
    Case("update, bf16", optimizer.QUICK[0], _update),
    Case("update, fp32", optimizer.QUICK[1], _update),
    Case("FP8 layer", fp8.QUICK[0], _fp8_layer),
    Case("FP8 experts", fp8.QUICK[1], _fp8_experts),
]


def run(quick: bool = False) -> dict[str, Any]:
    """A row a kernel; ValueError without a CUDA device (unless `quick`)."""
    return measured("correct", quick)


def rows(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    yield {"case": case.name, "error": case.errors(case.of, device), "tolerance": TOLERANCE}

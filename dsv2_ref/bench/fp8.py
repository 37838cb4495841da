# SPDX-License-Identifier: MIT
"""Products with FP8 weights on a GPU, beside the same in bf16: one byte a weight instead of two.

Cases, of V2-Lite and of V2, with 1, 16 and 128 rows as decoding has them: the linear layers that
read most (W_O, and the down product of the dense layer), and the routed experts of a layer.

Comparators: `bf16` (torch's linear; our fused experts), which reads twice the bytes, and
`dequantised` (the twin: a matrix in bf16 is written and read again), for experts the loop over
chosen experts in bf16. Where there are FP8 units, rows "quantised input" have x in FP8 as well;
that is another result, checked against its own twin. A row has the bytes that must be read and
written, `bf16_bytes` for the same in bf16, and `copy_share`, the rate relative to a plain copy's.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")            # for `quick`, before triton

from dsv2_ref.bench.harness.cases import measured
from dsv2_ref.bench.harness.gpu import check, medians, record, rotated, row
from dsv2_ref.kernels.fp8 import Fp8Stack, dequantise, linear, linear_quantised_input, quantise
from dsv2_ref.kernels.fp8_experts import experts_fp8
from dsv2_ref.kernels.fp8_products import TILES, linear_fp8, linear_fp8_quantised_input
from dsv2_ref.kernels.grouped_experts import experts_fused
from dsv2_ref.kernels.target import target_of
from dsv2_ref.moe.experts import experts_loop

ROWS = (1, 16, 128)


class Layer(NamedTuple):
    """A linear layer: r rows, c columns."""

    name: str
    r: int
    c: int
    counts: tuple[int, ...] = ROWS

    @property
    def needs(self) -> int:
        """W in fp32 twice, while it is quantised; inputs of 128 rows are nothing beside it."""
        return 16 * self.r * self.c + 2**28


class Experts(NamedTuple):
    """A layer's routed experts: E of (w, d), K a token."""

    name: str
    d: int
    w: int
    E: int
    K: int
    counts: tuple[int, ...] = ROWS

    @property
    def needs(self) -> int:
        """Three stacks in bf16, as codes, and in fp32 for the check."""
        return 30 * self.E * self.d * self.w + 2**28


CASES = [Layer("V2-Lite W_O", 2048, 2048), Experts("V2-Lite experts", 2048, 1408, 64, 6),
         Layer("V2-Lite dense down", 2048, 10944), Layer("V2 W_O", 5120, 16384),
         Layer("V2 dense down", 5120, 12288), Experts("V2 experts", 5120, 1536, 160, 6)]
QUICK = [Layer("W_O", 96, 130, (1, 18)), Experts("experts", 40, 24, 4, 2, (1, 18))]


def run(quick: bool = False) -> dict[str, Any]:
    """All cases as one JSON-able record; `quick` is a smoke test whose numbers mean nothing.

    ValueError without a CUDA device (unless `quick`).
    """
    return measured("fp8", quick)


def rows(case: Layer | Experts, device: torch.device) -> Iterator[dict[str, Any]]:
    for line in (_layer if isinstance(case, Layer) else _experts)(case, device):
        line["copy_share"] = line["tb_per_s"] / record(device)["copy_tb_per_s"]
        yield line


def _layer(layer: Layer, device: torch.device) -> Iterator[dict[str, Any]]:
    name, r, c, counts = layer
    W, inputs_of = made(layer, device)
    codes, scale = quantise(W)
    size = W.element_size()
    forms = {"ours": lambda x: linear_fp8(x, codes, scale), "bf16": lambda x: F.linear(x, W),
             "dequantised": lambda x: linear(x, codes, scale)}
    for M in counts:
        inputs = rotated(lambda _, M=M: inputs_of(M), M * c * size, device)
        other = M * (r + c) * size
        sizes = {"M": M, "r": r, "c": c, "bf16_bytes": W.nbytes + other}
        work = 2 * M * r * c, codes.nbytes + scale.nbytes + other
        errors = errors_of_a_layer(name, inputs[0], codes, scale)
        yield row(f"{name}, {M} rows", medians(forms, inputs, device), *work, next(errors), **sizes)
        for error in errors:
            own = {"ours": lambda x: linear_fp8_quantised_input(x, codes, scale)}
            ms = medians(own | {"bf16": forms["bf16"]}, inputs, device)
            yield row(f"{name}, {M} rows, quantised input", ms, *work, error, **sizes)


def _experts(layer: Experts, device: torch.device) -> Iterator[dict[str, Any]]:
    name, d, w, E, K, counts = layer
    W, inputs_of = made(layer, device)
    stacks = [Fp8Stack(one) for one in W]
    size = W[0].element_size()
    for N in counts:
        inputs = rotated(lambda _, N=N: inputs_of(N), N * d * size, device)
        error = error_of_experts(name, inputs[0], stacks)
        forms = {"ours": (experts_fp8, stacks), "bf16": (experts_fused, W),
                 "bf16 loop": (experts_loop, W)}
        with torch.no_grad():
            ms = medians({form: _step(*how) for form, how in forms.items()}, inputs, device)
        share, other = min(E, N * K) / E, 2 * N * d * size
        nbytes = share * sum(one.nbytes for one in stacks) + other
        yield row(f"{name}, {N} tokens", ms, 6 * N * K * d * w, nbytes, error, N=N, d=d, w=w,
                  E=E, K=K, bf16_bytes=share * sum(one.nbytes for one in W) + other)


def made(case: Layer | Experts, device: torch.device) -> tuple[Any, Callable[[int], Any]]:
    """W (r, c), or three stacks; a function of a number of rows, which gives x, or x and a routing.

    Standard normal numbers, in bf16 or, in the interpreter, in fp32.
    """
    random = torch.Generator(device).manual_seed(1)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(dtype)

    if isinstance(case, Layer):
        return normal(case.r, case.c) * case.c**-0.5, lambda M: normal(M, case.c)
    _, d, w, E, K, _ = case

    def tokens(N: int) -> tuple[Tensor, Tensor, Tensor]:
        s = torch.randn(N, E, generator=random, device=device).softmax(-1)
        gates, indices = s.topk(K, -1)
        return normal(N, d), indices, gates

    return [normal(E, *shape) * shape[1]**-0.5 for shape in ((w, d), (w, d), (d, w))], tokens


def errors_of_a_layer(name: str, x: Tensor, codes: Tensor, scale: Tensor) -> Iterator[float]:
    """Of ours, and where there are FP8 units of ours with x in FP8; RuntimeError if too large."""
    yield check(linear_fp8(x, codes, scale), F.linear(x.float(), dequantise(codes, scale)),
                f"linear_fp8, {name}")
    if "fp8" in TILES[target_of(x.device)]:
        yield check(linear_fp8_quantised_input(x, codes, scale),
                    linear_quantised_input(x.float(), codes, scale),
                    f"linear_fp8_quantised_input, {name}")


def error_of_experts(name: str, inputs: tuple[Tensor, ...], stacks: list[Fp8Stack]) -> float:
    x, *routed = inputs
    exact = [dequantise(stack.codes, stack.scale) for stack in stacks]
    return check(experts_fp8(x, *routed, *stacks), experts_loop(x.float(), *routed, *exact),
                 f"experts_fp8, {name}", 1e-2)                   # pre-activations are rounded too


def _step(form: Callable[..., Tensor], W: list[Any]) -> Callable[[Any], Tensor]:
    return lambda inputs: form(*inputs, *W)

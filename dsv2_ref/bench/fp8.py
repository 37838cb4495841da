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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2_ref.bench.harness.gpu import check, device_for, medians, record, rotated, row
from dsv2_ref.kernels.fp8 import Fp8Stack, dequantise, linear, linear_quantised_input, quantise
from dsv2_ref.moe.experts import experts_loop


class Layer(NamedTuple):
    """A linear layer: r rows, c columns."""

    name: str
    r: int
    c: int


class Experts(NamedTuple):
    """A layer's routed experts: E of (w, d), K a token."""

    name: str
    d: int
    w: int
    E: int
    K: int


LAYERS = [Layer("V2-Lite W_O", 2048, 2048), Layer("V2-Lite dense down", 2048, 10944),
          Layer("V2 W_O", 5120, 16384), Layer("V2 dense down", 5120, 12288)]
EXPERTS = [Experts("V2-Lite experts", 2048, 1408, 64, 6), Experts("V2 experts", 5120, 1536, 160, 6)]
ROWS = (1, 16, 128)
QUICK = [Layer("W_O", 96, 130)], [Experts("experts", 40, 24, 4, 2)], (1, 18)
TIMES = {"cuda": (20, 3), "cpu": (2, 1)}            # timed and not timed; an interpreter is slow


def run(quick: bool = False) -> dict[str, Any]:
    """All cases as one JSON-able record; `quick` is a smoke test whose numbers mean nothing.

    ValueError without a CUDA device (unless `quick`); RuntimeError if ours is wrong.
    """
    device = device_for("fp8", quick)
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")           # before a kernel is imported
    layers, experts, counts = QUICK if quick else (LAYERS, EXPERTS, ROWS)
    rows = [line for layer in layers for line in _layer(layer, counts, device)]
    rows += [line for layer in experts for line in _experts(layer, counts, device)]
    for line in rows:
        line["copy_share"] = line["tb_per_s"] / record(device)["copy_tb_per_s"]
    return {"name": "fp8", "quick": quick, **record(device), "rows": rows}


def _normal(device: torch.device) -> tuple[Callable[..., Tensor], torch.Generator]:
    """Standard normal numbers, in bf16 or, in the interpreter, in fp32."""
    random = torch.Generator(device).manual_seed(1)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return (lambda *shape: torch.randn(*shape, generator=random, device=device).to(dtype)), random


def _layer(
    layer: Layer, counts: tuple[int, ...], device: torch.device
) -> list[dict[str, Any]]:
    from dsv2_ref.kernels.fp8_products import TILES, linear_fp8, linear_fp8_quantised_input
    from dsv2_ref.kernels.target import target_of

    (name, r, c), (normal, _), rows = layer, _normal(device), []
    W = normal(r, c) * c**-0.5
    codes, scale = quantise(W)
    size = W.element_size()
    for M in counts:
        inputs = rotated(lambda _, M=M: normal(M, c), M * c * size, device)
        other = M * (r + c) * size
        sizes = {"M": M, "r": r, "c": c, "bf16_bytes": W.nbytes + other}
        work = 2 * M * r * c, codes.nbytes + scale.nbytes + other
        x = inputs[0]
        error = check(linear_fp8(x, codes, scale), F.linear(x.float(), dequantise(codes, scale)),
                      f"linear_fp8, {name}")
        ms = medians({"ours": lambda x: linear_fp8(x, codes, scale),
                      "bf16": lambda x: F.linear(x, W),
                      "dequantised": lambda x: linear(x, codes, scale)}, inputs, device,
                     *TIMES[device.type])
        rows.append(row(f"{name}, {M} rows", ms, *work, error, **sizes))
        if "fp8" in TILES[target_of(device)]:
            error = check(linear_fp8_quantised_input(x, codes, scale),
                          linear_quantised_input(x.float(), codes, scale),
                          f"linear_fp8_quantised_input, {name}")
            ms = medians({"ours": lambda x: linear_fp8_quantised_input(x, codes, scale),
                          "bf16": lambda x: F.linear(x, W)}, inputs, device, *TIMES[device.type])
            rows.append(row(f"{name}, {M} rows, quantised input", ms, *work, error, **sizes))
    return rows


def _experts(
    layer: Experts, counts: tuple[int, ...], device: torch.device
) -> list[dict[str, Any]]:
    from dsv2_ref.kernels.fp8_experts import experts_fp8
    from dsv2_ref.kernels.grouped_experts import experts_fused

    (name, d, w, E, K), (normal, random), rows = layer, _normal(device), []
    W = [normal(E, *shape) * shape[1]**-0.5 for shape in ((w, d), (w, d), (d, w))]
    stacks = [Fp8Stack(one) for one in W]
    size = W[0].element_size()

    def tokens(N: int) -> tuple[Tensor, Tensor, Tensor]:
        s = torch.randn(N, E, generator=random, device=device).softmax(-1)
        gates, indices = s.topk(K, -1)
        return normal(N, d), indices, gates

    for N in counts:
        inputs = rotated(lambda _, N=N: tokens(N), N * d * size, device)
        x, *routed = inputs[0]
        error = check(experts_fp8(x, *routed, *stacks),
                      experts_loop(x.float(), *routed, *(_exact(one) for one in stacks)),
                      f"experts_fp8, {name}", 1e-2)              # pre-activations are rounded too
        forms = {"ours": (experts_fp8, stacks), "bf16": (experts_fused, W),
                 "bf16 loop": (experts_loop, W)}
        with torch.no_grad():
            ms = medians({form: _step(*how) for form, how in forms.items()}, inputs, device,
                         *TIMES[device.type])
        share, other = min(E, N * K) / E, 2 * N * d * size
        nbytes = share * sum(one.nbytes for one in stacks) + other
        rows.append(row(f"{name}, {N} tokens", ms, 6 * N * K * d * w, nbytes, error, N=N, d=d, w=w,
                        E=E, K=K, bf16_bytes=share * sum(one.nbytes for one in W) + other))
    return rows


def _exact(stack: Fp8Stack) -> Tensor:
    return dequantise(stack.codes, stack.scale)


def _step(form: Callable[..., Tensor], W: list[Any]) -> Callable[[Any], Tensor]:
    return lambda inputs: form(*inputs, *W)

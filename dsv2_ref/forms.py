# SPDX-License-Identifier: MIT
"""Which of the equal algorithms runs: attention, selection, experts, and the steps between.

Equal algorithms are functions with one signature and one result (forms), chosen once a pass. The
choice goes by counting multiplications (attention), by device and size (experts), by the config
(selection); on a CUDA device a Triton kernel then takes the place of its naive twin. Triton and the
kernels are imported on the first such question about a CUDA device, not before: the package works
where Triton does not exist.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2_ref.attention.cache_quant import SixBitCache, attend_packed, dequantise, unpack
from dsv2_ref.attention.kv_cache import Cache, LatentCache
from dsv2_ref.attention.mla import (
    absorbed_is_cheaper,
    attend_absorbed,
    attend_expanded,
    attend_heads,
)
from dsv2_ref.attention.rope import rotate
from dsv2_ref.config import Config
from dsv2_ref.kernels.fp8 import Fp8Linear, Fp8Stack, linear
from dsv2_ref.kernels.fp8 import dequantise as dequantise_blocks
from dsv2_ref.moe.dropping import keep_within_budget
from dsv2_ref.moe.experts import (
    add_up,
    experts_grouped,
    experts_loop,
    experts_padded,
    swiglu,
)
from dsv2_ref.moe.routing import select_device_limited, select_greedy

Form = Callable[..., Tensor]


def rotate_both(q_r: Tensor, k_r: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of the queries (B, T, n_h, d_r) and of their key (B, T, d_r)."""
    return rotate(q_r, cos, sin), rotate(k_r, cos, sin)


def add_norm(h: Tensor, u: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """The stream h with u (..., d) added, and the norm of both."""
    h = h + u
    return h, norm(h)


@dataclass(frozen=True)
class Forms:
    """The algorithms of one pass."""

    attend: Form
    select: Form
    experts: Form
    keep: Form = keep_within_budget      # which slots are not dropped; training alone
    reads_positions: bool = False        # attend is given them, or would make them once a layer
    rotate_both: Form | None = None      # queries and key at once; None: each where it is made
    swiglu: Form = swiglu
    add_norm: Form = add_norm
    add_up: Form = add_up
    route: Form | None = None            # all that a router does

    def names(self) -> str:
        return ", ".join(f.__name__ for f in (self.attend, self.route or self.select, self.experts))


# twin -> the file and the name of its kernel
KERNELS: dict[Form, tuple[str, str]] = {
    attend_expanded: ("flash_attention", "attend_flash"),
    attend_absorbed: ("latent_decode", "attend_latent"),
    attend_packed: ("six_bit_decode", "attend_six_bit"),
    select_greedy: ("route_tokens", "select_greedy_fused"),
    select_device_limited: ("route_tokens", "select_device_limited_fused"),
    experts_loop: ("grouped_experts", "experts_fused"),
    experts_padded: ("grouped_experts", "experts_fused"),
    experts_grouped: ("grouped_experts", "experts_fused"),
    linear: ("fp8_products", "linear_fp8"),
    dequantise_blocks: ("fp8_products", "dequantise_fp8"),
    Fp8Stack: ("fp8_experts", "experts_fp8"),        # of any twin, whose weights are such stacks
    rotate_both: ("between_products", "rotate_both_fused"),
    swiglu: ("between_products", "swiglu_fused"),
    add_norm: ("between_products", "add_norm_fused"),
    add_up: ("route_tokens", "add_up_fused"),
    LatentCache: ("write_rows", "write_latent_fused"),        # of a cache, what it writes
    SixBitCache: ("write_rows", "write_six_bit_fused"),
}
# from about there, by bytes and FLOPs and not by a clock, dequantising once pays: the library's
# product is faster by more than five bytes a weight cost
FP8_ROWS = 512


def kernels_serve(x: Tensor) -> bool:
    """Whether there are kernels for tensors such as x, and they run where it is."""
    return (x.device.type == "cuda" and find_spec("triton") is not None
            and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and _run_on(x.device))


@functools.cache
def _run_on(device: torch.device) -> bool:
    """Whether a kernel can be launched there; if not, one warning says why.

    A first launch compiles a piece of C: without a compiler, or Python's header files, no kernel
    runs, although triton can be imported.
    """
    try:
        kernel(select_greedy)(torch.zeros(1, 2, device=device), 1)
    except Exception as error:               # of any kind: the compiler's, the driver's, ptxas'
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(f"no Triton kernel runs on {device}, plain torch takes their place ({why})",
                      stacklevel=2)
        return False
    return True


def kernel(twin: Form) -> Form:
    """The Triton kernel that equals `twin`."""
    file, name = KERNELS[twin]
    return getattr(importlib.import_module(f"dsv2_ref.kernels.{file}"), name)


def kernels_serve_fp8(x: Tensor) -> bool:
    """Whether products of x with FP8 weights have kernels: they have no gradient, nor autocast."""
    return (kernels_serve(x) and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type))


def multiply_fp8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (..., c), codes (r, c), scales (R, C) -> x·Wᵀ (..., r): what `Fp8Linear` computes with."""
    if kernels_serve_fp8(x) and x.numel() < FP8_ROWS * x.shape[-1]:
        return kernel(linear)(x, codes, scale)
    return F.linear(x, read_fp8(codes, scale, x.dtype))


def read_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (r, c), scales (R, C) -> W (r, c) of `dtype`, for absorption and for many rows."""
    serve = kernels_serve(torch.empty(0, dtype=dtype, device=codes.device))
    return (kernel(dequantise_blocks) if serve else dequantise_blocks)(codes, scale, dtype)


def describe_fp8(model: nn.Module, x: Tensor) -> list[str]:
    """What multiplies a model's FP8 layers, in one or no word; x as in `choose`."""
    if not any(isinstance(module, Fp8Linear) for module in model.modules()):
        return []
    if not kernels_serve_fp8(x):
        return ["FP8 layers: dequantised"]
    return [f"FP8 layers: {kernel(linear).__name__} below {FP8_ROWS} rows, then dequantised"]


def choose(
    c: Config, x: Tensor, B: int, T: int, S: int, cached: str | None = None,
    W_gate: object | None = None, alone: bool = True,
) -> Forms:
    """The forms for B sequences of T new tokens on S keys each.

    x: any tensor of the stream's device and dtype. cached: the cache's `kind`, None without one.
    W_gate: of the experts; weights that are no plain tensor (FP8) have a kernel of their own.
    alone: no other rank has a part in the experts' sum.
    """
    select = select_greedy if c.max_devices is None else select_device_limited
    if kernels_serve(x):
        select = kernel(select)
    attend = attention_form(c, x, T, S, cached)
    forms = Forms(attend, select, experts_form(c, x, B * T, W_gate),
                  reads_positions=attend.__module__.endswith("_decode"), **between(x))
    if alone and forms.swiglu is not swiglu and forms.experts is kernel(experts_loop):
        forms = replace(forms, **few(B * T))
    return forms


def few(n_tokens: int) -> dict[str, Form]:
    """Experts' rows, summed where they join the stream; of few tokens the router in one kernel."""
    grouped, route = (importlib.import_module(f"dsv2_ref.kernels.{file}")
                      for file in ("grouped_experts", "route_tokens"))
    found: dict[str, Form] = {"experts": grouped.expert_rows, "add_up": kernel(add_up)}
    return found | ({"route": route.route_fused} if n_tokens <= route.FEW else {})


def between(x: Tensor) -> dict[str, Form]:
    """The steps between products for tensors such as x, by their names in `Forms`."""
    found: dict[str, Form] = {}
    if kernels_serve(x):
        found["rotate_both"] = kernel(rotate_both)
        # the others have no gradient, and want all inputs of one dtype
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            found |= {"swiglu": kernel(swiglu), "add_norm": kernel(add_norm)}
    return found


def attention_form(c: Config, x: Tensor, T: int, S: int, cached: str | None) -> Form:
    """Expanded for prompts and training, absorbed for decoding; of rows as the cache has them."""
    if cached == "expanded":                 # keys and values, built when they were written
        return attend_heads
    if cached not in (None, "latent", "six_bit"):
        raise ValueError(f"cache: rows of kind {cached!r}, expected 'latent' or 'six_bit'")
    absorb = cached is not None and absorbed_is_cheaper(T, S, c.d_h, c.d_r, c.d_v, c.d_c)
    if absorb:
        twin = attend_packed if cached == "six_bit" else attend_absorbed
    else:
        twin = attend_expanded
    # under autocast new rows and cached ones differ in dtype, which the twins do not mind
    serve = kernels_serve(x) and not (cached and torch.is_autocast_enabled(x.device.type))
    if absorb and torch.is_grad_enabled():
        serve = False                        # the kernels of decoding have no gradient
    form = kernel(twin) if serve else twin
    return on_packed_rows(form) if cached == "six_bit" and not absorb else form


def writing(cache: Cache) -> Cache:
    """The same cache; a kernel writes its rows where there is one."""
    for kind in (LatentCache, SixBitCache):
        if isinstance(cache, kind) and kernels_serve(cache.stores[-1]):
            cache.fused = kernel(kind)
    return cache


def on_packed_rows(attend: Form) -> Form:
    """`attend`, which reads plain rows, for the words and scales of a six-bit cache."""

    @functools.wraps(attend)
    def unpacked(
        q_c: Tensor, q_r: Tensor, words: Tensor, scales: Tensor, W_UK: Tensor, *rest: object
    ) -> Tensor:
        numbers = unpack(words, W_UK.shape[-1], q_r.shape[-1])
        return attend(q_c, q_r, *dequantise(*numbers, scales, q_c.dtype), W_UK, *rest)

    return unpacked


def experts_form(c: Config, x: Tensor, n_tokens: int, W_gate: object | None) -> Form:
    """For `n_tokens` tokens of x's device and dtype."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if kernels_serve(x) and (W_gate is None or isinstance(W_gate, Tensor)):
        return experts_fused_autocast if autocast else kernel(experts_loop)
    if type(W_gate) is Fp8Stack and kernels_serve_fp8(x):
        return kernel(Fp8Stack)
    if torch.compiler.is_exporting():
        return experts_padded                # shapes that do not depend on who chose whom
    if n_tokens * c.top_k < 2 * c.n_routed:
        return experts_loop                  # few slots: read the chosen experts only
    # grouped_mm wants rows of whole 16 bytes and does not obey autocast
    fits = all(n * x.element_size() % 16 == 0 for n in (c.d, c.expert_width))
    best = torch.bfloat16 if x.device.type == "cuda" else torch.float32
    if fits and x.dtype == best and not autocast:
        return experts_grouped
    return experts_padded


def experts_fused_autocast(
    x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """`experts_fused` with x and weights in autocast's dtype, which a kernel does not know of."""
    dtype = torch.get_autocast_dtype(x.device.type)
    x, W_gate, W_up, W_down = (t.to(dtype) for t in (x, W_gate, W_up, W_down))
    return kernel(experts_loop)(x, indices, gates, W_gate, W_up, W_down, keep)

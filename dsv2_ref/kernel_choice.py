# SPDX-License-Identifier: MIT
"""Where a Triton kernel takes the place of its naive twin: on a CUDA device, and nowhere else.

Both have one signature and the same result, so `model.py` asks for the function that it wants and
runs what it gets. Triton and the kernels are imported on the first such question about a CUDA
device, not before: the package works where Triton does not exist.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

Form = Callable[..., Tensor]


def kernels_serve(x: Tensor) -> bool:
    """Whether there are kernels for tensors such as x."""
    return (x.device.type == "cuda" and find_spec("triton") is not None
            and x.dtype in (torch.bfloat16, torch.float16, torch.float32))


def attention_form(twin: Form, x: Tensor, cached: bool) -> Form:
    """The kernel in place of `twin`, one of the attend_ functions, for tensors such as x.

    The kernels of decoding have no gradient. Under autocast new rows and cached ones differ in
    dtype, which the twins do not mind.
    """
    if not kernels_serve(x) or (cached and torch.is_autocast_enabled(x.device.type)):
        return twin
    if twin.__name__ == "attend_expanded":
        from dsv2_ref.kernels.flash_attention import attend_flash

        return attend_flash
    if torch.is_grad_enabled():
        return twin
    if twin.__name__ == "attend_packed":
        from dsv2_ref.kernels.six_bit_decode import attend_six_bit

        return attend_six_bit
    from dsv2_ref.kernels.latent_decode import attend_latent

    return attend_latent


def selection_form(twin: Form, x: Tensor) -> Form:
    """The kernel in place of `twin`, select_device_limited, for affinities of tokens such as x."""
    if not kernels_serve(x):
        return twin
    from dsv2_ref.kernels.route_tokens import select_device_limited_fused

    return select_device_limited_fused


def experts_form(twin: Form, x: Tensor, weights: object) -> Form:
    """The kernel in place of `twin`, one of the experts_ functions, for tokens such as x.

    Weights that are no plain tensors (FP8, dequantised where they are used) keep the twin.
    """
    if not kernels_serve(x) or not isinstance(weights, Tensor):
        return twin
    if torch.is_autocast_enabled(x.device.type):
        return experts_fused_autocast
    from dsv2_ref.kernels.grouped_experts import experts_fused

    return experts_fused


def experts_fused_autocast(
    x: Tensor, indices: Tensor, gates: Tensor, W_gate: Tensor, W_up: Tensor, W_down: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """`experts_fused` with x and weights in autocast's dtype, which a kernel does not know of."""
    from dsv2_ref.kernels.grouped_experts import experts_fused

    dtype = torch.get_autocast_dtype(x.device.type)
    x, W_gate, W_up, W_down = (t.to(dtype) for t in (x, W_gate, W_up, W_down))
    return experts_fused(x, indices, gates, W_gate, W_up, W_down, keep)

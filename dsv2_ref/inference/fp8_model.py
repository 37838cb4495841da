# SPDX-License-Identifier: MIT
"""A model whose linear layers and experts lie in memory as FP8 codes and block scales.

Left as they are: router, norms, embedding and head. The blocks are those of our matrices, one for
each of the paper's symbols, where a file's are those of the published, interleaved ones; with V2's
sizes (d_h = d_v = 128, d_c = 512) they differ in W_UQ and W_QR alone. See kernels/fp8.py.
"""

import torch
from torch import Tensor, nn

from dsv2_ref.attention.mla import is_its_weight
from dsv2_ref.forms import multiply_fp8, read_fp8
from dsv2_ref.kernels.fp8 import Fp8Linear, Fp8Stack
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.moe.experts import MixtureOfExperts


def quantise_model(model: DeepSeekV2) -> DeepSeekV2:
    """The same model object, changed in place one weight at a time, in eval mode.

    It computes what the dequantised model would with frozen weights, bit for bit where no kernel
    takes its products (forms.py), and cannot be trained further. A model that is quantised already
    stays as it is. ValueError names a weight that is not finite, or a linear layer that is more
    than its weight; the model is then as it was.
    """
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear) and not is_its_weight(module):
            raise ValueError(f"blocks.{name}: a linear layer with a bias, a hook or code of its "
                             "own, expected its weight alone")
    for name, weight in model.blocks.named_parameters():
        if weight.dtype != torch.float8_e4m3fn and not weight.float().isfinite().all():
            raise ValueError(f"blocks.{name}: NaN or infinite, expected finite numbers")
    # a list that held the linear layers too would keep all their weights to the end
    for module in [m for m in model.blocks.modules() if not isinstance(m, nn.Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Fp8Linear(child.weight, multiply_fp8, read_fp8))
        if isinstance(module, MixtureOfExperts) and isinstance(module.W_gate, nn.Parameter):
            for name in ("W_gate", "W_up", "W_down"):
                W = getattr(module, name)
                delattr(module, name)
                setattr(module, name, Fp8Stack(W))
    return model.eval()


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of live weights by dtype, a tied matrix counted once."""
    seen: dict[int, Tensor] = {t.data_ptr(): t for t in model.parameters()}
    sizes: dict[str, int] = {}
    for t in seen.values():
        sizes[str(t.dtype)[6:]] = sizes.get(str(t.dtype)[6:], 0) + t.nbytes
    return sizes

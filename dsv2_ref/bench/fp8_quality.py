# SPDX-License-Identifier: MIT
"""What FP8 weights cost the small trained model: held-out bits per byte, and memory.

The peer is the same model in bf16, data/model. Every variant is computed in fp32, so that only the
stored weights differ:

  bf16              as it lies in data/model
  fp8_file          saved with `fp8=True` and loaded again: the blocks of the published rows
  fp8_file_bf16     the same, dequantised into bf16, as `load` does unless told otherwise
  fp8_memory        `quantise_model`: the blocks of our matrices, read from FP8 in every pass
  fp8_per_tensor    one scale per matrix instead of one per block
  fp8_with_router   the router in FP8 too, which V3 (and this project) leave alone

Held-out are test stories of the corpus that the model was trained on. `kl` is the mean of
KL(bf16 ‖ variant) in nats per token over the first of them; `same_experts` the share of routed
slots whose expert bf16 chooses too.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_ref import checkpoint
from dsv2_ref.checkout import in_checkout
from dsv2_ref.inference.evaluate import bits_per_byte
from dsv2_ref.inference.fp8_model import quantise_model, stored_bytes
from dsv2_ref.kernels.fp8 import BLOCK, dequantise, quantise
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import byte_count, stories_corpus
from dsv2_ref.text.data import marked
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.machine import machine

SEQUENCE = 256


def rounded(model: DeepSeekV2, whole: bool = False, router: bool = False) -> DeepSeekV2:
    """The model with its weights rounded to FP8, in place: with one scale per matrix, or the router
    as well."""
    with torch.no_grad():
        for name, W in model.blocks.named_parameters():
            if W.ndim > 1 and (router or "router" not in name):
                block = max(W.shape[-2:]) if whole else BLOCK
                W.copy_(dequantise(*quantise(W, block), block=block))
    return model


def variants(path: Path) -> dict[str, DeepSeekV2]:
    """Every variant, ready to be computed in fp32."""
    def plain() -> DeepSeekV2:
        return checkpoint.load(path, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(checkpoint.load(path), Path(folder) / "fp8", fp8=True)
        exact = checkpoint.load(Path(folder) / "fp8", dtype=torch.float32)
        half = checkpoint.load(Path(folder) / "fp8").float()
    return {
        "bf16": plain(), "fp8_file": exact, "fp8_file_bf16": half,
        "fp8_memory": quantise_model(plain()), "fp8_per_tensor": rounded(plain(), whole=True),
        "fp8_with_router": rounded(plain(), router=True),
    }


def _rows(ids: list[list[int]], length: int) -> Tensor:
    flat = torch.tensor([i for one in ids for i in one])
    return flat[: len(flat) // length * length].view(-1, length)


@torch.no_grad()
def _compared(model: DeepSeekV2, base: DeepSeekV2, tokens: Tensor) -> dict[str, float]:
    p, q = (m(tokens).double().log_softmax(-1) for m in (base, model))
    ours, theirs = (m.losses(tokens, tokens, with_load=True).load for m in (model, base))
    same = [(a.routing.indices[:, :, None] == b.routing.indices[:, None]).any(-1).double().mean()
            for a, b in zip(ours, theirs, strict=True)]
    return {"kl": (p.exp() * (p - q)).sum(-1).mean().item(),
            "same_experts": torch.stack(same).mean().item()}


def run(quick: bool = False, path: Path | None = None) -> dict[str, Any]:
    """One JSON-able record, of data/model by default; `quick` takes 20 stories instead of 300."""
    path = path or in_checkout("data/model")
    test = stories_corpus().test[: 20 if quick else 300]
    tokenizer = load_tokenizer(path / "tokenizer.json")
    ids, n_bytes = list(marked(test, tokenizer)), byte_count(test)
    few = _rows(ids[:64], 128)
    models = variants(path)
    record: dict[str, Any] = {}
    for name, model in models.items():
        bits = bits_per_byte(model, ids, n_bytes, SEQUENCE)
        record[name] = {"bits_per_byte": bits, **_compared(model, models["bf16"], few)}
    bf16 = record["bf16"]["bits_per_byte"]
    for values in record.values():
        values["change_percent"] = 100 * (values["bits_per_byte"] / bf16 - 1)
    before, after = (checkpoint.load(path) for _ in range(2))
    return {
        "name": "fp8_quality", "quick": quick, **machine(), "model": "data/model (mini, stories)",
        "held_out": {"stories": len(test), "bytes": n_bytes}, "variants": record,
        "live_bytes": {"bf16": stored_bytes(before), "fp8": stored_bytes(quantise_model(after))},
    }

# SPDX-License-Identifier: MIT
"""The published tensors of a model, and what they cannot hold. Only this file knows their names.

There is one tensor per linear layer and expert. The rows of three matrices are interleaved where
the paper has separate ones:

  q_proj / q_b_proj     per head [W_UQ ; W_QR]
  kv_a_proj_with_mqa    [W_DKV ; W_KR]
  kv_b_proj             per head [W_UK ; W_UV]

FP8 files (see kernels/fp8.py) hold codes for every `_proj`, X.weight, and for each 128×128 block of
its published rows a scale under V3's name, X.weight_scale_inv.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsv2_ref.config import Config
from dsv2_ref.kernels.fp8 import BLOCK, Fp8Linear, Fp8Stack
from dsv2_ref.model import Block, DeepSeekV2
from dsv2_ref.moe.experts import FeedForward

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """A published tensor and the views of our parameters that it is made of.

    Each part is (groups, rows, columns); group by group their rows are stacked, which is how the
    published rows interleave heads.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all parts exactly."""
        return functools.reduce(torch.promote_types, (part.dtype for part in self.parts))

    def read(self) -> Tensor:
        """Our values in the published layout, a contiguous copy on the CPU."""
        return torch.cat(self.parts, 1).reshape(self.shape).cpu()

    def write(self, published: Tensor) -> None:
        """Copy a published tensor into our parameters, casting to their dtype.

        ValueError where that dtype ends before the numbers do.
        """
        rows = [part.shape[1] for part in self.parts]
        pieces = published.reshape(self.parts[0].shape[0], sum(rows), -1).split(rows, 1)
        for part, piece in zip(self.parts, pieces, strict=True):
            part.copy_(piece)
            narrower = torch.finfo(part.dtype).max < torch.finfo(piece.dtype).max
            if narrower and not torch.equal(part.isfinite().cpu(), piece.isfinite()):
                raise ValueError(f"{self.name}: infinite in {part.dtype}, expected a dtype with "
                                 f"the range of {piece.dtype}")


def _entry(name: str, *weights: Tensor, heads: int = 1) -> Entry:
    weights = tuple(w.detach() for w in weights)
    shape = (sum(len(w) for w in weights), *weights[0].shape[1:])
    return Entry(name, shape, tuple(w.reshape(heads, len(w) // heads, -1) for w in weights))


def _feed_forward(prefix: str, ffn: FeedForward) -> Iterator[Entry]:
    yield _entry(f"{prefix}.gate_proj.weight", ffn.W_gate.weight)
    yield _entry(f"{prefix}.up_proj.weight", ffn.W_up.weight)
    yield _entry(f"{prefix}.down_proj.weight", ffn.W_down.weight)


def _block(prefix: str, block: Block) -> Iterator[Entry]:
    a, c = block.attention, block.config
    yield _entry(f"{prefix}.input_layernorm.weight", block.norm_attention.weight)
    query = "q_proj"
    if c.d_cq is not None:
        query = "q_b_proj"
        yield _entry(f"{prefix}.self_attn.q_a_proj.weight", a.W_DQ.weight)
        yield _entry(f"{prefix}.self_attn.q_a_layernorm.weight", a.norm_q.weight)
    yield _entry(f"{prefix}.self_attn.{query}.weight", a.W_UQ.weight, a.W_QR.weight, heads=c.n_h)
    yield _entry(f"{prefix}.self_attn.kv_a_proj_with_mqa.weight", a.W_DKV.weight, a.W_KR.weight)
    yield _entry(f"{prefix}.self_attn.kv_a_layernorm.weight", a.norm_kv.weight)
    yield _entry(f"{prefix}.self_attn.kv_b_proj.weight", a.W_UK.weight, a.W_UV.weight, heads=c.n_h)
    yield _entry(f"{prefix}.self_attn.o_proj.weight", a.W_O.weight)
    yield _entry(f"{prefix}.post_attention_layernorm.weight", block.norm_ffn.weight)
    if not c.is_moe(block.layer):
        yield from _feed_forward(f"{prefix}.mlp", block.ffn)
        return
    yield _entry(f"{prefix}.mlp.gate.weight", block.router.weight)
    yield from _feed_forward(f"{prefix}.mlp.shared_experts", block.experts.shared)
    for here, e in enumerate(block.experts.held):
        expert = f"{prefix}.mlp.experts.{e}"
        yield _entry(f"{expert}.gate_proj.weight", block.experts.W_gate[here])
        yield _entry(f"{expert}.up_proj.weight", block.experts.W_up[here])
        yield _entry(f"{expert}.down_proj.weight", block.experts.W_down[here])


def published_entries(model: DeepSeekV2) -> Iterator[Entry]:
    """Every published tensor of a model, in file order; of a stage those of its layers, and of
    routed experts those that are held. A tied head is the embedding, and not named again."""
    if model.first:
        yield _entry(EMBEDDING, model.embedding.weight)
    for block in model.blocks:
        yield from _block(f"model.layers.{block.layer}", block)
    if model.last:
        yield _entry("model.norm.weight", model.norm.weight)
        if not model.config.tie_embeddings:
            yield _entry(HEAD, model.head.weight)


def stored_entries(model: DeepSeekV2) -> Iterator[Entry]:
    """What is written of a whole model: a tied head is there as well, under its own name.

    Some programs (vLLM, for one) never tie the head of this kind of model, and would read with
    random numbers in its place.
    """
    yield from published_entries(model)
    if model.config.tie_embeddings:
        yield _entry(HEAD, model.head.weight)


def ragged(model: DeepSeekV2) -> list[str]:
    """The tensors of an FP8 file whose last blocks are not full: rows or columns are no multiple
    of 128. Not every program reads them right (inference/clients.md)."""
    return [entry.name for entry in published_entries(model)
            if has_scales(entry.name) and any(n % BLOCK for n in entry.shape)]


def has_scales(name: str) -> bool:
    """Which tensors are codes in an FP8 file: every linear layer and expert, no router, no head."""
    return "_proj" in name


def check_model(model: DeepSeekV2) -> None:
    """ValueError names the first part of a model that its published files would not hold.

    They hold what `model.config` describes and nothing else: no bias, no adapter, no layer of
    another kind, no setting that was changed on a module.
    """
    if type(model) is not DeepSeekV2:
        raise ValueError(f"model: {type(model).__name__}, expected DeepSeekV2")
    with torch.device("meta"):
        expected = _description(DeepSeekV2(model.config))
    found = _description(model)
    for name in found | expected:
        if found.get(name) != expected.get(name):
            here, there = (_words(each.get(name, "nothing")) for each in (found, expected))
            raise ValueError(f"{name}: {here}, expected {there}, as the published format has it")
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(f"{name}: on the meta device, expected numbers")
    head, embedding = model.head.weight, model.embedding.weight
    if model.config.tie_embeddings and head is not embedding and not torch.equal(head, embedding):
        raise ValueError("head.weight: differs from embedding.weight, expected one matrix "
                         "(tie_embeddings is True)")


def _description(model: DeepSeekV2) -> dict[str, Any]:
    """Name -> kind of each module, shape of each tensor, value of each plain setting."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is Fp8Stack:                  # in place of a parameter
            found[name] = tuple(module.shape)
            continue
        is_linear = type(module) in (nn.Linear, Fp8Linear)
        found[name] = nn.Linear if is_linear else type(module)
        if type(module) is Fp8Linear:
            found[f"{name}.weight"] = tuple(module.shape)
            continue
        tensors = (*module.named_parameters("", False, False), *module.named_buffers("", False))
        found |= {f"{name}.{key}".lstrip("."): tuple(t.shape) for key, t in tensors}
        if module is model or is_linear:              # how it is run; sizes are in the shapes
            continue
        found |= {f"{name}.{key}": value for key, value in vars(module).items()
                  if isinstance(value, bool | int | float | str | tuple | Config | None)
                  and key != "training" and not key.startswith("_")}
    return found


def _words(part: Any) -> str:
    return part.__name__ if isinstance(part, type) else str(part)

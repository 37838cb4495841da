# SPDX-License-Identifier: MIT
"""Models on disk in the published format. Only safetensors and JSON are read.

A published checkpoint is a directory: config.json, one or more .safetensors files with one tensor
per linear layer and expert, and an index where there are several files. The rows of three of its
matrices are interleaved where the paper has separate ones:

  q_proj / q_b_proj     per head [W_UQ ; W_QR]
  kv_a_proj_with_mqa    [W_DKV ; W_KR]
  kv_b_proj             per head [W_UK ; W_UV]

FP8 files (see kernels/fp8.py) hold codes for every `_proj`, X.weight, and for each 128×128 block of
its published rows a scale under V3's name, X.weight_scale_inv.

Only this file knows those names. Loading streams: the model is allocated once, and one published
tensor at a time is copied into it. Nothing is unpickled and no remote code is run. Saving writes a
neighbouring directory first and renames it when it is complete.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv2_ref.config import FP8, Config
from dsv2_ref.files.tensors import INDEX, SCALE, check_names, checked, open_file, read, tensor_files
from dsv2_ref.kernels.fp8 import quantise, scale_shape
from dsv2_ref.model import Block, DeepSeekV2
from dsv2_ref.moe.experts import FeedForward


@dataclass(frozen=True)
class Entry:
    """A published tensor and the views of our parameters that it is made of.

    Each part is (groups, rows, columns); group by group their rows are stacked, which is how the
    published rows interleave heads.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]

    def read(self) -> Tensor:
        """Our values in the published layout, a contiguous copy on the CPU."""
        return torch.cat(self.parts, 1).reshape(self.shape).cpu()

    def write(self, published: Tensor) -> None:
        """Copy a published tensor into our parameters, casting to their dtype."""
        rows = [part.shape[1] for part in self.parts]
        pieces = published.reshape(self.parts[0].shape[0], sum(rows), -1).split(rows, 1)
        for part, piece in zip(self.parts, pieces, strict=True):
            part.copy_(piece)


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
    for e in range(c.n_routed):
        expert = f"{prefix}.mlp.experts.{e}"
        yield _entry(f"{expert}.gate_proj.weight", block.experts.W_gate[e])
        yield _entry(f"{expert}.up_proj.weight", block.experts.W_up[e])
        yield _entry(f"{expert}.down_proj.weight", block.experts.W_down[e])


def published_entries(model: DeepSeekV2) -> Iterator[Entry]:
    """Every published tensor of a model, in file order."""
    yield _entry("model.embed_tokens.weight", model.embedding.weight)
    for layer, block in enumerate(model.blocks):
        yield from _block(f"model.layers.{layer}", block)
    yield _entry("model.norm.weight", model.norm.weight)
    if not model.config.tie_embeddings:
        yield _entry("lm_head.weight", model.head.weight)


def has_scales(name: str) -> bool:
    """Which tensors are codes in an FP8 file: every linear layer and expert, no router, no head."""
    return "_proj" in name


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> DeepSeekV2:
    """The model in a published directory, in eval mode.  dtype None: as stored; device None: CPU.

    ValueError names the tensor that is missing, extra or misshapen, or the file that is damaged.
    """
    path = Path(path)
    config = Config.from_hf(path)
    files = tensor_files(path)
    with torch.device("meta"):
        model = DeepSeekV2(config)
    expected = {entry.name: entry.shape for entry in published_entries(model)}
    if json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
        expected |= {n + SCALE: scale_shape(s) for n, s in expected.items() if has_scales(n)}
    check_names(path, expected, files)
    if dtype is None:
        name = "model.embed_tokens.weight"
        with open_file(files[name]) as reader:
            dtype = checked(reader, files[name], name, expected[name]).dtype
    model = model.to(dtype).to_empty(device=device or "cpu")
    if config.tie_embeddings:                                  # to_empty unties
        model.head.weight = model.embedding.weight
    entries = {entry.name: entry for entry in published_entries(model)}
    for file in sorted(set(files.values())):
        with open_file(file) as reader:
            for name in sorted(n for n, f in files.items() if f == file and n in entries):
                entries[name].write(read(reader, files, name, expected))
    return model.eval()


def save(
    model: DeepSeekV2, path: str | Path, files: dict[str, str] | None = None,
    overwrite: bool = False, shard_bytes: int = 5_000_000_000, fp8: bool = False,
) -> None:
    """Write the published format into the directory `path`, which must not hold anything yet.

    `files` are further text files, name -> content (a tokenizer.json). `overwrite` replaces a
    directory that exists, once the new one is complete. Nothing is ever half-written. `fp8` halves
    the file; `load` then gives the dequantised model.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: a file, expected a directory to save into")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path}: not empty, expected a new or empty directory")
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)      # of a killed process with the same id
        scratch.mkdir()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        _write_shards(model, scratch, shard_bytes, fp8)
        config = model.config.to_hf() | {"torch_dtype": str(model.embedding.weight.dtype)[6:]}
        config |= {"quantization_config": FP8} if fp8 else {}
        texts = {"config.json": json.dumps(config, indent=2) + "\n"} | (files or {})
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8")
        if path.is_dir() and any(path.iterdir()):
            old = scratch.with_suffix(".old")
            path.rename(old)
            try:
                scratch.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _stored(entry: Entry, fp8: bool) -> dict[str, Tensor]:
    if not fp8 or not has_scales(entry.name):
        return {entry.name: entry.read()}
    codes, scale = quantise(entry.read(), name=entry.name)
    return {entry.name: codes, entry.name + SCALE: scale}


def _write_shards(model: nn.Module, folder: Path, shard_bytes: int, fp8: bool) -> None:
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    size = model.embedding.weight.element_size()
    for entry in published_entries(model):
        nbytes = size * torch.Size(entry.shape).numel()
        if fp8 and has_scales(entry.name):
            nbytes = nbytes // size + 4 * torch.Size(scale_shape(entry.shape)).numel()
        if nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        room -= nbytes
        shards[-1].append(entry)
    where, total = {}, 0
    for i, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: t for entry in shard for name, t in _stored(entry, fp8).items()}
        total += sum(t.nbytes for t in tensors.values())
        where |= dict.fromkeys(tensors, name)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

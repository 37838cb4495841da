# SPDX-License-Identifier: MIT
"""Models on disk in the published format. Only safetensors and JSON are read.

A published checkpoint is a directory: config.json, one or more .safetensors files with one tensor
per linear layer and expert, and an index where there are several files. files/published.py knows
the names of the tensors and which of our weights they hold.

Loading streams: the model is allocated once, and one published tensor at a time is copied into it.
Nothing is unpickled and no remote code is run. Saving writes a neighbouring directory first and
renames it when it is complete. Beside the model lies a manifest.json: by it `save` can prove that
it wrote all of a directory that it is to replace, and it replaces no other.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv2_ref.config import Config
from dsv2_ref.config_json import FP8
from dsv2_ref.files.manifest import MANIFEST, write_manifest, written_files
from dsv2_ref.files.published import (
    EMBEDDING,
    HEAD,
    Entry,
    check_model,
    has_scales,
    published_entries,
    stored_entries,
)
from dsv2_ref.files.tensors import (
    INDEX,
    PLAIN,
    SCALE,
    check_names,
    checked,
    open_file,
    read,
    stored_dtype,
    tensor_files,
)
from dsv2_ref.files.whole import whole_folder
from dsv2_ref.kernels.fp8 import quantise, scale_shape
from dsv2_ref.model import DeepSeekV2

__all__ = ["INDEX", "Entry", "check_place", "load", "open_file", "published_entries", "save"]
CONFIG = "config.json"


def load(
    path: str | Path, dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> DeepSeekV2:
    """The model in a published directory, in eval mode.  device None: CPU.

    dtype None: as stored, the narrowest that holds every tensor exactly where they differ. It may
    be a name, "bfloat16". ValueError names the tensor that is missing, extra, misshapen or outside
    the dtype's range, or the file that is damaged.
    """
    path, dtype = Path(path), None if dtype is None else _dtype(dtype)
    device = "cpu" if device is None else device             # and not torch's default device
    _check_device(device)
    config = Config.from_hf(path)
    files = tensor_files(path)
    with torch.device("meta"):
        model = DeepSeekV2(config)
    expected = {entry.name: entry.shape for entry in published_entries(model)}
    weights = set(expected)
    if json.loads((path / CONFIG).read_text(encoding="utf-8")).get("quantization_config"):
        scaled = {n: scale_shape(s) for n, s in expected.items() if has_scales(n)}
        expected |= {n + SCALE: s for n, s in scaled.items()}
        weights -= set(scaled)
    if config.tie_embeddings and HEAD in files:              # most store the one matrix twice
        expected[HEAD] = expected[EMBEDDING]
    check_names(path, expected, files)
    model = model.to(dtype or stored_dtype(files, weights)).to_empty(device=device)
    if config.tie_embeddings:                                # to_empty unties
        model.head.weight = model.embedding.weight
    entries = {entry.name: entry for entry in published_entries(model)}
    for file in sorted(set(files.values())):
        with open_file(file) as reader:
            for name in sorted(n for n, f in files.items() if f == file and n in entries):
                entries[name].write(read(reader, files, name, expected))
    if config.tie_embeddings and HEAD in files:
        both = []
        for name in (EMBEDDING, HEAD):
            with open_file(files[name]) as reader:
                both.append(checked(reader, files[name], name, expected[name]).double())
        if not torch.equal(*both):
            raise ValueError(f"{HEAD}: differs from {EMBEDDING}, expected the same numbers, as "
                             "tie_word_embeddings is true")
    return model.eval()


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in PLAIN.values():
        names = ", ".join(str(plain)[6:] for plain in PLAIN.values())
        raise ValueError(f"dtype: {dtype!r}, expected one of {names}")
    return found


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"device: {device!r}, expected one that is here ({first})") from None


def check_place(path: str | Path, overwrite: bool = False) -> list[str]:
    """The files in `path` that `save` would replace: none in a new or empty directory.

    ValueError, and nothing is touched, where `save` would refuse: a file, a directory that holds
    anything and may not be overwritten, or anything that `save` did not write.
    """
    if path == "":
        raise ValueError("path: '', expected the name of a directory")
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: a file, expected a directory to save into")
        there = path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if there and not overwrite:
        raise ValueError(f"{path}: not empty, expected a new or empty directory")
    return written_files(path) if there else []


def save(
    model: DeepSeekV2, path: str | Path, files: dict[str, str] | None = None,
    overwrite: bool = False, shard_bytes: int = 5_000_000_000, fp8: bool = False,
) -> None:
    """Write the published format into the directory `path`, which must not hold anything yet.

    `files` are further text files, name -> content (a tokenizer.json). `overwrite` replaces a
    directory that holds what an earlier `save` wrote and nothing else, once the new one is
    complete. Nothing is ever half-written. `fp8` halves the file; `load` then gives the dequantised
    model. ValueError names what the format cannot hold, or what is in the way.
    """
    check_model(model)
    replaced = check_place(path, overwrite)
    shards = _shards(model, shard_bytes, fp8)
    for name in files or {}:
        if Path(name).name != name or name in (CONFIG, *shards, INDEX, MANIFEST):
            raise ValueError(f"files: {name!r}, expected a file name that the model does not use")
    with whole_folder(path, replaced) as folder:
        entries = stored_entries(model)
        for name, sizes in shards.items():
            tensors: dict[str, Tensor] = {}
            while len(tensors) < len(sizes):
                tensors |= _stored(next(entries), fp8)
            _save_file(tensors, folder / name, {"format": "pt"})
        for name, text in (_texts(model, shards, fp8) | (files or {})).items():
            (folder / name).write_bytes(text.encode())       # the same bytes on every system
        write_manifest(folder)


def _shards(model: DeepSeekV2, shard_bytes: int, fp8: bool) -> dict[str, dict[str, int]]:
    """File name -> the tensors in it, in file order, and their bytes."""
    shards: list[dict[str, int]] = [{}]
    for entry in stored_entries(model):
        numbers = torch.Size(entry.shape).numel()
        sizes = {entry.name: numbers * entry.dtype.itemsize}
        if fp8 and has_scales(entry.name):
            scales = torch.Size(scale_shape(entry.shape)).numel()
            sizes = {entry.name: numbers, entry.name + SCALE: 4 * scales}
        if shards[-1] and sum(shards[-1].values()) + sum(sizes.values()) > shard_bytes:
            shards.append({})
        shards[-1] |= sizes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    n = len(shards)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def _texts(model: DeepSeekV2, shards: dict[str, dict[str, int]], fp8: bool) -> dict[str, str]:
    """The small files of the format: name -> content."""
    dtype = model.embedding.weight.dtype
    config = model.config.to_hf() | {"torch_dtype": str(dtype)[6:]}
    config |= {"quantization_config": FP8} if fp8 else {}
    texts = {CONFIG: json.dumps(config, indent=2) + "\n"}
    if len(shards) > 1:
        total = sum(sum(sizes.values()) for sizes in shards.values())
        where = {name: file for file, sizes in shards.items() for name in sizes}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    return texts


def _stored(entry: Entry, fp8: bool) -> dict[str, Tensor]:
    if not fp8 or not has_scales(entry.name):
        return {entry.name: entry.read()}
    codes, scale = quantise(entry.read(), name=entry.name)
    return {entry.name: codes, entry.name + SCALE: scale}


def _save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:                         # a full disk, as safetensors says it
        raise OSError(str(error)) from None

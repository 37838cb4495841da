# SPDX-License-Identifier: MIT
"""Reading safetensors files that others wrote: whatever is wrong is told in one line.

FP8 files have codes under X.weight and a scale for each 128×128 block under X.weight_scale_inv,
which may lie in another file of the directory.
"""

import functools
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv2_ref.kernels.fp8 import dequantise

INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
PLAIN = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def checksum(tensors: dict[str, Tensor]) -> str:
    """Of all tensors' bytes, in the order of their names."""
    total = 0
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().reshape(-1).view(torch.uint8)
        total = zlib.crc32(flat.numpy(), total)
    return f"{total:08x}"


def tensor_files(path: Path) -> dict[str, Path]:
    """Published tensor name -> the file it lies in."""
    if (path / INDEX).exists():
        try:
            where = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: path / str(file) for name, file in where.items()}
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError):
            raise ValueError(f"{path / INDEX}: damaged, expected JSON with a weight_map") from None
    with open_file(path / "model.safetensors") as reader:
        return dict.fromkeys(reader.keys(), path / "model.safetensors")


def check_names(path: Path, expected: dict[str, Any], files: dict[str, Path]) -> None:
    if missing := sorted(set(expected) - set(files)):
        raise ValueError(f"{missing[0]}: missing from {path} ({len(missing)} missing in all)")
    extra = sorted(n for n in set(files) - set(expected) if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise ValueError(f"{extra[0]}: not part of the model that {path}/config.json describes "
                         f"({len(extra)} such tensors)")


def open_file(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged, expected a whole safetensors file ({error})") from None


def stored_dtype(files: dict[str, Path], names: Iterable[str]) -> torch.dtype:
    """The narrowest dtype that holds all of these tensors exactly, as far as they are plain."""
    names, dtypes = set(names), set()
    for file in sorted({files[name] for name in names}):
        with open_file(file) as reader:
            there = names.intersection(reader.keys())
            dtypes |= {reader.get_slice(name).get_dtype() for name in there} & set(PLAIN)
    plain = [PLAIN[dtype] for dtype in dtypes] or [torch.float32]
    return functools.reduce(torch.promote_types, plain)


def read(reader: safe_open, files: dict[str, Path], name: str, expected: dict[str, Any]) -> Tensor:
    """A published tensor; codes are dequantised here, where rows lie as their blocks were cut."""
    if (scale := name + SCALE) not in expected:
        return checked(reader, files[name], name, expected[name])
    codes = checked(reader, files[name], name, expected[name], torch.float8_e4m3fn)
    other = reader if files[scale] == files[name] else open_file(files[scale])
    W = dequantise(codes, checked(other, files[scale], scale, expected[scale], torch.float32))
    if not W.isfinite().all():
        raise ValueError(f"{name}: NaN or infinite with its {scale}, expected finite numbers")
    return W


def checked(
    reader: safe_open, file: Path, name: str, shape: tuple[int, ...],
    only: torch.dtype | None = None,
) -> Tensor:
    """The tensor of that name, if it is there, of that shape, and made of plain numbers.

    `only` is the one dtype that will do; None for any float of 16 bits or more.
    """
    try:
        found = tuple(reader.get_slice(name).get_shape())
        if found != shape:
            raise ValueError(f"{name}: shape {found} in {file}, expected {shape}")
        tensor = reader.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{name}: cannot be read from {file} ({error})") from None
    plain = tensor.is_floating_point() and tensor.element_size() >= 2
    if not (plain if only is None else tensor.dtype == only):
        raise ValueError(f"{name}: dtype {tensor.dtype} in {file}, expected "
                         f"{only or '16-bit floats or wider'}")
    return tensor

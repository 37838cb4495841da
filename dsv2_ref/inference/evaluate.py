# SPDX-License-Identifier: MIT
"""Held-out bits per byte: how well a model predicts text, whatever its tokenizer.

A model that gives a text the probability p can code it in -log2 p bits, so this number stands
beside a compressor's. The paper reports it on Pile-test (0.606 for V2).
"""

import gzip
import lzma
import math
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Document


@torch.no_grad()
def bits_per_byte(
    model: DeepSeekV2, documents: Sequence[Sequence[int]], n_bytes: int, sequence: int,
    batch: int = 32, overlap: float = 0.5, progress: bool = False,
) -> float:
    """Bits the model needs for one byte of the documents.

    documents: ids of each one, from its begin mark to its end mark; all but the begin mark are
    predicted. n_bytes: UTF-8 bytes of all texts. A window has `sequence` tokens, of which the first
    `overlap` share are context that has been counted before (except in a document's first window).
    """
    if n_bytes <= 0 or not documents:
        raise ValueError(f"documents: {len(documents)} with {n_bytes} bytes, expected some text")
    device = model.embedding.weight.device
    stride = max(1, round(sequence * (1 - overlap)))
    windows: list[tuple[list[int], int]] = []       # ids, how many of the last are counted
    for ids in documents:
        end = min(sequence, len(ids) - 1)
        windows.append((list(ids[: end + 1]), end))
        while end < len(ids) - 1:
            begin, end = end, min(end + stride, len(ids) - 1)
            windows.append((list(ids[max(0, end - sequence) : end + 1]), end - begin))
    windows.sort(key=lambda w: len(w[0]))           # neighbours of one length: little padding
    was_training, nats = model.training, 0.0
    model.eval()
    for start in tqdm(range(0, len(windows), batch), "held-out", disable=not progress, leave=False):
        rows = windows[start : start + batch]
        x = torch.zeros(len(rows), len(rows[-1][0]) - 1, dtype=torch.int64)
        y = torch.full_like(x, -100)
        for b, (ids, counted) in enumerate(rows):
            n = len(ids) - 1
            x[b, :n] = torch.tensor(ids[:-1])
            y[b, n - counted : n] = torch.tensor(ids[len(ids) - counted :])
        mean = model.losses(x.to(device), y.to(device)).language.item()
        nats += mean * int((y != -100).sum())
    model.train(was_training)
    return nats / math.log(2) / n_bytes


def compressed_bits_per_byte(documents: Sequence[Document]) -> dict[str, float]:
    """What general compressors need, in bits per raw byte: the bar a small model has to clear.

    gzip -9 and xz -9e on every document by itself (headers included), and xz on all of them
    joined in the given order, where one document may help the next.
    """
    raw = [document.text.encode() for document in documents]
    total = sum(map(len, raw))
    if not total:
        raise ValueError(f"{len(raw)} document(s) without any text, expected some to compress")

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return {
        "gzip": 8 * sum(len(gzip.compress(data, 9, mtime=0)) for data in raw) / total,
        "xz": 8 * sum(map(xz, raw)) / total,
        "xz_together": 8 * xz(b"".join(raw)) / total,
    }

# SPDX-License-Identifier: MIT
"""What a model makes of given text: log-probabilities, and held-out bits per byte.

A model that gives a text the probability p can code it in -log2 p bits, so bits per byte stand
beside a compressor's, and beside those of a model with another tokenizer. The paper reports them
on Pile-test (0.606 for V2). Benchmarks with choices compare the probabilities of the answers:
`score_continuations`; what is done with them is in scoring.py.
"""

import gzip
import lzma
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dsv2_ref.cross_entropy import linear_log_probs, linear_scores
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Document


def token_log_probs(
    model: DeepSeekV2, ids: Tensor, lengths: Sequence[int] | None = None
) -> Tensor:
    """log p of each next token: ids (B, T) -> (B, T-1) in nats, in at least fp32; carries gradient.

    lengths: real tokens of each sequence, the rest being padding on the right, where log p is 0;
    None for all. No slot is dropped and no balance loss taken, in training mode too.
    """
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(f"ids: shape {tuple(ids.shape)}, expected (batch, tokens), at least two")
    B, T = ids.shape
    if lengths is not None and (len(lengths) != B or not all(1 <= n <= T for n in lengths)):
        raise ValueError(f"lengths: {list(lengths)}, expected {B} numbers from 1 to {T}")
    h = model.hidden(ids[:, :-1]).flatten(0, 1)                              # (B·(T-1), d)
    next_ids = ids[:, 1:].long()
    known = (next_ids >= 0) & (next_ids < model.config.vocab)
    if ids.device.type == "cpu" and not known.all():
        raise ValueError(f"ids: {int(next_ids[~known][0])}, expected 0 to {model.config.vocab - 1}")
    log_p = linear_log_probs(h, model.head, next_ids.where(known, 0).flatten()).view(B, T - 1)
    log_p = log_p.masked_fill(~known, torch.nan)
    if lengths is None:
        return log_p
    real = torch.arange(1, T) < torch.tensor(lengths)[:, None]               # (B, T-1)
    return log_p.where(real.to(log_p.device), 0.0)


@torch.no_grad()
def score_continuations(
    model: DeepSeekV2, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int = 16,
    progress: bool = False,
) -> list[tuple[float, bool]]:
    """(log p of all tokens of the continuation in nats, whether each is the most likely one).

    pairs: ids of a context and of what follows it, both of at least one. Where the two are longer
    than the model's positions and one more (the last token is not read), the context loses its
    first tokens. Pairs that read the same, as the letters of a multiple choice do, are read once.
    """
    most = model.config.max_positions
    readers: dict[tuple[int, ...], list[int]] = {}         # what is read -> the pairs that need it
    for i, (context, following) in enumerate(pairs):
        if not context or not 1 <= len(following) <= most:
            raise ValueError(f"pairs[{i}]: {len(context)} and {len(following)} tokens, expected at "
                             f"least one of both and at most max_positions = {most} of the second")
        if wrong := [id for id in following if not 0 <= id < model.config.vocab]:
            raise ValueError(f"pairs[{i}]: id {wrong[0]}, expected 0 to {model.config.vocab - 1}")
        readers.setdefault((*context, *following)[-most - 1 : -1], []).append(i)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    texts = sorted(readers, key=len, reverse=True)         # what does not fit fails at once
    for start in tqdm(range(0, len(texts), batch), "scored", disable=not progress, leave=False):
        rows = texts[start : start + batch]
        padded = torch.tensor([[*ids, *[ids[-1]] * (len(rows[0]) - len(ids))] for ids in rows])
        h = model.hidden(padded.to(model.like.device))                       # (B, T, d)
        mine = [(b, i) for b, ids in enumerate(rows) for i in readers[ids]]
        ends = [h[b, len(rows[b]) - len(pairs[i][1]) : len(rows[b])] for b, i in mine]
        targets = [target for _, i in mine for target in pairs[i][1]]
        log_p, first = linear_scores(torch.cat(ends), model.head,
                                     torch.tensor(targets, device=h.device))
        sizes = [len(pairs[i][1]) for _, i in mine]
        for (_, i), p, is_first in zip(mine, log_p.split(sizes), first.split(sizes), strict=True):
            found[i] = p.sum(dtype=torch.float64).item(), bool(is_first.all())
    return found


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
    stride = max(1, round(sequence * (1 - overlap)))
    windows: list[tuple[list[int], int]] = []       # ids, how many of the last are counted
    for ids in documents:
        end = min(sequence, len(ids) - 1)
        windows.append((list(ids[: end + 1]), end))
        while end < len(ids) - 1:
            begin, end = end, min(end + stride, len(ids) - 1)
            windows.append((list(ids[max(0, end - sequence) : end + 1]), end - begin))
    windows.sort(key=lambda w: len(w[0]))           # neighbours of one length: little padding
    nats = 0.0
    for start in tqdm(range(0, len(windows), batch), "held-out", disable=not progress, leave=False):
        rows = windows[start : start + batch]
        longest = len(rows[-1][0])
        padded = torch.tensor([ids + ids[-1:] * (longest - len(ids)) for ids, _ in rows])
        log_p = token_log_probs(model, padded.to(model.like.device))         # (B, longest - 1)
        counted = torch.zeros(log_p.shape, dtype=torch.bool)
        for b, (ids, n) in enumerate(rows):
            counted[b, len(ids) - 1 - n : len(ids) - 1] = True
        nats -= log_p[counted.to(log_p.device)].sum(dtype=torch.float64).item()
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

# SPDX-License-Identifier: MIT
"""Generation: read the prompts, then step after step: sample a token of each, feed it.

The prompts of a batch may have different lengths. They are padded on the right, and the cache
counts the real tokens of each, so a padded row is the next one to be overwritten and no mask for
padding exists. A long prompt is read in pieces, which bounds the memory and changes nothing. On a
CUDA device the step is captured once and replayed: graph.py.
"""

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dsv2_ref.attention.kv_cache import Cache
from dsv2_ref.inference.graph import DecodeStep, worth
from dsv2_ref.model import DeepSeekV2

PIECE = 1024    # prompt tokens read at once
NOT_A_NUMBER = -1


def read(model: DeepSeekV2, prompts: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Append the prompts to the cache; the hidden state (B, d) of each one's last token."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[*p, *[p[-1]] * (longest - len(p))] for p in prompts],
                          device=model.like.device)
    last = model.like.new_zeros(len(prompts), model.config.d)
    for start in range(0, longest, PIECE):
        piece = padded[:, start : start + PIECE]
        lengths = [min(max(len(p) - start, 0), piece.shape[1]) for p in prompts]
        h = model.hidden(piece, cache, lengths)
        for b, p in enumerate(prompts):
            if start < len(p) <= start + piece.shape[1]:
                last[b] = h[b, len(p) - 1 - start]
    return last


def step(model: DeepSeekV2, ids: Tensor, cache: Cache, counts: Sequence[int]) -> Tensor:
    """Append one token of each sequence, ids (B,); the hidden state (B, d) after it.

    counts: 1, or 0 for a sequence that has ended: its token is read and not counted.
    """
    return model.hidden(ids[:, None], cache, counts)[:, 0]


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """logits (B, vocab) -> (B,) ids: the most likely for temperature 0, else drawn.

    Top-p keeps the fewest most likely tokens whose probabilities reach `top_p` together. The id is
    `NOT_A_NUMBER` where a logit is NaN or the largest is infinite: a flag that needs no wait.
    """
    largest, ids = logits.max(-1, keepdim=True)         # (B, 1); of equal ones the first
    usable = largest.isfinite()
    if temperature > 0:
        # in fp64 no temperature above 0 is too small, and sums of a vocabulary are exact enough
        below = logits.where(usable, 0.0) - largest.where(usable, 0.0)
        p = (below.double() / temperature).softmax(-1)
        if top_p < 1:
            p, order = p.sort(-1, descending=True)
            # what comes before already suffices; probabilities of fp32 logits are known to 1e-6
            enough = p.cumsum(-1) - p >= top_p * (1 - 1e-6)
            p = p.masked_fill(enough, 0.0)
        ids = torch.multinomial(p, 1, generator=generator)
        ids = ids if top_p >= 1 else order.gather(-1, ids)
    return ids.where(usable, NOT_A_NUMBER)[:, 0]


@torch.inference_mode()
def generate(
    model: DeepSeekV2, tokens: Tensor | Sequence[Sequence[int]], max_new_tokens: int,
    temperature: float = 0.0, top_p: float = 1.0, stop: int | Iterable[int] | None = None,
    cache: Cache | None = None, stream: Callable[[list[int | None]], None] | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """New ids of each sequence, up to and including its first stop token.

    tokens: (B, T) or B lists of ids, of any lengths >= 1. stop: ids that end a sequence; None means
    the model's own ends of a document, () nothing. cache: to go on from, one row a sequence; it
    then holds the prompt and all new tokens but the last. A sequence also ends where its room in
    the cache, or max_positions, does. stream: called at every step with the new id of each
    sequence, None for those that have ended. generator: for reproducible draws.
    """
    prompts, stops = _prompts(tokens), _stops(model, stop)
    _check(max_new_tokens, temperature, top_p)
    if cache is None:
        cache = model.new_cache(len(prompts), _room(model, prompts, max_new_tokens))
    most = min(cache.max_tokens, model.config.max_positions)
    h = read(model, prompts, cache)                             # (B, d)
    new: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    replay = DecodeStep(model, cache) if worth(model, cache, max_new_tokens) else None
    for n in range(max_new_tokens):
        if n:
            last = torch.tensor([row[-1] for row in new], device=h.device)
            counts = [int(runs) for runs in running]
            h = replay(last, counts) if replay else step(model, last, cache, counts)
        ids = sample(model.head(h), temperature, top_p, generator).tolist()
        for b, (row, i, runs) in enumerate(zip(new, ids, running, strict=True)):
            if runs and i == NOT_A_NUMBER:
                raise ValueError(f"logits: NaN or infinite for new token {n} of sequence {b}, "
                                 "expected numbers; weights, a token id or the cache are damaged")
            if runs:
                row.append(i)
        if stream is not None:
            stream([i if runs else None for i, runs in zip(ids, running, strict=True)])
        running = [runs and i not in stops and read_so_far < most for i, runs, read_so_far
                   in zip(ids, running, cache.lengths, strict=True)]
        if not any(running):
            break
    return new


def _prompts(tokens: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    rows = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    rows = list(rows) if hasattr(rows, "__iter__") else [rows]
    for row in rows:
        if isinstance(row, str) or not hasattr(row, "__iter__"):
            raise ValueError(f"tokens: {row!r} where a sequence should be, expected (batch, tokens)"
                             " ids")
    rows = [_ids("tokens", row) for row in rows]
    if not rows or not all(rows):
        raise ValueError("tokens: an empty prompt, expected at least one token per sequence")
    return rows


def _ids(name: str, values: Iterable[object]) -> list[int]:
    """Integers of any kind (numpy's, 0-dimensional tensors) as ints."""
    values = list(values)
    try:
        ids = [operator.index(value) for value in values]
    except TypeError:
        raise ValueError(f"{name}: {values!r}, expected integer ids") from None
    if any(isinstance(value, bool) for value in values):
        raise ValueError(f"{name}: {values!r}, expected integer ids, not True or False")
    return ids


def _stops(model: DeepSeekV2, stop: object) -> set[int]:
    if stop is None:
        return set(model.config.stops)
    if isinstance(stop, Tensor):
        stop = stop.reshape(-1).tolist()
    one = not hasattr(stop, "__iter__") and not isinstance(stop, str)
    ids, vocab = _ids("stop", [stop] if one or isinstance(stop, str) else stop), model.config.vocab
    for i in ids:
        if not 0 <= i < vocab:               # it would never be drawn
            raise ValueError(f"stop: id {i}, expected 0 to {vocab - 1}")
    return set(ids)


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens}, expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: {temperature}, expected a number >= 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p}, expected above 0 and at most 1")


def _room(model: DeepSeekV2, prompts: list[list[int]], max_new_tokens: int) -> int:
    """Tokens that a cache has to hold: the last new one of each sequence is never read."""
    lengths, most = [len(p) for p in prompts], model.config.max_positions
    if max(lengths) > most:
        raise ValueError(f"tokens: a prompt of {max(lengths)}, expected at most max_positions = "
                         f"{most}")
    if (needed := min(lengths) + max_new_tokens - 1) > most:
        raise ValueError(f"max_new_tokens: {max_new_tokens} after {min(lengths)} tokens need "
                         f"{needed} positions, expected at most max_positions = {most}")
    return min(max(lengths) + max_new_tokens - 1, most)

# SPDX-License-Identifier: MIT
"""Generation: read the prompts through expanded attention, decode through absorbed attention.

The prompts of a batch may have different lengths. They are padded on the right, and the cache
counts the real tokens of each, so a padded row is the next one to be overwritten and no mask for
padding exists. A long prompt is read in pieces, which bounds the memory and changes nothing.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.model import DeepSeekV2

PIECE = 1024    # prompt tokens read at once


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """logits (B, vocab) -> (B,) ids: the most likely for temperature 0, else drawn.

    Top-p keeps the fewest most likely tokens whose probabilities reach `top_p` together.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)           # what comes before already suffices
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


@torch.inference_mode()
def generate(
    model: DeepSeekV2, tokens: Tensor | Sequence[Sequence[int]], max_new_tokens: int,
    temperature: float = 0.0, top_p: float = 1.0, stop: int | Iterable[int] | None = None,
    cache: LatentCache | None = None, stream: Callable[[list[int | None]], None] | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """New ids of each sequence, up to and including its first stop token.

    tokens: (B, T) or B lists of ids, of any lengths >= 1. stop: ids that end a sequence; None means
    the model's own ends of a document, () nothing. cache: to go on from, one row a sequence; it
    then holds the prompt and all new tokens but the last. stream: called at every step with the
    new id of each sequence, None for those that have ended. generator: for reproducible draws.
    """
    prompts = [[int(i) for i in row] for row in tokens]
    stops = _check(model, prompts, max_new_tokens, temperature, top_p, stop)
    if cache is None:
        cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        h = _read(model, prompts, cache)                        # (B, d)
        new: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        for step in range(max_new_tokens):
            if step:
                # an ended sequence is fed its last token again, and counted as 0 tokens
                last = torch.tensor([[row[-1]] for row in new], device=h.device)
                h = model.hidden(last, cache, [int(r) for r in running])[:, -1]
            ids = sample(model.head(h), temperature, top_p, generator).tolist()
            for row, i, runs in zip(new, ids, running, strict=True):
                if runs:
                    row.append(i)
            if stream is not None:
                stream([i if runs else None for i, runs in zip(ids, running, strict=True)])
            running = [runs and i not in stops for i, runs in zip(ids, running, strict=True)]
            if not any(running):
                break
    finally:
        model.train(was_training)
    return new


def _read(model: DeepSeekV2, prompts: list[list[int]], cache: LatentCache) -> Tensor:
    """Append the prompts to the cache; the hidden state (B, d) of each one's last token."""
    longest = max(map(len, prompts))
    padded = torch.tensor([p + [p[-1]] * (longest - len(p)) for p in prompts],
                          device=model.embedding.weight.device)
    last = model.embedding.weight.new_zeros(len(prompts), model.config.d)
    for start in range(0, longest, PIECE):
        piece = padded[:, start : start + PIECE]
        lengths = [min(max(len(p) - start, 0), piece.shape[1]) for p in prompts]
        h = model.hidden(piece, cache, lengths)
        for b, p in enumerate(prompts):
            if start < len(p) <= start + piece.shape[1]:
                last[b] = h[b, len(p) - 1 - start]
    return last


def _check(
    model: DeepSeekV2, prompts: list[list[int]], max_new_tokens: int, temperature: float,
    top_p: float, stop: int | Iterable[int] | None,
) -> set[int]:
    if not prompts or not all(prompts):
        raise ValueError("tokens: an empty prompt, expected at least one token a sequence")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens}, expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: {temperature}, expected a number >= 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p}, expected above 0 and at most 1")
    if stop is None:
        return set(model.config.stops)
    return {stop} if isinstance(stop, int) else set(stop)


class TextStream:
    """Turns ids that arrive one by one into text; half a character waits for its other half.

    `before` is written with the first of them.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], write: Callable[[str], object], before: str = ""
    ) -> None:
        self.decode, self.write, self.before = decode, write, before
        self.ids: list[int] = []
        self.written = 0

    def __call__(self, step: list[int | None]) -> None:
        """Take the step of `generate`'s first sequence."""
        if step[0] is None:
            return
        if not self.ids:
            self.write(self.before)
        self.ids.append(step[0])
        text = self.decode(self.ids)
        if not text.endswith("\ufffd"):
            self.write(text[self.written :])
            self.written = len(text)

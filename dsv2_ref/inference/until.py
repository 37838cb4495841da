# SPDX-License-Identifier: MIT
"""Texts that go on until one of some words comes: the engine, with stops that are texts.

A stop of a benchmark is a text ("\\n\\n", "Question:"), and a model may spell it with any tokens,
so it is looked for in what the tokens decode to. A stop of n bytes lies in at most n tokens: no
more of them are decoded at each step. A request that has come to its stop is cancelled, and its
pages are free for the next ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from dsv2_ref.inference.engine import Engine
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Ask:
    """A prompt, and how it is to be continued."""

    tokens: Sequence[int]
    stops: Sequence[str]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop in it; an empty stop is none."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text),
                      default=len(text))]


def continue_until(
    model: DeepSeekV2, tokenizer: TextTokenizer, asked: Sequence[Ask], memory_bytes: int = 2**30,
    progress: bool = False,
) -> list[str]:
    """The new text of each, without its stop and without document marks; in the order asked.

    It ends before the first stop, at the model's own ends, or after max_new_tokens. What is drawn
    at a temperature follows from torch's own seed. ValueError for a prompt that does not fit.
    """
    engine, number, new = Engine(model, memory_bytes), {}, [[] for _ in asked]
    for i, ask in enumerate(asked):
        number[engine.add(ask.tokens, ask.max_new_tokens, ask.temperature, ask.top_p)] = i
    longest = [max((len(stop.encode()) for stop in ask.stops), default=0) for ask in asked]
    with tqdm(total=len(asked), desc="written", disable=not progress, leave=False) as bar:
        for id, token, finished in engine.run():
            i = number[id]
            new[i].append(token)
            tail = tokenizer.decode(new[i][-longest[i]:]) if longest[i] else ""
            if not finished and any(stop and stop in tail for stop in asked[i].stops):
                engine.cancel(id)
                finished = True
            bar.update(finished)
    return [cut(tokenizer.decode(ids), ask.stops) for ids, ask in zip(new, asked, strict=True)]

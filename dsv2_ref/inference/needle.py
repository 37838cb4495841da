# SPDX-License-Identifier: MIT
"""Needle in a haystack: does a model find one sentence in a long text? (section 3.1.4, Figure 4)

A grid of cells, lengths × depths. A cell reads a text of exactly `length` tokens with a needle at
`depth` per cent of it and the question at its end. It is scored on the answer's tokens in two ways,
both from one pass with the right answer fed:

  exact   share of the samples whose every answer token is the most likely one: just those for which
          greedy generation would write the answer
  rank    mean rank of an answer token among all tokens, 1 is the best: how near a miss was

The paper asks a language model to judge; here nothing is judged. Its green cells are those with 10
of 10 points; ours are those with an `exact` of at least GREEN.

What cells share is read once. All of them hide their needles in one text, so the places are visited
in order, and each cell begins with a fork of the cache that has read the text up to its place. The
text is read in pieces, so memory grows with the length and nothing else does.

A run may be killed at any moment: its cells are kept as they are made (kept_cells.py), and a later
run with the same settings, weights and text makes the others. A cell's tasks are drawn from (seed,
length, depth, kind) alone, so that what it gives does not depend on when it is made.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dsv2_ref.attention.kv_cache import Cache
from dsv2_ref.files.tensors import checksum
from dsv2_ref.inference.generate import PIECE
from dsv2_ref.inference.kept_cells import kept_cells
from dsv2_ref.model import CACHES, DeepSeekV2
from dsv2_ref.text.needles import KINDS, Needles, Task, hidden_in
from dsv2_ref.text.tokenizer import TextTokenizer

GREEN = 0.95                         # share of samples answered exactly


@dataclass(frozen=True)
class Grid:
    """What is asked."""

    lengths: tuple[int, ...]             # tokens that are read, question included
    depths: tuple[float, ...]            # per cent of the text before the needle
    samples: int = 8                     # needles of a cell
    kind: str = "one"                    # or "several", "chain": see text/needles.py
    cache: str = "latent"                # or "six_bit"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lengths", "depths"):
            if not (values := getattr(self, name)) or len(set(values)) != len(values):
                raise ValueError(f"{name}: {list(values)}, expected different numbers, at least "
                                 "one")
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise ValueError(f"depths: {depth}, expected per cents from 0 to 100")
        for length in self.lengths:
            if not length >= 1:
                raise ValueError(f"lengths: {length}, expected at least 1")
        if self.samples < 1:
            raise ValueError(f"samples: {self.samples}, expected at least 1")
        for name, known in (("kind", KINDS), ("cache", tuple(CACHES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r}, expected one of "
                                 f"{', '.join(known)}")


@dataclass(frozen=True)
class Plan:
    """One cell before it is read: all its samples are `length` tokens and share the first `at`."""

    length: int
    depth: float
    at: int                              # tokens of the text before the needle, begin mark included
    tasks: tuple[Task, ...]

    def rest(self, text: Sequence[int]) -> list[list[int]]:
        """What each sample reads behind the shared tokens, the answer but its last token too."""
        rows = []
        for task in self.tasks:
            left = text[self.at : self.length - task.n_tokens]
            # the others of several needles stand evenly in what follows
            places = [i * len(left) // len(task.needles) for i in range(len(task.needles))]
            rows.append([*hidden_in(left, places, task), *task.answer[:-1]])
        return rows


def plans(grid: Grid, tokenizer: TextTokenizer, most: int) -> list[Plan]:
    """All cells, those that share more of the text later.

    ValueError for a length without room for the needles, or beyond `most`, the model's positions.
    """
    needles, cells = Needles(tokenizer), []
    if (longest := max(grid.lengths)) > most:
        raise ValueError(f"lengths: {longest}, expected at most max_positions = {most} of the "
                         "model; a larger factor gives more")
    for length in grid.lengths:
        for depth in grid.depths:
            draw = random.Random(f"{grid.seed} {length} {depth} {grid.kind}")
            tasks = tuple(needles.task(grid.kind, draw, asked=0) for _ in range(grid.samples))
            room = length - 1 - max(task.n_tokens for task in tasks)
            if room < 1:
                raise ValueError(f"lengths: {length}, expected above {length - room} tokens, which "
                                 "the needles and the question take")
            cells.append(Plan(length, depth, 1 + round(depth * room / 100), tasks))
    return sorted(cells, key=lambda cell: (cell.at, cell.length))


@torch.inference_mode()
def read_pieces(model: DeepSeekV2, rows: Tensor, cache: Cache, last: int = 1) -> Tensor:
    """Append rows (B, T) to the cache in pieces; what the head reads of the `last` tokens.

    The result is (B, last, d). The last piece is never shorter than `last`.
    """
    T = rows.shape[1]
    if not 1 <= last <= T:
        raise ValueError(f"last: {last}, expected 1 to {T}, the tokens that are read")
    begin = 0
    while T - begin > max(PIECE, last):
        end = min(begin + PIECE, T - last)
        model.hidden(rows[:, begin:end], cache)
        begin = end
    return model.hidden(rows[:, begin:], cache)[:, -last:]


@torch.inference_mode()
def score(model: DeepSeekV2, plan: Plan, text: Sequence[int], shared: Cache) -> dict[str, Any]:
    """One cell. `shared` has read text[: plan.at] as its only sequence, and is not changed."""
    cache = shared.fork(0, len(plan.tasks))
    rows = torch.tensor(plan.rest(text), device=model.like.device)           # (B, T)
    longest = max(len(task.answer) for task in plan.tasks)
    h = read_pieces(model, rows, cache, longest)                             # (B, longest, d)
    exact, ranks = 0, []
    for row, task in zip(h, plan.tasks, strict=True):
        logits = model.head(row[-len(task.answer) :]).float()                # (answer, vocab)
        right = logits.gather(-1, torch.tensor(task.answer, device=h.device)[:, None])
        if not logits.isfinite().all():
            raise ValueError(f"logits: NaN or infinite in the cell of length {plan.length}, depth "
                             f"{plan.depth}, expected numbers")
        rank = 1 + (logits > right).sum(-1)                                  # (answer,)
        ties = (logits == right).sum(-1) > 1                                 # no answer by accident
        ranks.append((rank + ties).double().mean().item())
        exact += int((rank + ties == 1).all())
    return {"length": plan.length, "depth": plan.depth, "exact": exact / len(plan.tasks),
            "rank": sum(ranks) / len(ranks)}


def cells(
    model: DeepSeekV2, text: Sequence[int], todo: Sequence[Plan], kind: str = "latent",
) -> Iterator[dict[str, Any]]:
    """The scores of the plans in their order, which must be ascending in `at`."""
    if not todo:
        return
    shared = model.new_cache(1, max(plan.length for plan in todo), kind)
    begin = 0
    for plan in todo:
        if plan.at > begin:
            read_pieces(model, torch.tensor([text[begin : plan.at]], device=model.like.device),
                        shared)
            begin = plan.at
        yield score(model, plan, text, shared)


def fingerprint(model: DeepSeekV2, text: Sequence[int]) -> str:
    """A checksum of the config, the weights and the text."""
    told = json.dumps([model.config.to_hf(), checksum(model.state_dict()), list(text)],
                      sort_keys=True)
    return f"{zlib.crc32(told.encode()):08x}"


def run(
    model: DeepSeekV2, tokenizer: TextTokenizer, text: Sequence[int], grid: Grid,
    folder: str | Path | None = None, progress: bool = False,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The grid: {"grid": exact by length and depth, "ranks", "mean", "green", ...}.

    text: ids of the haystack, begin mark first, at least as many as the longest length. In a
    `folder`, cells are kept as they are made, and those that are there are not made again. `watch`
    is called with each cell that is made.
    """
    todo = plans(grid, tokenizer, model.config.max_positions)
    if len(text) < (longest := max(grid.lengths)):
        raise ValueError(f"text: {len(text)} tokens, expected at least {longest}, the longest "
                         "length")
    text = list(text[:longest])
    with ExitStack() as opened:
        done, keep = {}, None
        if folder is not None:
            settings = asdict(grid) | {"model": fingerprint(model, text)}
            done, keep = opened.enter_context(kept_cells(folder, settings))
        left = [plan for plan in todo if (plan.length, plan.depth) not in done]
        bar = opened.enter_context(tqdm(total=len(todo), initial=len(done), desc="needles",
                                        disable=not progress))
        for cell in cells(model.eval(), text, left, grid.cache):
            done[cell["length"], cell["depth"]] = cell
            if keep is not None:
                keep(cell)
            if watch is not None:
                watch(cell)
            bar.update()
    return _summary(grid, done)


def _summary(grid: Grid, done: dict[tuple, dict[str, Any]]) -> dict[str, Any]:
    rows = [[done[length, depth] for depth in grid.depths] for length in grid.lengths]
    exact = [[cell["exact"] for cell in row] for row in rows]
    flat = [value for row in exact for value in row]
    ranks = [[cell["rank"] for cell in row] for row in rows]
    settings = asdict(grid) | {"lengths": list(grid.lengths), "depths": list(grid.depths)}
    return {**settings, "grid": exact, "ranks": ranks,
            "mean": sum(flat) / len(flat), "green": sum(value >= GREEN for value in flat),
            "cells": len(flat)}

# SPDX-License-Identifier: MIT
"""Needles to hide in a haystack of text, and questions about them.

    one        "Remember: amber kilo lima oscar tango."        "Recall: amber" -> the four words
    several    four such sentences with different names        "Recall: coral" -> the four of coral
    chain      "Remember: amber kilo lima oscar tango.", later "Remember: coral amber." and
               "Remember: olive coral."         "Recall: olive" -> coral amber kilo lima oscar tango

The first is the needle test of section 3.1.4 (Figure 4). In the second a name has to be told from
others. The third is variable tracking, RULER's idea (arXiv 2404.06654): x1 = 7, x2 = x1, x3 = x2,
and what is x3? No word of a needle occurs in `stories`, so nothing but the needle gives the answer.

Everything is ids: a needle is a run of ids between two tokens of the text, whatever the tokenizer.
`NeedleBatches` are sequences to learn from.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv2_ref.text.corpora import Document
from dsv2_ref.text.data import check_same_data, fingerprint, marked
from dsv2_ref.text.tokenizer import TextTokenizer

NAMES = ("amber coral olive ivory scarlet indigo teal maroon beige violet khaki mauve ochre peach "
         "russet sepia").split()
WORDS = ("alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november "
         "oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu").split()
KINDS = ("one", "several", "chain")
LONG, OTHERS = 4, 3                  # words of an answer; needles beside the one asked for


@dataclass(frozen=True)
class Task:
    """Needles in the order of the text, and a question about them, as ids."""

    needles: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that a reader gets beside the haystack: all but the last of the answer."""
        return sum(map(len, self.needles)) + len(self.question) + len(self.answer) - 1


class Needles:
    """Makes tasks for a tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        pieces = ["\nRemember:", "\nRecall:", ".", *(f" {w}" for w in NAMES + WORDS)]
        self._ids = dict(zip(pieces, tokenizer.encode_batch(pieces)))

    def _tokens(self, first: str, words: Sequence[str] = (), last: str = "") -> tuple[int, ...]:
        pieces = [first, *(f" {w}" for w in words), last]
        return tuple(i for piece in pieces if piece for i in self._ids[piece])

    def task(self, kind: str, draw: random.Random, asked: int | None = None) -> Task:
        """A task; of `several`, needle number `asked` is asked for (None: any)."""
        if kind not in KINDS:
            raise ValueError(f"kind: {kind!r}, expected one of {', '.join(KINDS)}")
        names = draw.sample(NAMES, 1 if kind == "one" else 1 + OTHERS)
        if kind == "chain":
            names = names[:3]
            words = draw.sample(WORDS, LONG)
            told = [[names[0], *words], *([new, old] for old, new in zip(names, names[1:]))]
            question, answer = names[-1], [*reversed(names[:-1]), *words]
        else:
            told = [[name, *draw.sample(WORDS, LONG)] for name in names]
            which = draw.randrange(len(told)) if asked is None else asked
            question, *answer = told[which]
        needles = tuple(self._tokens("\nRemember:", words, ".") for words in told)
        return Task(needles, self._tokens("\nRecall:", [question]), self._answer(answer))

    def _answer(self, words: Sequence[str]) -> tuple[int, ...]:
        return tuple(i for word in words for i in self._ids[f" {word}"])


def hidden_in(text: Sequence[int], places: Sequence[int], task: Task) -> list[int]:
    """The text with needle i before its token places[i] (ascending), then the question."""
    if list(places) != sorted(places) or not all(0 <= p <= len(text) for p in places):
        raise ValueError(f"places: {list(places)}, expected ascending numbers from 0 to "
                         f"{len(text)}")
    ids, begin = [], 0
    for place, needle in zip(places, task.needles, strict=True):
        ids += [*text[begin:place], *needle]
        begin = place
    return [*ids, *text[begin:], *task.question]


def haystack(documents: Sequence[Document], tokenizer: TextTokenizer, n: int) -> list[int]:
    """`n` ids of the documents in their order, from their begin to their end marks.

    Repeated where they are shorter, as the test's first version does. ValueError without text.
    """
    ids: list[int] = []
    while len(ids) < n:
        before = len(ids)
        for document in marked(documents, tokenizer):
            ids += document
            if len(ids) >= n:
                break
        if len(ids) == before:
            raise ValueError("text: no documents, expected some to hide needles in")
    return ids[:n]


class NeedleBatches:
    """Sequences of exactly `sequence` tokens that end with a question and its answer.

    text: ids to hide the needles in, as `data.encode` gives them. What is asked is drawn evenly
    from `kinds`. A batch may also have sequences that are n times as short, and n times as many of
    them; n is drawn evenly from `shorter`. What a batch holds follows from (seed, its number) and
    its size.
    """

    def __init__(
        self, text: np.ndarray, tokenizer: TextTokenizer, sequence: int, seed: int,
        kinds: Sequence[str] = ("one",), shorter: Sequence[int] = (1,),
    ) -> None:
        if len(text) < sequence:
            raise ValueError(f"text: {len(text)} tokens, expected at least {sequence}")
        self.text, self.sequence, self.seed = text, sequence, seed
        self.kinds, self.shorter = tuple(kinds), tuple(shorter)
        self.needles, self.bos, self.n = Needles(tokenizer), tokenizer.bos, 0
        self.fingerprint = fingerprint(text, *self.kinds, *map(str, self.shorter))

    def next_batch(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and targets (B, T) int64, and which targets are the answer's (B, T) bool.

        B is `batch`, or as many times that as T is shorter than `sequence`.
        """
        draw = random.Random(f"{self.seed} {self.n}")
        times = draw.choice(self.shorter)
        T = self.sequence // times
        rows, answers = [], []
        for _ in range(batch * times):
            task = self.needles.task(draw.choice(self.kinds), draw)
            n = T - 1 - task.n_tokens
            if n < 0:
                raise ValueError(f"sequence: {T}, expected at least {1 + task.n_tokens}, what "
                                 "needles and question take")
            begin = draw.randrange(len(self.text) - n)
            places = sorted(draw.randrange(n + 1) for _ in task.needles)
            text = self.text[begin : begin + n].tolist()
            rows.append([self.bos, *hidden_in(text, places, task), *task.answer])
            answers.append(len(task.answer))
        self.n += 1
        ids = torch.tensor(rows)                                             # (B, T + 1)
        last = torch.arange(T) >= T - torch.tensor(answers)[:, None]
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), last

    def state(self) -> dict[str, int]:
        """Plain ints: the position, and what it is a position in."""
        return {"batch": self.n, "seed": self.seed, "sequence": self.sequence,
                "fingerprint": self.fingerprint}

    def load(self, state: dict[str, int]) -> None:
        """Go on from `state` bit for bit. ValueError if it belongs to other text or sequences."""
        check_same_data(self.state(), state)
        if state["batch"] < 0:
            raise ValueError(f"batch is {state['batch']}, expected at least 0")
        self.n = state["batch"]


def sentences(seed: int, n: int) -> list[str]:
    """`n` needles and questions as text, for a tokenizer that is to know their words."""
    draw = random.Random(seed)
    return [f"\nRemember: {draw.choice(NAMES)} {' '.join(draw.sample(WORDS, LONG))}."
            f"\nRecall: {' '.join(draw.sample(NAMES, LONG))}" for _ in range(n)]

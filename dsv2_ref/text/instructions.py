# SPDX-License-Identifier: MIT
"""Our generated instruction set: questions and answers that a program can check.

    arithmetic  addition, subtraction (two digits), comparison
    lists       sort, reverse_list, count, longest *
    strings     reverse_word, upper, first_letters *
    dates       next_day, weekdays
    code        code: a Python function of one line
    format      json, words (exactly n of them), capitals (told by a system message)
    refusals    unknown (what cannot be known), refusal (what should not be done)

Each in English and Chinese. What is held out, by a rule and not by a list:
  1. Kinds: those with a star are in no training set. Whether they are learned from the others
     shows what carries over.
  2. Questions: a fifth of what each kind can ask, by a hash of what is asked. Language and phrasing
     do not matter, and for addition (and comparison) neither does the order: (47, 38) and (38, 47)
     are on the same side, so a model that has seen one of them was trained on both, or on neither.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv2_ref.text.questions import KINDS

LANGUAGES = ("en", "zh")
HELD_OUT_KINDS = ("longest", "first_letters")
TRAINED_KINDS = tuple(kind for kind in KINDS if kind not in HELD_OUT_KINDS)
ONE_OF = 5                           # questions of a kind that is held out


@dataclass(frozen=True)
class Example:
    """A question and an answer to it that is right."""

    kind: str
    language: str
    key: str                         # what is asked, whatever the language and the words
    messages: tuple[dict[str, str], ...]     # the last one is the answer
    test: str = ""                   # of code: what it must pass

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    def check(self, answer: str) -> bool:
        """Whether an answer is right; spaces and line ends around it do not count."""
        return KINDS[self.kind].check(answer.strip(), self.answer)

    def row(self) -> dict[str, Any]:
        """A line of a .jsonl file, as `conversation_lines` takes it."""
        return {"messages": list(self.messages), "kind": self.kind, "language": self.language}


def is_held_out(kind: str, key: str) -> bool:
    """Whether a question is never trained on: one of five, always the same."""
    return int(hashlib.sha256(f"{kind} {key}".encode()).hexdigest(), 16) % ONE_OF == 0


def pair_is_held_out(a: int, b: int) -> bool:
    """Whether no training set has a + b, nor b + a."""
    return is_held_out("addition", f"{min(a, b)} {max(a, b)}")


def examples(
    n: int, seed: int = 0, kinds: Sequence[str] = TRAINED_KINDS, held_out: bool = False
) -> list[Example]:
    """`n` examples, of each kind as many, to be trained on, or with `held_out` to be judged by.

    All follow from the seed. ValueError for a kind that is unknown, or held out and asked for to be
    trained on.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: {kind!r}, expected some of {', '.join(KINDS)}")
        if kind in HELD_OUT_KINDS and not held_out:
            raise ValueError(f"kinds: {kind!r} is never trained on, expected held_out=True for it")
    if n < 1 or not kinds:
        raise ValueError(f"n: {n} of {len(kinds)} kinds, expected at least one of both")
    draw = random.Random(f"{seed} {held_out}")
    return [_example(kinds[i % len(kinds)], draw, held_out) for i in range(n)]


def _example(kind: str, draw: random.Random, held_out: bool) -> Example:
    while True:
        question = KINDS[kind].make(draw)
        if is_held_out(kind, question.key) == held_out:
            break
    which = draw.randrange(len(LANGUAGES))
    messages = [{"role": "user", "content": draw.choice(question.texts[which])},
                {"role": "assistant", "content": question.answers[which]}]
    if question.system:
        messages.insert(0, {"role": "system", "content": question.system[which]})
    return Example(kind, LANGUAGES[which], question.key, tuple(messages), question.test)

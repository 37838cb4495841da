# SPDX-License-Identifier: MIT
"""Judged answers: what a reward model is trained on, and judged by (section 4.2).

The paper takes preferences for mathematics from the known result and for code from the compiler.
So do we: a chat model writes several answers to each question, and a program says what each is
worth, from 0 (worthless) to 1 (right). Two sorts of examples are made of that:

  pairs      two answers to one question, the better one first, for the pair-wise loss
  verdicts   one answer and whether it is right, for the point-wise loss

A question whose answers are all worth the same gives no pair, as it would give no advantage in
GRPO. Verdicts keep it, since how often answers are right is part of what they teach.

An answer always ends with the end mark here, also one that was cut at its limit: a rollout hands
over answers without their marks, and both have to look the same to the reward model.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2_ref.alignment.chat import prompt_ids
from dsv2_ref.alignment.feedback import feedback, pairs
from dsv2_ref.alignment.rollout import sample_answers
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.conversations import Preference
from dsv2_ref.text.instructions import Example, is_held_out
from dsv2_ref.text.tokenizer import TextTokenizer

Ids = Sequence[int]
# questions, and an answer to each -> what it is worth, from 0 to 1
Judge = Callable[[Sequence[Example], Sequence[str]], Sequence[float]]
CODE_SECONDS = 2.0               # most time of a program that is judged
PROGRAMS = 2                     # that run at once


def whole_text(question: Ids, answer: Ids, tokenizer: TextTokenizer) -> list[int]:
    """What a reward model reads: ids of a question, of an answer, and the end mark."""
    return [*question, *answer, tokenizer.eos]


@dataclass
class Judged:
    """G answers to each of Q questions; those to one question lie side by side."""

    texts: list[list[int]]       # N = Q·G texts, as `whole_text` makes them
    rewards: Tensor              # (Q, G), what each answer is worth

    def __post_init__(self) -> None:
        if self.rewards.ndim != 2 or self.rewards.numel() != len(self.texts):
            raise ValueError(f"rewards: shape {tuple(self.rewards.shape)}, expected (questions, "
                             f"answers) of {len(self.texts)} texts")

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """(better, worse) of all answers to one question that are worth different; each once."""
        found = dict.fromkeys((tuple(self.texts[i]), tuple(self.texts[j]))
                              for i, j in zip(*map(Tensor.tolist, pairs(self.rewards)),
                                              strict=True))
        return [(list(better), list(worse)) for better, worse in found]

    def verdicts(self) -> list[tuple[list[int], bool]]:
        """Every answer, and whether it is right: worth 1."""
        return list(zip(self.texts, (self.rewards.flatten() == 1).tolist(), strict=True))


def by_truth(asked: Sequence[Example], answers: Sequence[str]) -> list[float]:
    """1 for an answer that passes its question's check, else 0. No program is run."""
    return [float(example.check(answer)) for example, answer in zip(asked, answers, strict=True)]


def by_compiler(asked: Sequence[Example], answers: Sequence[str]) -> list[float]:
    """Of code a third each for: it parses, it runs, it passes its test; the rest `by_truth`.

    Programs run in the sandbox; `Uncontained` where the system allows none.
    """
    found = by_truth(asked, answers)
    code = [i for i, example in enumerate(asked) if example.test]
    programs = list(dict.fromkeys((answers[i], asked[i].test) for i in code))
    with ThreadPoolExecutor(PROGRAMS) as pool:
        told = dict(zip(programs, pool.map(lambda p: feedback(*p, CODE_SECONDS), programs),
                        strict=True))
    for i in code:
        found[i] = sum(told[answers[i], asked[i].test][:3]) / 3
    return found


def judged_samples(
    model: DeepSeekV2, tokenizer: TextTokenizer, asked: Sequence[Example], group: int = 8,
    max_new_tokens: int = 48, judge: Judge = by_truth, seed: int = 0, batch: int = 32,
) -> Judged:
    """`group` sampled answers of a chat model to each question, judged.

    `batch` questions are read at once. All follows from the seed, on one machine.
    """
    if not asked:
        raise ValueError("asked: no questions, expected some")
    draws = torch.Generator(model.like.device).manual_seed(seed)
    texts: list[list[int]] = []
    rewards: list[float] = []
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        questions = [prompt_ids(example.prompt, tokenizer) for example in some]
        said = sample_answers(model, questions, group, max_new_tokens, draws).answers
        repeated = [i for i in range(len(some)) for _ in range(group)]
        texts += [whole_text(questions[i], answer, tokenizer)
                  for i, answer in zip(repeated, said, strict=True)]
        rewards += judge([some[i] for i in repeated],
                         [tokenizer.decode(answer).removeprefix(" ") for answer in said])
    return Judged(texts, torch.tensor(rewards, dtype=torch.float64).view(-1, group))


def judged_preferences(rows: Sequence[Preference], tokenizer: TextTokenizer) -> Judged:
    """Somebody's preferences: of each question the chosen answer is worth 1, the rejected one 0."""
    texts = []
    for messages, *answers in rows:
        question = prompt_ids(messages, tokenizer)
        texts += [whole_text(question, tokenizer.encode(f" {answer}"), tokenizer)
                  for answer in answers]
    return Judged(texts, torch.tensor([[1.0, 0.0]] * len(rows), dtype=torch.float64).view(-1, 2))


def split_preferences(rows: Sequence[Preference]) -> tuple[list[Preference], list[Preference]]:
    """Those to train on, and those to judge by: about one question of five, by a hash of it.

    All rows with one question are on the same side. ValueError if a side is empty.
    """
    sides: tuple[list[Preference], list[Preference]] = ([], [])
    for row in rows:
        asked = "\n".join(message["content"] for message in row.messages)
        sides[is_held_out("preference", asked)].append(row)
    if not all(sides):
        raise ValueError(f"preferences: {len(sides[0])} to train on and {len(sides[1])} held out, "
                         "expected some of both; one question of five is held out")
    return sides

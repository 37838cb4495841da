# SPDX-License-Identifier: MIT
"""Exercises of notebook 19: what is learned of a conversation, the mean of its loss, Bradley-Terry,
calibration."""

import math

import torch

from dsv2_ref.alignment.calibration import Bin, calibration_error
from dsv2_ref.alignment.reward import pairwise_loss
from dsv2_ref.exercises import Exercises, Value

# tokens of a conversation, piece by piece, without the marks: a question, an answer, and so on
PIECES = (9, 3, 7, 2)
NATS = ((3.0,), (0.6, 0.6, 0.6, 0.6, 0.6))       # of each answer token of two conversations
LONGEST = 8                                      # next tokens of the longer one, padding included
REWARDS = (2.0, 1.0)                             # of two answers
BINS = (Bin(0.6, 0.5, 20), Bin(0.8, 0.9, 30), Bin(0.95, 0.95, 50))


def learned_tokens() -> int:
    """Answers and their end marks."""
    return sum(PIECES[1::2]) + len(PIECES[1::2])


def answer_loss() -> float:
    """Over all answer tokens of the batch at once."""
    nats = [x for row in NATS for x in row]
    return sum(nats) / len(nats)


def chances_and_loss() -> list[float]:
    """That the first answer wins; the same with 10 more for both; the loss of a wrong opinion."""
    first, second = REWARDS
    shifted = (first + 10) - (second + 10)
    wrong = pairwise_loss(torch.tensor([0.0]).double(), torch.tensor([math.log(3)]).double())
    return [1 / (1 + math.exp(-(first - second))), 1 / (1 + math.exp(-shifted)), wrong.item()]


exercises = Exercises({
    1: Value(learned_tokens, "The model writes the answers, and it has to end each of them itself. "
             "The begin mark and the questions are read.",
             known=[(sum(PIECES[1::2]), "who ends an answer?"),
                    (sum(PIECES) + 3, "questions and the begin mark are read and not learned"),
                    (PIECES[3] + 1, "the first answer is learned as well")]),
    2: Value(answer_loss, "One mean over all answer tokens: six of them. Neither conversations nor "
             "padding are counted.",
             known=[((3.0 + 0.6) / 2, "so a token of the short answer would count five times as "
                     "much as one of the long answer"),
                    (6.0 / (2 * LONGEST), "padding is no answer token"),
                    (6.0, "this is the sum")]),
    3: Value(chances_and_loss, "sigmoid(x) = 1 / (1 + exp(-x)), of the difference alone. In the "
             "third the chance of what happened is 1 / (1 + 3).",
             known=[([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-12)), math.log(4)],
                     "the chance follows from the difference of two rewards"),
                    ([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-1)), math.log(4 / 3)],
                     "in the third the worse answer has the higher reward"),
                    ([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-1)), 0.25],
                     "the third is the chance; the loss is minus its logarithm")]),
    4: Value(lambda: calibration_error(list(BINS)), "0.1, 0.1 and 0 off, and so many of 100 "
             "predictions in each.",
             known=[(0.2 / 3, "a bin counts by the predictions in it"),
                    (0.01, "too sure and too unsure do not make up for each other")]),
})

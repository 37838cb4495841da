# SPDX-License-Identifier: MIT
"""Exercises of notebook 20: advantages, where the clip bites, step 0, rewards with a hole."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv2_ref.alignment.grpo import advantages, grpo_loss, surrogate
from dsv2_ref.exercises import Exercises, Value

TOKENS = ((1.3, 1.0), (1.3, -1.0), (0.7, 1.0), (0.7, -1.0), (1.1, -2.0))      # ratio, advantage
ASKED = "312"
# the pay for an answer that has to hold the digits of ASKED in ascending order
PAYS: dict[str, Callable[[str], float]] = {
    "a": lambda answer: float(answer == "".join(sorted(ASKED))),
    "b": lambda answer: float(sum(map(int, answer)) == sum(map(int, ASKED))),
    "c": lambda answer: sum(digit in ASKED for digit in answer) / len(ASKED),
    "d": lambda answer: float(len(answer) == len(ASKED)) * sum(
        one == other for one, other in zip(answer, sorted(ASKED), strict=False)) / len(ASKED),
    "e": lambda answer: float(list(answer) == sorted(answer)),
}


def of_five() -> Tensor:
    """One right answer of five."""
    return advantages(torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64))[0]


def still_moves() -> list[bool]:
    """For each of `TOKENS` whether the clipped gain has a slope there."""
    found = []
    for ratio, A in TOKENS:
        logp = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
        gain = surrogate(logp, torch.zeros_like(logp), torch.tensor([A]).double(), 0.2)
        (slope,) = torch.autograd.grad(gain.sum(), logp)
        found.append(slope.item() != 0)
    return found


def step_zero() -> list[float]:
    """Two answers of 1 and 4 tokens, advantages 1 and -1: both losses, then two gradients."""
    mask = torch.tensor([[True, False, False, False], [True] * 4])
    A, told = torch.tensor([1.0, -1.0], dtype=torch.float64), []
    for normalise in ("sequence", "token"):
        logp = torch.full((2, 4), -1.0, dtype=torch.float64, requires_grad=True)
        same = logp.detach()
        loss = grpo_loss(logp, same, same, A, mask, normalise=normalise)
        (gradient,) = torch.autograd.grad(loss, logp)
        told.append((loss.item() + 0.0, gradient[:, 0].tolist()))
    return [told[0][0], told[1][0], *told[0][1]]


def with_a_hole(answers: Sequence[str] = ("", "1", "123", "222", "111", "12333")) -> list[str]:
    """The rewards that pay some wrong answer as much as the right one, or more."""
    right = "".join(sorted(ASKED))
    return [name for name, pay in PAYS.items()
            if any(pay(answer) >= pay(right) == 1 for answer in answers if answer != right)]


exercises = Exercises({
    1: Value(of_five, "The mean of the five rewards is 0.2. The squares of the differences are "
             "0.64 once and 0.04 four times; (34) divides by the root of their mean.",
             known=[([0.8, -0.2, -0.2, -0.2, -0.2], "(34) also divides by the standard deviation"),
                    ([0.8 / 0.2**0.5] + [-0.2 / 0.2**0.5] * 4,
                     "the squares are divided by G here, not by G - 1"),
                    ([1, 0, 0, 0, 0], "these are the rewards")]),
    2: Value(still_moves, "The minimum of two lines. With A > 0 it is flat where the ratio is too "
             "large, with A < 0 where it is too small. On the other side it is the plain line.",
             known=[([False, False, False, False, True],
                     "the clip takes the say away on one side only"),
                    ([True, False, False, True, True],
                     "the other way round: a worse answer may still be made less likely")]),
    3: Value(step_zero, "All ratios are 1, so each token's gain is its A, and the penalty and its "
             "slope are 0. A token counts 1 / (answers · its answer's tokens) with 'sequence', and "
             "1 / all tokens with 'token'. The loss is minus the gain.",
             known=[([0, 0, -0.5, 0.125], "with the token mean the long answer weighs more"),
                    ([0, -0.6, -0.5, 0.125], "the loss is minus the mean gain"),
                    ([0, 0.6, 0.5, -0.125], "the loss is minus the gain, so is its gradient"),
                    ([0, 0.6, 0, 0], "the loss is 0, its slope is not"),
                    ([0, 0.6, -0.2, 0.2], "these are the gradients with the token mean")]),
    4: Value(with_a_hole, "Try on each: nothing at all, \"1\", \"111\", \"222\", \"12333\". Is one "
             "of them paid as much as \"123\"?",
             known=[(["b", "c"], "nothing at all is in order, too"),
                    (["c", "e"], "are there other digits with the same sum?"),
                    (["b", "e"], "may a digit be counted again?"),
                    (["b", "c", "d", "e"], "d pays a part to wrong answers, but never as much")]),
})

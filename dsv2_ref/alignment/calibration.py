# SPDX-License-Identifier: MIT
"""Is a reward model right, and does it know how sure to be?

Accuracy counts pairs in which the better answer got the higher reward. Calibration asks for more: a
reward model also says with which chance the first answer wins, sigmoid(r_first - r_second), and of
all pairs of which it says "80 %" four of five should be won. Chances are put into bins of equal
width; in each, the mean chance stands beside the share that happened. The *expected calibration
error* is the mean of their differences, weighed by how many are in a bin.

A policy that is trained on the reward looks for answers that are paid best, so a model that is sure
and wrong does more harm than one that is unsure.

Shapes: P pairs, N predictions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 10


class Bin(NamedTuple):
    """Predictions of about one chance."""

    chance: float                # the mean of what was predicted
    share: float                 # of them that happened
    count: int


def pair_accuracy(better: Tensor, worse: Tensor) -> float:
    """Share of the pairs whose better answer has the higher reward, (P,) each; a tie is half."""
    return ((better > worse).double() + 0.5 * (better == worse).double()).mean().item()


def pair_chances(better: Tensor, worse: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards (P,) and (P,) -> the chance that the first one wins, (2P,) fp64; whether it did.

    Each pair is taken in both orders: the chance of a pair shown in one order, always the better
    one first, could not be compared with anything.
    """
    chance = torch.sigmoid((better - worse).double())                            # (P,)
    won = torch.ones_like(chance, dtype=torch.bool)
    return torch.cat([chance, 1 - chance]), torch.cat([won, ~won])


def calibration(chance: Tensor, happened: Tensor, bins: int = BINS) -> list[Bin]:
    """Predicted chances (N,) in [0, 1] and what happened (N,) bool, in bins that are not empty."""
    if bins < 1:
        raise ValueError(f"bins: {bins}, expected at least 1")
    if chance.ndim != 1 or not len(chance) or chance.shape != happened.shape:
        raise ValueError(f"happened: shape {tuple(happened.shape)}, expected one for each chance, "
                         f"{tuple(chance.shape)}, at least one")
    if not ((chance >= 0) & (chance <= 1)).all():
        raise ValueError(f"chance: {chance.min():.3g} to {chance.max():.3g}, expected 0 to 1")
    where = (chance * bins).long().clamp(max=bins - 1)                           # (N,)
    found = []
    for i in range(bins):
        if n := int((mine := where == i).sum()):
            found.append(Bin(chance[mine].double().mean().item(),
                             happened[mine].double().mean().item(), n))
    return found


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: how far chance and share are apart, weighed by count."""
    return sum(b.count * abs(b.chance - b.share) for b in bins) / sum(b.count for b in bins)

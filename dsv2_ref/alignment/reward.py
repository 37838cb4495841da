# SPDX-License-Identifier: MIT
"""Rewards: what an answer is worth (section 4.2).

Two stages have two rewards. The first is about reasoning, code and mathematics, where a model
learns from what can be checked: one number, r = RM(o), equation (35). The second is about
preference, and adds three up: helpful, safe, and by the rules, equation (36). Each of them is a
number that a program finds, or that a *reward model* gives: the SFT model with a head of one number
in place of the vocabulary's, trained on judgements, either

  - point-wise: one answer and whether it is right; the loss is that of a yes-or-no question, or
  - pair-wise: two answers to one question and which is better (Bradley-Terry): the chance that the
    first one wins is sigmoid(r_first - r_second). Only differences count, so r may be anywhere.

Judgements of code come from running it and of mathematics from the known result, as in the paper;
nobody has to label them.

The value of an answer is read at its last token, which has seen all of it. Padding stands on the
right, where causal attention does not look.

Shapes: N answers, T tokens of the longest with its question, P pairs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2_ref.config import Config
from dsv2_ref.model import DeepSeekV2


class RewardModel(nn.Module):
    """A language model whose head gives one number for a whole answer."""

    def __init__(self, model: DeepSeekV2) -> None:
        """model: is trained on from here; its own head is not used."""
        super().__init__()
        self.model = model
        like = model.like
        self.head = nn.Linear(model.config.d, 1, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.head.weight)                 # all answers are worth the same at first
        nn.init.zeros_(self.head.bias)

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def like(self) -> Tensor:
        return self.model.like

    def forward(self, ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Questions with answers, ids (N, T), the first lengths[n] of each real -> rewards (N,)."""
        N, T = ids.shape
        lengths = [T] * N if lengths is None else list(lengths)
        if len(lengths) != N or not all(1 <= n <= T for n in lengths):
            raise ValueError(f"lengths: {lengths}, expected {N} numbers from 1 to {T}")
        h = self.model.hidden(ids)                                           # (N, T, d)
        last = torch.tensor(lengths, device=ids.device) - 1
        h = h[torch.arange(N, device=ids.device), last]                      # (N, d)
        return self.head(h)[:, 0].to(torch.promote_types(h.dtype, torch.float32))   # (N,)   (35)


def pairwise_loss(better: Tensor, worse: Tensor) -> Tensor:
    """-log of the chance that the better answer wins: rewards (P,) and (P,) -> scalar, nats."""
    _same("worse", worse, better)
    return -F.logsigmoid(better - worse).mean()


def pointwise_loss(reward: Tensor, right: Tensor) -> Tensor:
    """Rewards (N,) read as log odds of being right, right (N,) bool -> scalar, nats an answer."""
    _same("right", right, reward)
    return F.binary_cross_entropy_with_logits(reward, right.to(reward.dtype))


def preference_reward(
    helpful: Tensor, safety: Tensor, rule: Tensor, c_helpful: float, c_safety: float, c_rule: float
) -> Tensor:
    """Stage two: three rewards (N,) each, weighed and added. The paper names no weights."""
    _same("safety", safety, helpful)
    _same("rule", rule, helpful)
    return c_helpful * helpful + c_safety * safety + c_rule * rule           # (N,)    (36)


def _same(name: str, found: Tensor, expected: Tensor) -> None:
    if expected.ndim != 1 or found.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(found.shape)}, expected one number for each "
                         f"answer, {tuple(expected.shape)}")

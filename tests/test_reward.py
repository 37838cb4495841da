# SPDX-License-Identifier: MIT
"""Reward models and their losses, and the sum of stage two, (36)."""

import math

import pytest
import torch
from oracles import loops
from refusals import refused
from small_run import CONFIG

from dsv2_ref.alignment.reward import (
    RewardModel,
    pairwise_loss,
    pointwise_loss,
    preference_reward,
)
from dsv2_ref.model import DeepSeekV2

P = 5


def test_the_pairwise_loss_is_the_loop():
    better, worse = loops.normal(1, P), loops.normal(2, P)
    expected = sum(-math.log(1 / (1 + math.exp(w - b)))
                   for b, w in zip(better.tolist(), worse.tolist())) / P
    assert abs(pairwise_loss(better, worse).item() - expected) < 1e-10
    assert abs(pairwise_loss(worse, better).item() - expected) > 0.1
    shifted = pairwise_loss(better + 40, worse + 40)     # only differences count
    assert abs(shifted.item() - expected) < 1e-10
    assert pairwise_loss(better, better).item() == pytest.approx(math.log(2), abs=1e-12)
    for far in (800.0, -800.0):                          # no overflow, and a slope that still pulls
        r = torch.tensor([far], dtype=torch.float64, requires_grad=True)
        pairwise_loss(r, torch.zeros(1).double()).backward()
        assert r.grad.item() == (0.0 if far > 0 else -1.0)


def test_the_pointwise_loss_is_the_loop():
    reward, right = loops.normal(3, P), torch.tensor([True, False, True, True, False])
    expected = 0.0
    for r, yes in zip(reward.tolist(), right.tolist()):
        p = 1 / (1 + math.exp(-r))
        expected -= math.log(p if yes else 1 - p) / P
    assert abs(pointwise_loss(reward, right).item() - expected) < 1e-10
    assert abs(pointwise_loss(reward, ~right).item() - expected) > 1e-3


def test_the_reward_of_stage_two_is_the_weighed_sum():
    parts = [loops.normal(4 + i, P) for i in range(3)]
    r = preference_reward(*parts, 0.7, 1.1, 0.3)
    for i in range(P):
        expected = 0.7 * parts[0][i] + 1.1 * parts[1][i] + 0.3 * parts[2][i]
        assert abs(r[i] - expected) < 1e-12
    assert (preference_reward(*parts, 0.7, 0.3, 1.1) - r).abs().max() > 0.1


def model(seed=1):
    rewards = RewardModel(DeepSeekV2(CONFIG))
    return loops.randomize(rewards, seed, 0.3).eval()


def test_an_answer_is_worth_what_its_last_token_says():
    """By a loop: each text alone, without padding."""
    rewards, lengths = model(), [7, 2, 5, 1]
    ids = torch.randint(2, CONFIG.vocab, (4, 7), generator=torch.Generator().manual_seed(5))
    found = rewards(ids, lengths)
    for i, n in enumerate(lengths):
        h = rewards.model.hidden(ids[i : i + 1, :n])[0, -1]
        expected = h @ rewards.head.weight[0] + rewards.head.bias[0]
        assert abs(found[i] - expected) < 1e-10
    other = ids.clone()
    other[1, 2:] = 3                                     # padding says nothing
    assert (rewards(other, lengths) - found).abs().max() < 1e-10
    other[1, 1] = (ids[1, 1] + 1) % CONFIG.vocab
    assert abs(rewards(other, lengths)[1] - found[1]) > 1e-3
    assert (rewards(ids) - rewards(ids, [7] * 4)).abs().max() == 0


def test_a_new_reward_model_has_no_opinion_and_then_learns_one():
    """Answers with the token 9 at the end are better; texts it has not seen are judged, too."""
    torch.manual_seed(0)
    rewards = RewardModel(DeepSeekV2(CONFIG))
    draw = torch.Generator().manual_seed(1)

    def pairs(n):
        worse = torch.randint(10, CONFIG.vocab, (n, 6), generator=draw)
        better = worse.clone()
        better[:, 4] = 9
        return better, worse

    better, worse = pairs(64)
    assert rewards(better).abs().max() == 0
    optimizer = torch.optim.AdamW(rewards.parameters(), 3e-3)
    for _ in range(30):
        loss = pairwise_loss(rewards(better), rewards(worse))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    new_better, new_worse = pairs(100)
    with torch.no_grad():
        assert (rewards(new_better) > rewards(new_worse)).double().mean() > 0.9


def test_refusals():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    refused(lambda: model()(ids, [3]), "lengths: [3]", "2 numbers from 1 to 3")
    refused(lambda: model()(ids, [3, 0]), "lengths: [3, 0]")
    refused(lambda: pairwise_loss(torch.zeros(3), torch.zeros(3, 1)), "worse: shape (3, 1)")
    refused(lambda: pointwise_loss(torch.zeros(3), torch.zeros(2)), "right: shape (2,)")
    refused(lambda: preference_reward(torch.zeros(3), torch.zeros(2), torch.zeros(3), 1, 1, 1),
            "safety: shape (2,)", "(3,)")
    refused(lambda: preference_reward(torch.zeros(3), torch.zeros(3), torch.zeros(4), 1, 1, 1),
            "rule: shape (4,)")

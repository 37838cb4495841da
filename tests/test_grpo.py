# SPDX-License-Identifier: MIT
"""Advantages and the loss of GRPO, (32)-(34), against loops over answers and tokens in fp64."""

import math
import statistics

import pytest
import torch
from oracles.loops import normal
from torch import Tensor

from dsv2_ref.alignment.grpo import (
    advantages,
    grpo_loss,
    grpo_terms,
    reference_kl,
    sequence_mean,
    surrogate,
    token_mean,
)

N, T = 6, 7
LENGTHS = [7, 2, 5, 1, 3, 4]
CLIP, BETA = 0.2, 0.3


def mask() -> Tensor:
    """Answers begin at different places and have different lengths."""
    m = torch.zeros(N, T, dtype=torch.bool)
    for i, n in enumerate(LENGTHS):
        m[i, T - n - (i % 2 and n < T) : T - (i % 2 and n < T)] = True
    assert m.sum(-1).tolist() == LENGTHS
    return m


def inputs():
    """log p of pi, of pi_old (far enough for the clip to bite), of the reference; advantages."""
    logp = -normal(1, N, T).abs() - 0.1
    old, ref = logp + 0.3 * normal(2, N, T), logp + 0.4 * normal(3, N, T)
    return logp, old, ref, torch.tensor([-1.3, 0.7, 0.9, 1.9, 0.0, -1.1], dtype=torch.float64)


def by_loop(logp, old, ref, A, m, normalise):
    """Minus (32) in Python floats; how often the clip decided, by whether the answer is good."""
    per_answer, clipped = [], {True: 0, False: 0}
    for i in range(N):
        terms = []
        for t in range(T):
            if not m[i, t]:
                continue
            ratio = math.exp(float(logp[i, t]) - float(old[i, t]))
            a = float(A[i])
            inside = min(max(ratio, 1 - CLIP), 1 + CLIP)
            gain = min(ratio * a, inside * a)
            clipped[a > 0] += gain != ratio * a
            x = math.exp(float(ref[i, t])) / math.exp(float(logp[i, t]))
            terms.append(gain - BETA * (x - math.log(x) - 1))
        per_answer.append(terms)
    if normalise == "sequence":
        return -statistics.fmean(sum(terms) / len(terms) for terms in per_answer), clipped
    flat = [x for terms in per_answer for x in terms]
    return -sum(flat) / len(flat), clipped


@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_the_loss_is_the_loop_over_tokens(normalise):
    logp, old, ref, A = inputs()
    loss = grpo_loss(logp, old, ref, A, mask(), CLIP, BETA, normalise)
    expected, clipped = by_loop(logp, old, ref, A, mask(), normalise)
    assert loss.ndim == 0 and abs(loss.item() - expected) < 1e-10
    assert min(clipped.values()) >= 2                    # both sides are part of what is compared
    gain, penalty = grpo_terms(logp, old, ref, A, mask(), CLIP, BETA, normalise)
    assert abs((gain + penalty - loss).item()) < 1e-15 and penalty > 0


@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_the_gradient_is_the_loop_over_tokens(normalise):
    """d loss / d log p, token by token: ratio times advantage where not clipped, and (1 - x)."""
    logp, old, ref, A = inputs()
    leaf = logp.clone().requires_grad_()
    grpo_loss(leaf, old, ref, A, mask(), CLIP, BETA, normalise).backward()
    expected = torch.zeros(N, T, dtype=torch.float64)
    for i in range(N):
        for t in range(T):
            if not mask()[i, t]:
                continue
            ratio, a = math.exp(logp[i, t] - old[i, t]), float(A[i])
            stopped = ratio > 1 + CLIP if a > 0 else ratio < 1 - CLIP
            slope = (0.0 if stopped else ratio * a) + BETA * (math.exp(ref[i, t] - logp[i, t]) - 1)
            share = 1 / (N * LENGTHS[i]) if normalise == "sequence" else 1 / sum(LENGTHS)
            expected[i, t] = -slope * share
    assert (leaf.grad - expected).abs().max() < 1e-10
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, ref, A, mask(), CLIP, BETA, normalise), leaf)


def wrong(variant: str):
    """The loss with a mistake that public code has made."""
    logp, old, ref, A = inputs()
    m = mask()
    if variant == "prompt tokens in the loss":
        m = torch.ones_like(m)
    if variant == "ratio against the reference":
        old = ref
    gain, kl = surrogate(logp, old, A, CLIP), reference_kl(logp, ref)
    if variant == "KL reversed":
        kl = reference_kl(ref, logp)
    if variant == "the plain difference as KL":
        kl = logp - ref
    if variant == "clip on the wrong side":
        ratio = (logp - old).exp()
        gain = torch.maximum(ratio * A[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * A[:, None])
    if variant == "clip without the minimum":
        gain = (logp - old).exp().clamp(1 - CLIP, 1 + CLIP) * A[:, None]
    if variant == "no clip":
        gain = (logp - old).exp() * A[:, None]
    if variant == "penalty added":
        kl = -kl
    per_token = -(gain - BETA * kl)
    if variant == "padding in the mean":
        return ((per_token * m).sum(-1) / T).mean()
    return sequence_mean(per_token, m)


@pytest.mark.parametrize("variant", [
    "prompt tokens in the loss", "ratio against the reference", "KL reversed",
    "the plain difference as KL", "clip on the wrong side", "clip without the minimum", "no clip",
    "penalty added", "padding in the mean",
])
def test_rejects(variant):
    logp, old, ref, A = inputs()
    right = grpo_loss(logp, old, ref, A, mask(), CLIP, BETA)
    assert abs(wrong("none") - right) < 1e-12
    assert abs(wrong(variant) - right) > 1e-3


def test_only_the_policy_gets_a_gradient():
    leaves = [x.clone().requires_grad_() for x in inputs()]
    grpo_loss(*leaves, mask(), CLIP, BETA).backward()
    assert leaves[0].grad.abs().max() > 0
    assert all(leaf.grad is None for leaf in leaves[1:])


def test_at_step_zero_the_loss_says_nothing_and_the_gradient_all():
    """With pi = pi_old = pi_ref the sequence loss is 0, the token loss -sum len·A / sum len."""
    logp = inputs()[0]
    A = advantages(normal(5, 2, 3)).flatten()
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    for normalise, value in (("sequence", 0.0),
                             ("token", -(lengths @ A / lengths.sum()).item())):
        leaf = logp.clone().requires_grad_()
        loss = grpo_loss(leaf, logp, logp, A, mask(), CLIP, BETA, normalise)
        loss.backward()
        assert abs(loss.item() - value) < 1e-12
        weight = lengths * N if normalise == "sequence" else lengths.sum().expand(N)
        expected = torch.where(mask(), -(A / weight)[:, None], 0.0)       # the policy gradient
        assert (leaf.grad - expected).abs().max() < 1e-12
    assert abs(value) > 0.05


def test_what_is_masked_out_may_hold_anything():
    logp, old, ref, A = inputs()
    clean = logp.clone().requires_grad_()
    expected = grpo_loss(clean, old, ref, A, mask(), CLIP, BETA)
    expected.backward()
    for junk in (torch.nan, torch.inf, -torch.inf, 1e300):
        leaf = logp.masked_fill(~mask(), junk).requires_grad_()
        loss = grpo_loss(leaf, old.masked_fill(~mask(), junk), ref.masked_fill(~mask(), -junk), A,
                         mask(), CLIP, BETA)
        loss.backward()
        assert torch.equal(loss, expected) and torch.equal(leaf.grad, clean.grad)


def test_advantages_are_those_of_the_statistics_module():
    rewards = normal(7, 4, 5) * 3 + 2
    A = advantages(rewards)
    for q, row in enumerate(rewards.tolist()):
        mean, std = statistics.fmean(row), statistics.pstdev(row)
        for g, r in enumerate(row):
            assert abs(A[q, g].item() - (r - mean) / std) < 1e-10
    over_the_batch = (rewards - rewards.mean()) / rewards.std(correction=0)
    sample_std = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    for mistake in (over_the_batch, sample_std, rewards - rewards.mean(1, keepdim=True)):
        assert (mistake - A).abs().max() > 0.05


def test_by_hand():
    """Of four answers one is right: mean 1/4, standard deviation sqrt(3)/4."""
    A = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64))
    expected = torch.tensor([[3.0, -1.0, -1.0, -1.0]], dtype=torch.float64) / math.sqrt(3)
    assert (A - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
def test_equal_rewards_teach_nothing(dtype):
    """The mean of three times 0.1 is not 0.1, and 0/0 is not 0."""
    for value in (0.1, 0.7, 1.0, 0.0, -3.3, 1e4):
        A = advantages(torch.full((2, 3), value).to(dtype))
        assert torch.equal(A, torch.zeros_like(A)) and A.dtype == torch.promote_types(
            dtype, torch.float32)
    logp, old, _, _ = inputs()
    leaf = logp.clone().requires_grad_()
    zero = advantages(torch.full((2, 3), 0.1, dtype=torch.float64)).flatten()
    grpo_loss(leaf, old, logp, zero, mask(), CLIP, 0.0).backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_advantages_know_neither_the_scale_nor_the_place_of_rewards():
    rewards = normal(8, 3, 4)
    A = advantages(rewards)
    for scale, shift in ((1e-30, 0.0), (1e-200, 0.0), (1e30, 0.0), (5.0, -40.0), (1e-3, 1.0)):
        assert (advantages(rewards * scale + shift) - A).abs().max() < 1e-9
    mixed = torch.stack((rewards[0], rewards[0, :1].expand(4)))
    assert torch.equal(advantages(mixed)[0], A[0]) and not advantages(mixed)[1].any()


def test_the_estimate_of_the_kl_is_right_on_average_and_never_negative():
    """Its mean over the policy is the KL divergence itself; for each token it is >= 0."""
    p, q = normal(9, 11).softmax(-1), normal(10, 11).softmax(-1)
    estimate = reference_kl(p.log(), q.log())
    assert (estimate >= 0).all() and reference_kl(p, p).abs().max() == 0
    assert abs((p * estimate).sum() - (p * (p.log() - q.log())).sum()) < 1e-12


def test_the_two_means_differ_where_lengths_do():
    values = normal(11, N, T)
    rows = [values[i][mask()[i]].mean() for i in range(N)]
    assert abs(sequence_mean(values, mask()) - torch.stack(rows).mean()) < 1e-12
    assert abs(token_mean(values, mask()) - values[mask()].mean()) < 1e-12
    assert abs(sequence_mean(values, mask()) - token_mean(values, mask())) > 1e-3


GOOD = dict(zip(("logp", "old_logp", "ref_logp", "advantages"), inputs()), mask=mask())


@pytest.mark.parametrize(("changes", "words"), [
    ({"logp": torch.zeros(N)}, "logp: shape"),
    ({"old_logp": torch.zeros(N, T + 1)}, "old_logp: shape"),
    ({"ref_logp": torch.zeros(N, T + 1)}, "ref_logp: shape"),
    ({"mask": torch.ones(N, 1, dtype=torch.bool)}, "mask: shape"),
    ({"mask": torch.ones(N, T)}, "mask: torch.float32, expected bool"),
    ({"mask": torch.zeros(N, T, dtype=torch.bool)}, "an answer without a token"),
    ({"advantages": torch.zeros(N, 1)}, "advantages: shape"),
    ({"clip": 0.0}, "clip: 0.0"), ({"clip": math.nan}, "clip: nan"), ({"clip": 1.0}, "clip: 1.0"),
    ({"beta": -0.1}, "beta: -0.1"), ({"beta": math.inf}, "beta: inf"),
    ({"normalise": "mean"}, "normalise: 'mean', expected 'sequence' or 'token'"),
])
def test_refusals(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        grpo_loss(**GOOD | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rewards", [torch.zeros(3), torch.zeros(2, 0),
                                     torch.tensor([[1.0, torch.nan]])])
def test_refused_rewards(rewards):
    with pytest.raises(ValueError, match="rewards: "):
        advantages(rewards)

# SPDX-License-Identifier: MIT
"""Answers that are sampled, their batches, and a policy that learns from them."""

import copy
import math
import statistics

import pytest
import torch
from oracles import loops
from refusals import refused
from small_run import CONFIG, RECIPE

from dsv2_ref.alignment.grpo import advantages, grpo_loss
from dsv2_ref.alignment.rollout import Rollouts, greedy_reward, objective, sample_answers
from dsv2_ref.inference.evaluate import token_log_probs
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.objective import Batch
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.trainer import Trainer

QUESTIONS = [[5, 9, 2, 11], [7, 3], [8, 8, 30, 12, 4, 40], [21, 33, 50]]
STOP, LIKED = CONFIG.stops[0], range(20, 40)      # of 61 tokens
GROUP, NEW = 3, 5


def policy(seed=1, std=0.3) -> DeepSeekV2:
    """fp64, and likely to end an answer after some tokens."""
    model = loops.randomize(DeepSeekV2(CONFIG), seed, std).eval()
    with torch.no_grad():
        model.head.weight[STOP] *= 3
    return model


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def liked(which, answers):
    """Reward: the share of liked tokens among the most there can be."""
    return [sum(token in LIKED for token in answer) / NEW for answer in answers]


def test_answers_are_what_generate_draws_with_the_same_generator():
    """The fork of a question's cache is the question read once more."""
    model = policy()
    said = sample_answers(model, QUESTIONS, GROUP, NEW, draws())
    asked = [q for q in QUESTIONS for _ in range(GROUP)]
    expected = generate(model, asked, NEW, temperature=1.0, generator=draws())
    lengths = set()
    for i, (question, answer) in enumerate(zip(asked, expected, strict=True)):
        n = len(question) + len(answer)
        lengths.add(len(answer))
        assert said.lengths[i] == n and said.ids[i, :n].tolist() == question + answer
        assert said.answers[i] == [t for t in answer if t != STOP]
        assert said.ended[i] == (answer[-1] == STOP)
        assert said.mask[i].nonzero().flatten().tolist() == list(range(len(question) - 1, n - 1))
    assert len(lengths) > 2 and 0 < sum(said.ended) < len(asked)
    assert len({tuple(a) for a in said.answers}) > len(QUESTIONS)        # a group is not one answer


def test_log_probabilities_are_those_of_the_whole_text():
    """By a loop: each answer alone, read from its beginning."""
    model = policy()
    said = sample_answers(model, QUESTIONS, GROUP, NEW, draws())
    entropies = []
    for i, n in enumerate(said.lengths):
        log_p = model(said.ids[i : i + 1, :n])[0].log_softmax(-1)
        for t in range(said.mask.shape[1]):
            if said.mask[i, t]:
                expected = log_p[t, said.ids[i, t + 1]].item()
                entropies.append(-(log_p[t].exp() * log_p[t]).sum().item())
                assert abs(said.logp[i, t].item() - expected) < 1e-5       # kept in fp32
            else:
                assert said.logp[i, t] == 0
    assert abs(said.entropy - statistics.fmean(entropies)) < 1e-10


def test_what_follows_a_cut_is_as_if_it_had_not_been_written():
    model = policy()
    whole = sample_answers(model, QUESTIONS, GROUP, NEW, draws())
    said = sample_answers(model, QUESTIONS, GROUP, NEW, draws(), lambda n, row:
                          min(2 + n, len(row)))
    entropies, cut = [], []
    for i, n in enumerate(whole.lengths):
        q = len(QUESTIONS[i // GROUP])
        kept = min(2 + i // GROUP, n - q)
        cut.append(kept < n - q)
        assert said.lengths[i] == q + kept
        assert said.ids[i, : q + kept].tolist() == whole.ids[i, : q + kept].tolist()
        assert said.mask[i].nonzero().flatten().tolist() == list(range(q - 1, q + kept - 1))
        assert torch.equal(said.logp[i], (whole.logp[i] * said.mask.new_tensor(
            [q - 1 <= t < q + kept - 1 for t in range(whole.mask.shape[1])]))[: said.mask.shape[1]])
        assert said.answers[i] == [t for t in whole.ids[i, q : q + kept].tolist() if t != STOP]
        assert said.ended[i] == (cut[i] or whole.ended[i])
        log_p = model(said.ids[i : i + 1, : q + kept])[0].log_softmax(-1)[q - 1 : q + kept - 1]
        entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
    assert 0 < sum(cut) < len(cut) and not all(said.ended)
    assert abs(said.entropy - statistics.fmean(entropies)) < 1e-10
    assert abs(said.entropy - whole.entropy) > 1e-3


def test_a_batch_is_cut_by_its_questions():
    """The reward sees what is left, and no token behind it is in the mask."""
    seen = {}

    def cut(n, row):
        return min(n + 1, len(row))

    def noted(which, answers):
        seen.update(which=list(which), answers=answers)
        return [float(len(answer)) for answer in answers]

    rollouts = Rollouts(policy(), policy(2), QUESTIONS, noted, GROUP, NEW, seed=1, cut=cut)
    _, mask, *_ = rollouts.next_batch(4 * GROUP)
    assert sorted(seen["which"]) == sorted(GROUP * [0, 1, 2, 3]) != seen["which"]
    tokens = mask.sum(-1).tolist()
    assert all(m <= n + 1 for n, m in zip(seen["which"], tokens, strict=True))
    assert {1, 2, 3, 4} <= set(tokens)
    assert all(m - 1 <= len(a) <= m for m, a in zip(tokens, seen["answers"], strict=True))


def test_a_batch_holds_what_the_loss_needs():
    model, reference = policy(), policy(2)
    before = copy.deepcopy(reference.state_dict())
    rollouts = Rollouts(model, reference, QUESTIONS, liked, GROUP, NEW, seed=3)
    ids, mask, old, ref, A, tokens = rollouts.next_batch(2 * GROUP)
    lengths = [int(row.nonzero().max()) + 2 for row in mask]
    for name, one, found in (("policy", model, old), ("reference", reference, ref)):
        expected = token_log_probs(one, ids, lengths)
        assert (found - expected)[mask].abs().max() < 1e-10, name
    assert (old - ref)[mask].abs().max() > 0.1
    answers = [[t for t in ids[i, 1:][mask[i]].tolist() if t != STOP] for i in range(6)]
    rewards = torch.tensor(liked(None, answers), dtype=torch.float64).view(2, GROUP)
    assert (A - advantages(rewards).flatten()).abs().max() < 1e-6
    report = rollouts.report
    assert abs(report["reward"] - rewards.mean().item()) < 1e-12
    assert report["no_spread"] == (rewards.std(1) == 0).double().mean().item()
    assert report["length"] == mask.sum().item() / 6 and tokens.tolist() == [report["length"]] * 6
    gap = ((old - ref) * mask).sum() / mask.sum()
    assert abs(report["kl_to_reference"] - gap.item()) < 1e-10
    assert 0 < report["sampler_gap"] < 1e-5
    assert all(torch.equal(w, before[name]) for name, w in reference.state_dict().items())
    assert not any(w.requires_grad for w in reference.parameters())


def test_only_groups_with_spread_are_kept():
    """All that is left of a batch is what it would hold of them; the report is of all answers."""

    def judge(which, answers):                               # to the second all answers are equal
        equal = which[GROUP]
        return [0.5 if n == equal else r for n, r in zip(which, liked(which, answers), strict=True)]

    def batch(reward, **how):
        rollouts = Rollouts(policy(), policy(2), QUESTIONS, reward, GROUP, NEW, seed=3, **how)
        return rollouts.next_batch(4 * GROUP), rollouts.report

    whole, of_all = batch(judge)
    some, report = batch(judge, only_spread=True)
    spread = (whole[4] != 0).view(4, GROUP).any(1)
    kept = spread.repeat_interleave(GROUP)
    assert spread[0] and not spread[1] and spread[2:].any()
    T = some[0].shape[1]
    for name, a, b in zip(("ids", "mask", "old", "ref", "A"), whole, some, strict=False):
        a = a[kept] if name == "A" else a[kept][:, : T - (name != "ids")]
        assert a.shape == b.shape and (a.double() - b.double()).abs().max() < 1e-10, name
    assert whole[1][kept][:, T - 1 :].sum() == 0 and some[1].any(0)[-1]
    assert some[5].tolist() == [some[1].sum().item() / len(b)] * len(b)
    for name in ("reward", "no_spread", "length", "ended", "entropy"):
        assert report[name] == of_all[name], name
    assert report["no_spread"] == 1 - spread.double().mean().item() > 0
    equal, _ = batch(lambda which, answers: [1.0] * len(answers), only_spread=True)
    assert len(equal[0]) == 4 * GROUP and not equal[4].any()         # nothing else to give


def test_every_epoch_asks_every_question_once_in_an_order_of_its_own():
    seen = []

    def noted(which, answers):
        seen.append(list(which)[::2])
        return [0.0] * len(answers)

    model = policy()
    rollouts = Rollouts(model, policy(2), QUESTIONS, noted, 2, 1, seed=4)
    for _ in range(12):
        rollouts.next_batch(2)
    (_, *_), asked = seen, [q for (q,) in seen]
    epochs = [asked[i : i + 4] for i in range(0, 12, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = Rollouts(model, policy(2), QUESTIONS, noted, 2, 1, seed=4)
    again.load({**rollouts.state(), "asked": 5})
    for _ in range(4):
        again.next_batch(2)
    assert [q for (q,) in seen[-4:]] == asked[5:9] != asked[:4]


@pytest.mark.parametrize("normalise", ["sequence", "token"])
@pytest.mark.parametrize("clip", [0.2, 0.01])
def test_micro_batches_give_the_gradient_of_the_whole_batch(normalise, clip):
    model, reference = policy(), policy(2)
    tensors = Rollouts(policy(3), reference, QUESTIONS, liked, GROUP, NEW).next_batch(6)
    ids, mask, old, ref, _, tokens = tensors
    A = loops.normal(5, 6)                               # not zero wherever rewards are equal
    tensors = ids, mask, old, ref, A, tokens
    grpo_loss(token_log_probs(model, ids), old, ref, A, mask, clip, 0.3, normalise).backward()
    expected = [w.grad for w in model.parameters()]
    assert len(set(mask.sum(-1).tolist())) > 1           # answers of different lengths
    model.zero_grad()
    of = objective(clip, 0.3, normalise)
    for start, end in ((0, 1), (1, 4), (4, 6)):
        part = Batch(tuple(t[start:end] for t in tensors), torch.zeros(end - start) > 0)
        losses = of(model, part).losses
        assert set(losses) == {"policy", "kl"}
        (sum(losses.values()) * (end - start) / 6).backward()
    for w, g in zip(model.parameters(), expected, strict=True):
        assert (w.grad is None) == (g is None)
        if g is not None:
            assert (w.grad - g).abs().max() < 1e-10


def learner(steps=40, seed=0, beta=0.02, **changes):
    torch.manual_seed(seed)
    model = DeepSeekV2(CONFIG)
    recipe = RECIPE.with_(steps=steps, optimizer="adamw", lr=2e-2, weight_decay=0.0, batch=24,
                          protected=0.0, seed=seed, **changes)
    recipe = recipe.__class__(**vars(recipe) | {"batch_start": None})
    rollouts = Rollouts(model, copy.deepcopy(model), QUESTIONS, liked, 6, NEW, seed)
    return Trainer(model, recipe, rollouts, objective(beta=beta))


def test_a_policy_learns_what_is_rewarded():
    trainer = learner()
    before = greedy_reward(trainer.model, QUESTIONS, liked, NEW)
    log = train(trainer, progress=False)
    first, last = (statistics.fmean(entry["reward"] for entry in part)
                   for part in (log[:5], log[-5:]))
    assert first < 0.45 and last > 0.9
    assert before < 0.7 and greedy_reward(trainer.model, QUESTIONS, liked, NEW) > 0.9
    assert log[0]["kl"] == pytest.approx(0, abs=1e-9) and log[-1]["kl_to_reference"] > 1
    assert log[-1]["entropy"] < log[0]["entropy"] < math.log(CONFIG.vocab) + 1e-3
    assert all(abs(entry["sampler_gap"]) < 1e-3 for entry in log)
    held = train(learner(beta=3.0), progress=False)
    assert held[-1]["kl_to_reference"] < log[-1]["kl_to_reference"] / 2


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    names = ("policy", "kl", "reward", "entropy", "gradient_norm", "length", "sampler_gap")

    def exact(log):
        return [[entry[name] for name in names] for entry in log]

    whole = train(learner(6), progress=False)
    first = learner(6)
    for _ in range(3):
        first.step()
    first.save(tmp_path / "state.safetensors")
    second = learner(6, seed=0)
    with torch.no_grad():
        for w in second.model.parameters():
            w.zero_()
    second.load(tmp_path / "state.safetensors")
    assert exact(train(second, progress=False)) == exact(whole[3:])


def test_equal_rewards_leave_the_policy_as_it_is():
    trainer = learner(2, beta=0.0)
    trainer.batches.reward = lambda which, answers: [0.1] * len(answers)
    before = copy.deepcopy(trainer.model.state_dict())
    entry = trainer.step()
    assert entry["no_spread"] == 1 and entry["gradient_norm"] == 0
    assert all(torch.equal(w, before[name]) for name, w in trainer.model.state_dict().items())


def test_a_damaged_policy_is_refused_in_one_line():
    model = policy()
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    refused(lambda: sample_answers(model, QUESTIONS, 2, 3), "logits: NaN", "answer 0")


def test_refusals():
    model, reference = policy(), policy(2)

    def make(questions=QUESTIONS, group=GROUP, reference=reference, reward=liked, **more):
        return Rollouts(model, reference, questions, reward, group, NEW, **more)

    refused(lambda: make(group=1), "group: 1", "at least 2")
    refused(lambda: make(questions=[]), "questions: none")
    refused(lambda: make(reference=model), "reference: the policy itself")
    refused(lambda: make().next_batch(4), "batch: 4", "multiple of group = 3")
    refused(lambda: make(reward=lambda *_: [1.0]).next_batch(3), "reward: shape (1,)", "(3,)")
    refused(lambda: make(reward=lambda *_: [1.0, math.nan, 0.0]).next_batch(3), "rewards: NaN")
    refused(lambda: sample_answers(model, [[]], 2, 3), "questions: an empty one")
    refused(lambda: sample_answers(model, QUESTIONS, 0, 3), "group: 0")
    refused(lambda: sample_answers(model, QUESTIONS, 2, 0), "max_new_tokens: 0")
    for wrong in (0, 9):
        refused(lambda: sample_answers(model, QUESTIONS, 2, 3, draws(), lambda n, row: wrong),  # noqa: B023
                f"cut: {wrong}", "expected 1 to")
    state = make().state()
    for other in ({"questions": QUESTIONS[:2]}, {"group": 4}, {"settings": "0.1"},
                  {"reference": DeepSeekV2(model.config)}):
        refused(lambda: make(**other).load(state), "cannot resume: questions")  # noqa: B023
    assert make().state() == state
    refused(lambda: make().load(state | {"seed": 9}), "seed 9")
    refused(lambda: make().load(state | {"asked": "x"}), "asked 'x'")

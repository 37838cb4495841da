# SPDX-License-Identifier: MIT
"""Reward models trained: losses against loops over answers, runs that go on bit for bit, what one
learns and knows of its chances, and the folder that it is saved in."""

import json
import math
import random

import pytest
import torch
from oracles import loops
from refusals import refused
from small_run import CONFIG

from dsv2_ref import checkpoint
from dsv2_ref.alignment.calibration import calibration_error
from dsv2_ref.alignment.judged import Judged, whole_text
from dsv2_ref.alignment.reward import RewardModel
from dsv2_ref.alignment.reward_training import (
    HEAD_FILE,
    AnswerBatches,
    as_reward,
    judge_rewards,
    load_reward_model,
    reward_trainer,
    rows_of,
    save_reward_model,
    scores,
    train_reward_model,
)
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.recipe import Recipe

UNTIED = CONFIG.with_(tie_embeddings=False)
RECIPE = Recipe(steps=6, batch=5, micro_batch=2, sequence=20, precision="fp32", lr=2e-3)
LOSSES = ("pair", "point")


class Marks:
    """Stands for a tokenizer: its end mark."""

    eos = 1


def judged(q=6, g=3, seed=0, worth=lambda answer: float(len(answer) > 2)):
    """Questions, and answers of several lengths."""
    draw = random.Random(seed)
    texts, rewards = [], []
    for _ in range(q):
        question = [0, *draw.choices(range(2, 61), k=draw.randint(2, 6))]
        for _ in range(g):
            answer = draw.choices(range(2, 61), k=draw.randint(1, 5))
            texts.append(whole_text(question, answer, Marks))
            rewards.append(worth(answer))
    return Judged(texts, torch.tensor(rewards).view(q, g))


def base(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return DeepSeekV2(config)


def opinionated(config=CONFIG, seed=1):
    """fp64, with a head that is not zero."""
    return loops.randomize(RewardModel(DeepSeekV2(config)), seed, 0.3)


def exact(log):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]


# ---- the losses


def alone(rewards, text, variant=""):
    """What one text is worth: read alone, by its last token."""
    if variant == "the end mark left out":
        text = text[:-1]
    if variant == "padding read":
        text = text + [0] * 3
    h = rewards.model.hidden(torch.tensor([text]))[0]
    value = (h @ rewards.head.weight[0] + rewards.head.bias)
    return value.mean() if variant == "the mean of all tokens" else value[-1]


def looped(rewards, loss, data, which, variant=""):
    """The loss of these rows, a text at a time."""
    rows, right = rows_of(data, loss)
    terms = []
    for i in which:
        r = [alone(rewards, list(text), variant) for text in rows[i]]
        if variant == "the worse one first":
            r = r[::-1]
        if variant == "right and wrong exchanged" and loss == "point":
            r = [-r[0]]
        odds = r[0] - r[1] if loss == "pair" else r[0] if right[i] else -r[0]
        if variant == "no sigmoid":
            terms.append(-odds)
        else:
            terms.append((1 + (-odds).exp()).log())
    return sum(terms) / (len(terms) + (variant == "a wrong mean"))


def first(loss, micro_batch, data):
    """Loss and gradients of the trainer's first batch, in fp64; its rows; the model."""
    mine = reward_trainer(opinionated(), data, loss, RECIPE.with_(micro_batch=micro_batch,
                                                                  clip=1e9))
    which = mine.batches._order[:5].tolist()
    losses, *_ = mine._gradients(mine._read(False))
    return losses, which, mine.model


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_the_loops_over_texts(loss, micro_batch):
    losses, which, mine = first(loss, micro_batch, judged())
    model = opinionated()
    expected = looped(model, loss, judged(), which)
    assert losses[loss] == losses["loss"] == pytest.approx(expected.item(), abs=1e-10)
    expected.backward()
    compared = 0
    for (name, W), V in zip(mine.named_parameters(), model.parameters(), strict=True):
        if V.grad is not None:
            torch.testing.assert_close(W.grad, V.grad, atol=1e-10, rtol=0, msg=name)
            compared += bool(V.grad.abs().max() > 0)
    assert compared > 20


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variant", [
    "the end mark left out", "padding read", "the mean of all tokens", "the worse one first",
    "right and wrong exchanged", "no sigmoid", "a wrong mean"])
def test_rejects(loss, variant):
    if (loss, variant) in {("point", "the worse one first"), ("pair", "right and wrong exchanged")}:
        return                                           # nothing of this kind
    losses, which, _ = first(loss, 2, judged())
    with torch.no_grad():
        wrong = looped(opinionated(), loss, judged(), which, variant)
    assert abs(losses[loss] - wrong.item()) > 1e-4


# ---- batches and runs


def test_an_epoch_has_each_row_once_in_an_order_of_its_own():
    rows, right = rows_of(judged(), "point")
    batches = AnswerBatches(rows, right, 20, 3)
    seen = []
    for _ in range(2 * len(rows) // 6):
        ids, lengths, verdicts = batches.next_batch(6)
        assert ids.shape == (6, 1, int(lengths.max())) and verdicts.dtype == torch.bool
        for (text,), (n,), yes in zip(ids.tolist(), lengths.tolist(), verdicts.tolist()):
            assert set(text[n:]) <= {0} and (((text[:n],), yes) in list(zip(rows, right)))
            seen.append(tuple(text[:n]))
    assert sorted(seen[: len(rows)]) == sorted(seen[len(rows) :]) == sorted(
        tuple(text) for text, in rows)
    assert seen[: len(rows)] != seen[len(rows) :]
    ids, lengths, verdicts = AnswerBatches(*rows_of(judged(), "pair"), 20, 3).next_batch(4)
    assert ids.shape[:2] == lengths.shape == (4, 2) and verdicts.all()


@pytest.mark.parametrize("loss, optimizer, config", [
    ("pair", "muon", UNTIED), ("point", "adamw", CONFIG)])
def test_a_run_goes_on_bit_for_bit(loss, optimizer, config, tmp_path):
    recipe = RECIPE.with_(optimizer=optimizer)

    def trainer():
        return reward_trainer(RewardModel(base(config)), judged(), loss, recipe)

    whole = trainer()
    log = [whole.step() for _ in range(6)]
    half = trainer()
    for _ in range(3):
        half.step()
    half.save(tmp_path / "state")
    other = trainer()
    other.load(tmp_path / "state")
    assert exact([other.step() for _ in range(3)]) == exact(log[3:])
    for (name, W), V in zip(whole.model.state_dict().items(), other.model.state_dict().values()):
        assert torch.equal(W, V), name
    strange = reward_trainer(RewardModel(base(config)), judged(seed=1), loss, recipe)
    refused(lambda: strange.load(tmp_path / "state"), "cannot resume: tokens")


def test_the_vocabularys_own_head_stays_and_the_new_one_is_no_matter_of_muon():
    model = base(UNTIED)
    trained = train_reward_model(model, judged(), recipe=RECIPE)
    assert torch.equal(trained.model.head.weight, model.head.weight)
    changed = [name for name, W in trained.model.state_dict().items()
               if not torch.equal(W, model.state_dict()[name])]
    assert len(changed) > 0.8 * len(model.state_dict()) and not trained.training
    trainer = reward_trainer(RewardModel(model), judged(), recipe=RECIPE)
    adamw, muon = trainer.optimizers
    assert any(W is trainer.model.head.weight for g in adamw.param_groups for W in g["params"])
    assert muon.param_groups[0]["params"]


def test_activations_that_are_made_again_change_nothing():
    logs = [exact([reward_trainer(RewardModel(base()), judged(),
                                  recipe=RECIPE.with_(recompute=share)).step() for _ in range(1)])
            for share in (0.0, 1.0)]
    assert logs[0] == logs[1]
    again = reward_trainer(RewardModel(base()), judged(), recipe=RECIPE.with_(recompute=1.0))
    assert again.model.model.recompute == 1.0


def test_it_learns_what_is_better_and_how_sure_to_be():
    """The better answers end with a 9; of a fifth of the answers dice say what they are worth."""
    draw = random.Random(7)

    def some(n, seed):
        made = judged(n, 4, seed)
        for text in made.texts:
            if draw.random() < 0.5:
                text[-2] = 9
        worth = [float(text[-2] == 9 if draw.random() < 0.8 else draw.random() < 0.5)
                 for text in made.texts]
        return Judged(made.texts, torch.tensor(worth).view(n, 4))

    seen, held_out = some(100, 1), some(40, 2)
    recipe = Recipe(steps=45, batch=24, sequence=20, precision="fp32", lr=4e-3,
                    optimizer="adamw")
    assert judge_rewards(RewardModel(base()), held_out)["pair"][0] == 0.5
    for loss in LOSSES:
        found = judge_rewards(train_reward_model(base(), seen, loss, recipe), held_out)
        accuracy, bins = found[loss]
        assert accuracy > 0.85 and found["pair"][0] > 0.85 and calibration_error(bins) < 0.12
        assert 0.8 < bins[-1].chance and 0.8 < bins[-1].share < 1


# ---- scores, rollouts, folders


def test_scores_are_those_of_each_text_alone():
    rewards, texts = opinionated(), judged().texts
    found = scores(rewards, texts, batch=4)
    for text, r in zip(texts, found, strict=True):
        assert abs(r - alone(rewards, text)) < 1e-10
    assert found.dtype == torch.float64 and len({round(r, 6) for r in found.tolist()}) > 10
    questions = [[0, 5, 7], [0, 9]]
    reward = as_reward(rewards, questions, Marks)
    told = reward([1, 0, 1], [[3, 4], [], [8]])
    assert told == pytest.approx([alone(rewards, text).item() for text in
                                  ([0, 9, 3, 4, 1], [0, 5, 7, 1], [0, 9, 8, 1])], abs=1e-10)


def test_what_is_judged_is_what_a_loop_counts():
    rewards, data = opinionated(), judged(worth=lambda answer: min(len(answer), 4) / 4)
    found = judge_rewards(rewards, data)
    pairs = [(alone(rewards, b), alone(rewards, w)) for b, w in data.pairs()]
    assert found["pair"][0] == pytest.approx(sum(float(b > w) for b, w in pairs) / len(pairs))
    assert sum(b.count for b in found["pair"][1]) == 2 * len(pairs)
    right = [(alone(rewards, t) > 0) == yes for t, yes in data.verdicts()]
    assert found["point"][0] == pytest.approx(sum(map(float, right)) / len(right))
    chances = [1 / (1 + math.exp(-alone(rewards, text).item())) for text in data.texts]
    mean = sum(b.chance * b.count for b in found["point"][1]) / len(chances)
    assert mean == pytest.approx(sum(chances) / len(chances), abs=1e-10)
    refused(lambda: judge_rewards(rewards, judged(worth=lambda answer: 1.0)),
            "judged: no two answers")


def test_a_folder_gives_back_the_same_rewards_and_holds_a_model(tmp_path):
    texts = judged().texts
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rewards = opinionated(UNTIED).to(dtype)
        save_reward_model(rewards, tmp_path / "model", {"notes.txt": "mine"}, overwrite=True)
        for stored in (None, dtype):
            again = load_reward_model(tmp_path / "model", stored)
            assert torch.equal(scores(again, texts), scores(rewards, texts)) and not again.training
    model = checkpoint.load(tmp_path / "model")
    assert torch.equal(model.embedding.weight, rewards.model.embedding.weight)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert load_reward_model(tmp_path / "model", "float32").like.dtype == torch.float32


def test_a_folder_that_holds_no_reward_model_is_refused(tmp_path):
    save_reward_model(RewardModel(base()), tmp_path / "model")
    head = tmp_path / "model" / HEAD_FILE
    good = json.loads(head.read_text())
    for wrong in ("{", "[1]", "3", json.dumps({"weight": [1.0]}),
                  json.dumps(good | {"bias": None}), json.dumps(good | {"weight": ["x"]})):
        head.write_text(wrong)
        refused(lambda: load_reward_model(tmp_path / "model"), HEAD_FILE, "damaged")
    head.write_text(json.dumps(good | {"weight": [1.0, 2.0]}))
    refused(lambda: load_reward_model(tmp_path / "model"), "weight of shape (2,), expected (24,)")
    head.unlink()
    refused(lambda: load_reward_model(tmp_path / "model"), "no such file, expected the folder of a")


def test_what_cannot_be_trained_is_refused():
    refused(lambda: rows_of(judged(), "both"), "loss: 'both', expected one of pair, point")
    refused(lambda: reward_trainer(RewardModel(base().bfloat16()), judged(), recipe=RECIPE),
            "model: weights in bfloat16")
    refused(lambda: reward_trainer(RewardModel(base()), judged(), recipe=RECIPE.with_(sequence=4)),
            "answers[", "expected at most sequence = 4")
    refused(lambda: reward_trainer(RewardModel(base(CONFIG.with_(max_positions=5))), judged(),
                                   recipe=RECIPE), "expected at most sequence = 5")
    refused(lambda: reward_trainer(RewardModel(base()), judged(worth=lambda answer: 1.0),
                                   recipe=RECIPE), "answers: nothing to compare")
    assert train(reward_trainer(RewardModel(base()), judged(), "point", RECIPE.with_(steps=1)),
                 progress=False)[0]["point"] == pytest.approx(math.log(2), abs=1e-6)

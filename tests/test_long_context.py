# SPDX-License-Identifier: MIT
"""The extension stage, and models that learn to find needles: batches, loss, loop, recipes."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_needles import TEXTS, TOKENIZER

from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.needles import KINDS, haystack
from dsv2_ref.text.reading import Document
from dsv2_ref.training import long_context
from dsv2_ref.training.long_context import (
    PAPER,
    PRESETS,
    NeedleBatches,
    extend,
    extension,
    learn,
    retrieval,
)
from dsv2_ref.training.recipe import Recipe

TEXT = haystack([Document(str(i), text) for i, text in enumerate(TEXTS)], TOKENIZER, 4000)
CONFIG = TINY.with_(vocab=TOKENIZER.vocab, n_layers=2, max_positions=80, drop_capacity=None)
RECIPE = Recipe(steps=3, sequence=80, batch=4, precision="fp32")


def batches(sequence=80, seed=0, kinds=KINDS):
    return NeedleBatches(TEXT, TOKENIZER, sequence, seed, kinds)


def model_of(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return DeepSeekV2(config)


def test_a_sequence_is_bos_text_with_needles_question_and_answer():
    tokens, targets, asked = batches().next_batch(12)
    assert tokens.shape == targets.shape == asked.shape == (12, 80)
    for row, target, mask in zip(tokens, targets, asked):
        assert row[0] == TOKENIZER.bos and torch.equal(row[1:], target[:-1])
        n = int(mask.sum())
        assert n in (4, 6) and mask[-n:].all()              # four words, or a chain's six
        text = TOKENIZER.decode([*row.tolist(), int(target[-1])])
        question = text.rpartition("\nRecall:")[2].split()
        assert len(question) == n + 1                       # the name asked for, then the answer
        assert f"\nRemember: {' '.join(question[-5:])}." in text
        for name, other in zip(question[: n - 4], question[1:]):             # a chain's links
            assert f"\nRemember: {name} {other}." in text


def test_batches_follow_from_the_seed_and_their_number_alone():
    first = [batches().next_batch(3) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*first))
    other, later = batches(seed=1).next_batch(3), batches()
    later.next_batch(7)
    for different in (other, later.next_batch(3)):
        assert not torch.equal(different[0], first[0][0])


def test_needles_stand_at_every_depth():
    tokens, _, _ = batches(kinds=("one",)).next_batch(200)
    remember = TOKENIZER.encode("Remember")[0]
    places = (tokens == remember).nonzero()[:, 1]
    assert len(places) == 200 and places.min() < 6 and places.max() > 60
    assert abs(places.double().mean() - 34) < 5


@pytest.mark.parametrize("sequence, said", [
    (4001, "text: 4000 tokens, expected at least 4001"), (9, "sequence: 9, expected at least")])
def test_too_little_text_or_room_is_refused(sequence, said):
    with pytest.raises(ValueError, match=said):
        batches(sequence).next_batch(3)


def test_the_loss_is_the_answers_cross_entropy_and_a_share_of_the_texts():
    model = model_of().double().eval()
    tokens, targets, asked = batches().next_batch(5)
    losses = retrieval(model, tokens, targets, asked)
    log_p = -F.cross_entropy(model(tokens).transpose(1, 2), targets, reduction="none")   # (B, T)
    assert losses["answer"].item() == pytest.approx(-log_p[asked].mean().item(), abs=1e-10)
    assert losses["text"].item() == pytest.approx(-0.3 * log_p[~asked].mean().item(), abs=1e-10)
    assert losses["balance"] == 0
    model.train()
    balance = model.losses(tokens, targets)
    expected = (balance.expert + balance.device + balance.communication).item()
    assert retrieval(model, tokens, targets, asked)["balance"].item() == pytest.approx(
        expected, abs=1e-12) and expected > 0


def test_learning_is_reproducible_and_learns():
    logs, weights = [], []
    for _ in range(2):
        model, seen = model_of(), []
        log = learn(model, batches(), RECIPE.with_(steps=8), seen.append)
        assert log == seen and [entry["step"] for entry in log] == [*range(1, 9)]
        logs.append([{k: v for k, v in entry.items() if k != "seconds"} for entry in log])
        weights.append(torch.cat([W.flatten() for W in model.parameters()]))
        assert not model.training
    assert logs[0] == logs[1] and torch.equal(*weights)
    assert logs[0][-1]["text"] < 0.95 * logs[0][0]["text"]


def test_the_last_step_is_taken_at_the_end_of_the_schedule(monkeypatch):
    shares = []
    monkeypatch.setattr(long_context, "set_rate", lambda _, share: shares.append(share))
    learn(model_of(), batches(), RECIPE)
    assert shares == [RECIPE.rate(k / 3) for k in (1, 2, 3)] and shares[-1] == pytest.approx(0.02)


def test_a_diverged_run_says_so():
    model = model_of()
    model.embedding.weight.data[:, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="step 1: gradient norm nan, try a lower lr"):
        learn(model, batches(), RECIPE)


def test_an_extended_model_is_a_stretched_copy_that_was_tuned():
    model = model_of()
    before = {name: W.clone() for name, W in model.state_dict().items()}
    recipe = extension(CONFIG, 4, steps=2, batch=2)
    assert recipe.sequence == 320
    longer = extend(model, 4, batches(320), recipe)
    assert longer.config.yarn_factor == 4 and longer.config.yarn_original_positions == 80
    assert longer.config.max_positions == 320 and not longer.training
    assert all(torch.equal(W, before[name]) for name, W in model.state_dict().items())
    changed = [name for name, W in longer.state_dict().items() if not torch.equal(W, before[name])]
    assert len(changed) > 0.8 * len(before)
    again = extension(longer.config, 8)
    assert again.sequence == 640                            # of the trained length, not of the last


def test_the_papers_stage_and_the_presets():
    assert (PAPER.steps, PAPER.sequence, PAPER.batch) == (1000, 32768, 576)
    assert PAPER.rate(0.0) == PAPER.rate(0.999) == 1.0      # one rate, no warm-up
    assert PAPER.lr == pytest.approx(2.4e-4 * 0.316**2)
    cpu, gpu = PRESETS["cpu"], PRESETS["gpu"]
    assert cpu.recipe.sequence == cpu.config.max_positions == 128 and cpu.factor == 8
    assert gpu.recipe.sequence == gpu.config.max_positions == 4096
    assert gpu.factor * gpu.recipe.sequence == 128 * 1024
    n = sum(W.numel() for W in DeepSeekV2(cpu.config).parameters())
    assert 2 * n < 3e6 and math.isclose(n / 1e6, 0.9, abs_tol=0.05)      # bytes in bf16

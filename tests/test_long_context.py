# SPDX-License-Identifier: MIT
"""The extension stage, and models that learn to find needles: batches, objective, presets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from test_needles import TEXTS, TOKENIZER

from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.stretch import stretched_config
from dsv2_ref.text.corpora import Corpus, Document
from dsv2_ref.text.needles import KINDS, NeedleBatches, haystack
from dsv2_ref.training.long_context import (
    PAPER,
    PRESETS,
    Preset,
    extend,
    extension,
    retrieval,
    set_up_needles,
)
from dsv2_ref.training.objective import Batch
from dsv2_ref.training.pretrain import Trainer, train
from dsv2_ref.training.recipe import Recipe

DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]
TEXT = np.array(haystack(DOCUMENTS, TOKENIZER, 4000), np.uint16)
CONFIG = TINY.with_(vocab=TOKENIZER.vocab, n_layers=2, max_positions=80, drop_capacity=None)
RECIPE = Recipe(steps=6, sequence=80, batch=4, precision="fp32")


def batches(sequence=80, seed=0, kinds=KINDS, text=TEXT):
    return NeedleBatches(text, TOKENIZER, sequence, seed, kinds)


def model_of(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return DeepSeekV2(config)


def trainer(recipe=RECIPE, seed=0):
    return Trainer(model_of(seed=seed), recipe, batches(), retrieval)


def exact(log):
    """Entries without what the clock says."""
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]


def batch_of(tensors, with_load=False):
    return Batch(tensors, torch.zeros(len(tensors[0]), dtype=torch.bool), with_load)


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


def test_a_position_is_gone_on_from_and_belongs_to_its_data():
    read = batches()
    read.next_batch(3)
    state = read.state()
    again = batches()
    again.load(state)
    assert all(torch.equal(a, b) for a, b in zip(read.next_batch(2), again.next_batch(2)))
    assert state["batch"] == 1 and all(isinstance(value, int) for value in state.values())
    for other, said in (
        (batches(text=TEXT[::-1]), "tokens (corpus or tokenizer) changed"),
        (batches(kinds=("one",)), "changed"), (batches(sequence=81), "sequence 80, now 81"),
        (batches(seed=1), "seed 0, now 1"),
    ):
        refused(lambda other=other: other.load(state), "cannot resume", said)
        assert other.n == 0
    refused(lambda: again.load({"batch": 1}), "no integer seed, sequence, fingerprint")
    refused(lambda: again.load(state | {"batch": -1}), "batch is -1, expected at least 0")


def test_needles_stand_at_every_depth():
    tokens, _, _ = batches(kinds=("one",)).next_batch(200)
    remember = TOKENIZER.encode("Remember")[0]
    places = (tokens == remember).nonzero()[:, 1]
    assert len(places) == 200 and places.min() < 6 and places.max() > 60
    assert abs(places.double().mean() - 34) < 5


def test_some_batches_have_shorter_sequences_and_more_of_them():
    read = NeedleBatches(TEXT, TOKENIZER, 90, 0, ("one",), shorter=(1, 2, 3))
    shapes = [tuple(read.next_batch(4)[0].shape) for _ in range(60)]
    assert set(shapes) == {(4, 90), (8, 45), (12, 30)}
    assert all(10 <= shapes.count(shape) <= 30 for shape in set(shapes))
    again = NeedleBatches(TEXT, TOKENIZER, 90, 0, ("one",), shorter=(1, 2, 3))
    again.load(read.state())
    assert all(torch.equal(a, b) for a, b in zip(read.next_batch(4), again.next_batch(4)))
    refused(lambda: batches(90, kinds=("one",)).load(read.state()), "changed")
    tokens, targets, asked = again.next_batch(4)
    assert (asked.sum(1) == 4).all() and asked[:, -4:].all() and tokens.shape == targets.shape


@pytest.mark.parametrize("sequence, said", [
    (4001, "text: 4000 tokens, expected at least 4001"), (9, "sequence: 9, expected at least")])
def test_too_little_text_or_room_is_refused(sequence, said):
    refused(lambda: batches(sequence).next_batch(3), said)


def test_the_loss_is_the_answers_cross_entropy_and_a_share_of_the_texts():
    model = model_of().double().eval()
    tokens, targets, asked = tensors = batches().next_batch(5)
    losses = retrieval(model, batch_of(tensors)).losses
    log_p = -F.cross_entropy(model(tokens).transpose(1, 2), targets, reduction="none")   # (B, T)
    assert losses["answer"].item() == pytest.approx(-log_p[asked].mean().item(), abs=1e-10)
    assert losses["text"].item() == pytest.approx(-0.3 * log_p[~asked].mean().item(), abs=1e-10)
    assert losses["balance"] == 0
    model.train()
    balance = model.losses(tokens, targets)
    expected = (balance.expert + balance.device + balance.communication).item()
    found = retrieval(model, batch_of(tensors, with_load=True))
    assert found.losses["balance"].item() == pytest.approx(expected, abs=1e-12) and expected > 0
    assert found.total == sum(found.losses.values())
    assert [layer.experts.sum() for layer in found.load] == [5 * 80 * CONFIG.top_k]


def test_protected_sequences_drop_nothing():
    model = model_of(CONFIG.with_(drop_capacity=0.5))
    tensors = batches().next_batch(3)
    kept = [retrieval(model, Batch(tensors, torch.full((3,), protected), True)).load[0].dropped
            for protected in (True, False)]
    assert kept[0] == 0 < kept[1]


def test_learning_is_reproducible_and_learns():
    recipe = RECIPE.with_(steps=8)
    logs = [train(trainer(recipe), progress=False) for _ in range(2)]
    assert exact(logs[0]) == exact(logs[1])
    assert set(logs[0][0]) >= {"answer", "text", "balance", "loss"}
    assert logs[0][-1]["text"] < 0.95 * logs[0][0]["text"]


@pytest.mark.parametrize("at", (1, 4))
def test_a_resumed_run_has_the_same_losses_bit_for_bit(tmp_path, at):
    whole = train(trainer(), progress=False)
    first = trainer()
    for _ in range(at):
        first.step()
    first.save(tmp_path / "state")
    second = trainer(seed=7)                                # from other weights
    second.load(tmp_path / "state")
    assert exact(train(second, progress=False)) == exact(whole[at:])
    other = Trainer(model_of(), RECIPE, batches(text=TEXT[::-1]), retrieval)
    refused(lambda: other.load(tmp_path / "state"), "cannot resume")


def test_a_preset_is_trained_plain_and_saved_with_yarn_over_the_length_it_was_trained_at():
    corpus = Corpus("texts", DOCUMENTS, DOCUMENTS[:2], DOCUMENTS[2:4], "made here")
    preset = Preset(CONFIG.with_(vocab=700), RECIPE, 4.0, shorter=(2,))
    setup = set_up_needles(preset, RECIPE.with_(sequence=60, seed=3), corpus)
    c = setup.model.config
    assert (c.yarn_factor, c.max_positions, c.vocab) == (None, 60, setup.tokenizer.vocab)
    assert setup.saved == stretched_config(c, 4) and setup.saved.yarn_original_positions == 60
    assert len(setup.tokenizer.encode(" november")) == 1          # a needle's word is a token
    entry = setup.trainer.step()
    assert entry["batch"] == 2 * RECIPE.batch and entry["tokens"] == RECIPE.batch * 60
    again = set_up_needles(preset, RECIPE.with_(sequence=60, seed=3), corpus, setup.tokenizer)
    other = set_up_needles(preset, RECIPE.with_(sequence=60, seed=4), corpus, setup.tokenizer)
    assert again.trainer.step()["answer"] == entry["answer"] != other.trainer.step()["answer"]


def test_an_extended_model_is_a_stretched_copy_that_was_tuned():
    model = model_of()
    before = {name: W.clone() for name, W in model.state_dict().items()}
    recipe = extension(CONFIG, 4, steps=2, batch=2)
    assert recipe.sequence == extension(CONFIG, 2).sequence == 80       # never below the trained
    seen = []
    longer = extend(model, 4, recipe, batches(80), watch=seen.append)
    assert [entry["step"] for entry in seen] == [1, 2]
    assert longer.config == stretched_config(CONFIG, 4) and not longer.training
    assert longer.head.weight is longer.embedding.weight
    assert all(torch.equal(W, before[name]) for name, W in model.state_dict().items())
    changed = [name for name, W in longer.state_dict().items() if not torch.equal(W, before[name])]
    assert len(changed) > 0.8 * len(before)
    again = extension(longer.config, 8)
    assert again.sequence == 160             # a quarter of 8 times the trained length, not the last


def test_the_papers_stage_and_the_presets():
    assert (PAPER.steps, PAPER.sequence, PAPER.batch) == (1000, 32768, 576)
    assert PAPER.rate(0.0) == PAPER.rate(0.999) == 1.0      # one rate, no warm-up
    assert PAPER.lr == pytest.approx(2.4e-4 * 0.316**2)
    cpu, gpu = PRESETS["cpu"], PRESETS["gpu"]
    assert cpu.recipe.sequence <= 512 and cpu.factor >= 8
    assert gpu.recipe.sequence == 4096 and gpu.factor * 4096 == 128 * 1024
    assert all(preset.config.drop_capacity is None for preset in PRESETS.values())
    n = sum(W.numel() for W in DeepSeekV2(cpu.config).parameters())
    assert 2 * n < 2.9e6                                    # bytes in bf16: data/needle has 3 MB

# SPDX-License-Identifier: MIT
"""A model and a recipe come together, or it is said why not."""

import pytest
from refusals import refused

from dsv2_ref.config import LITE, TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import stories_corpus
from dsv2_ref.text.tokenizer import train_tokenizer
from dsv2_ref.training import machine, setup
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.setup import set_up

RECIPE = Recipe(steps=2, batch=2, sequence=16, precision="fp32")


@pytest.fixture(scope="module")
def corpus():
    return stories_corpus(40)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer((d.text for d in corpus.train), 300)


def test_a_ready_model_is_trained_as_it_is(corpus, tokenizer):
    """The one a new run would make, made before: the same losses; of another, others."""
    new = set_up(TINY, RECIPE, corpus, tokenizer)
    ready = DeepSeekV2(new.model.config)
    ready.load_state_dict(new.model.state_dict())
    other = DeepSeekV2(new.model.config)
    setups = [new, *(set_up(None, RECIPE, corpus, tokenizer, model) for model in (ready, other))]
    assert setups[1].model is ready
    losses = [[s.trainer.step()["language"] for _ in range(2)] for s in setups]
    assert losses[0] == losses[1] != losses[2]


def test_a_ready_model_needs_its_tokenizer_and_its_positions(corpus, tokenizer):
    config = TINY.with_(vocab=tokenizer.vocab, max_positions=20)
    model = DeepSeekV2(config)
    refused(lambda: set_up(None, RECIPE, corpus, None, model), "tokenizer: None")
    refused(lambda: set_up(None, RECIPE.with_(sequence=21), corpus, tokenizer, model),
            "sequence: 21", "max_positions = 20")
    small = DeepSeekV2(config.with_(vocab=tokenizer.vocab - 1))
    refused(lambda: set_up(None, RECIPE, corpus, tokenizer, small),
            f"tokenizer: {tokenizer.vocab} tokens", f"{tokenizer.vocab - 1}")


def test_a_new_model_says_at_which_length_it_is_trained(corpus, tokenizer):
    """Fewer positions than it can read; all of them; under YaRN as before."""
    def said(length, **changes):
        recipe = RECIPE.with_(sequence=length)
        config = set_up(TINY.with_(**changes), recipe, corpus, tokenizer).model.config
        return config.trained_positions, config.max_positions

    assert said(20) == (20, 512) and said(30, max_positions=30) == (None, 30)
    assert said(40, max_positions=30) == (None, 40)
    assert said(20, yarn_factor=4.0) == (None, 512)


def test_what_cannot_fit_is_refused_where_the_memory_is_known(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(setup, "memory", lambda device: (None, 2**30))
    refused(lambda: set_up(LITE, RECIPE, corpus, tokenizer), "preset", "fits in 1 GiB")
    monkeypatch.setattr(setup, "memory", lambda device: (None, None))           # Windows
    assert set_up(TINY, RECIPE, corpus, tokenizer).trainer.step()["step"] == 1


def test_memory_is_told_in_bytes_or_not_at_all(monkeypatch, tmp_path):
    psutil = pytest.importorskip("psutil")
    free, total = machine.memory("cpu")
    assert total == psutil.virtual_memory().total
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / "none")        # macOS
    assert machine.memory("cpu")[0] is None
    assert machine.memory("cpu")[1] == pytest.approx(total, rel=0.01)
    monkeypatch.delattr(machine.os, "sysconf")                                  # Windows
    assert machine.memory("cpu") == (None, None)

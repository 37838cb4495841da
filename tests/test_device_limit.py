# SPDX-License-Identifier: MIT
"""The measurement of M: every limit is really in force, and nothing else differs."""

import json

import pytest
import torch

from dsv2_ref.bench import device_limit as bench
from dsv2_ref.text.corpora import stories_corpus
from dsv2_ref.text.tokenizer import train_tokenizer
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.setup import set_up


@pytest.fixture(scope="module")
def record() -> dict:
    return bench.run(quick=True)


def test_record_is_complete(record):
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "device_limit" and record["quick"] is True and record["cores"] >= 1
    assert [(r["max_devices"], r["seed"]) for r in record["runs"]] == [(m, 0) for m in (1, 2, 3, 4)]
    assert record["model"]["experts"] == 32 and record["training"]["tokens"] == 2 * 8 * 128
    for r in record["runs"]:
        assert record["floor"] < r["bits_per_byte"] < 8 and 0 <= r["dropped"] < 1


def test_no_token_reaches_more_devices_than_its_limit(record):
    reached = [r["devices"] for r in record["runs"]]
    assert reached[0] == 1 and 1 < reached[1] <= 2 < reached[2] <= 3 and reached[3] < 4
    assert len({r["bits_per_byte"] for r in record["runs"]}) == 4       # the limit was in force


def test_the_limit_is_all_that_differs():
    corpus = stories_corpus(40)
    tokenizer = train_tokenizer((d.text for d in corpus.train), 300)
    recipe = Recipe(steps=1, batch=2, sequence=16, precision="fp32", seed=3)
    setups = [set_up(bench.CONFIG.with_(max_devices=m), recipe, corpus, tokenizer)
              for m in bench.LIMITS]
    batches = [setup.trainer.batches.next_batch()[0] for setup in setups]
    for setup, batch in zip(setups[1:], batches[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(setups[0].model.parameters(),
                                                     setup.model.parameters(), strict=True))
        assert torch.equal(batch, batches[0])


def test_devices_reached_counts_a_device_once():
    corpus = stories_corpus(40)
    tokenizer = train_tokenizer((d.text for d in corpus.train), 300)
    setup = set_up(bench.CONFIG, Recipe(steps=1, sequence=16), corpus, tokenizer)
    chosen = []
    for block in setup.model.blocks[1:]:
        block.router.register_forward_hook(lambda *args: chosen.append(args[2].indices // 8))
    mean = bench.devices_reached(setup, n_stories=3)
    slots = torch.cat(chosen).tolist()
    assert mean == pytest.approx(sum(len(set(row)) for row in slots) / len(slots))

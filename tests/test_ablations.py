# SPDX-License-Identifier: MIT
"""The studies change one thing each, and count it rightly."""

import json
import statistics
from types import SimpleNamespace

import pytest
import torch

from dsv2_ref import cost
from dsv2_ref.__main__ import main
from dsv2_ref.attention.mha import MultiHeadAttention
from dsv2_ref.attention.rope import rope_frequencies, rope_tables
from dsv2_ref.bench import ablations as bench
from dsv2_ref.bench.harness.study import summary
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import stories_corpus
from dsv2_ref.text.data import encode
from dsv2_ref.text.tokenizer import train_tokenizer
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.setup import set_up


@pytest.fixture(scope="module")
def record() -> dict:
    return bench.run(quick=True)


def test_record_is_complete(record):
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "ablations" and record["quick"] is True
    assert record["training"]["tokens"] == 2 * 8 * 128 and record["training"]["corpus"] == "stories"
    assert set(record["studies"]) == set(bench.STUDIES)
    for name, study in record["studies"].items():
        assert [r["setting"] for r in study["runs"]] == list(bench.settings(name))
        assert [r["setting"] for r in study["summary"]] == list(bench.settings(name))
        for r, row in zip(study["runs"], study["summary"], strict=True):
            assert record["floor"] < r["bits_per_byte"] == row["mean"] < 8
            assert row["deviation"] is None                                  # of one seed


def test_kinds_of_attention_have_equal_parameters_and_their_own_caches(record):
    runs = record["studies"]["attention"]["runs"]
    assert [r["setting"] for r in runs] == ["MHA", "GQA", "MQA", "MLA"]
    most, least = (f(r["parameters"] for r in runs) for f in (max, min))
    assert most < 1.002 * least and all(r["parameters"] == r["activated"] for r in runs)
    d_h, n_h = bench.DENSE.d_h, bench.DENSE.n_h
    assert [r["cached"] for r in runs] == [2 * n_h * d_h, 2 * 2 * d_h, 2 * d_h, 4.5 * d_h]
    assert bench.DENSE.d_c == 4 * d_h and bench.DENSE.d_r == d_h / 2         # V2's proportions


@pytest.mark.parametrize("kind", ["MHA", "GQA", "MQA"])
def test_the_replaced_attention_is_the_plain_one_with_rope_on_whole_heads(kind):
    config, change = bench.attention_kind(kind, bench.DENSE)
    torch.manual_seed(0)
    model = DeepSeekV2(config).double()
    change(model)
    model.double()
    seen = {}
    block = model.blocks[1]
    block.attention.register_forward_hook(lambda m, args, out: seen.update(h=args[0], u=out))
    model.losses(torch.randint(100, (2, 9)), torch.randint(100, (2, 9)))
    plain = MultiHeadAttention(config.d, config.n_h, config.d_h, cost.kv_heads(kind, 8)).double()
    plain.load_state_dict(block.attention.state_dict())
    cos, sin = rope_tables(torch.arange(9), rope_frequencies(config.d_h, config.rope_theta))
    assert torch.allclose(seen["u"], plain(seen["h"], cos, sin), atol=1e-12, rtol=0)
    assert not torch.allclose(seen["u"], plain(seen["h"]), atol=1e-6, rtol=0)


def test_finer_experts_keep_total_and_activated_parameters(record):
    runs = record["studies"]["experts"]["runs"]
    centroids = [8 * m * bench.ONE_DEVICE.d * 2 for m in (1, 2, 4)]          # of two MoE layers
    assert len({r["parameters"] - n for r, n in zip(runs, centroids, strict=True)}) == 1
    assert len({r["activated"] - n for r, n in zip(runs, centroids, strict=True)}) == 1
    for run, (config, _) in zip(runs, bench.settings("experts").values(), strict=True):
        idle = run["parameters"] - run["activated"]
        assert idle == 2 * (config.n_routed - config.top_k) * 3 * config.d * config.expert_width
        assert config.reach == 1 and config.drop_capacity is None


def test_one_thing_changes():
    for study, fields in (("balance", {"alpha_expert", "alpha_device", "alpha_comm"}),
                          ("dropping", {"drop_capacity"}), ("devices", {"max_devices"})):
        (first, _), *others = bench.settings(study).values()
        for config, change in others:
            differs = {f for f in vars(first) if getattr(config, f) != getattr(first, f)}
            assert differs <= fields and change is None
    none = bench.settings("balance")["none"][0]
    assert none.alpha_expert == none.alpha_device == none.alpha_comm == 0


def test_dropping_is_in_force(record):
    off, one, half = (r["dropped"] for r in record["studies"]["dropping"]["runs"])
    assert off == 0 < one < half == pytest.approx(0.5, abs=0.01)


def test_a_card_gets_the_same_models_four_times_as_wide():
    for study in bench.STUDIES:
        for (small, _), (large, _) in zip(bench.settings(study).values(),
                                          bench.settings(study, 4).values(), strict=True):
            assert (large.d, large.d_h, large.d_c) == (4 * small.d, 4 * small.d_h, 4 * small.d_c)
            assert (large.n_h, large.n_layers, large.top_k) == (small.n_h, small.n_layers,
                                                                small.top_k)


def test_load_is_counted_in_fair_shares():
    class Layer:
        entropy = 1.5

        def __init__(self, *experts):
            self.experts = torch.tensor(experts)

            self.devices, self.routing = torch.tensor([5, 3]), SimpleNamespace(indices=[0] * 4)

    layers = [Layer(0, 4, 4, 8), Layer(2, 98, 100, 200)]
    setup = SimpleNamespace(corpus=SimpleNamespace(test=[]), held_out_load=lambda _: layers)
    assert bench.load_shares(setup) == {
        "fullest": 2.0, "emptiest": pytest.approx(0.01), "dead": 1 / 8, "devices": 2.0,
        "gate_entropy": 1.5}


def test_no_token_reaches_more_devices_than_its_limit(record):
    runs = record["studies"]["devices"]["runs"]
    assert [r["setting"] for r in runs] == ["M = 4", "M = 3", "M = 2", "M = 1"]
    four, three, two, one = (r["devices"] for r in runs)
    assert one == 1 < two <= 2 < three <= 3 and three < four < 4
    assert len({r["bits_per_byte"] for r in runs}) == 4                 # the limit was in force
    assert all(config.drop_capacity == 1.0 for config, _ in bench.settings("devices").values())
    assert {r["devices"] for r in record["studies"]["experts"]["runs"]} == {1}


def small_setups(*configs):
    corpus = stories_corpus(40)
    tokenizer = train_tokenizer((d.text for d in corpus.train), 300)
    recipe = Recipe(steps=1, batch=2, sequence=16, precision="fp32", seed=3)
    return [set_up(config, recipe, corpus, tokenizer) for config in configs]


def test_the_limit_is_all_that_differs():
    """All limits start from the same weights and read the same data."""
    first, *others = small_setups(*(config for config, _ in bench.settings("devices").values()))
    batch = first.trainer.batches.next_batch()[0]
    for setup in others:
        assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(),
                                                     setup.model.parameters(), strict=True))
        assert torch.equal(setup.trainer.batches.next_batch()[0], batch)


def test_held_out_load_reads_rows_of_the_documents_and_counts_a_device_once():
    (setup,) = small_setups(bench.settings("devices")["M = 3"][0])
    chosen, read = [], []
    for block in setup.model.blocks[1:]:
        block.router.register_forward_hook(lambda *args: chosen.append(args[2].indices // 8))
    setup.model.embedding.register_forward_hook(lambda m, args, out: read.append(args[0]))
    documents = setup.corpus.test[:2]
    load = setup.held_out_load(documents, rows=3)
    expected = torch.from_numpy(encode(documents, setup.tokenizer)[:48].astype("int64"))
    assert torch.equal(read[0], expected.view(3, 16))
    for layer, devices in zip(load, chosen, strict=True):
        assert layer.experts.sum() == 48 * 4
        assert layer.devices.sum() == sum(len(set(row)) for row in devices.tolist())
    (few,) = setup.held_out_load(documents[:1], rows=1)[:1]
    assert few.experts.sum() == 16 * 4


def test_summary_compares_seed_by_seed():
    bits = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 1.5, ("b", 1): 2.6}
    runs = [{"setting": s, "seed": seed, "bits": v} for (s, seed), v in bits.items()]
    first, second = summary(runs, "setting", "bits")
    assert first["difference"] == first["difference_deviation"] == 0 and first["mean"] == 1.5
    assert second["difference"] == pytest.approx(0.55)
    assert second["difference_deviation"] == pytest.approx(statistics.stdev([0.5, 0.6]))
    assert second["deviation"] == pytest.approx(statistics.stdev([1.5, 2.6]))


def test_one_study_alone_from_the_command_line(capsys):
    assert main(["bench", "ablations", "--quick", "--json", "--only", "dropping"]) == 0
    assert list(json.loads(capsys.readouterr().out)["studies"]) == ["dropping"]
    for argv, message in ((["ablations", "--only", "x"], "only: 'x', expected one of attention,"),
                          (["train", "--only", "x"], "--only: 'x', expected with ablations alone")):
        assert main(["bench", "--quick", *argv]) == 2
        assert message in capsys.readouterr().err

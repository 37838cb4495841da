# SPDX-License-Identifier: MIT
"""The benchmark of serving runs, counts right, and refuses other tokens. Never how fast."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from dsv2_ref.bench import serve
from dsv2_ref.bench.harness import serving
from dsv2_ref.bench.harness.serving import Ask, asks, cache_bytes, filled, least_work, under_load
from dsv2_ref.config import LITE, M150, TINY
from dsv2_ref.inference.engine import Engine
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2


@pytest.fixture(scope="module")
def record() -> dict:
    pytest.importorskip("transformers")
    return serve.run(quick=True)


@pytest.fixture(scope="module")
def model() -> DeepSeekV2:
    torch.manual_seed(0)
    return DeepSeekV2(TINY).eval()


def positive(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(positive, value.values()))
    return math.isfinite(value) and value > 0


def test_the_record_is_complete(record: dict) -> None:
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "serve" and record["quick"] is True and record["torch"]
    assert positive({k: record[k] for k in ("read_gb_per_s", "matmul_gflops", "page")})
    (sixteen,) = record["sixteen"]
    ways = {"sequential", "plain batch", *serve.CACHES}
    assert sixteen["seconds"].keys() == sixteen["times_sequential"].keys() == ways
    assert positive(sixteen["seconds"]) and sixteen["times_sequential"]["sequential"] == 1
    assert [row["cache"] for row in record["decode"]] == list(serve.CACHES)
    assert [row["cache"] for row in record["memory"]] == 2 * list(serve.CACHES)
    assert [row["load"] for row in record["latency"]] == [0.3, 0.6, 0.9]
    for row in record["latency"]:
        assert row["requests"] == serve.QUICK.requests
        for what in ("first_token_ms", "next_token_ms"):
            assert 0 < row[what]["p50"] <= row[what]["p90"] <= row[what]["p99"]


def test_transformers_has_each_backend_and_its_own_engine_fails(record: dict) -> None:
    mixed = record["mixed"]
    assert len(mixed["tried_ms"]) == 6 and mixed["backends"] == min(
        mixed["tried_ms"], key=mixed["tried_ms"].get)
    theirs = {way for way in mixed["seconds"] if way.startswith("transformers")}
    assert theirs == {"transformers 16", "transformers 16 sorted", "transformers 64"}
    assert mixed["best"] == min(theirs, key=mixed["seconds"].get)
    for kind in serve.CACHES:
        assert mixed["ratio"][kind] == mixed["seconds"][mixed["best"]] / mixed["seconds"][kind]
    assert mixed["continuous_batching_error"] is None and mixed["same_tokens"].endswith("of 6")


@pytest.mark.parametrize(("result", "told"), [
    ({"a": SimpleNamespace(error=None), "b": SimpleNamespace(error="shapes")}, "shapes"),
    ({"a": SimpleNamespace(error=None)}, None), ({}, "no result"),
    (TypeError("no\n such"), "TypeError: no such"),
])
def test_what_their_engine_says_is_recorded(result, told) -> None:
    def generate_batch(prompts, settings, few, warmup):
        assert prompts == [[3, 4]] and settings.max_new_tokens == 4
        if isinstance(result, Exception):
            raise result
        return result

    fake = SimpleNamespace(ContinuousBatchingConfig=dict, GenerationConfig=SimpleNamespace)
    theirs = SimpleNamespace(generate_batch=generate_batch)
    assert serving.their_engine(fake, theirs, [Ask([3, 4], 1)]) == told


def test_as_many_fit_as_the_config_says(record: dict) -> None:
    for row in record["memory"]:
        assert row["batch"] == int(row["predicted_batch"] + 1e-9)
        assert row["predicted_batch"] == pytest.approx(
            row["budget_bytes"] / row["context"] / row["bytes_per_token"])
    for row in record["decode"]:
        assert row["share_of_floor"] == pytest.approx(
            max(row["floor_ms"].values()) / row["step_ms"])
        assert row["tokens_per_s"] * row["step_ms"] == pytest.approx(1e3 * row["batch"])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("config", "latent", "six_bit"), [(LITE, 8.89, 2.67), (M150, 6.67, 2.67)])
def test_bytes_of_a_token_are_those_of_a_live_cache(config, latent, six_bit, itemsize) -> None:
    small = config.with_(n_layers=2, d=32, d_cq=None, vocab=16, bos=0, eos=1, dense_width=16,
                         expert_width=16)
    live = DeepSeekV2(small).to(torch.bfloat16 if itemsize == 2 else torch.float32)
    sizes = {kind: cache_bytes(small, kind, itemsize) for kind in serve.CACHES}
    for kind, size in sizes.items():
        assert Engine(live, 10**7, kind).cache.nbytes_per_token == size
    assert sizes["per_head"] / sizes["latent"] == pytest.approx(latent, rel=2e-3)
    # 2.67 is 16 bits over 6; two scales a row are in our bytes, too
    assert sizes["latent"] / sizes["six_bit"] == pytest.approx(six_bit * itemsize / 2, rel=0.025)


def test_a_full_engine_goes_on_as_if_it_had_read_its_prompts(model) -> None:
    """As many as fit by hand, a step of all of them, no page for anyone else, nobody stopped."""
    pages = 4 * 11 + 3                                         # 4 of 11 pages; the last has no room
    asked = asks(TINY.vocab, 9, (161, 161), (16, 16))
    engine = Engine(model, pages * 16 * int(cache_bytes(TINY, "latent", 4)), "latent", 16)
    assert filled(engine, asked) == 4
    assert [engine._missing(r) for r in engine._running()] == [1] * len(engine._requests) == [1] * 4
    got = [id for id, _, _ in engine.run()]
    assert len(got) == 4 * 16 and sorted(set(got)) == [0, 1, 2, 3] and not engine.pages_in_use


def test_least_work_by_hand() -> None:
    c = TINY.with_(n_layers=2, tie_embeddings=False)
    with torch.device("meta"):
        live = DeepSeekV2(c)
    named = dict(live.named_parameters())
    routed = sum(p.numel() for n, p in named.items() if ".experts.W_" in n and p.ndim == 3)
    rest = sum(p.numel() for n, p in named.items()) - routed - c.vocab * c.d
    work = least_work(c, 5, 7, "latent", 4)
    assert work["weight_bytes"] == pytest.approx(4 * (rest + routed * (1 - (5 / 8) ** 5)))
    assert work["cache_bytes"] == 5 * 7 * 2 * 40 * 4
    longer, per_head = least_work(c, 5, 8, "latent", 4), least_work(c, 5, 8, "per_head", 4)
    assert longer["flops"] - work["flops"] == 5 * 2 * 2 * 4 * (2 * 32 + 8)
    assert per_head["cache_bytes"] == 5 * 8 * 2 * 4 * (16 + 8 + 16) * 4
    assert longer["flops"] - per_head["flops"] == 5 * 8 * 2 * 2 * 4 * (2 * 32 - 16 - 16)


def test_a_queue_by_hand(model, monkeypatch) -> None:
    """Every look at the clock is a second later; arrivals at 0.2 and 1.7, and at 40, alone."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(serving, "clock", lambda: float(next(ticks)))
    arrivals = iter((0.2, 1.5, 38.3))
    monkeypatch.setattr(serving.random.Random, "expovariate", lambda self, rate: next(arrivals))
    row = under_load(Engine(model, 10**6), [Ask([3, 4], 2), Ask([5], 1), Ask([6, 7], 2)], 9.0)
    # first at 0.2: tokens at 1.2 and 2.2; second came at 1.7, is there at 3.2; third 41, 42
    assert row["requests"] == 3 and row["first_token_ms"]["p50"] == pytest.approx(1000)
    assert row["first_token_ms"]["p99"] == pytest.approx(1490)
    assert row["next_token_ms"]["p50"] == row["next_token_ms"]["p99"] == pytest.approx(1000)
    assert row["seconds"] == pytest.approx(42)


def test_padded_answers_are_those_of_generate(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    with serve.quiet(transformers):
        config = TINY.with_(init_std=0.1, tie_embeddings=False)
        ours, theirs = serve.both(transformers, config, tmp_path / "m")
    asked = asks(TINY.vocab, 5, (1, 9), (1, 6))
    expected = [generate(ours, [a.prompt], a.new, stop=())[0] for a in asked]
    for ask, new in zip(asked, expected):                      # no choice is close
        top = ours(torch.tensor([ask.prompt + new[:-1]]))[0, len(ask.prompt) - 1 :].topk(2).values
        assert (top[:, 0] - top[:, 1] > 1e-3).all()
    assert serving.padded(theirs, asked, 2) == serving.padded(theirs, asked, 5) == expected
    assert serving.served(Engine(ours, 10**6), asked) == expected


def test_the_full_run_has_the_sizes_it_documents() -> None:
    lite, m150 = serve.CPU.shapes["lite attention"], serve.CPU.shapes["150m"]
    for field in ("d", "n_h", "d_h", "d_r", "d_v", "d_c", "d_cq"):
        assert getattr(lite, field) == getattr(LITE, field)
        assert getattr(m150, field) == getattr(M150, field)
    assert m150.n_routed == M150.n_routed and m150.expert_width == M150.expert_width
    assert serve.GPU.models["lite"] == serve.GPU.shapes["lite"] == LITE
    assert serve.CPU.tokens == 64 and serve.CPU.models.keys() == {"mini", "small"}
    assert all(plan.context % serve.PAGE == 0 for plan in (serve.CPU, serve.GPU, serve.QUICK))


def test_without_transformers_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="bench serve .*transformers .* pip install"):
        serve.run(quick=True)

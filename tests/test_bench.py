# SPDX-License-Identifier: MIT
"""The benchmarks run and agree with what they are compared with. Never how fast they are."""

import contextlib
import json
import math
import sys
import types

import pytest
import torch

from dsv2_ref import cost
from dsv2_ref.bench import cpu_decode, train
from dsv2_ref.bench.harness import one_card, peer, timing
from dsv2_ref.config import LITE
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.memory import state_bytes


@pytest.fixture(scope="module")
def record() -> dict:
    pytest.importorskip("transformers")
    return cpu_decode.run(quick=True)


@pytest.fixture(scope="module")
def train_record() -> dict:
    pytest.importorskip("transformers")
    return train.run(quick=True)


def test_record_says_what_it_was_made_with(record: dict) -> None:
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "cpu_decode" and record["quick"] is True
    assert record["torch"] == torch.__version__ and record["threads"] == torch.get_num_threads()
    assert record["cpu"] and record["dtype"] == "float32" and len(record["date"]) == 10
    assert record["transformers"] == sys.modules["transformers"].__version__


def test_every_comparison_is_there(record: dict) -> None:
    assert [(r["context"], r["batch"]) for r in record["decode"]] == [(32, 1), (32, 2), (64, 1)]
    assert [r["context"] for r in record["attention"]] == [32, 64]
    backends = {f"{a}+{e}" for a in peer.ATTENTION for e in peer.EXPERTS}
    assert all(set(r["tried_ms"]) == backends for r in record["decode"])
    assert all(set(r["tried_ms"]) == set(peer.ATTENTION) for r in record["attention"])


@pytest.mark.parametrize("part", ["decode", "attention"])
def test_numbers_are_numbers_and_outputs_agree(record: dict, part: str) -> None:
    for result in record[part]:
        check(result)


def check(result: dict) -> None:
    assert 0 <= result["difference"] < timing.TOLERANCE
    assert result["best"] == min(result["tried_ms"], key=result["tried_ms"].get)
    assert result["ratio"] == pytest.approx(result["theirs_ms"] / result["ours_ms"])
    for side in ("ours", "theirs"):
        milliseconds, rate = result[f"{side}_ms"], result[f"{side}_tokens_per_s"]
        tokens = result["batch"] * result.get("length", 1)
        assert math.isfinite(rate) and milliseconds > 0
        assert rate * milliseconds == pytest.approx(1000 * tokens)


def test_the_full_run_has_the_sizes_it_documents() -> None:
    """Widths that exclude no backend, and a layer of V2-Lite's real size."""
    for model in (peer.MODEL, *train.MODELS.values()):
        for width in (model.d, model.expert_width, model.dense_width, model.d_c, model.d_cq):
            assert width % 16 == 0
    assert cpu_decode.LAYER.n_h == 16 and cpu_decode.LAYER.d == 2048


def test_shares_are_of_what_a_step_needs(record: dict) -> None:
    """Counted in a live model: the weights that are multiplied with, and the cache's own bytes."""
    for row in record["decode"] + record["attention"]:
        for share, what, rate in (("bandwidth_share", "bytes", record["read_gb_per_s"] * 1e9),
                                  ("matmul_share", "flops", record["matmul_tflops"] * 1e12)):
            assert row[share] * rate * row["ours_ms"] / 1e3 == pytest.approx(row[what])
    c = peer.MODEL.with_(d=64, n_h=2, d_cq=24, n_layers=3, vocab=128, dense_width=96, bos=0, eos=1)
    model, rows, batch = DeepSeekV2(c), 5, 3
    cache = model.new_cache(batch, rows)
    chosen: list[int] = []
    for block in model.blocks[1:]:
        block.router.register_forward_hook(
            lambda *given: chosen.append(len(set(given[-1].indices.flatten().tolist()))))
    tokens = torch.tensor([[1], [2], [3]])
    experts = cpu_decode.experts_read(model, lambda: model(tokens, cache))
    assert experts == sum(chosen) and len(chosen) == 2 and experts > 2 * c.top_k
    routed = [W for block in model.blocks[1:]
              for W in (block.experts.W_gate, block.experts.W_up, block.experts.W_down)]
    one = sum(W[0].numel() for W in routed) // 2
    table = model.embedding.weight.numel()
    weights = sum(p.numel() for p in model.parameters()) - sum(W.numel() for W in routed) - table
    found = cpu_decode.needed(c, rows, batch, experts)
    assert found["bytes"] == 4 * (weights + experts * one) + cache.nbytes
    pairs = batch * rows * c.n_layers * c.n_h * (2 * c.d_c + c.d_r)
    assert found["flops"] == 2 * (batch * (weights + 2 * c.top_k * one) + pairs)
    a = c.with_(n_layers=1)
    attention = DeepSeekV2(a).blocks[0].attention
    matrices = sum(p.numel() for p in attention.parameters() if p.ndim == 2)
    found = cpu_decode.needed_by_attention(a, rows)
    assert found["bytes"] == 4 * matrices + 4 * rows * (c.d_c + c.d_r)
    assert found["flops"] == 2 * matrices + 2 * rows * c.n_h * (2 * c.d_c + c.d_r)


def test_disagreement_stops_the_run() -> None:
    a = torch.tensor([1.0, 2.0])
    assert timing.agree(a, a, "same") == 0
    for b in (a + 1e-3, a * torch.nan):
        with pytest.raises(RuntimeError, match="decode at 2048: outputs differ by"):
            timing.agree(a, b, "decode at 2048")


def test_training_is_compared_at_equal_work(train_record: dict) -> None:
    assert json.loads(json.dumps(train_record)) == train_record
    assert train_record["name"] == "train" and train_record["matmul_tflops"] > 0
    assert [(r["batch"], r["length"]) for r in train_record["training"]] == [(2, 16), (1, 32)]
    for r in (*train_record["training"], train_record["lite"]):
        check(r)
        c = train._tiny(LITE if r is train_record["lite"] else peer.MODEL)
        flops = cost.causal_training_flops(c, r["length"])
        for side in ("ours", "theirs"):
            rate = flops * r[f"{side}_tokens_per_s"]
            assert r[f"{side}_mfu"] * train_record["matmul_tflops"] * 1e12 == pytest.approx(rate)
    for config in (*train.MODELS.values(), LITE.with_(**train.EQUAL)):
        assert config.drop_capacity is None
        assert config.alpha_expert == config.alpha_device == config.alpha_comm == 0


def test_the_path_of_lite_is_the_one_a_card_takes(train_record: dict) -> None:
    lite, ways = train_record["lite"], set(map("+".join, one_card.WAYS))
    assert set(lite["tried_ms"]) | set(lite["not_run"]) == ways
    assert lite["their_optimizer"].startswith("torch AdamW") and lite["their_error"] is None
    assert lite["planned_peak_bytes"] > 6 * lite["parameters"] and 0 <= lite["recompute"] <= 1


@pytest.mark.parametrize(("memory", "layers"), [(139.8e9, 27), (79e9, 15)])
def test_as_many_layers_as_a_card_holds(memory: float, layers: int) -> None:
    def state(n: int) -> int:
        return state_bytes(n, one_card.LITTLE)

    fitted = one_card.fitting(LITE, state, int(memory))
    assert fitted == LITE.with_(n_layers=layers)
    assert state_bytes(cost.parameters(fitted).total, one_card.LITTLE) < 0.7 * memory
    with pytest.raises(ValueError, match="memory: 1 GiB, expected enough"):
        one_card.fitting(LITE, state, 2**30)


def test_the_peer_has_an_optimizer(monkeypatch) -> None:
    """torch's where it fits; torchao's; else torch's on as many layers as it has room for."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    name, make, config = one_card.their_optimizer(LITE, int(139.8e9))
    assert config.n_layers == 20 and name.startswith("torch AdamW")
    assert 8 * cost.parameters(config).total <= 0.68 * 139.8e9
    assert make([torch.nn.Parameter(torch.zeros(2))], lr=0.0).defaults["fused"]
    assert one_card.their_optimizer(LITE, 2 * 10**11)[2] == LITE
    stub = types.SimpleNamespace(AdamW8bit=lambda parameters, lr, bf16_stochastic_round: lr)
    monkeypatch.setitem(sys.modules, "torchao.optim", stub)
    name, make, config = one_card.their_optimizer(LITE, int(139.8e9))
    assert config == LITE and "torchao" in name and make([], lr=3) == 3


@pytest.mark.parametrize("where", ["both", "_theirs"])
def test_what_stops_the_peer_costs_ours_nothing(where, monkeypatch, tmp_path) -> None:
    def refuses(*args: object) -> None:
        raise TypeError("another\nversion")

    monkeypatch.setattr(one_card, where, refuses)
    monkeypatch.setattr(one_card, "_two_layers_agree", lambda *x: refuses() if where == "both"
                        else 0.0)
    monkeypatch.setattr(one_card, "peer", lambda name: None)
    monkeypatch.setattr(one_card, "quiet", contextlib.nullcontext)
    (case,) = train.QUICK
    *_, row = train.rows(case, torch.device("cpu"))
    assert row["their_error"] == "TypeError: another version" and row["ours_tokens_per_s"] > 0
    assert row["ratio"] is row["theirs_mfu"] is None and row["ours_mfu"] > 0
    assert json.loads(json.dumps(row)) == row


def test_two_sides_that_disagree_are_not_timed(monkeypatch, tmp_path) -> None:
    def differ(*args: object) -> None:
        raise timing.Disagreement("training loss")

    monkeypatch.setattr(one_card, "_two_layers_agree", differ)
    monkeypatch.setattr(one_card, "peer", lambda name: None)
    monkeypatch.setattr(one_card, "quiet", contextlib.nullcontext)
    with pytest.raises(timing.Disagreement):
        next(train.rows(train.QUICK[0], torch.device("cpu")))


def test_losses_and_gradients_are_compared_before_anything_is_timed(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = peer.both(transformers, train._tiny(peer.MODEL), tmp_path / "model")
    assert peer.agreement(ours, theirs, (2, 16))[0] < timing.TOLERANCE
    loss = theirs.forward
    theirs.forward = lambda *a, **k: _Halved(loss(*a, **k))
    with pytest.raises(RuntimeError, match="gradient norm: outputs differ"):
        peer.agreement(ours, theirs, (2, 16))
    with torch.no_grad():
        ours.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="training loss: outputs differ"):
        peer.agreement(ours, theirs, (2, 16))


class _Halved:
    """The right loss with half its gradient."""

    def __init__(self, output: object) -> None:
        self.loss = output.loss / 2 + output.loss.detach() / 2


def test_an_update_takes_the_mean_of_its_losses_and_clips() -> None:
    layer = torch.nn.Linear(3, 1, bias=False)
    layer.weight.data.fill_(1.0)
    rows = torch.tensor([[30.0, 0.0, 0.0], [0.0, 40.0, 0.0]])
    losses = [lambda row=row: layer(row).sum() for row in rows]
    peer.update(layer, losses, torch.optim.SGD(layer.parameters(), lr=1.0))()
    assert torch.allclose(layer.weight, torch.tensor([[0.4, 0.2, 1.0]]))    # (15, 20, 0) / 25
    layer.weight.data.fill_(1.0)
    gentle = [lambda loss=loss: 0.02 * loss() for loss in losses]               # no clipping
    peer.update(layer, gentle, torch.optim.SGD(layer.parameters(), lr=1.0))()
    assert torch.allclose(layer.weight, torch.tensor([[0.7, 0.6, 1.0]]))
    assert layer.weight.grad is None
    peer.update(layer, losses, None)()
    assert torch.allclose(layer.weight, torch.tensor([[0.7, 0.6, 1.0]]))


def test_without_transformers_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for bench in (cpu_decode, train):
        with pytest.raises(ImportError, match="transformers .* pip install"):
            bench.run(quick=True)

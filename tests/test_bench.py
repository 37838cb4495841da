# SPDX-License-Identifier: MIT
"""The benchmarks run and agree with what they are compared with. Never how fast they are."""

import json
import math
import sys

import pytest
import torch

from dsv2_ref.bench import _timing, cpu_decode


@pytest.fixture(scope="module")
def record() -> dict:
    pytest.importorskip("transformers")
    return cpu_decode.run(quick=True)


def test_record_says_what_it_was_made_with(record: dict) -> None:
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "cpu_decode" and record["quick"] is True
    assert record["torch"] == torch.__version__ and record["threads"] == torch.get_num_threads()
    assert record["cpu"] and record["dtype"] == "float32" and len(record["date"]) == 10
    assert record["transformers"] == sys.modules["transformers"].__version__


def test_every_comparison_is_there(record: dict) -> None:
    assert [(r["context"], r["batch"]) for r in record["decode"]] == [(32, 1), (32, 2), (64, 1)]
    assert [r["context"] for r in record["attention"]] == [32, 64]
    assert [(r["batch"], r["length"]) for r in record["training"]] == [(2, 16), (1, 32)]
    backends = {f"{a}+{e}" for a in cpu_decode.ATTENTION for e in cpu_decode.EXPERTS}
    assert all(set(r["tried_ms"]) == backends for r in record["decode"])
    assert all(set(r["tried_ms"]) == set(cpu_decode.ATTENTION) for r in record["attention"])


@pytest.mark.parametrize("part", ["decode", "attention", "training"])
def test_numbers_are_numbers_and_outputs_agree(record: dict, part: str) -> None:
    for result in record[part]:
        assert 0 <= result["difference"] < _timing.TOLERANCE
        assert result["best"] == min(result["tried_ms"], key=result["tried_ms"].get)
        assert result["ratio"] == pytest.approx(result["theirs_ms"] / result["ours_ms"])
        for side in ("ours", "theirs"):
            milliseconds, rate = result[f"{side}_ms"], result[f"{side}_tokens_per_s"]
            tokens = result["batch"] * result.get("length", 1)
            assert math.isfinite(rate) and milliseconds > 0
            assert rate * milliseconds == pytest.approx(1000 * tokens)


def test_the_full_run_has_the_sizes_it_documents() -> None:
    """Widths that exclude no backend, and a layer of V2-Lite's real size."""
    model = cpu_decode.MODEL
    for width in (model.d, model.expert_width, model.dense_width, model.d_c, model.d_cq):
        assert width % 16 == 0
    assert cpu_decode.LAYER.n_h == 16 and cpu_decode.LAYER.d == 2048


def test_disagreement_stops_the_run() -> None:
    a = torch.tensor([1.0, 2.0])
    assert _timing.agree(a, a, "same") == 0
    for b in (a + 1e-3, a * torch.nan):
        with pytest.raises(RuntimeError, match="decode at 2048: outputs differ by"):
            _timing.agree(a, b, "decode at 2048")


def test_without_transformers_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers .* pip install"):
        cpu_decode.run(quick=True)

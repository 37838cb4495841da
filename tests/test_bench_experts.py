# SPDX-License-Identifier: MIT
"""The benchmark of the experts runs, checks what it times, and counts right. Never how fast."""

import json
import os

import pytest
import torch
from refusals import refused

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # before a kernel's module is imported

from dsv2_ref.bench import experts
from dsv2_ref.kernels import grouped_experts

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")


@pytest.fixture(scope="module")
def record() -> dict:
    pytest.importorskip("transformers")
    return experts.run(quick=True)


def test_every_case_is_there_and_every_comparator_ran(record):
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "experts" and record["quick"] is True
    wanted = []
    for case in experts.QUICK:
        wanted.append(f"{case.name}, forward")
        if case.backward:
            wanted += [f"{case.name}, forward and backward", f"{case.name}, routing and sort"]
    assert [row["case"] for row in record["rows"]] == wanted
    for row in record["rows"]:
        if "routing" in row["case"]:
            assert row["ms"].keys() == {"ours", "torch"}
        else:
            assert row["ms"].keys() >= {"ours", "grouped_mm", "padded", "transformers grouped_mm"}
            assert 0 < row["error"] < 1e-6
        assert all(isinstance(ms, float) for ms in row["ms"].values()), row["ms"]


def test_work_is_counted_right(record):
    forward, both, routing = record["rows"][:3]
    case = experts.QUICK[0]
    assert forward["flops"] == 2 * 3 * case.N * case.K * case.d * case.w
    assert both["flops"] == 3 * forward["flops"] and routing["flops"] == 0
    weights, tokens = 3 * case.E * case.d * case.w * 4, case.N * case.d * 4
    assert forward["bytes"] == weights + 2 * tokens      # x and y
    assert both["bytes"] == 3 * weights + 4 * tokens     # read twice, written once; dy and dx


def test_the_full_run_has_the_sizes_it_documents():
    lite, v2, decode = experts.CASES
    assert lite[1:8] == (32768, 2048, 1408, 64, 6, 1, 1) and lite.backward
    assert v2[1:8] == (8192, 5120, 1536, 160, 6, 8, 3) and v2.backward
    assert decode.N == 64 and not decode.backward


def test_transformers_computes_the_same():
    pytest.importorskip("transformers")
    case = experts.QUICK[0]
    torch.manual_seed(1)
    W = [torch.randn(case.E, case.w, case.d) for _ in range(2)]
    W.append(torch.randn(case.E, case.d, case.w))
    gates, indices = torch.randn(case.N, case.E).softmax(-1).topk(case.K, -1)
    inputs = torch.randn(case.N, case.d), indices, gates, None
    expected = experts._step(experts.experts_loop, W, False)(inputs)
    for name in ("grouped_mm", "batched_mm", "eager"):
        got = experts._of_transformers(name, case, W, False)(inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_wrong_experts_are_not_timed(monkeypatch):
    real = grouped_experts.experts_fused
    monkeypatch.setattr(grouped_experts, "experts_fused", lambda *args: 1.02 * real(*args))
    with pytest.raises(RuntimeError, match="experts_fused, y: relative RMS error 2.0e-02"):
        experts.run(quick=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")
def test_without_a_gpu_it_says_so():
    refused(experts.run, "bench experts", "CUDA device")

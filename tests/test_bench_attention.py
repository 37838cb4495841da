# SPDX-License-Identifier: MIT
"""The attention benchmark runs and agrees with fp32. Never how fast it is."""

import json
import types

import pytest
import torch
from refusals import refused

from dsv2_ref.bench import attention
from dsv2_ref.bench.attention import CASES, QUICK, Case


@pytest.fixture(scope="module")
def record() -> dict:
    return attention.run(quick=True)


def test_every_form_is_timed_or_says_why_not(record):
    assert json.loads(json.dumps(record)) == record and record["name"] == "attention"
    assert [r["direction"] for r in record["rows"]] == ["forward", "backward"]
    for row in record["rows"]:
        assert row["ms"].keys() == {"ours", "cudnn", "cudnn_padded", "sdpa", "flex"}
        assert row["ms"]["ours"] > 0 and row["ms"]["sdpa"] > 0
        assert all(t > 0 if isinstance(t, float) else t for t in row["ms"].values())
        assert 0 < row["error"] < 1e-6                     # fp32 on a CPU


def test_counts_are_those_of_the_causal_half():
    """Counted one by one at a small size; 320 and 832 multiplications a pair at V2's widths."""
    case = Case(3, 5, 7, d_h=4, d_r=2, d_v=9)
    pairs = sum(1 for _ in range(3 * 7) for i in range(5) for j in range(5) if j <= i)
    assert case.flops(backward=False) == 2 * pairs * (6 + 9)
    assert case.flops(backward=True) == 2 * pairs * (3 * 6 + 2 * 9)
    for case in CASES:
        assert (case.d_qk, case.d_v, case.dtype) == (192, 128, torch.bfloat16)
        assert case.flops(backward=True) / case.flops(backward=False) == 832 / 320
    assert {c.n_h for c in CASES} == {16, 128} and {c.T for c in CASES} == {4096, 8192}


def test_bytes_are_those_of_all_tensors():
    (case,) = QUICK
    x = attention.inputs(case, torch.device("cpu"), 0)
    inputs = sum(t.nbytes for t in x.leaves["ours"])
    output = x.grads["ours"].nbytes
    assert case.nbytes(backward=False) == inputs + output
    assert case.nbytes(backward=True) == 2 * inputs + 2 * output


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    """Nor is one whose gradients alone are wrong."""
    right = attention.flash_attention
    monkeypatch.setattr(attention, "flash_attention", lambda *x: right(*x) * 1.01)
    record = attention.run(quick=True)
    assert record["rows"] == []
    (why,) = record["cases"].values()
    assert why.startswith("failed: RuntimeError: attention forward: relative RMS error")

    def k_r_detached(q_c, q_r, k_c, k_r, *rest):
        return right(q_c, q_r, k_c, 0.5 * k_r + 0.5 * k_r.detach(), *rest)

    monkeypatch.setattr(attention, "flash_attention", k_r_detached)
    (why,) = attention.run(quick=True)["cases"].values()
    assert why.startswith("failed: RuntimeError: attention backward, k_r: relative RMS error")


def test_each_case_starts_the_compiler_anew(monkeypatch):
    """Or a fifth shape, forward and backward, meets its limit of versions and is not compiled."""
    calls = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda f, **how: calls.append(how) or f)
    monkeypatch.setattr(attention, "create_block_mask", lambda *x, **y: None)
    monkeypatch.setattr(torch, "arange", lambda n, **y: torch.zeros(n))
    for case in QUICK * 2:
        attention.forms(case, types.SimpleNamespace(type="cuda"))
    assert calls == ["reset", {"dynamic": False}] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    refused(lambda: attention.run(), "bench attention", "CUDA device")

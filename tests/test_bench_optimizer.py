# SPDX-License-Identifier: MIT
"""The benchmark of the optimiser runs, checks what it times, and counts right. Never how fast."""

import json
import os

import pytest
import torch
from refusals import refused

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # before a kernel's module is imported

from dsv2_ref.bench import optimizer
from dsv2_ref.kernels import adamw8_update

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")


def test_every_case_is_there_and_its_bytes_are_counted_right():
    record = optimizer.run(quick=True)
    assert json.loads(json.dumps(record)) == record
    assert [row["case"] for row in record["rows"]] == [case.name for case in optimizer.QUICK]
    for row, case, each in zip(record["rows"], optimizer.QUICK, (10, 16), strict=True):
        assert row["weights"] == torch.Size(case.size).numel()
        assert row["bytes_a_weight"] == each + 16 / 256
        assert row["ms"].keys() == {"ours", "torch", "torchao", "copy"}
        assert all(isinstance(row["ms"][name], float) for name in ("ours", "torch", "copy"))
        assert isinstance(row["ms"]["torchao"], float) or "torchao" in row["ms"]["torchao"]
        assert 0 <= row["error"] < 1e-5
        assert row["share_of_copy"] == row["tb_per_s"] / record["copy_tb_per_s"]


def test_a_wrong_update_is_not_timed(monkeypatch):
    real = adamw8_update.update_fused

    def wrong(W, gradient, moments, *args, **more):
        real(W, gradient, moments, *args, **more)
        moments["v_largest"].mul_(1.02)

    monkeypatch.setattr(adamw8_update, "update_fused", wrong)
    record = optimizer.run(quick=True)
    assert record["rows"] == [] and len(record["cases"]) == 2
    for why in record["cases"].values():
        assert "RuntimeError: update_fused, v_largest: relative RMS error 2.0e-02" in why


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")
def test_without_a_gpu_it_says_so():
    refused(optimizer.run, "bench optimizer", "CUDA device")

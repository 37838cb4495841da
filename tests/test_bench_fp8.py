# SPDX-License-Identifier: MIT
"""The benchmark of FP8 products runs, checks what it times, and counts right. Never how fast."""

import json
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # before a kernel's module is imported

from dsv2_ref.bench import fp8

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")


@pytest.fixture(scope="module")
def record() -> dict:
    return fp8.run(quick=True)


def test_every_case_is_there_and_every_comparator_ran(record):
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == "fp8" and record["quick"] is True
    cases = [row["case"] for row in record["rows"]]
    assert [case for case in cases if "quantised" not in case] == [
        "W_O, 1 rows", "W_O, 18 rows", "experts, 1 tokens", "experts, 18 tokens"]
    for row in record["rows"]:
        wanted = {"ours", "bf16"}
        if "quantised" not in row["case"]:
            wanted |= {"bf16 loop"} if "experts" in row["case"] else {"dequantised"}
        assert row["ms"].keys() == wanted and row["error"] < 1e-2
        assert all(isinstance(ms, float) for ms in row["ms"].values()), row["ms"]
        share = row["tb_per_s"] / record["copy_tb_per_s"]
        assert row["copy_share"] == pytest.approx(share) and share > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="bytes of fp32, which a CPU is given")
def test_work_is_counted_right(record):
    layer = record["rows"][0]
    assert layer["flops"] == 2 * 96 * 130
    assert layer["bytes"] == 96 * 130 + 4 * 2 + 4 * (96 + 130)      # codes, two scales, x and y
    assert layer["bf16_bytes"] == 4 * (96 * 130 + 96 + 130)
    one, many = record["rows"][-2:]
    assert one["flops"] == 6 * 2 * 40 * 24 and many["flops"] == 18 * one["flops"]
    matrix = 40 * 24 + 4                                            # each is one block
    assert one["bytes"] == 2 * 3 * matrix + 2 * 4 * 40              # two experts of four
    assert many["bytes"] == 4 * 3 * matrix + 18 * 2 * 4 * 40


def test_the_full_run_has_the_sizes_it_documents():
    assert all(case.counts == (1, 16, 128) for case in fp8.CASES)
    assert [case[1:-1] for case in fp8.CASES] == [
        (2048, 16 * 128), (2048, 1408, 64, 6), (2048, 10944), (5120, 128 * 128), (5120, 12288),
        (5120, 1536, 160, 6)]


@pytest.mark.parametrize("name", ["linear_fp8", "linear_fp8_quantised_input", "experts_fp8"])
def test_what_is_wrong_is_not_timed(monkeypatch, name):
    real = getattr(fp8, name)
    monkeypatch.setattr(fp8, name, lambda *args: 1.02 * real(*args))
    record = fp8.run(quick=True)
    (why,) = (why for why in record["cases"].values() if why != "measured")
    assert f"{name}, " in why and "relative RMS error 2.0e-02" in why


def test_without_a_gpu_only_quick_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="bench fp8: no CUDA device"):
        fp8.run()

# SPDX-License-Identifier: MIT
"""What the GPU benchmarks share: they run on a CPU for `quick`, fail clearly, and count right."""

import json
import types

import pytest
import torch

from dsv2_ref import __main__
from dsv2_ref.bench.harness import goals, gpu

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")


@without_gpu
@pytest.mark.parametrize("name", ["all", "correct", "attention", "mla_decode",
                                  "six_bit_decode", "experts"])
def test_without_a_gpu_one_line_and_exit_code_2(name, capsys):
    if name != "all":
        pytest.importorskip("triton")
    assert __main__.main(["bench", name, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"bench {name}" in err and "expected" in err and "CUDA device" in err
    assert gpu.device_for(name, quick=True) == CPU


def test_the_record_says_what_it_was_made_with():
    record = gpu.record(CPU)
    assert json.loads(json.dumps(record)) == record
    assert record["torch"] == torch.__version__ and len(record["date"]) == 10
    assert record["device"] == "cpu"
    assert record["copy_tb_per_s"] > 0 and record["matmul_tflops"] > 0
    assert gpu.record(CPU) is record                    # measured once


@pytest.mark.gpu
def test_the_record_of_a_gpu():
    device = gpu.device_for("x", quick=False)
    record = gpu.record(device)
    assert json.loads(json.dumps(record)) == record
    assert record["device"] == torch.cuda.get_device_name() and record["driver"] != "unknown"
    assert record["l2_bytes"] > 0 and record["triton"]


def test_medians_take_turns_and_rotate(monkeypatch):
    seen, now = [], iter(range(1000))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(now) * 1e-3)
    steps = {"a": lambda x: seen.append(("a", x)), "b": lambda x: seen.append(("b", x))}
    assert gpu.medians(steps, [1, 2], CPU, n=3, warmup=1) == pytest.approx({"a": 1.0, "b": 1.0})
    assert seen == [("a", 1), ("b", 1), ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 1), ("b", 1)]


def test_the_median_is_one(monkeypatch):
    ends = iter([0, 1, 0, 100, 0, 3])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(ends))
    assert gpu.medians({"a": lambda x: x}, [0], CPU, n=3, warmup=0) == {"a": 3000.0}


def test_a_comparator_that_fails_is_a_string():
    def refuses(x):
        raise NotImplementedError("no\nkernel for this")

    ms = gpu.medians({"ours": lambda x: x, "theirs": refuses}, [0], CPU, n=2)
    assert ms["theirs"] == "NotImplementedError: no kernel for this" and ms["ours"] > 0
    result = gpu.row("case", ms, 1e9, 1e6, 0.0)
    assert result["best"] is None and result["ratio"] is None
    with pytest.raises(RuntimeError, match="theirs: NotImplementedError"):
        gpu.row("case", ms, 1e9, 1e6, 0.0, ours="theirs")


@pytest.mark.parametrize("call", [1, 3, 5])
def test_a_step_that_raises_while_it_is_timed_loses_itself_alone(call):
    """In its warm-up, in the middle, at the end; and it is not called again."""
    calls = []

    def breaks(x):
        calls.append(x)
        if len(calls) == call:
            raise RuntimeError("at last")

    ms = gpu.medians({"theirs": breaks, "ours": lambda x: x}, [0], CPU, n=3, warmup=2)
    assert ms["ours"] > 0 and ms["theirs"] == "RuntimeError: at last" and len(calls) == call
    ms = gpu.medians({"wrong": "reason", "ours": lambda x: x}, [0], CPU)
    assert ms["wrong"] == "reason" and gpu.row("x", ms, 1, 1, 0.0)["ratio"] is None


def test_stages_grow_and_are_asked_for_one_by_one():
    seen = []

    def stages():
        yield {"ours": lambda x: seen.append("ours")}
        seen.append("checked")
        yield {"theirs": lambda x: seen.append("theirs")}

    first, second = gpu.growing(stages(), [0], CPU)
    assert first.keys() == {"ours"} and second.keys() == {"ours", "theirs"}
    assert seen == ["ours", "checked", "ours", "theirs"]


def test_a_step_that_is_wrong_has_the_reason_in_its_place():
    x = torch.ones(3)
    steps = {"right": lambda x: x, "near": lambda x: 1.01 * x, "wrong": lambda x: x[:2]}
    found = gpu.sound(steps, x, lambda name: x, gpu.PEER_TOLERANCE)
    assert found["right"] is steps["right"] and found["near"] is steps["near"]
    assert found["wrong"] == "RuntimeError: wrong: shape (2,), expected (3,)"
    found = gpu.sound(steps, x, lambda name: x, gpu.TOLERANCE)
    assert "relative RMS error 1.0e-02" in found["near"]


def test_a_bound_is_never_the_best():
    result = gpu.row("x", {"ours": 2.0, "copy": 1.0, "bmm": 6.0, "no": "why"}, 1.0, 1.0, 0.0)
    assert result["peers"] == ["bmm", "no"] and result["bounds"] == ["copy"]
    assert result["best"] == "bmm" and result["ratio"] == 3.0
    assert result["speed_of"] == {"copy": 0.5, "bmm": 3.0}
    result = gpu.row("x", {"ours": 2.0, "copy": 1.0}, 1.0, 1.0, 0.0)
    assert result["best"] is result["ratio"] is None
    assert gpu.row("x", {"ours": 2.0, "roof": 1.0}, 1, 1, 0.0, bounds=["roof"])["best"] is None


def test_goals_stand_beside_their_rows():
    ms = {"ours": 2.0, "copy": 1.92, "bmm": 3.0}
    found = goals.judged("mla_decode", gpu.row("16 heads, 128x8192", ms, 1.0, 1.0, 0.0))
    assert [(g["reads"], g["value"], g["reached"]) for g in found] == [
        ("copy", 0.96, "goal"), ("bmm", 1.5, "below base")]
    long = gpu.row("16 heads, 1x131072", {"ours": 0.045}, 1.0, 1.0, 0.0)
    (found,) = goals.judged("mla_decode", long)
    assert found["value"] == pytest.approx(45) and found["reached"] == "goal"  # µs: less is better
    assert goals.judged("attention", long) == []
    row = gpu.row("forward, 16 heads, 2x8192", {"ours": 3.0, "cudnn": "refused",
                                                "cudnn_padded": 1.5}, 1.0, 1.0, 0.0)
    found = {g["reads"]: g["reached"] for g in goals.judged("attention", row)}
    assert found == {"cudnn": "below base", "tflops": "below base"}
    lite = {"case": "lite", "ours_tokens_per_s": 2e4, "ratio": None, "peak_bytes": 120 * 2**30}
    found = {g["reads"]: g["reached"] for g in goals.judged("train", lite)}
    assert found == {"tokens/s": "moonshot", "peak GiB": "base"}
    told = goals.line("x", long | {"goals": goals.judged("mla_decode", long)})
    assert told == "x: 16 heads, 1x131072; 0.045 ms; us 45 (base 60, goal 46): goal"


def test_a_row_counts_right():
    result = gpu.row("B 1", {"ours": 2.0, "slow": 8.0, "fast": 3.0}, flops=4e9, nbytes=6e9,
                      error=1e-4, S=4096)
    assert result["tflops"] == pytest.approx(2.0)            # 4e9 FLOPs in 2 ms
    assert result["tb_per_s"] == pytest.approx(3.0)
    assert result["best"] == "fast" and result["ratio"] == pytest.approx(1.5)
    assert result["S"] == 4096 and json.loads(json.dumps(result)) == result


def test_inputs_rotate_beyond_the_cache(monkeypatch):
    assert gpu.rotated(lambda i: i, 10, CPU) == [0, 1]
    properties = types.SimpleNamespace(L2_cache_size=60)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    cuda = torch.device("cuda", 0)
    for nbytes, copies in ((1000, 2), (60, 3), (50, 4), (1, 32)):
        assert len(gpu.rotated(lambda i: i, nbytes, cuda)) == copies


def test_errors_are_relative_and_nan_is_one():
    a = torch.tensor([3.0, 4.0])
    assert gpu.rms_error(a * 1.01, a) == pytest.approx(0.01, rel=1e-4)
    assert gpu.check(a * 1.001, a, "x") == pytest.approx(1e-3, rel=1e-3)
    for wrong in (a * 1.01, a * torch.nan, torch.tensor([3.0, torch.inf])):
        with pytest.raises(RuntimeError, match="decode: relative RMS error .* expected less than"):
            gpu.check(wrong, a, "decode")

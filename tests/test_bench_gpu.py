# SPDX-License-Identifier: MIT
"""What the GPU benchmarks share: they run on a CPU for `quick`, fail clearly, and count right."""

import json
import sys
import types

import pytest
import torch

from dsv2_ref import __main__
from dsv2_ref.bench import all as everything
from dsv2_ref.bench.harness import gpu

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")


@without_gpu
@pytest.mark.parametrize("name", ["all", *everything.NAMES])
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


def test_all_goes_on_after_a_failure_and_writes_one_file(tmp_path, monkeypatch, capsys):
    def fails(quick):
        raise RuntimeError("relative\nerror")

    for name in everything.NAMES:
        run = fails if name == "attention" else lambda quick, name=name: {"name": name, "q": quick}
        monkeypatch.setitem(sys.modules, f"dsv2_ref.bench.{name}", types.SimpleNamespace(run=run))
    result = everything.run(quick=True, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []                     # nothing is written for `quick`
    assert result["benches"]["attention"] == {"failed": "RuntimeError: relative error"}
    assert result["benches"]["experts"] == {"name": "experts", "q": True}
    assert list(result["benches"]) == list(everything.NAMES)
    monkeypatch.setattr(everything, "device_for", lambda name, quick: CPU)
    result = everything.run(quick=False, folder=tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == f"gpu-{result['date']}.json" and json.loads(file.read_text()) == result
    out, err = capsys.readouterr()
    assert out == "" and "experts ..." in err and str(file) in err

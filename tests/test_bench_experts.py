# SPDX-License-Identifier: MIT
"""The benchmark of the experts runs, checks what it times, and counts right. Never how fast."""

import json
import os

import pytest
import torch
from refusals import refused
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # before a kernel's module is imported

from dsv2_ref.bench import experts
from dsv2_ref.bench.harness import gpu
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


def test_who_waits_for_the_gpu_is_named():
    """A form that reads a number of a tensor cannot run where tensors have none."""
    pytest.importorskip("transformers")
    case = experts.QUICK[2]
    W, ((x, indices, gates, dy), *_) = experts.made(case, torch.device("cpu"))
    W = [w.to("meta", torch.bfloat16) for w in W]
    inputs = x.to("meta", torch.bfloat16), indices.to("meta"), gates.to("meta"), None
    steps = {form: experts._step(getattr(experts, f"experts_{form}"), W, False)
             for form in ("grouped", "padded", "loop")}
    steps |= {f"transformers {name}": experts._of_transformers(
        name, lambda n: experts._module(n, case, W), False) for name in case.theirs}
    waiting = {name for name, why in gpu.medians(steps, [inputs], torch.device("cpu")).items()
               if isinstance(why, str)}
    assert waiting == set(experts.WAIT)


class Counted(TorchDispatchMode):
    """The most bytes of new tensors that there are at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(made):
            if isinstance(t, torch.Tensor):
                weak = StorageWeakRef(t.untyped_storage())
                self.live[weak.cdata] = weak, t.untyped_storage().nbytes()
        self.live = {at: (w, n) for at, (w, n) in self.live.items() if not w.expired()}
        self.most = max(self.most, sum(n for _, n in self.live.values()))
        return made


@pytest.mark.parametrize("case", [
    experts.Case("V2", 20, 128, 96, 24, 2, 3, 2, True, ("grouped_mm",)),         # weights
    experts.Case("Lite", 300, 64, 48, 4, 3, 1, 1, True, ("grouped_mm",)),       # slots
    experts.Case("decode", 24, 64, 48, 6, 2, 1, 1, False, ("grouped_mm", "batched_mm", "eager")),
], ids=lambda case: case.name)
def test_what_a_case_needs_is_counted(case, monkeypatch):
    """The loop stands for ours, whose kernels would be interpreted."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(grouped_experts, "experts_fused", experts.experts_loop)
    monkeypatch.setattr(experts, "_routing", lambda *x: {})
    with Counted() as counted:
        rows = list(experts.rows(case, torch.device("cpu")))
    assert not [why for row in rows[:2] for why in row["ms"].values() if isinstance(why, str)]
    assert 0.6 * case.bytes_needed(4) < counted.most < case.bytes_needed(4)


def test_v2_fits_in_80_gb():
    """And its check holds no gradient twice: 2.2 times the weights, and 5.7 all at once."""
    lite, v2, decode = experts.CASES
    assert 30e9 < v2.needs < 40e9 and max(lite.needs, decode.needs) < 40e9
    case = experts.Case("V2", 20, 128, 96, 24, 2, 3, 2, True, ())
    W, (inputs, *_) = experts.made(case, torch.device("cpu"))
    with Counted() as counted:
        experts.checked(experts.experts_padded, inputs, W, True)
    assert counted.most < 3 * sum(w.nbytes for w in W)


def test_errors_of_every_gradient_are_seen(monkeypatch):
    """Ours against fp32 expert by expert is what it is all at once; each of the six can fail it."""
    case = experts.QUICK[1]
    W, (inputs, *_) = experts.made(case, torch.device("cpu"))
    error, y = experts.checked(experts.experts_padded, inputs, W, True)
    assert error < 1e-6
    torch.testing.assert_close(y, experts._step(experts.experts_loop, W, False)(inputs))

    def bent(at):
        class Bend(torch.autograd.Function):
            @staticmethod
            def forward(ctx, t):
                return t.clone()

            @staticmethod
            def backward(ctx, g):
                g = g.clone()
                g[-1] *= 1.5                                   # of the last expert or token alone
                return g

        def form(x, indices, *leaves):
            leaves = [x, *leaves]
            leaves[at] = Bend.apply(leaves[at])
            return experts.experts_padded(leaves[0], indices, *leaves[1:])
        return form

    for at, name in enumerate(("dx", "dg", "dW_gate", "dW_up", "dW_down")):
        with pytest.raises(RuntimeError, match=f"experts_fused, {name}: relative RMS error"):
            experts.checked(bent(at), inputs, W, True)


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
        got = experts._of_transformers(name, lambda n: experts._module(n, case, W), False)(inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_wrong_experts_are_not_timed(monkeypatch):
    real = grouped_experts.experts_fused
    monkeypatch.setattr(grouped_experts, "experts_fused", lambda *args: 1.02 * real(*args))
    record = experts.run(quick=True)
    assert all(row["case"].endswith("sort") for row in record["rows"])
    for why in record["cases"].values():
        assert why.startswith("failed: RuntimeError: experts_fused, y: relative RMS error 2.0e-02")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")
def test_without_a_gpu_it_says_so():
    refused(experts.run, "bench experts", "CUDA device")

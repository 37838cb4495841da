# SPDX-License-Identifier: MIT
"""Selection and sort kernels against their twins in moe/, index by index.

Without a CUDA device the kernels run in Triton's interpreter."""

import os
from inspect import unwrap

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402
from oracles.loops import normal  # noqa: E402
from refusals import refused  # noqa: E402

from dsv2_ref.kernels.route_tokens import (  # noqa: E402
    add_up_fused,
    route_fused,
    select_device_limited_fused,
    select_greedy_fused,
    sort_slots_fused,
)
from dsv2_ref.moe.experts import sort_slots  # noqa: E402
from dsv2_ref.moe.routing import Router, select_device_limited, select_greedy  # noqa: E402


def before_nan(x: torch.Tensor) -> torch.Tensor:
    """x, followed in memory by NaN: what reads beyond its end, even times 0, is seen."""
    longer = torch.cat((x.flatten(), x.new_full((8,), torch.nan)))
    return longer[: x.numel()].view(x.shape)


def scores(seed: int, n: int, n_routed: int) -> torch.Tensor:
    return normal(seed, n, n_routed).softmax(-1).float().to(DEVICE)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 97])
@pytest.mark.parametrize(("n_routed", "top_k"), [(64, 6), (13, 4), (8, 8), (1, 1)])
def test_greedy_takes_the_twins_experts(n, n_routed, top_k):
    s = scores(n_routed, n, n_routed)
    chosen = select_greedy_fused(s, top_k)
    assert chosen.dtype == torch.int64 and torch.equal(chosen, select_greedy(s, top_k))


@pytest.mark.parametrize("n", [1, 97])
@pytest.mark.parametrize(("n_routed", "top_k", "n_devices", "max_devices"),
                         [(160, 6, 8, 3), (15, 4, 5, 2), (12, 3, 3, 1), (12, 3, 3, 3)])
def test_device_limited_takes_the_twins_experts(n, n_routed, top_k, n_devices, max_devices):
    s = scores(2, n, n_routed)
    args = (top_k, n_devices, max_devices)
    chosen = select_device_limited_fused(s, *args)
    assert torch.equal(chosen, select_device_limited(s, *args))
    if max_devices < n_devices and n > 1:
        assert not torch.equal(chosen, select_greedy(s, top_k))


def test_a_device_is_worth_its_best_expert_and_not_its_two_best():
    s = torch.tensor([[0.40, 0.02, 0.25, 0.24, 0.05, 0.04]], device=DEVICE)
    assert select_device_limited_fused(s, 2, 3, 1).tolist() == [[0, 1]]


def test_an_underflowed_affinity_does_not_escape_its_device():
    s = torch.tensor([[0, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], device=DEVICE)
    chosen = select_device_limited_fused(s.float(), 2, 3, 1)
    assert chosen.sort(-1).values.tolist() == [[4, 5], [2, 3], [0, 1]]


def test_equal_affinities_go_to_the_smaller_index_and_nan_is_the_largest():
    s = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, torch.nan, 0.3, 0.2], [torch.nan] * 4],
                     device=DEVICE)
    assert select_greedy_fused(s, 3)[:2].tolist() == [[0, 1, 2], [1, 2, 3]]
    assert select_greedy_fused(s, 3)[2].max() < 4


def test_rows_need_not_be_contiguous_and_may_be_fp64():
    s = scores(3, 12, 40).T.double()
    assert not s.is_contiguous()
    assert torch.equal(select_greedy_fused(s, 5), select_greedy(s, 5))


def same_as_twin(indices: torch.Tensor, n_routed: int, keep: torch.Tensor | None = None) -> None:
    order, offsets = sort_slots_fused(indices, n_routed, keep)
    expected, counts = sort_slots(indices, n_routed, keep)
    assert order.dtype == offsets.dtype == torch.int32
    assert offsets[0] == 0 and torch.equal(offsets.diff().long(), counts)
    assert torch.equal(order[: offsets[-1]].long(), expected)


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("n", "top_k", "n_routed"),
                         [(0, 3, 5), (1, 1, 1), (1, 6, 64), (42, 3, 7), (43, 3, 9), (64, 4, 160),
                          (97, 6, 64)])
def test_slots_are_sorted_as_the_twin_sorts_them(n, top_k, n_routed, dropping):
    indices = scores(4, n, n_routed).topk(top_k, -1).indices
    keep = (normal(5, n, top_k) > -0.4).to(DEVICE) if dropping else None
    same_as_twin(indices, n_routed, keep)


def test_one_expert_may_get_all_and_others_none():
    indices = torch.full((150, 2), 3, device=DEVICE)
    same_as_twin(indices, 6)
    same_as_twin(indices, 6, torch.zeros(150, 2, dtype=torch.bool, device=DEVICE))
    same_as_twin(indices.int().T[:1].T, 4)                         # strided, int32


@pytest.mark.parametrize("n", [1, 5, 16])
@pytest.mark.parametrize(("n_routed", "top_k", "n_devices", "max_devices", "d"),
                         [(64, 6, 1, None, 7), (13, 4, 1, None, 1037), (160, 6, 8, 3, 300),
                          (15, 4, 5, 2, 2)])
@torch.no_grad()
def test_few_tokens_are_routed_at_once(n, n_routed, top_k, n_devices, max_devices, d):
    """As the twin in fp64. Widths beside a block; half precision is widened, not computed in."""
    router = Router(d, n_routed, top_k, n_devices, max_devices, 2.5).to(DEVICE)
    router.weight.data = before_nan((normal(7, n_routed, d) * (7 / d) ** 0.5).float().to(DEVICE))
    u = before_nan(normal(8, n, d).to(DEVICE, torch.float16 if d == 300 else torch.float32))
    fused, twin = router(u, route=route_fused), router.double()(u.double())
    assert torch.equal(fused.indices, twin.indices)
    for got, expected in ((fused.gates, twin.gates), (fused.scores, twin.scores)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=8e-6, atol=0)
    for got, expected in zip(fused.slots, sort_slots_fused(twin.indices, n_routed), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")        # numpy's
def test_a_token_that_is_nan_still_goes_to_experts_that_are_there():
    u, centroids = (normal(seed, n, 5).float().to(DEVICE) for seed, n in ((9, 3), (13, 13)))
    u[1, 4] = torch.nan
    indices, gates, _, (order, offsets) = route_fused(u, centroids, 4)
    assert indices[1].tolist() == [0, 1, 2, 3] and gates[1].isnan().all()
    assert gates[::2].isfinite().all() and offsets[-1] == 12
    assert sorted(order.tolist()) == list(range(12))


@pytest.mark.parametrize(("n", "top_k", "d"), [(1, 6, 2048), (3, 2, 37), (0, 2, 5)])
def test_rows_join_the_stream(n, top_k, d):
    u, shared = (normal(seed, n, d).half().to(DEVICE) for seed in (10, 11))
    rows = normal(12, n, top_k, d).half().to(DEVICE)
    for routed in (rows, rows[:, 0]):
        whole = routed.double().sum(1) if routed.ndim == 3 else routed.double()
        h = add_up_fused(u, shared, routed)
        assert h.dtype == u.dtype
        assert torch.equal(h, (u.double() + shared.double() + whole).float().half())


def test_what_is_not_asked_for_is_refused():
    s, i = scores(6, 3, 12), torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    refused(lambda: select_greedy_fused(s, 13), "top_k", 13, "1 to 12")
    refused(lambda: select_device_limited_fused(s, 5, 3, 1), "top_k", 5, "1 to 4")
    refused(lambda: select_device_limited_fused(s, 2, 5, 1), "n_devices", "divisor of E = 12")
    refused(lambda: select_device_limited_fused(s, 2, 3, 4), "max_devices", "n_devices = 3")
    refused(lambda: select_greedy_fused(i, 1), "s", "int64")
    refused(lambda: sort_slots_fused(s, 4), "indices", "float32")
    c = scores(7, 12, 12)
    refused(lambda: route_fused(s.double(), c, 2), "u", "float64", "float32, bfloat16")
    refused(lambda: route_fused(s, c.double(), 2), "centroids", "float64", "float32, bfloat16")
    refused(lambda: route_fused(scores(6, 17, 12), c, 2), "u, centroids", "(17, 12)", "1 to 16")
    refused(lambda: route_fused(s, c[:, :5], 2), "u, centroids", "(12, 5)", "(E, d)")
    refused(lambda: route_fused(s, c, 5, 3, 1), "top_k", 5, "1 to 4")
    refused(lambda: route_fused(s.clone().requires_grad_(), c, 2), "u", "gradient")
    refused(lambda: route_fused(s, c.requires_grad_(), 2), "centroids", "gradient")
    refused(lambda: add_up_fused(s, s[:2], s), "u, shared, routed", "(2, 12)")
    refused(lambda: add_up_fused(s, s, s.clone().requires_grad_()), "add_up_fused", "gradient")
    refused(lambda: sort_slots_fused(i, 4, i), "keep", "int64", "bool")
    refused(lambda: sort_slots_fused(i, 4, i[:1].bool()), "keep", "(3, 2)")


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without one")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    refused(lambda: select_greedy_fused(scores(7, 3, 4).bfloat16(), 2), "s", "bfloat16 on cpu")
    compiled = object.__new__(triton.JITFunction)
    for kernel in ("_select_kernel", "_place_kernel"):
        monkeypatch.setitem(unwrap(sort_slots_fused).__globals__, kernel, compiled)
    refused(lambda: select_greedy_fused(scores(7, 3, 4), 2), "s", "cpu", "TRITON_INTERPRET=1")
    refused(lambda: sort_slots_fused(torch.zeros(3, 2).long(), 4), "indices", "CUDA device")

# SPDX-License-Identifier: MIT
"""The fused experts in fp32 against `experts_loop` in fp64: values and all gradients.

Without a CUDA device the kernels run in Triton's interpreter, and buffers come full of NaN."""

import os
from inspect import unwrap

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402
from oracles.loops import normal, rounded_well  # noqa: E402
from refusals import refused  # noqa: E402

from dsv2_ref.kernels.grouped_experts import (  # noqa: E402
    TILES,
    Plan,
    experts_fused,
    grouped_forward,
    plan,
)
from dsv2_ref.kernels.route_tokens import sort_slots_fused  # noqa: E402
from dsv2_ref.moe.experts import experts_loop  # noqa: E402

# an index of the interpreter of triton 3.6; what `poisoned` asks for, on a GPU
pytestmark = [pytest.mark.filterwarnings("ignore:Conversion of an array with ndim"),
              pytest.mark.filterwarnings("ignore:.*deterministic")]

NAMES = ("y", "x", "gates", "W_gate", "W_up", "W_down")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nothing was written to is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def stacks(seed: int, n_routed: int, w: int, d: int) -> list[torch.Tensor]:
    shapes = [(n_routed, w, d), (n_routed, w, d), (n_routed, d, w)]
    return [normal(seed + i, *shape).to(DEVICE) / shape[2] ** 0.5 for i, shape in enumerate(shapes)]


def inputs(seed: int, n: int, d: int, w: int, n_routed: int, top_k: int,
           dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Distinct experts a token; x, gates and weights, which want gradients."""
    s = normal(seed, n, n_routed)
    s[:, n_routed // 2] -= 100                             # one expert gets no token if it need not
    gates, indices = s.softmax(-1).topk(top_k, -1)
    x = normal(seed + 1, n, d).to(DEVICE, dtype)
    W = [W.to(dtype) for W in stacks(seed + 2, n_routed, w, d)]
    tensors = [x, gates.float().to(DEVICE), *W]
    return indices.to(DEVICE), [t.requires_grad_() for t in tensors]


def results(run, indices, tensors, keep=None, dy=None) -> list[torch.Tensor]:
    """y and the gradients of x, gates and the weights; the upstream one is random, or `dy`."""
    x, gates, *W = tensors
    y = run(x, indices, gates, *W, keep)
    dy = normal(99, *y.shape).to(DEVICE, y.dtype) if dy is None else dy
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def compare(ours, indices, tensors, keep=None, dtype=torch.float32, times=8.0) -> list:
    """`ours` with the loop in fp64, whose results are returned."""
    def exact(*moved):
        *moved, dy = moved
        return results(experts_loop, indices, [t.requires_grad_() for t in moved], keep, dy)

    dy = normal(99, *ours[0].shape).to(DEVICE, tensors[0].dtype)
    for value, like in zip(ours, (tensors[0], *tensors), strict=True):
        assert value.dtype == like.dtype and value.shape == like.shape
    rounded_well(ours, exact, [*tensors, dy], dtype, times, NAMES)
    return exact(*(t.detach().double() for t in (*tensors, dy)))


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("n", "d", "w", "n_routed", "top_k"), [
    (1, 32, 32, 4, 2),         # fewer slots than experts
    (15, 32, 16, 5, 3), (16, 16, 32, 5, 3), (17, 33, 17, 5, 3),
    (97, 33, 24, 4, 1),        # several tiles an expert, and more tiles than programs
    (5, 1, 1, 3, 1), (9, 70, 50, 1, 1),
])
def test_equals_the_loop(n, d, w, n_routed, top_k, dropping):
    indices, tensors = inputs(1, n, d, w, n_routed, top_k)
    keep = (normal(2, n, top_k) > -0.4).to(DEVICE) if dropping else None
    if dropping:
        keep[0, 0] = True
    twins = compare(results(experts_fused, indices, tensors, keep), indices, tensors, keep)
    assert all(twin.abs().max() > 1e-4 for twin in twins)


@pytest.mark.parametrize("n", [16, 33])
def test_all_tokens_may_go_to_one_expert(n):
    _, tensors = inputs(3, n, 20, 18, 4, 1)
    indices = torch.full((n, 1), 2, device=DEVICE)
    ours = results(experts_fused, indices, tensors)
    compare(ours, indices, tensors)
    for gradient in ours[3:]:
        assert (gradient != 0).flatten(1).any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("n", [0, 6])
def test_without_any_slot_the_sum_and_the_gradients_are_zero(n):
    indices, tensors = inputs(4, n, 20, 18, 4, 2)
    keep = torch.zeros(n, 2, dtype=torch.bool, device=DEVICE)
    ours = results(experts_fused, indices, tensors, keep)
    for gradient, tensor in zip(ours[1:], tensors, strict=True):
        assert gradient.shape == tensor.shape
    assert all((value == 0).all() for value in ours)


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    indices, tensors = inputs(5, 40, 12, 10, 6, 2)
    assert not (indices == 3).any()
    ours = results(experts_fused, indices, tensors)
    for gradient in ours[3:]:
        assert (gradient != 0).flatten(1).any(1).tolist() == [e != 3 for e in range(6)]


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same():
    indices, tensors = inputs(6, 19, 24, 20, 5, 2)
    x, gates, *W = tensors
    y = experts_fused(x, indices, gates, *W)
    with torch.no_grad():
        z = experts_fused(x, indices, gates, *W)
    assert torch.equal(y, z) and y.requires_grad and not z.requires_grad
    assert torch.equal(z, experts_fused(*(t.detach() for t in (x, indices, gates, *W))))


def test_the_backward_may_run_twice_and_gives_the_same_bits():
    indices, tensors = inputs(7, 30, 16, 12, 4, 3)
    y = experts_fused(tensors[0], indices, *tensors[1:])
    first, second = (torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
                     for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_need_not_be_contiguous():
    indices, tensors = inputs(8, 21, 24, 20, 5, 2)
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
               for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    mixed = indices.T.contiguous().T
    keep = (normal(9, 2, 21) > -0.4).to(DEVICE).T
    compare(results(experts_fused, mixed, strided, keep), indices, tensors, keep)

    # a gradient that comes expanded, as sum() makes it
    y = experts_fused(tensors[0], indices, *tensors[1:])
    expanded = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    plain = torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


def test_half_precision():
    """fp16 everywhere but the gates; compared with the loop in fp64."""
    indices, tensors = inputs(10, 17, 40, 24, 3, 2, torch.float16)
    compare(results(experts_fused, indices, tensors), indices, tensors, None, torch.float16, 0.5)


@pytest.mark.parametrize("target", ["sm_90", "few", "sm_80", "gfx942", "small"])
@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter alone takes the tiles of any target")
@pytest.mark.parametrize("descriptors", [False, True])
def test_the_tiles_of_every_target(monkeypatch, target, descriptors):
    """Tiles wider than the matrices, through pointers and tensor descriptors, in fp32."""
    monkeypatch.setitem(unwrap(experts_fused).__globals__, "plan",
                        lambda *_: Plan(TILES[target], descriptors, 2))
    indices, tensors = inputs(11, 45, 72, 40, 3, 2)
    keep = (normal(12, 45, 2) > -0.8).to(DEVICE)
    compare(results(experts_fused, indices, tensors, keep), indices, tensors, keep)


def test_sorted_slots_of_ones_own():
    """The lower level: gated rows, one a slot, and the pre-activations in sorted order."""
    indices, (x, gates, *W) = inputs(13, 11, 24, 20, 5, 2)
    order, offsets = sort_slots_fused(indices, 5)
    with torch.no_grad():
        how = plan(x, W[0], len(order))
        rows, gate, up = grouped_forward(x, gates, *W, order, offsets, how, True)
        for place, slot in enumerate(order.tolist()):
            n, e = slot // 2, int(indices.flatten()[slot])

            def exact(x, W_gate, W_up, W_down, g):
                a, b = W_gate @ x, W_up @ x
                return [a, b, W_down @ (torch.nn.functional.silu(a) * b) * g]

            rounded_well([gate[place], up[place], rows[slot]], exact,
                         [x[n], *(w[e] for w in W), gates.flatten()[slot, None]])


@pytest.mark.parametrize(("target", "few", "many", "descriptors"), [
    ("sm_90", "few", "sm_90", True), ("sm_80", "sm_80", "sm_80", False),
    ("consumer", "consumer", "consumer", False), ("gfx942", "gfx942", "gfx942", False)])
def test_the_plan_of_each_card(monkeypatch, target, few, many, descriptors):
    monkeypatch.setitem(plan.__globals__, "target_of", lambda device: target)
    monkeypatch.setitem(plan.__globals__, "multiprocessors", lambda device: 132)
    x, W = torch.empty(3, 64, dtype=torch.bfloat16), torch.empty(4, 32, 64, dtype=torch.bfloat16)
    assert plan(x, W, 64) == Plan(TILES[few], descriptors, 132)
    assert plan(x, W, 65) == Plan(TILES[many], descriptors, 132)
    assert not plan(x, W, 0).descriptors                      # of nothing there is no descriptor
    assert plan(x.float(), W.float(), 64) == Plan(TILES["small"], False, 132)
    assert plan(x[:, :60], W[..., :60], 64) == Plan(TILES["small"], False, 132)


def test_a_plan_never_starts_more_programs_than_there_can_be_tiles():
    how = Plan(TILES["sm_90"], True, 132)
    assert how.grid("wide", 196608, 64, 2048) == (132,)
    assert how.grid("wide", 3, 64, 2048) == (3 * 8,)           # each slot may be a tile of its own
    assert how.grid("narrow", 128 * 5 + 2, 2, 128) == (5 + 2,)  # 2 ragged tiles among them
    assert how.grid("narrow", 0, 64, 128) == (1,)


def test_what_is_not_asked_for_is_refused():
    indices, (x, gates, *W) = inputs(14, 3, 6, 4, 4, 2)
    refused(lambda: experts_fused(x[:2], indices, gates, *W), "x", "(2, 6)", "(3, 6)")
    refused(lambda: experts_fused(x, indices[:, :1], gates, *W), "indices", "(3, 1)", "(3, 2)")
    refused(lambda: experts_fused(x, indices, gates, W[0], W[2], W[1]), "W_up", "(4, 4, 6)")
    refused(lambda: experts_fused(x.double(), indices, gates, *W), "float64", "one of float32")
    refused(lambda: experts_fused(x, indices, gates, *(w.double() for w in W)), "float64")
    refused(lambda: experts_fused(x.half(), indices, gates, *W), "float16, torch.float32")
    refused(lambda: experts_fused(x, indices, gates, *W, gates), "keep", "bool")


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without one")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    indices, tensors = inputs(16, 3, 6, 4, 4, 2)
    half = [t.detach().bfloat16() for t in tensors]
    refused(lambda: experts_fused(half[0], indices, *half[1:]), "x", "bfloat16", "CUDA device")
    compiled = object.__new__(triton.JITFunction)
    monkeypatch.setitem(unwrap(experts_fused).__globals__, "_up_kernel", compiled)
    refused(lambda: experts_fused(tensors[0], indices, *tensors[1:]), "cpu", "TRITON_INTERPRET=1")


@pytest.mark.skipif(DEVICE == "cpu", reason="bf16 products are wrong in the interpreter")
@pytest.mark.parametrize(("n", "d", "w", "n_routed", "top_k"), [
    (4096, 2048, 1408, 64, 6), (5, 2048, 1408, 64, 6), (1000, 200, 136, 16, 4),
    (333, 77, 41, 5, 2)])
def test_bf16_on_a_gpu(n, d, w, n_routed, top_k):
    indices, tensors = inputs(15, n, d, w, n_routed, top_k, torch.bfloat16)
    compare(results(experts_fused, indices, tensors), indices, tensors, None, torch.bfloat16, 0.5)

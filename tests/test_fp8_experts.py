# SPDX-License-Identifier: MIT
"""Experts with FP8 weights against the sum written out in fp64 on the numbers that codes mean.

Without a CUDA device the kernels run in Triton's interpreter, and buffers come full of NaN."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from oracles.loops import normal  # noqa: E402
from refusals import refused  # noqa: E402
from torch import Tensor  # noqa: E402

from dsv2_ref.kernels.fp8_experts import experts_fp8  # noqa: E402
from dsv2_ref.kernels.fp8_products import TILES, Fp8Stack, Plan, Tile, plan  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:Conversion of an array with ndim"),
              pytest.mark.filterwarnings("ignore:.*deterministic")]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nothing was written to is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    yield
    torch.use_deterministic_algorithms(before)


def inputs(seed: int, n: int, d: int, w: int, n_routed: int, top_k: int,
           dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, list[Fp8Stack]]:
    """x, distinct experts a token, their gates, and three stacks whose blocks differ in size."""
    s = normal(seed, n, n_routed)
    s[:, n_routed // 2] -= 100                             # one expert gets no token if it need not
    gates, indices = s.softmax(-1).topk(top_k, -1)
    stacks = []
    for i, (r, c) in enumerate(((w, d), (w, d), (d, w))):
        W = normal(seed + 2 + i, n_routed, r, c) / c**0.5
        size = normal(seed + 9 + i, n_routed, -(-r // 128), -(-c // 128)).mul(0.7).exp()
        W *= size.repeat_interleave(128, 1)[:, :r].repeat_interleave(128, 2)[..., :c]
        stacks.append(Fp8Stack(W.to(dtype)).to(DEVICE))
    x = normal(seed + 1, n, d).to(DEVICE, dtype)
    return x, indices.to(DEVICE), gates.float().to(DEVICE), stacks


def exact(x: Tensor, indices: Tensor, gates: Tensor, stacks: list[Fp8Stack],
          keep: Tensor | None = None) -> Tensor:
    """Equation (20)'s routed part in fp64, expert by expert."""
    y, kept = torch.zeros_like(x, dtype=torch.float64), True if keep is None else keep
    for e in range(len(stacks[0])):
        matrices = []
        for W in stacks:
            r, c = W.shape[1:]
            scale = W.scale[e].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
            matrices.append(W.codes[e].double() * scale[:r, :c])
        n, k = ((indices == e) & kept).nonzero(as_tuple=True)
        gate, up = (x[n].double() @ W.T for W in matrices[:2])
        out = (gate / (1 + (-gate).exp()) * up) @ matrices[2].T
        y.index_add_(0, n, gates[n, k, None].double() * out)
    return y


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Each block of 128 columns by itself, for a large one would hide the others."""
    assert got.shape == expected.shape and got.isfinite().all()
    for a, b in zip(got.double().split(128, 1), expected.split(128, 1), strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), (a - b).norm() / b.norm()


@pytest.mark.parametrize(("n", "d", "w", "n_routed", "top_k", "dropping"), [
    (1, 130, 96, 4, 2, False),     # fewer slots than experts, and more than one block
    (9, 32, 150, 3, 2, True),
    (97, 33, 24, 4, 1, False),     # several tiles an expert, of the wide ones
    (41, 40, 20, 2, 2, True),
    (5, 1, 1, 3, 1, False),
])
def test_equals_the_loop(n, d, w, n_routed, top_k, dropping):
    x, indices, gates, W = inputs(1, n, d, w, n_routed, top_k)
    keep = (normal(2, n, top_k) > -0.4).to(DEVICE) if dropping else None
    if dropping:
        keep[0, 0] = True
    y = experts_fp8(x, indices, gates, *W, keep)
    assert y.dtype == x.dtype
    near(y, exact(x, indices, gates, W, keep))
    assert torch.equal(y, experts_fp8(x, indices, gates, *W, keep))


def test_all_tokens_may_go_to_one_expert():
    x, _, gates, W = inputs(3, 33, 20, 18, 4, 1)
    indices = torch.full((33, 1), 3, device=DEVICE)
    near(experts_fp8(x, indices, gates, *W), exact(x, indices, gates, W))


@pytest.mark.parametrize("n", [0, 6])
def test_without_any_slot_the_sum_is_zero(n):
    x, indices, gates, W = inputs(4, n, 20, 18, 4, 2)
    keep = torch.zeros(n, 2, dtype=torch.bool, device=DEVICE)
    assert torch.equal(experts_fp8(x, indices, gates, *W, keep), torch.zeros_like(x))


def test_inputs_need_not_be_contiguous():
    x, indices, gates, W = inputs(5, 11, 24, 20, 5, 2)
    y = experts_fp8(x.T.contiguous().T, indices.T.contiguous().T, gates.T.contiguous().T, *W)
    assert torch.equal(y, experts_fp8(x, indices, gates, *W))


def test_half_precision():
    """fp16 in and out, and pre-activations rounded to it; gates in fp32."""
    x, indices, gates, W = inputs(6, 17, 40, 24, 3, 2, torch.float16)
    y = experts_fp8(x, indices, gates, *W)
    assert y.dtype == torch.float16
    near(y, exact(x, indices, gates, W), 5e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter alone takes the tiles of any target")
@pytest.mark.parametrize("target", ["sm_90", "sm_80", "small"])
def test_the_tiles_of_every_target(monkeypatch, target):
    monkeypatch.setitem(experts_fp8.__globals__, "plan",
                        lambda x, name, *_: Plan(Tile(*TILES[target][name]), False, 1))
    for n in (3, 40):                                      # few slots an expert, and many
        x, indices, gates, W = inputs(7, n, 72, 40, 2, 2)
        near(experts_fp8(x, indices, gates, *W), exact(x, indices, gates, W))


def test_tiles_go_by_slots_an_expert(monkeypatch):
    asked = []

    def asking(x: Tensor, name: str, *widths: int) -> Plan:
        asked.append((name, *widths))
        return plan(x, name, *widths)

    monkeypatch.setitem(experts_fp8.__globals__, "plan", asking)
    for n in (32, 33):
        x, indices, gates, W = inputs(8, n, 24, 20, 2, 1)
        experts_fp8(x, indices, gates, *W)
    assert asked == [("few", 24, 20)] * 2 + [("pair", 24, 20), ("many", 24, 20)]


def test_a_grid_has_room_for_every_tile():
    how = Plan(Tile(16, 64, 128, 4, 4, 2), True, 264)
    assert how.grid(6, 64, 1408) == (22, 6)                # each slot may be a tile of its own
    assert how.grid(200, 3, 2048) == (32, 12 + 3)          # 3 ragged tiles among them


def test_what_is_not_asked_for_is_refused():
    x, indices, gates, W = inputs(9, 3, 6, 4, 4, 2)
    refused(lambda: experts_fp8(x[:2], indices, gates, *W), "x", "(2, 6)", "(3, 6)")
    refused(lambda: experts_fp8(x, indices[:, :1], gates, *W), "indices", "(3, 1)", "(3, 2)")
    refused(lambda: experts_fp8(x, indices, gates, W[0], W[2], W[1]), "W_up", "(4, 4, 6)")
    refused(lambda: experts_fp8(x.double(), indices, gates, *W), "x", "float64", "one of float32")
    if DEVICE == "cpu":
        refused(lambda: experts_fp8(x.bfloat16(), indices, gates, *W), "x", "CUDA device")


@pytest.mark.skipif(DEVICE == "cpu", reason="bf16 products are wrong in the interpreter")
@pytest.mark.parametrize(("n", "d", "w", "n_routed", "top_k"), [
    (1, 2048, 1408, 64, 6), (64, 2048, 1408, 64, 6), (4096, 2048, 1408, 64, 6),
    (3, 5120, 1536, 160, 6), (333, 77, 41, 5, 2), (400, 144, 208, 5, 2)])
def test_bf16_on_a_gpu(n, d, w, n_routed, top_k):
    x, indices, gates, W = inputs(10, n, d, w, n_routed, top_k, torch.bfloat16)
    near(experts_fp8(x, indices, gates, *W), exact(x, indices, gates, W), 1e-2)

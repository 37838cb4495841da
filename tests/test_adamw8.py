# SPDX-License-Identifier: MIT
"""AdamW with moments of a byte each as an optimiser: torch's AdamW beside it, places, resuming."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # before a kernel's module is imported

from dsv2_ref.kernels.eight_bit_moments import BLOCK, update_in_pieces
from dsv2_ref.training import adamw8
from dsv2_ref.training.adamw8 import AdamW8, update_form


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_small_updates_of_bf16_weights_are_not_lost():
    """lr 1e-4 on weights of 1: far below half a unit in the last place, 2^-8 = 3.9e-3."""
    W = torch.nn.Parameter(torch.ones(64, BLOCK, dtype=torch.bfloat16))
    optimizer = AdamW8([W], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        W.grad = torch.ones_like(W)
        optimizer.step()
    assert W.float().mean().item() == pytest.approx(1 - 100 * 1e-4, abs=5e-4)
    plain = torch.ones(3, dtype=torch.bfloat16)
    for _ in range(100):
        plain -= 1e-4
    assert (plain == 1).all()                            # what rounding to nearest does


def run(optimizer_of, dtype, steps=60, size=(37, 50)):
    """Least squares with gradients of very different sizes: their squares span five decades."""
    g = seeded(1)
    target = torch.randn(*size, generator=g)
    sizes = torch.logspace(-2, 0.5, size[1])
    W = torch.nn.Parameter(torch.zeros(*size, dtype=dtype))
    optimizer = optimizer_of([W])
    for _ in range(steps):
        noise = torch.randn(*size, generator=g)
        W.grad = ((W.detach().float() - target + noise) * sizes).to(dtype)
        optimizer.step()
    return W.detach().float()


def test_it_follows_torchs_adamw():
    options = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    exact = run(lambda p: torch.optim.AdamW(p, **options), torch.float32)
    ours = run(lambda p: AdamW8(p, **options), torch.float32)
    assert (ours - exact).norm() / exact.norm() < 0.04               # 0.026 seen


def test_bf16_weights_stay_with_the_exact_ones_where_torchs_adamw_leaves_them():
    options = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    exact = run(lambda p: torch.optim.AdamW(p, **options), torch.float32, steps=300)
    ours = run(lambda p: AdamW8(p, **options), torch.bfloat16, steps=300)
    plain = run(lambda p: torch.optim.AdamW(p, **options), torch.bfloat16, steps=300)
    assert 3 * (ours - exact).norm() < (plain - exact).norm()        # 0.018 and 0.084 of it seen


def test_one_step_is_torchs_to_the_precision_of_nothing_but_arithmetic():
    """The moments of a step are used before they are stored, so the first one is exact."""
    for decay in (0.0, 0.1):
        results = []
        for kind in (torch.optim.AdamW, AdamW8):
            W = torch.nn.Parameter(torch.randn(11, 70, generator=seeded(2)))
            W.grad = torch.randn(11, 70, generator=seeded(3))
            kind([W], lr=0.01, betas=(0.9, 0.95), weight_decay=decay).step()
            results.append(W.detach())
        assert torch.allclose(*results, rtol=0, atol=1e-7)


def steps_of(parts, gradients, seed=5):
    """Weights and moments after AdamW8 steps of parameters by name, (first expert, weight) each."""
    weights = []
    for name, (first, W) in parts.items():
        W = torch.nn.Parameter(W.clone())
        W.place = name, first
        weights.append(W)
    optimizer = AdamW8(weights, lr=1e-2, seed=seed)
    for step in gradients:
        for W, (name, (first, _)) in zip(weights, parts.items(), strict=True):
            W.grad = step[name][first : first + len(W)].clone()
        optimizer.step()
    return {name: (W.detach(), optimizer.state[W])
            for name, W in zip(parts, weights, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_share_of_the_experts_is_a_slice_of_the_whole(dtype):
    """Bit for bit: its `place` says with which expert it begins."""
    stack = torch.randn(6, 7, 11, generator=seeded()).to(dtype)
    g = seeded(1)
    gradients = [{"W": torch.randn(6, 7, 11, generator=g).to(dtype)} for _ in range(4)]
    whole, state = steps_of({"W": (0, stack)}, gradients)["W"]
    for held in (range(0, 2), range(2, 6)):
        rows = slice(held.start, held.stop)
        share, its = steps_of({"W": (held.start, stack[rows])}, gradients)["W"]
        assert torch.equal(share, whole[rows]) and its["step"] == state["step"] == 4
        assert torch.equal(its["v"], state["v"][rows])


def test_rounding_differs_by_step_seed_and_parameter_and_by_nothing_else():
    W = torch.ones(4, 300, dtype=torch.bfloat16)
    gradient = [{name: torch.ones(4, 300, dtype=torch.bfloat16) for name in "ab"}]
    both = steps_of({"a": (0, W), "b": (0, W)}, gradient)
    assert not torch.equal(both["a"][0], both["b"][0])
    alone = steps_of({"b": (0, W)}, gradient)           # whoever else there is, and in what order
    assert torch.equal(alone["b"][0], both["b"][0])
    assert not torch.equal(steps_of({"b": (0, W)}, gradient, seed=6)["b"][0], alone["b"][0])
    first = alone["b"][0].float() - 1
    second = steps_of({"b": (0, W)}, gradient * 2)["b"][0] - alone["b"][0].float()
    far = first == first.min(), second == second.min()  # two steps, and not the same went far
    assert 0.6 < far[0].double().mean() < 0.9 and 0.4 < (far[0] == far[1]).double().mean() < 0.8


def test_moments_take_two_bytes_a_weight_and_come_back():
    W = torch.nn.Parameter(torch.randn(400, 700, generator=seeded()).bfloat16())
    optimizer = AdamW8([W], lr=1e-2, seed=3)
    for seed in range(3):
        W.grad = torch.randn(400, 700, generator=seeded(seed)).bfloat16()
        optimizer.step()
    taken = sum(t.nbytes for t in optimizer.state[W].values())
    assert taken / W.numel() == pytest.approx(2 + 8 / BLOCK, rel=1e-3)
    other = torch.nn.Parameter(W.detach().clone())
    resumed = AdamW8([other], lr=1e-2, seed=3)
    resumed.load_state_dict(optimizer.state_dict())
    for key, kept in optimizer.state[W].items():
        assert resumed.state[other][key].dtype == kept.dtype, key
    for weight, o in ((W, optimizer), (other, resumed)):
        weight.grad = torch.randn(400, 700, generator=seeded(9)).bfloat16()
        o.step()
    assert torch.equal(W, other)


def test_zero_gradients_decay_alone():
    W = torch.nn.Parameter(torch.full((3, 5), 2.0))
    W.grad = torch.zeros(3, 5)
    AdamW8([W], lr=0.1, weight_decay=0.5).step()
    W = W.detach()
    assert torch.allclose(W, torch.full((3, 5), 2.0 * 0.95)) and math.isfinite(W.sum())


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")     # Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_takes_the_twins_place_where_it_serves(dtype, monkeypatch):
    """In the middle of a run, too: what one has stored the other reads."""
    pytest.importorskip("triton")
    clip, found = torch.tensor(0.7), {}
    for name, served in (("twin", []), ("both", [3, 4, 5])):
        W = torch.nn.Parameter(torch.randn(3, 7, 11, generator=seeded(2)).to(dtype))
        W.place = "W", 5
        optimizer, g, forms = AdamW8([W], lr=1e-2), seeded(3), set()
        for t in range(6):
            monkeypatch.setattr(adamw8, "kernels_serve", lambda x, t=t, s=served: t in s)
            forms.add(update_form(W).__name__)
            W.grad = torch.randn(3, 7, 11, generator=g).to(dtype)
            optimizer.step(clip=clip)
        found[name] = W.detach().float(), optimizer.state[W]["step"].item(), forms
    assert found["twin"][2] == {update_in_pieces.__name__}
    assert found["both"][2] == {update_in_pieces.__name__, "update_fused"}
    assert found["both"][1] == found["twin"][1] == 6
    assert torch.allclose(found["both"][0], found["twin"][0], rtol=0, atol=1e-6)


def test_a_weight_without_gradient_is_left_alone():
    idle, W = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    W.grad = torch.ones(3)
    optimizer = AdamW8([idle, W], lr=0.1)
    optimizer.step()
    assert (idle == 1).all() and idle not in optimizer.state and (W < 1).all()

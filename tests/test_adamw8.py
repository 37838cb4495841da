# SPDX-License-Identifier: MIT
"""AdamW in two bytes a weight: its codes, its rounding, and torch's AdamW beside it."""

import math

import pytest
import torch

from dsv2_ref.training import adamw8
from dsv2_ref.training.adamw8 import (
    BLOCK,
    M_CODES,
    M_DECADES,
    V_CODES,
    V_DECADES,
    AdamW8,
    decode,
    encode,
    round_stochastically,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("codes, decades, signed", [(127, 5, True), (255, 7, False)])
def test_numbers_in_range_come_back_within_half_a_code(codes, decades, signed):
    assert (codes, decades) in ((M_CODES, M_DECADES), (V_CODES, V_DECADES))
    x = torch.randn(5, BLOCK, generator=seeded()) ** 3 * torch.logspace(-20, 10, 5)[:, None]
    x = x if signed else x.abs()
    x[2, 3:9] = 0
    x[3] = 0
    x[4, 0] = x[4].abs().max() * 1e-9                   # below the range: the smallest code, not 0
    code, largest = encode(x, codes, decades)
    back = decode(code, largest, codes, decades)
    inside = x.abs() > largest * 10.0**-decades
    step = math.log(10) * decades / (codes - 1)
    assert ((back / x)[inside].log().abs() <= step * 0.501).all()
    assert torch.equal(back == 0, x == 0) and code.abs().max() <= codes
    assert back[4, 0] == pytest.approx(largest[4].item() * 10.0**-decades, rel=1e-3)


@pytest.mark.parametrize("codes, decades, keep", [(127, 5, 0.9), (255, 7, 0.95)])
def test_a_moment_forgets_however_small(codes, decades, keep):
    x = torch.full((1, BLOCK), 1e-3)
    x[0, 0] = 1.0                                        # sets the scale
    state = encode(x, codes, decades)
    for _ in range(30):
        now = decode(*state, codes, decades) * keep
        now[0, 0] = 1.0
        state = encode(now, codes, decades)
    left = decode(*state, codes, decades)[0, 1].item()
    assert 1e-3 * keep**45 < left < 1e-3 * keep**20


def test_stochastic_rounding_is_right_on_average_and_only_to_neighbours():
    x = torch.tensor([1 + 2**-10, -3.3, 1e-3, 7.0, -(2**-20) * 1.2345])
    drawn = round_stochastically(x.repeat(200_000, 1), seeded()).float()
    step = torch.tensor([2**-7, 2**-6, 2**-17, 0, 2**-27])
    assert ((drawn - x).abs() <= step).all()
    assert (drawn[:, 3] == 7).all() and drawn[:, 0].unique().tolist() == [1, 1 + 2**-7]
    spread = step / 200_000**0.5                         # four standard deviations at the most
    assert ((drawn.double().mean(0) - x.double()).abs() <= 2 * spread + 1e-12).all()


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


def test_pieces_do_not_change_the_result(monkeypatch):
    whole = run(lambda p: AdamW8(p, lr=1e-2), torch.float32, steps=5)
    monkeypatch.setattr(adamw8, "PIECE", 2 * BLOCK)
    assert torch.equal(run(lambda p: AdamW8(p, lr=1e-2), torch.float32, steps=5), whole)


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

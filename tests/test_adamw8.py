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
    blocks_of,
    decode,
    encode,
    noise,
    round_stochastically,
    rounding_key,
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
    drawn = round_stochastically(x.repeat(200_000, 1), rounding_key(0, 1, "a")).float()
    step = torch.tensor([2**-7, 2**-6, 2**-17, 0, 2**-27])
    assert ((drawn - x).abs() <= step).all()
    assert (drawn[:, 3] == 7).all() and drawn[:, 0].unique().tolist() == [1, 1 + 2**-7]
    spread = step / 200_000**0.5                         # four standard deviations at the most
    assert ((drawn.double().mean(0) - x.double()).abs() <= 2 * spread + 1e-12).all()


def test_the_bits_are_even_and_independent():
    """Each of 16 bits, each pair of them and of neighbours; steps, seeds and names are unlike."""
    n = 1 << 16
    keys = [rounding_key(*parts) for parts in (
        (0, 1, "a"), (0, 2, "a"), (1, 1, "a"), (0, 1, "b"), (0, 11, "a"), (0, 1, "1 a"))]
    assert len(set(keys)) == len(keys)
    draws = [noise(key, 0, n) for key in keys] + [noise(keys[0], 1, n), noise(keys[0], n, n)]
    bits = torch.stack([(x >> i) & 1 for x in draws for i in range(16)]).double() * 2 - 1
    assert all(0 <= x.min() and x.max() < 1 << 16 for x in draws)
    together = bits @ bits.T / n                         # means of products, of +1 and -1
    assert (together - torch.eye(len(bits))).abs().max() < 6 / n**0.5
    assert bits.mean(1).abs().max() < 5 / n**0.5
    counts = torch.bincount(draws[0].long(), minlength=1 << 16)
    assert abs((counts == 0).double().mean().item() - math.exp(-1)) < 0.01       # as if thrown


def test_the_bits_of_a_place_do_not_depend_on_where_one_begins():
    key = rounding_key(3, 7, "blocks.1.ffn.experts.W_up")
    whole = noise(key, 0, 1000)
    assert torch.equal(noise(key, 300, 200), whole[300:500])
    assert torch.equal(noise(key, 2**32 + 5, 10), whole[5:15])
    far = noise(key, 2**31 - 5, 10)                      # beyond int32
    assert torch.equal(far[7:], noise(key, 2**31 + 2, 3)) and far.unique().numel() == 10
    x = torch.randn(40, 25, generator=seeded())
    rounded = round_stochastically(x, key)
    assert torch.equal(round_stochastically(x[12:], key, 12 * 25), rounded[12:])
    assert not torch.equal(round_stochastically(x[12:], key, 0), rounded[12:])


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
    bf16 = run(lambda p: AdamW8(p, lr=1e-2), torch.bfloat16, steps=5)
    monkeypatch.setattr(adamw8, "PIECE", 2 * BLOCK)
    assert torch.equal(run(lambda p: AdamW8(p, lr=1e-2), torch.float32, steps=5), whole)
    assert torch.equal(run(lambda p: AdamW8(p, lr=1e-2), torch.bfloat16, steps=5), bf16)


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
@pytest.mark.parametrize("inner", [(7, 11), (16, 32)], ids=str)
def test_a_share_of_the_experts_is_a_slice_of_the_whole(dtype, inner, monkeypatch):
    """Bit for bit, weights and moments; 7·11 is no multiple of a block, 16·32 is."""
    stack = torch.randn(6, *inner, generator=seeded()).to(dtype)
    g = seeded(1)
    gradients = [{"W": torch.randn(6, *inner, generator=g).to(dtype)} for _ in range(4)]
    whole, state = steps_of({"W": (0, stack)}, gradients)["W"]
    for held in (range(0, 2), range(2, 6), range(5, 6)):
        rows = slice(held.start, held.stop)
        share, its = steps_of({"W": (held.start, stack[rows])}, gradients)["W"]
        assert torch.equal(share, whole[rows])
        for key in ("m", "v", "m_largest", "v_largest"):
            part = state[key].unflatten(0, (6, -1))[rows].flatten(0, 1)
            assert torch.equal(its[key], part), key
        if dtype == torch.bfloat16:                     # bits of another place are others
            moved, _ = steps_of({"W": (0, stack[rows])}, [
                {"W": step["W"][rows]} for step in gradients])["W"]
            assert torch.equal(moved, share) == (held.start == 0)
    monkeypatch.setattr(adamw8, "PIECE", BLOCK)
    again, _ = steps_of({"W": (0, stack)}, gradients)["W"]
    assert torch.equal(again, whole)


def test_no_block_crosses_experts():
    """A large gradient of one expert does not make the codes of the next one coarse."""
    stack = torch.zeros(3, 7, 11)
    assert blocks_of(stack.shape) == 3 and blocks_of(stack[0].shape) == 1
    assert blocks_of(torch.Size((3, 32, 16))) == 6 and blocks_of(torch.Size((300,))) == 2
    gradient = torch.ones(3, 7, 11) * torch.tensor([1.0, 1e9, 1.0])[:, None, None]
    _, state = steps_of({"W": (0, stack)}, [{"W": gradient}])["W"]
    assert torch.allclose(state["m_largest"].flatten(), torch.tensor([0.1, 1e8, 0.1]))


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

# SPDX-License-Identifier: MIT
"""Moments in a byte each: codes, rounding, and the update, against a loop over single weights."""

import math

import pytest
import torch

from dsv2_ref.kernels.eight_bit_moments import (
    BLOCK,
    M_CODES,
    M_DECADES,
    V_CODES,
    V_DECADES,
    blocks_of,
    decode,
    encode,
    new_moments,
    noise,
    round_stochastically,
    rounding_key,
    update_in_pieces,
)

NAMES = ("m", "v", "m_largest", "v_largest")
OPTIONS = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)


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


def place_of(x, largest, n_codes, decades):
    """Where a number stands on the scale, in codes: n_codes the largest, 1 the range's end."""
    if x == 0 or largest == 0:
        return 0.0
    return max(1.0, n_codes + math.log10(abs(x) / largest) * (n_codes - 1) / decades)


def value_of(code, largest, n_codes, decades):
    return 0.0 if code == 0 else math.copysign(
        largest * 10 ** ((abs(code) - n_codes) * decades / (n_codes - 1)), code)


def loop(W, gradient, moments, t, lr, betas, eps, weight_decay, clip):
    """One expert, in fp64 and a weight at a time: weights, and by block places and the largest."""
    w, g = W.flatten().tolist(), gradient.flatten().tolist()
    result, places = [], {"m": [], "v": []}
    for start in range(0, len(w), BLOCK):
        block, new = start // BLOCK, {"m": [], "v": []}
        for i in range(start, min(start + BLOCK, len(w))):
            for name, beta, x, codes in (("m", betas[0], clip * g[i], (M_CODES, M_DECADES)),
                                         ("v", betas[1], (clip * g[i]) ** 2, (V_CODES, V_DECADES))):
                old = value_of(moments[name][block, i - start].item(),
                               moments[f"{name}_largest"][block].item(), *codes)
                new[name].append(beta * old + (1 - beta) * x)
            m, v = (new[name][-1] / (1 - beta**t) for name, beta in zip("mv", betas))
            result.append(w[i] - lr * weight_decay * w[i] - lr * m / (math.sqrt(v) + eps))
        for name, codes in (("m", (M_CODES, M_DECADES)), ("v", (V_CODES, V_DECADES))):
            largest = max(map(abs, new[name]))
            places[name].append((largest, [math.copysign(place_of(x, largest, *codes), x)
                                           for x in new[name]]))
    return result, places


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("size", [(2, 7, 53), (33, 9), (5,)], ids=str)
def test_an_update_is_that_of_a_loop_over_weights(size, clip):
    """Experts of 371 weights, no whole blocks. Codes may differ where their place is in between."""
    g = seeded(4)
    W, E = torch.randn(*size, generator=g), size[0] if len(size) > 2 else 1
    moments = new_moments(W)
    for t in range(1, 5):
        gradient = torch.randn(*size, generator=g) ** 3
        gradient.view(-1)[1::3] = 0.0
        before, old = W.clone(), {name: x.clone() for name, x in moments.items()}
        update_in_pieces(W, gradient, moments, t, **OPTIONS, key=0,
                         clip=None if clip is None else torch.tensor(clip))
        for e in range(E):
            mine = {name: x.view(E, -1, x.shape[1])[e] for name, x in old.items()}
            expected, places = loop(before.view(E, -1)[e], gradient.view(E, -1)[e], mine, t,
                                    **OPTIONS, clip=clip or 1.0)
            got = W.view(E, -1)[e]
            assert torch.allclose(got.double(), torch.tensor(expected, dtype=torch.double),
                                  rtol=1e-6, atol=1e-6)
            for name, blocks in places.items():
                codes, largest = (moments[key].view(E, len(blocks), -1)[e].double()
                                  for key in (name, f"{name}_largest"))
                for found, top, (most, there) in zip(codes, largest, blocks, strict=True):
                    assert top.item() == pytest.approx(most, rel=1e-5)
                    assert (found[len(there):] == 0).all()
                    away = (found[: len(there)] - torch.tensor(there, dtype=torch.double)).abs()
                    assert away.max() < 0.5 + 1e-3


def run(dtype, steps=5, size=(37, 50)):
    g = seeded(1)
    W = torch.zeros(*size, dtype=dtype)
    moments = new_moments(W)
    for t in range(1, steps + 1):
        gradient = (W.float() - 1 + torch.randn(*size, generator=g)).to(dtype)
        update_in_pieces(W, gradient, moments, t, **OPTIONS, key=rounding_key(0, t, "W"))
    return W, moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_do_not_change_the_result(dtype, monkeypatch):
    whole, moments = run(dtype)
    monkeypatch.setitem(update_in_pieces.__globals__, "PIECE", 2 * BLOCK)
    again, others = run(dtype)
    assert torch.equal(again, whole)
    assert all(torch.equal(others[name], moments[name]) for name in NAMES)


def steps_of(stack, gradients, held):
    """A share of the experts, and its moments, after updates."""
    W = stack[held.start : held.stop].clone()
    moments = new_moments(W)
    for t, gradient in enumerate(gradients, 1):
        update_in_pieces(W, gradient[held.start : held.stop], moments, t, **OPTIONS,
                         key=rounding_key(0, t, "W"), first=held.start)
    return W, moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", [(7, 11), (16, 32)], ids=str)
def test_a_share_of_the_experts_is_a_slice_of_the_whole(dtype, inner, monkeypatch):
    """Bit for bit, weights and moments; 7·11 is no multiple of a block, 16·32 is."""
    g = seeded(1)
    stack = torch.randn(6, *inner, generator=g).to(dtype)
    gradients = [torch.randn(6, *inner, generator=g).to(dtype) for _ in range(4)]
    whole, state = steps_of(stack, gradients, range(6))
    for held in (range(0, 2), range(2, 6), range(5, 6)):
        rows = slice(held.start, held.stop)
        share, its = steps_of(stack, gradients, held)
        assert torch.equal(share, whole[rows])
        for key in NAMES:
            assert torch.equal(its[key], state[key].unflatten(0, (6, -1))[rows].flatten(0, 1)), key
        if dtype == torch.bfloat16:                     # bits of another place are others
            moved, _ = steps_of(stack[rows], [x[rows] for x in gradients], range(len(held)))
            assert torch.equal(moved, share) == (held.start == 0)
    monkeypatch.setitem(update_in_pieces.__globals__, "PIECE", BLOCK)
    assert torch.equal(steps_of(stack, gradients, range(6))[0], whole)


def test_no_block_crosses_experts():
    """A large gradient of one expert does not make the codes of the next one coarse."""
    stack = torch.zeros(3, 7, 11)
    assert blocks_of(stack.shape) == 3 and blocks_of(stack[0].shape) == 1
    assert blocks_of(torch.Size((3, 32, 16))) == 6 and blocks_of(torch.Size((300,))) == 2
    gradient = torch.ones(3, 7, 11) * torch.tensor([1.0, 1e9, 1.0])[:, None, None]
    _, moments = steps_of(stack, [gradient], range(3))
    assert torch.allclose(moments["m_largest"].flatten(), torch.tensor([0.2, 2e8, 0.2]))


def test_a_factor_counts_as_a_scaled_gradient_and_is_not_rounded():
    """fp32: bit for bit. bf16: nearer to what fp32 gives than gradients scaled where they lie."""
    g = seeded(6)
    start, gradient = torch.randn(700, generator=g), torch.randn(700, generator=g).bfloat16()
    clip, found = torch.tensor(0.37), {}
    for name, G, factor in (
            ("exact", gradient.double() * 0.37, None), ("folded", gradient, clip),
            ("scaled", gradient * clip, None), ("folded, fp32", gradient.float(), clip),
            ("scaled, fp32", gradient.float() * clip, None)):
        W = start.clone()
        moments = new_moments(W)
        update_in_pieces(W, G, moments, 1, 1.0, (0.8, 0.95), 1.0, 0.0, 0, clip=factor)
        found[name] = W
    assert torch.equal(found["folded, fp32"], found["scaled, fp32"])
    off = {name: (W - found["exact"]).norm().item() for name, W in found.items()}
    assert off["folded"] < 1e-2 * off["scaled"]

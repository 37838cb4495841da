# SPDX-License-Identifier: MIT
"""RoPE and YaRN against complex numbers, 50-digit decimals and V2's published constants."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from oracles import loops

from dsv2_ref.attention.rope import (
    rope_frequencies,
    rope_magnitude,
    rope_tables,
    rotate,
    softmax_scale,
    yarn_frequencies,
    yarn_mscale,
    yarn_ramp,
)

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
FAR = 131_071                                        # the last position of V2's 128K
V2 = dict(d_r=64, theta=1e4, beta_fast=32, beta_slow=1, original_positions=4096)


@pytest.mark.parametrize("d_r,theta", [(2, 1e4), (10, 500.0), (64, 1e4)])
def test_frequencies_are_theta_to_the_minus_2i_over_d(d_r, theta):
    expected = torch.tensor(loops.frequencies(d_r, theta), dtype=torch.float64)
    torch.testing.assert_close(rope_frequencies(d_r, theta), expected, atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize("d_r", [0, -2, 7])
def test_an_odd_size_is_refused(d_r):
    with pytest.raises(ValueError, match="d_r"):
        rope_frequencies(d_r)


def test_rotate_equals_multiplication_by_a_complex_number():
    B, T, n_h, d_r, magnitude = 2, 5, 3, 6, 1.25
    x = loops.normal(1, B, T, n_h, d_r)
    freqs = rope_frequencies(d_r, 30.0)
    positions = torch.tensor([[0, 1, 2, 3, 9], [4, 5, 90, 7, 8]])
    turned = rotate(x, *rope_tables(positions, freqs, magnitude))
    one_head = rotate(x[:, :, 0], *rope_tables(positions, freqs, magnitude))
    assert turned.shape == x.shape and one_head.shape == (B, T, d_r)
    torch.testing.assert_close(one_head, turned[:, :, 0], atol=0, rtol=0)
    for b in range(B):
        for t in range(T):
            for i in range(n_h):
                expected = loops.rope(x[b, t, i].tolist(), int(positions[b, t]),
                                      loops.frequencies(d_r, 30.0), magnitude)
                assert turned[b, t, i].tolist() == pytest.approx(expected, abs=1e-10)


def test_one_table_serves_every_sequence():
    x = loops.normal(2, 3, 5, 4, 8)
    cos, sin = rope_tables(torch.arange(5), rope_frequencies(8))
    assert cos.shape == (5, 4)
    torch.testing.assert_close(rotate(x, cos, sin), rotate(x, cos[None], sin[None]))
    torch.testing.assert_close(rotate(x, cos, sin)[1:2], rotate(x[1:2], cos, sin))


def test_pairs_are_adjacent():
    """A quarter turn of pair 0 moves (1, 0, ...) to (0, 1, ...), not to the half's first place."""
    x = torch.zeros(1, 1, 6, dtype=torch.float64)
    x[..., 0] = 1.0
    cos, sin = torch.ones(1, 3).double(), torch.zeros(1, 3).double()
    cos[:, 0], sin[:, 0] = 0.0, 1.0
    assert rotate(x, cos, sin).flatten().tolist() == [0, 1, 0, 0, 0, 0]


def test_scores_depend_on_the_distance_alone():
    d_r = 14
    q, k = loops.normal(3, 1, 1, d_r), loops.normal(4, 1, 1, d_r)
    freqs = rope_frequencies(d_r)

    def score(i: int, j: int) -> float:
        turned_q = rotate(q, *rope_tables(torch.tensor([i]), freqs))
        turned_k = rotate(k, *rope_tables(torch.tensor([j]), freqs))
        return (turned_q * turned_k).sum().item()

    assert score(17, 4) == pytest.approx(score(13 + 1009, 1009), abs=1e-10)
    assert abs(score(17, 4) - score(4, 17)) > 1e-3
    assert abs(score(17, 4) - score(18, 4)) > 1e-3


def test_norm_is_kept_and_position_zero_is_the_identity():
    x = loops.normal(5, 2, 7, 3, 10)
    turned = rotate(x, *rope_tables(torch.arange(7), rope_frequencies(10)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-12, rtol=0)
    assert torch.equal(turned[:, 0], x[:, 0])


def test_gradient_of_a_turn_is_the_turn_back():
    x = loops.normal(6, 2, 3, 1, 4).requires_grad_()
    cos, sin = rope_tables(torch.arange(3), rope_frequencies(4, 7.0))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)
    (grad,) = torch.autograd.grad(rotate(x, cos, sin).sum(), x)
    torch.testing.assert_close(grad, rotate(torch.ones_like(x), cos, -sin), atol=1e-12, rtol=0)


def exact_angle(position: int, pair: int, d_r: int, theta: float = 1e4) -> float:
    """position · theta^(-2i/d_r) modulo 2π, in 50 digits until the last step."""
    with localcontext() as context:
        context.prec = 50
        angle = position * (Decimal(theta).ln() * Decimal(-2 * pair) / d_r).exp()
        return float(angle % (2 * PI))


def worst_error(cos: torch.Tensor, sin: torch.Tensor, exact: list[float]) -> float:
    return max(math.hypot(c - math.cos(a), s - math.sin(a))
               for c, s, a in zip(cos.tolist(), sin.tolist(), exact, strict=True))


def test_angles_are_right_at_the_far_end_of_the_context():
    d_r = 64
    exact = [exact_angle(FAR, i, d_r) for i in range(d_r // 2)]
    freqs = rope_frequencies(d_r)
    cos, sin = rope_tables(torch.tensor([FAR]), freqs)
    assert cos.dtype == torch.float64
    assert worst_error(cos[0], sin[0], exact) < 1e-9
    # what is usually done, for comparison: the product taken in fp32, in bf16
    angles = (torch.tensor(float(FAR)) * freqs.float()).double()
    assert 5e-4 < worst_error(angles.cos(), angles.sin(), exact) < 5e-3
    angles = (torch.tensor(float(FAR)).bfloat16() * freqs.bfloat16()).double()
    assert worst_error(angles.cos(), angles.sin(), exact) > 1.0


def test_half_precision_inputs_are_turned_in_fp32():
    x, first = loops.normal(7, 1, 9, 2, 12), FAR - 8
    tables = rope_tables(torch.arange(first, FAR + 1), rope_frequencies(12))
    for dtype, eps in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        low = x.to(dtype)
        turned = rotate(low, *tables)
        assert turned.dtype == dtype
        exact = torch.tensor(
            [[[loops.rope(head, first + t, loops.frequencies(12)) for head in token]
              for t, token in enumerate(low[0].tolist())]], dtype=torch.float64)
        # one rounding of the result, nothing else
        error = (turned.double() - exact).abs()
        assert (error <= eps * exact.abs() + 1e-6).all()
    assert rotate(x.float(), *tables).dtype == torch.float32


YARN = [
    dict(d_r=64, theta=1e4, factor=40.0, beta_fast=32.0, beta_slow=1.0, original_positions=4096),
    dict(d_r=64, theta=1e4, factor=3.0, beta_fast=8.0, beta_slow=2.0, original_positions=1000),
    dict(d_r=10, theta=500.0, factor=2.5, beta_fast=32.0, beta_slow=1.0, original_positions=200),
    # the fastest pair is slow already: low is clamped to 0
    dict(d_r=12, theta=50.0, factor=7.0, beta_fast=32.0, beta_slow=0.5, original_positions=60),
    # the slowest pair makes many turns: high is clamped to d_r - 1
    dict(d_r=6, theta=20.0, factor=7.0, beta_fast=100.0, beta_slow=1.0, original_positions=2000),
    # low and high meet
    dict(d_r=8, theta=1e4, factor=5.0, beta_fast=900.0, beta_slow=90.0, original_positions=16),
]


@pytest.mark.parametrize("c", YARN, ids=lambda c: f"d_r={c['d_r']},s={c['factor']}")
def test_yarn_frequencies_match_the_search(c):
    expected = loops.yarn_frequencies(c["d_r"], c["theta"], c["factor"], c["beta_fast"],
                                      c["beta_slow"], c["original_positions"])
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(yarn_frequencies(**c), expected, atol=0, rtol=1e-12)


def test_published_ramp_runs_from_pair_10_to_pair_23():
    ramp = yarn_ramp(**V2)
    assert ramp.shape == (32,)
    assert (ramp[:11] == 0).all() and (ramp[23:] == 1).all()
    expected = torch.arange(1, 13, dtype=torch.float64) / 13
    torch.testing.assert_close(ramp[11:23], expected, atol=1e-15, rtol=0)
    stretched = yarn_frequencies(factor=40.0, **V2)
    assert torch.equal(stretched[:11], rope_frequencies(64)[:11])
    torch.testing.assert_close(stretched[23:] * 40, rope_frequencies(64)[23:], atol=0, rtol=1e-14)


def test_v2_temperatures():
    m = yarn_mscale(40.0, 0.707)
    assert m == pytest.approx(0.0707 * math.log(40) + 1, abs=1e-15)
    assert round(m, 4) == 1.2608 and round(m * m, 4) == 1.5896
    assert rope_magnitude(40.0, 0.707, 0.707) == 1.0
    assert softmax_scale(128 + 64, 40.0, 0.707) == pytest.approx(m * m / math.sqrt(192), abs=1e-15)


def test_temperatures_follow_the_configuration():
    assert yarn_mscale(1.0, 0.707) == yarn_mscale(0.5, 0.707) == 1.0
    m = 0.1 * math.log(8) + 1
    assert yarn_mscale(8.0, 1.0) == pytest.approx(m, abs=1e-15)
    # without mscale_all_dim the softmax is left alone and cos, sin carry m(factor, mscale or 1)
    assert softmax_scale(25, 8.0) == softmax_scale(25, 8.0, None) == softmax_scale(25) == 0.2
    assert rope_magnitude(8.0, None, None) == pytest.approx(m, abs=1e-15)
    assert rope_magnitude(8.0, 0.5, None) == pytest.approx(0.05 * math.log(8) + 1, abs=1e-15)
    # without mscale it counts as 1, as the published code has it
    ratio = (0.1 * math.log(40) + 1) / (0.0707 * math.log(40) + 1)
    assert rope_magnitude(40.0, None, 0.707) == pytest.approx(ratio, abs=1e-15)
    # with both, cos and sin carry their ratio
    ratio = (0.1 * 0.5 * math.log(8) + 1) / (0.1 * 1.5 * math.log(8) + 1)
    assert rope_magnitude(8.0, 0.5, 1.5) == pytest.approx(ratio, abs=1e-15)


def test_magnitude_multiplies_both_tables():
    positions, freqs = torch.arange(3), rope_frequencies(4)
    cos, sin = rope_tables(positions, freqs, 1.5)
    plain_cos, plain_sin = rope_tables(positions, freqs)
    assert torch.equal(cos, 1.5 * plain_cos) and torch.equal(sin, 1.5 * plain_sin)

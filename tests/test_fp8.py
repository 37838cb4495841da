# SPDX-License-Identifier: MIT
"""FP8 weights against the format's own 256 numbers, enumerated bit by bit, and its error bound."""

import math
from bisect import bisect_left

import pytest
import torch
from torch import Tensor

from dsv2_ref.kernels.fp8 import (
    SMALLEST_SCALE,
    Fp8Linear,
    Fp8Stack,
    block_scales,
    dequantise,
    linear,
    linear_quantised_input,
    quantise,
    quantise_rows,
    scale_shape,
)

# rows, columns, and blocks of both: ragged, whole, smaller than a block, one number
SHAPES = [((576, 96), (5, 1)), ((130, 257), (2, 3)), ((256, 128), (2, 1)), ((3, 200), (1, 2)),
          ((1, 1), (1, 1)), ((3, 140, 70), (3, 2, 1)), ((2, 3, 129, 5), (2, 3, 2, 1))]
shapes = pytest.mark.parametrize("shape, blocks", SHAPES, ids=[str(s) for s, _ in SHAPES])


def normal(*shape: int, seed: int = 0, std: float = 0.02) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; torch does not compare codes."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def value(code: int) -> float:
    """What the byte means: 1 bit of sign, 4 of exponent (bias 7), 3 of mantissa."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


GRID = [value(code) for code in range(127)]           # ascending, from 0 to 448


def nearest(x: float) -> float:
    """The number of the format next to x, ties to the even code."""
    i = bisect_left(GRID, abs(x))
    if i == len(GRID):
        return math.copysign(GRID[-1], x)
    below, above = GRID[max(i - 1, 0)], GRID[i]
    low, high = abs(x) - below, above - abs(x)
    chosen = below if low < high or (low == high and (i - 1) % 2 == 0) else above
    return math.copysign(chosen, x)


def test_the_format_is_e4m3():
    assert max(GRID) == 448 and GRID[1] == 2.0**-9 and GRID[8] == 2.0**-6
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = torch.tensor([value(code) for code in range(256)])
    assert torch.equal(codes.isnan(), expected.isnan()) and int(codes.isnan().sum()) == 2
    assert torch.equal(codes.nan_to_num(), expected.nan_to_num())


@shapes
def test_equals_a_loop_over_numbers(shape, blocks):
    """Each number over its block's scale goes to the nearest code, ties to even."""
    W = normal(*shape)
    codes, scale = quantise(W)
    assert tuple(scale.shape) == blocks == scale_shape(shape)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    for index in torch.cartesian_prod(*[torch.arange(n)[:: max(1, n // 7)] for n in shape]).view(
        -1, len(shape)
    ).tolist():
        *stack, i, j = index
        s = scale[(*stack, i // 128, j // 128)].item()
        x = torch.tensor(W[tuple(index)].item()) / torch.tensor(s)       # one fp32 division
        assert codes[tuple(index)].item() == nearest(x.item())


@shapes
def test_a_scale_is_its_blocks_largest_over_448(shape, blocks):
    W = normal(*shape)
    scale = block_scales(W)
    for *stack, I, J in torch.cartesian_prod(*map(torch.arange, blocks)).view(
        -1, len(blocks)
    ).tolist():
        block = W[(*stack, slice(128 * I, 128 * I + 128), slice(128 * J, 128 * J + 128))]
        s, largest = scale[(*stack, I, J)].item(), block.abs().max().item()
        assert s == (torch.tensor(largest) / 448).item()


@shapes
@pytest.mark.parametrize("std", [0.02, 1e-25, 1e30])
def test_the_error_keeps_the_bound_of_the_format(shape, blocks, std):
    W = normal(*shape, std=std)
    W.view(-1)[::3] *= 1e-4                                              # some fall below normal
    codes, scale = quantise(W)
    r, c = shape[-2:]
    rows, columns = torch.arange(r) // 128, torch.arange(c) // 128
    s = scale[..., rows[:, None], columns].double()
    error = (W.double() - dequantise(codes, scale, torch.float64)).abs()
    bound = torch.maximum(W.double().abs() / 16, s / 1024) * (1 + 2**-20)
    assert (error <= bound).all()
    if W.numel() > 1000:                                                 # and the bound is tight
        assert (error / bound).max() > 0.95


@shapes
@pytest.mark.parametrize("std", [0.02, 1.0, 1e-12, 1e-32, 1e-38, 3e36])
def test_quantising_what_was_dequantised_changes_no_bit(shape, blocks, std):
    for seed in range(3):
        codes, scale = quantise(normal(*shape, seed=seed, std=std))
        W = dequantise(codes, scale)
        again = quantise(W)
        assert same(again[0], codes) and same(again[1], scale)
        assert same(dequantise(*again), W)


def test_dequantising_is_one_multiplication():
    """code·scale in fp64 is exact (4 + 24 bits) and is rounded once."""
    codes, scale = quantise(normal(200, 150))
    exact = codes.double() * scale.double().repeat_interleave(128, 0)[:200].repeat_interleave(
        128, 1
    )[:, :150]
    assert torch.equal(dequantise(codes, scale), exact.float())
    assert torch.equal(dequantise(codes, scale, torch.float64), exact.float().double())
    assert torch.equal(dequantise(codes, scale, torch.bfloat16), exact.float().bfloat16())


def test_a_stack_is_its_matrices():
    W = normal(3, 140, 70)
    codes, scale = quantise(W)
    for e in range(3):
        one = quantise(W[e])
        assert same(codes[e].contiguous(), one[0]) and same(scale[e].contiguous(), one[1])


def test_zeros_stay_zeros():
    codes, scale = quantise(torch.zeros(130, 5))
    assert not codes.float().any() and (scale == SMALLEST_SCALE).all()
    W = normal(256, 128)
    W[:128] = 0
    back = dequantise(*quantise(W))
    assert not back[:128].any() and back[128:].all(1).any()


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 2.0**-126, 2.0**-111])
def test_what_is_below_the_smallest_scale_becomes_zero(tiny):
    assert not dequantise(*quantise(torch.full((2, 3), tiny))).any()
    assert dequantise(*quantise(torch.tensor([[tiny, 0.4375]]))).tolist() == [[0, 0.4375]]


def test_the_largest_fp32_does_not_overflow():
    top = torch.finfo(torch.float32).max
    W = torch.tensor([[top, -top, top / 448, 0.0]])
    back = dequantise(*quantise(W))
    assert back.isfinite().all()
    assert ((back - W).abs() <= W.abs() * 2**-23).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_refused(bad, dtype):
    W = normal(130, 40).to(dtype)
    W[129, 7] = bad
    with pytest.raises(ValueError, match="^q_proj: 1 of 5200 numbers are NaN or infinite.*finite"):
        quantise(W, name="q_proj")


def test_what_fp32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="infinite"):
        quantise(torch.tensor([[1e39]], dtype=torch.float64))


@pytest.mark.parametrize("W, word", [
    (torch.zeros(3), "shape"), (torch.zeros(0, 4), "shape"), (torch.zeros(2, 0, 4), "shape"),
    (torch.zeros(2, 3, dtype=torch.int32), "dtype"),
])
def test_what_is_no_matrix_of_numbers_is_refused(W, word):
    with pytest.raises(ValueError, match=word):
        quantise(W)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (1,), (1, 1, 1), (3, 2)])
def test_scales_of_another_matrix_are_refused(shape):
    codes, _ = quantise(normal(130, 200))
    with pytest.raises(ValueError, match=r"scale: shape .* expected \(2, 2\)"):
        dequantise(codes, torch.ones(shape))


def test_an_outlier_costs_its_block_and_not_the_matrix():
    """The case for blocks: the rest of the matrix keeps its precision."""
    W = normal(256, 384)
    W[3, 5] = 3000.0                                     # 200 would hardly be noticed
    errors = {}
    for name, block in (("tensor", 384), ("block", 128)):
        codes, scale = quantise(W, block)
        assert scale.numel() == {"tensor": 1, "block": 6}[name]
        error = (dequantise(codes, scale, block=block) - W).abs()
        errors[name] = error.mean().item()
        elsewhere = error[128:].mean() / W[128:].abs().mean()
        errors[name + " elsewhere"] = elsewhere.item()
    assert errors["block"] < 0.4 * errors["tensor"]
    assert errors["block elsewhere"] < 0.03 < 0.1 < errors["tensor elsewhere"]


def test_linear_is_the_dequantised_linear():
    W, x = normal(130, 257), normal(4, 5, 257, seed=1, std=1.0)
    codes, scale = quantise(W)
    assert torch.equal(linear(x, codes, scale), x @ dequantise(codes, scale).T)
    half = x.bfloat16()
    assert torch.equal(linear(half, codes, scale), half @ dequantise(codes, scale).bfloat16().T)
    module = Fp8Linear(W)
    assert torch.equal(module(x), linear(x, codes, scale)) and module.shape == W.shape
    assert module.nbytes == 130 * 257 + 4 * 2 * 3


def test_the_gradient_passes_to_the_input_alone():
    module, x = Fp8Linear(normal(130, 40)), normal(3, 40, seed=1).requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(3, -1))
    assert not any(p.requires_grad for p in module.parameters())


def test_casts_change_what_is_handed_out_and_not_what_is_kept():
    module = torch.nn.Sequential(Fp8Linear(normal(130, 40)), Fp8Stack(normal(2, 5, 40)))
    kept = [p.clone() for p in module.parameters()]
    W = module[0].weight
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        module.to(dtype)
        assert module[0].weight.dtype == module[1][1].dtype == module[1].mT.dtype == dtype
        assert torch.equal(module[0].weight, W.to(dtype))
        assert all(same(a, b) for a, b in zip(kept, module.parameters(), strict=True))
    assert module.half()[0](normal(1, 40).half()).dtype == torch.float16
    assert module.to("meta")[0].codes.is_meta and module[0].scale.is_meta


def test_codes_and_scales_are_the_state():
    module, other = Fp8Linear(normal(130, 40)), Fp8Linear(normal(130, 40, seed=1))
    assert set(module.state_dict()) == {"codes", "scale"}
    other.load_state_dict(module.state_dict())
    assert same(other.codes, module.codes) and same(other.scale, module.scale)


def test_a_stack_is_read_expert_by_expert():
    W = normal(3, 140, 70)
    stack = Fp8Stack(W)
    whole = dequantise(*quantise(W))
    assert len(stack) == 3 and torch.equal(stack.mT, whole.mT)
    assert all(torch.equal(stack.unbind()[e], whole[e]) for e in range(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_the_same_codes_and_numbers():
    W = normal(3, 300, 200)
    here, there = quantise(W), quantise(W.cuda())
    assert same(here[0], there[0].cpu()) and same(here[1], there[1].cpu())
    assert same(dequantise(*here), dequantise(*there).cpu())
    module = Fp8Linear(W[0]).cuda().bfloat16()
    x = normal(5, 200, seed=1, std=1.0).cuda().bfloat16()
    assert torch.equal(module(x), x @ module.weight.T) and module.weight.is_cuda


@pytest.mark.parametrize(("M", "c"), [(3, 300), (5, 128), (2, 1), (0, 70)])
def test_rows_are_quantised_in_blocks_of_one_by_128(M, c):
    """Activations as V3 quantises them; zeros stay zeros, and other rows change nothing."""
    x = normal(M, c, seed=9, std=3.0) * torch.arange(1, M + 1)[:, None] ** 5
    x[:, : c // 2] /= 50
    x[1:2, :128] = 0
    codes, scale = quantise_rows(x)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (M, -(-c // 128))
    rounded = torch.zeros(M, c)
    for i in range(M):
        for k in range(0, c, 128):
            block = x[i, k : k + 128]
            s = max(block.abs().max().item() / 448, SMALLEST_SCALE)
            assert scale[i, k // 128].item() == pytest.approx(s, rel=1e-6)
            s = scale[i, k // 128].item()
            for j in range(k, min(k + 128, c)):
                assert codes[i, j].float().item() == nearest((x[i, j] / scale[i, k // 128]).item())
                rounded[i, j] = codes[i, j].float() * s
    weight = quantise(normal(7, c, seed=10))
    y, expected = linear_quantised_input(x[None], *weight), rounded @ dequantise(*weight).T
    assert y.shape == (1, M, 7) and torch.allclose(y[0], expected, rtol=1e-5, atol=1e-4)


def test_a_layer_computes_with_the_forms_that_it_is_given():
    W, x = normal(20, 30, seed=11), normal(2, 30, seed=12)
    layer = Fp8Linear(W, lambda *args: linear(*args) + 1, lambda *args: dequantise(*args) + 2)
    plain = Fp8Linear(W)
    assert torch.equal(layer(x), plain(x) + 1) and torch.equal(layer.weight, plain.weight + 2)
    assert torch.equal(plain(x), torch.nn.functional.linear(x, plain.weight))

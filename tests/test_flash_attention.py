# SPDX-License-Identifier: MIT
"""Flash attention against `attend_expanded` in fp64, values and gradients.

On a CPU the kernels run in Triton's interpreter, on a CUDA machine as compiled.
"""

import math
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracles import loops
from refusals import refused
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")            # before the first import of triton

import triton

from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.attention.mla import MultiHeadLatentAttention, attend_expanded
from dsv2_ref.attention.rope import rope_frequencies, rope_tables
from dsv2_ref.kernels.flash_attention import (
    TILES,
    _forward,
    attend_flash,
    flash_attention,
    padded,
    tile,
)

# what Triton 3.6's interpreter does with the bounds of a loop
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("q_c", "q_r", "c_kv", "k_r", "W_UK", "W_UV")
SIZES = dict(n_h=2, d_h=16, d_r=4, d_v=8, d_c=12)
ODD = dict(n_h=3, d_h=5, d_r=2, d_v=19, d_c=7)
SCALE = 0.24


@pytest.fixture(autouse=True)
def poisoned(monkeypatch) -> None:
    """Memory for results holds NaN until it is written."""
    def of(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: object, **kwargs: object) -> Tensor:
            x = empty(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return poisoned

    monkeypatch.setattr(torch, "empty_like", of(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", of(torch.Tensor.new_empty))


def rms(got: Tensor, expected: Tensor) -> float:
    """Relative; NaN where `got` has one."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert got.shape == expected.shape
    assert rms(got, expected) <= tolerance


def inputs(
    B: int, T: int, S: int, sizes: dict[str, int] = SIZES, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q_c, q_r, c_kv, k_r, W_UK, W_UV; scores and values of the order of one."""
    n_h, d_h, d_r, d_v, d_c = sizes.values()
    shapes = [(B, T, n_h, d_h), (B, T, n_h, d_r), (B, S, d_c), (B, S, d_r), (n_h, d_h, d_c),
              (n_h, d_v, d_c)]
    made = [loops.normal(i + T + S, *shape) for i, shape in enumerate(shapes)]
    made[4:] = [W / d_c**0.5 for W in made[4:]]
    return [x.to(DEVICE, dtype) for x in made]


def judged(
    ours: Callable[..., Tensor], twin: Callable[..., Tensor], given: list[Tensor], times: float
) -> Tensor:
    """Output, which is returned, and the gradients of all that is given, against fp64."""
    def results(attend: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        *tensors, grad = tensors
        tensors = [x.detach().requires_grad_() for x in tensors]
        o = attend(*tensors)
        return [o.detach(), *torch.autograd.grad(o, tensors, grad)]

    shape = twin(*given).shape
    grad = ((loops.normal(99, *shape) * 8).round() / 8).to(given[0])
    got = results(ours, *given, grad)
    loops.rounded_well(got, lambda *moved: results(twin, *moved), [*given, grad],
                       given[0].dtype, times)
    return got[0]


def agree(
    given: list[Tensor], positions: Tensor | None = None, scale: float = SCALE, times: float = 8.0
) -> None:
    judged(lambda *x: attend_flash(*x, scale, positions),
           lambda *x: attend_expanded(*x, scale, positions), given, times)


@pytest.mark.parametrize("T", [31, 32, 33, 63, 64, 65, 97, 130])
def test_equals_the_twin_at_any_length(T):
    agree(inputs(1, T, T))


def test_one_token():
    """P is 1, whatever q and k are: their gradients are 0, exactly so where no sum is rounded."""
    agree([(x * 8).round() / 8 for x in inputs(2, 1, 1)])


def test_several_sequences():
    agree(inputs(3, 34, 34))


@pytest.mark.parametrize(("T", "S"), [(1, 40), (5, 37), (33, 70), (64, 128), (40, 131)])
def test_new_tokens_after_cached_ones(T, S):
    agree(inputs(1, T, S))


@pytest.mark.parametrize("sizes", [ODD, dict(n_h=1, d_h=33, d_r=16, d_v=5, d_c=6)])
def test_odd_widths(sizes):
    agree(inputs(2, 37, 37, sizes))
    agree(inputs(1, 3, 70, sizes))


def test_ragged_positions():
    """As of a cache whose sequences have different lengths, the second T of them padded."""
    start = torch.tensor([[0], [33], [64]], device=DEVICE)
    agree(inputs(3, 5, 69), start + torch.arange(5, device=DEVICE))


def test_positions_in_any_order():
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 80, (2, 35), generator=generator)
    positions[0, 7], positions[1, 0] = 0, 200                           # past the last key
    agree(inputs(2, 35, 70), positions.to(DEVICE))


def packed_twin(
    q_c: Tensor, q_r: Tensor, k_c: Tensor, k_r: Tensor, v: Tensor, scale: float,
    n_q: list[int], n_k: list[int],
) -> Tensor:
    """Every sequence by itself, in fp64; 0 where a query sees nothing."""
    outputs, first, first_k = [], 0, 0
    for T, S in zip(n_q, n_k, strict=True):
        rows, keys = slice(first, first + T), slice(first_k, first_k + S)
        s = torch.einsum("ihd,jhd->hij", q_c[rows], k_c[keys])
        s = (s + torch.einsum("ihd,jd->hij", q_r[rows], k_r[keys])) * scale
        seen = torch.arange(S) <= torch.arange(T)[:, None] + S - T
        s = s.masked_fill(~seen.to(s.device), -1e9)
        weights = s.softmax(-1) * seen.any(-1).to(s)[:, None] if S else s
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[keys]))
        first, first_k = first + T, first_k + S
    return torch.cat(outputs)


def packed(
    n_q: list[int], n_k: list[int], sizes: dict[str, int] = SIZES,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q_c, q_r, k_c, k_r, v of packed sequences, cut out of memory full of NaN."""
    n_h, d_h, d_r, d_v, _ = sizes.values()
    shapes = [(sum(n_q), n_h, d_h), (sum(n_q), n_h, d_r), (sum(n_k), n_h, d_h), (sum(n_k), d_r),
              (sum(n_k), n_h, d_v)]
    tensors = []
    for i, (N, *rest) in enumerate(shapes):
        memory = torch.full((N + 140, *rest), torch.nan, dtype=dtype, device=DEVICE)
        memory[70 : 70 + N] = loops.normal(50 + i, N, *rest).to(memory)
        tensors.append(memory[70 : 70 + N])
        assert tensors[-1].is_contiguous()
    return tensors


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def packed_agree(
    given: list[Tensor], n_q: list[int], n_k: list[int], scale: float = SCALE, times: float = 8.0
) -> Tensor:
    return judged(
        lambda *x: flash_attention(*x, scale, starts(n_q), starts(n_k), max(n_q), max(n_k)),
        lambda *x: packed_twin(*x, scale, n_q, n_k), given, times)


@pytest.mark.parametrize(("n_q", "n_k"), [
    ([0, 5, 40, 1, 0, 17], [3, 5, 67, 9, 0, 17]),              # empty on one side and on both
    ([4, 70, 3], [0, 33, 2]),                                   # queries that see nothing
], ids=["empty", "blind"])
def test_packed_sequences(n_q, n_k):
    o = packed_agree(packed(n_q, n_k), n_q, n_k)
    blind = sum(max(T - S, 0) for T, S in zip(n_q, n_k))
    assert (o == 0).all(-1).all(-1).sum() == blind


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_scores_of_hundreds(order):
    """The largest score moves from tile to tile; exp of it is not a number of fp32."""
    T = 100
    height = {"rising": torch.arange(T), "falling": T - torch.arange(T),
              "mixed": torch.arange(T) * 37 % T}[order]
    q_c, q_r, c_kv, k_r, W_UK, W_UV = inputs(1, T, T, dict(n_h=1, d_h=3, d_r=2, d_v=4, d_c=6))
    q_r[:], k_r[:] = 1.0, (40.0 * height[:, None]).to(DEVICE)
    W_UK[:] = 0
    ours = [x.requires_grad_() for x in (q_c, q_r, c_kv, k_r, W_UK, W_UV)]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    o, expected = attend_flash(*ours, 1.0), attend_expanded(*theirs, 1.0)
    close(o, expected)
    o.square().sum().backward()
    expected.square().sum().backward()
    for i in (2, 5):                                       # of the values; the others' are nothing
        close(ours[i].grad, theirs[i].grad)
    assert all(x.grad.isfinite().all() for x in ours)


def test_strided_inputs_give_the_same_bits():
    """Slices of one projection, rows of a cache, and a gradient that is not contiguous."""
    given = inputs(2, 20, 34)
    n_h, d_h, d_r = SIZES["n_h"], SIZES["d_h"], SIZES["d_r"]
    q = torch.cat(given[:2], -1)
    rows = torch.full((2, 50, 16), torch.nan, device=DEVICE)
    rows[:, :34] = torch.cat(given[2:4], -1)
    views = [q[..., :d_h], q[..., d_h:], rows[:, :34, :12], rows[:, :34, 12:], *given[4:]]
    assert not views[0].is_contiguous() and not views[3].is_contiguous()
    grad = loops.normal(97, 2, n_h, 20, 8).to(q).transpose(1, 2)
    results = []
    for case, g in ((given, grad.contiguous()), (views, grad)):
        case = [x.detach().requires_grad_() for x in case]
        o = attend_flash(*case, SCALE)
        results.append([o, *torch.autograd.grad(o, case, g)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert d_r == 4


def test_the_same_bits_each_time():
    given = [x.requires_grad_() for x in inputs(1, 70, 70, dict(SIZES, n_h=4))]
    results = []
    for _ in range(2):
        o = attend_flash(*given, SCALE)
        results.append([o, *torch.autograd.grad(o.square().sum(), given)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_token_sees_the_future():
    given = [x.requires_grad_() for x in inputs(1, 40, 40)]
    c_kv, k_r = torch.autograd.grad(attend_flash(*given, SCALE)[:, 33].sum(), given[2:4])
    for grad in (c_kv, k_r):
        assert (grad[:, 34:] == 0).all() and (grad[:, :34] != 0).any(-1).all()


def test_in_a_model_with_a_ragged_cache():
    """Prompts of 40 and 33 tokens padded to one batch, then chunks of new tokens."""
    m = loops.randomize(MultiHeadLatentAttention(13, **SIZES), 1, std=0.2).float().to(DEVICE)
    h = loops.normal(2, 2, 45, 13).float().to(DEVICE)
    cos, sin = (x.to(DEVICE) for x in rope_tables(torch.arange(45), rope_frequencies(4, 30.0)))
    full = m.double()(h.double(), cos.double(), sin.double())
    m.float()
    cache = LatentCache(1, 2, 45, 12, 4, device=DEVICE)
    with torch.no_grad():
        cache.positions(40, [40, 33])
        close(m(h[:, :40], cos[:40], sin[:40], attend_flash, cache), full[:, :40])
        cache.advance()
        for n in (3, 1):
            at = cache.positions(n)
            new = torch.stack([h[b, at[b]] for b in range(2)])
            u = m(new, cos[at], sin[at], attend_flash, cache)
            close(u, torch.stack([full[b, at[b]] for b in range(2)]))
            cache.advance(n)


def test_weights_and_outputs_are_summed_in_fp32():
    """64 keys of weight 1, then many of 2⁻¹², which would not move a sum kept in fp16 at all.

    fp16 holds these weights exactly, so an output is off by one rounding of fp16 (2⁻¹¹ of it) and
    by what 1200 sums in fp32 are.
    """
    n_q, n_k = [3], [1200]
    given = packed(n_q, n_k, dtype=torch.float16)
    q_c, q_r, k_c, k_r, v = given
    height = 12.0 * (torch.arange(1200) < 64).to(k_r)
    q_c[:], q_r[:], k_r[:] = 0, 1, 0
    k_r[:, 0] = height
    o = flash_attention(*given, math.log(2), starts(n_q), starts(n_k), 3, 1200)
    for i in range(3):
        w, seen = 2.0 ** height[: 1198 + i].double(), v[: 1198 + i].double()
        exact, size = (torch.einsum("j,jhd->hd", w / w.sum(), x) for x in (seen, seen.abs()))
        bound = 2.0**-11 * exact.abs() + 2 * 1200 * 2.0**-24 * size
        assert ((o[i].double() - exact).abs() <= bound).all()


def gradients(given: list[Tensor], grad: Tensor, T: int, S: int) -> list[Tensor]:
    given = [x.requires_grad_() for x in given]
    o = flash_attention(*given, math.log(2), starts([T]), starts([S]), T, S)
    return [x.double() for x in torch.autograd.grad(o, given, grad)]


def test_gradients_of_queries_are_summed_in_fp32():
    """One query, 1024 keys of equal weight: dS is 2⁻⁶ for 64 of them, and 2⁻¹⁸ for the rest."""
    q_c, q_r, k_c, k_r, v = given = packed([1], [1024], dtype=torch.float16)
    for x in given:
        x[:] = 0
    sign = 1.0 - 2.0 * (torch.arange(1024) % 2).to(v)[:, None]          # so that o is 0
    v[:, :, 0] = sign * (2.0**-8 + (16 - 2.0**-8) * (torch.arange(1024) < 64).to(v)[:, None])
    k_c[:, :, 0], k_r[:, :1] = sign, sign
    dq_c, dq_r, *_ = gradients(given, torch.ones(1, 2, 8).to(v), 1, 1024)
    exact = math.log(2) * (64 * 2.0**-6 + 960 * 2.0**-18)
    for dq in (dq_c, dq_r):
        assert ((dq[0, :, 0] - exact).abs() <= (2.0**-11 + 2.0**-13) * exact).all()


def test_gradients_of_keys_and_values_are_summed_in_fp32():
    """Keys 0 and 1 share all weight of 400 queries, of gradient 1 (16 of them) or 2⁻¹³."""
    q_c, q_r, k_c, k_r, v = given = packed([400], [401], dtype=torch.float16)
    for x in given:
        x[:] = 0
    q_c[:, :, 0], q_r[:, :, 0], k_r[:2, 0] = 1, 1, 40
    v[0, :, 0], v[1, :, 0] = 1, -1                                      # so that o is 0
    grad = torch.zeros(400, 2, 8).to(v)
    grad[:, :, 0], grad[64:80, :, 0] = 2.0**-13, 1
    _, _, dk_c, dk_r, dv = gradients(given, grad, 400, 401)
    exact = 0.5 * (16 + 384 * 2.0**-13)
    scaled = exact * math.log(2)
    for got, value in ((dv[:2, :, 0], exact), (dk_c[0, :, 0], scaled), (-dk_c[1, :, 0], scaled),
                       (dk_r[0, 0], 2 * scaled)):                       # of both heads
        assert ((got - value).abs() <= (2.0**-11 + 2.0**-13) * value).all()


def test_half_precision():
    """fp16 in, sums in fp32: as exact as the weights and dS, which are rounded once, allow."""
    agree(inputs(1, 70, 70, dtype=torch.float16), times=0.5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(("n_q", "n_k"), [([1, 129], [1, 129]), ([1000], [1000]),
                                          ([100, 0, 300], [777, 5, 301])])
def test_bf16_at_the_published_widths(n_q, n_k):
    packed_agree(packed(n_q, n_k, dict(n_h=4, d_h=128, d_r=64, d_v=128, d_c=0), torch.bfloat16),
                 n_q, n_k, scale=0.1147, times=0.5)


def test_tiles():
    """Of each card for what they were made for, small ones beyond; no tile under 16 rows."""
    v2 = (128, 64, 128)
    assert tile("forward", "sm_90", v2, 2) == dict(BM=128, BN=128, num_warps=8, num_stages=2)
    assert tile("dq", "sm_90", v2, 2) == tile("dq", "sm_90", (40, 24, 56), 2)
    small = dict(BM=16, BN=32, num_warps=4, num_stages=1)
    assert tile("dq", "sm_90", (40, 24, 56), 4) == tile("dq", "sm_80", (129, 64, 128), 2) == small
    assert tile("dq", "cpu", v2, 4) == tile("dq", "cpu", (5, 4, 6), 4)
    for kernels in TILES.values():
        assert kernels.keys() == {"forward", "dq", "dkdv"}
        assert all(BM >= 16 and BN >= 16 for BM, BN, _, _ in kernels.values())
    assert TILES.keys() == {"sm_90", "sm_80", "consumer", "gfx942", "cpu", "small"}
    assert [padded(width) for width in (1, 16, 17, 128)] == [16, 16, 32, 128]


def test_refusals(monkeypatch):
    given = inputs(1, 5, 5)
    for scale in (0.0, -0.1, float("nan")):
        refused(partial(attend_flash, *given, scale), "scale", "expected a positive number")
    refused(lambda: attend_flash(*[x.double() for x in given], SCALE), "q_c", "float64", "float32")
    mixed = [*given[:3], given[3].half(), *given[4:]]
    refused(lambda: attend_flash(*mixed, SCALE), "k_r", "float16", "float32")
    short = [*given[:3], given[3][:, :4], *given[4:]]
    refused(lambda: attend_flash(*short, SCALE), "k_c", "(5, 2, 16)", "expected (4, 2, 16)")
    plain = packed([5], [5])
    for at, name, wrong in ((1, "q_r", plain[1][:4]), (4, "v", plain[4][:, :1])):
        case = [*plain[:at], wrong, *plain[at + 1:]]
        refused(partial(flash_attention, *case, SCALE, starts([5]), starts([5]), 5, 5), name,
                "expected (5, 2,")
    refused(lambda: flash_attention(*plain, SCALE, starts([5]), starts([2, 3]), 5, 5),
            "cu_k", "(3,)", "expected (2,)")
    refused(lambda: flash_attention(*plain, SCALE, starts([5]), starts([5]), 5, 5,
                                    torch.arange(4)), "positions", "expected (5,)")
    if DEVICE.type == "cpu":
        refused(lambda: attend_flash(*[x.bfloat16() for x in given], SCALE), "q_c", "bfloat16")
        monkeypatch.setattr(triton, "JITFunction", type(_forward))     # not interpreted
        refused(lambda: attend_flash(*given, SCALE), "q_c", "cpu", "TRITON_INTERPRET=1")

# SPDX-License-Identifier: MIT
"""The fused update against its twin: weights, codes, scales, and the random bits, bit for bit.

Without a CUDA device the kernel runs in Triton's interpreter."""

import math
import os
from contextlib import contextmanager

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402
from refusals import refused  # noqa: E402

from dsv2_ref.kernels.adamw8_update import update_fused  # noqa: E402
from dsv2_ref.kernels.eight_bit_moments import (  # noqa: E402
    BLOCK,
    M_CODES,
    M_DECADES,
    V_CODES,
    V_DECADES,
    blocks_of,
    new_moments,
    parts,
    rounding_key,
    update_in_pieces,
)

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LR, (BETA_1, BETA_2) = 0.02, (0.85, 0.95)
OPTIONS = dict(lr=LR, betas=(BETA_1, BETA_2), eps=1e-8, weight_decay=0.3)
TIE = 1e-5 if DEVICE == "cpu" else 1e-4      # 7e-6 seen in the interpreter; a card approximates
KINDS = (("m", BETA_1, M_CODES, M_DECADES), ("v", BETA_2, V_CODES, V_DECADES))
# a stack; more blocks than a program takes; whole ones; one weight; one more than a block
SIZES = [(3, 7, 53), (11, 100), (8, 160), (1,), (257,)]
CASES = [(size, W, W) for size in SIZES for W in (FP32, BF16)] + [((9, 50), FP16, BF16)]


def normal(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradient_of(seed: int, *size: int) -> torch.Tensor:
    """Of very different sizes, a fifth of them 0: codes of the whole range."""
    g = normal(seed, *size) * 10.0 ** (2 * normal(seed + 50, *size)).clamp(-6, 3)
    return torch.where(normal(seed + 100, *size) > 0.84, 0.0, g)


def copied(moments: dict) -> dict:
    return {name: x.clone() for name, x in moments.items()}


def in_fp64(old: dict, gradient: torch.Tensor, clip: float, name: str, beta: float, n_codes: int,
            decades: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of new moments on the scale, and how far the arithmetic of fp32 may move them.

    That is TIE of a code; more where the old moment and the gradient almost cancel.
    """
    E, n = parts(gradient.shape)
    g = torch.zeros_like(old[name], dtype=torch.double)
    g.view(E, -1)[:, :n] = gradient.double().view(E, n) * clip
    code = old[name].double()
    kept = beta * code.sign() * old[f"{name}_largest"].double() * 10 ** (
        (code.abs() - n_codes) * decades / (n_codes - 1))
    added = (1 - beta) * (g if name == "m" else g * g)
    new = kept + added
    largest = new.abs().amax(-1, keepdim=True)
    place = n_codes + (new.abs() / largest).log10() * (n_codes - 1) / decades
    place = torch.where(new == 0, 0, place.clamp(1, n_codes)) * new.sign()
    return place, TIE * (kept.abs() + added.abs()) / new.abs().clamp(min=1e-300)


@pytest.mark.parametrize(("size", "weights", "gradients"), CASES, ids=str)
def test_a_step_is_the_twins(size, weights, gradients):
    """Each from the same weights and moments; clipped in every second step."""
    W, moments, others = normal(1, *size).to(weights), None, [0, 0]
    moments = new_moments(W)
    for t in range(1, 5):
        gradient = gradient_of(t, *size).to(gradients)
        clip = torch.tensor(0.3, device=DEVICE) if t % 2 else None
        mine, my_moments, old = W.clone(), copied(moments), copied(moments)
        more = dict(key=rounding_key(7, t, "W"), first=3, clip=clip, **OPTIONS)
        update_fused(mine, gradient, my_moments, t, **more)
        update_in_pieces(W, gradient, moments, t, **more)
        if weights == FP32:
            assert torch.allclose(mine, W, rtol=1e-6, atol=1e-6)
        else:                                      # rounded to the other neighbour, and rarely
            one = torch.finfo(weights).eps * W.float().abs().clamp(min=1e-3)
            assert ((mine.float() - W.float()).abs() <= one).all()
            others[0] += (mine != W).sum().item()
        for kind in KINDS:
            name = kind[0]
            place, slack = in_fp64(old, gradient, clip.item() if t % 2 else 1.0, *kind)
            a, b = my_moments[name].double(), moments[name].double()
            tie = ((place.abs() % 1 - 0.5).abs() <= slack)
            assert ((a - b).abs() <= tie).all(), name
            others[1] += (a != b).sum().item()
            largest = f"{name}_largest"
            assert torch.allclose(my_moments[largest], moments[largest], rtol=0.2 * TIE, atol=0)
    assert others[0] <= 1 + 0.002 * 4 * W.numel() and others[1] <= 1 + 1e-4 * 8 * W.numel()


def test_many_steps_stay_with_the_twin():
    """Each on its own; least squares, so that moments rise and fall by decades."""
    target, found = normal(2, 3, 300), []
    for update in (update_in_pieces, update_fused):
        W = torch.zeros(3, 300, device=DEVICE)
        moments = new_moments(W)
        for t in range(1, 26):
            gradient = (W - target) * torch.logspace(-3, 1, 300, device=DEVICE)
            update(W, gradient, moments, t, **OPTIONS, key=0)
        found.append(W)
    assert (found[0] - target).norm() < 0.8 * target.norm()
    assert (found[1] - found[0]).norm() < 3e-4 * found[0].norm()         # codes at ties differ


@pytest.mark.parametrize("first", [0, 2, 2**23, 2**32 + 1])
@pytest.mark.parametrize("size", [(5, 7, 53), (3, 16, 32)], ids=str)
def test_the_random_bits_are_the_twins(size, first):
    """Decay alone: one product in fp32, the same everywhere. Places up to 2^41, beyond int32."""
    start = normal(3, *size).to(BF16)
    results = []
    for update in (update_in_pieces, update_fused):
        W = start.clone()
        for t in (1, 2):
            update(W, torch.zeros_like(W), new_moments(W), t, **OPTIONS, first=first,
                   key=rounding_key(1, t, "blocks.1.ffn.experts.W_up"))
        results.append(W)
    assert torch.equal(*results) and not torch.equal(results[0], start)
    nearest = start
    for _ in range(2):
        nearest = (nearest.float() * (1 - LR * 0.3)).to(BF16)
    assert 0.2 < (results[0] != nearest).double().mean() < 0.8


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("inner", [(7, 53), (16, 32)], ids=str)
def test_a_share_of_the_experts_is_a_slice_of_the_whole(dtype, inner):
    """Bit for bit, weights and moments."""
    stack = normal(4, 6, *inner).to(dtype)
    found = []
    for held in (range(6), range(2, 5)):
        W = stack[held.start : held.stop].clone()
        moments = new_moments(W)
        for t in (1, 2, 3):
            gradient = gradient_of(t, 6, *inner).to(dtype)[held.start : held.stop]
            update_fused(W, gradient, moments, t, **OPTIONS, key=rounding_key(0, t, "W"),
                         first=held.start)
        found.append((W, moments))
    (whole, all_moments), (share, moments) = found
    assert torch.equal(share, whole[2:5])
    for name, x in moments.items():
        assert torch.equal(x, all_moments[name].unflatten(0, (6, -1))[2:5].flatten(0, 1)), name


def test_nothing_beyond_the_weight_is_read_or_written():
    """Both lie in memory of NaN, at a place that is not aligned."""
    n, edge = 3 * 7 * 53, 301
    W, gradient = (torch.full((n + 2 * edge,), math.nan, device=DEVICE) for _ in range(2))
    inside = slice(edge, edge + n)
    W[inside], gradient[inside] = normal(5, n), normal(6, n)
    expected = W[inside].view(3, 7, 53).clone()
    moments, others = (new_moments(expected) for _ in range(2))
    update_fused(W[inside].view(3, 7, 53), gradient[inside].view(3, 7, 53), moments, 1, **OPTIONS,
                 key=0)
    update_in_pieces(expected, gradient[inside].view(3, 7, 53), others, 1, **OPTIONS, key=0)
    assert torch.allclose(W[inside].view(3, 7, 53), expected, rtol=1e-6, atol=1e-6)
    assert W[:edge].isnan().all() and W[edge + n :].isnan().all()
    assert moments["m"].abs().max() == M_CODES and torch.equal(moments["m"], others["m"])


def test_an_experts_numbers_do_not_reach_the_next():
    found = []
    for size in (1.0, 1e9):
        gradient = normal(7, 3, 7, 53)
        gradient[1] *= size
        W = torch.zeros(3, 7, 53, device=DEVICE)
        moments = new_moments(W)
        update_fused(W, gradient, moments, 1, **OPTIONS, key=0)
        found.append([W, *(x.view(3, -1) for x in moments.values())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_a_weight_that_never_had_a_gradient_only_decays():
    """Its codes are 0, and stay so beside one that moves."""
    W = torch.full((300,), 2.0, device=DEVICE)
    moments = new_moments(W)
    gradient = torch.zeros_like(W)
    gradient[7] = 1e-3
    for t in (1, 2, 3):
        update_fused(W, gradient, moments, t, **OPTIONS, key=0)
    assert torch.allclose(W[8:], torch.full_like(W[8:], 2 * (1 - LR * 0.3) ** 3)) and W[7] < W[8]
    for name, n_codes in (("m", M_CODES), ("v", V_CODES)):
        codes = moments[name].view(-1).tolist()
        assert codes[7] == n_codes and set(codes[:7] + codes[8:]) == {0}


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e15])
def test_tiny_and_huge_gradients(size):
    W = normal(8, 500)
    moments, found = new_moments(W), {}
    for update in (update_fused, update_in_pieces):
        mine, my_moments = W.clone(), copied(moments)
        for t in (1, 2):
            update(mine, gradient_of(t, 500) * size, my_moments, t, **OPTIONS, key=0)
        found[update] = mine
        assert mine.isfinite().all()
    assert torch.allclose(*found.values(), rtol=1e-5, atol=1e-6)


def test_the_factor_is_multiplied_in_before_anything_is_rounded():
    gradient, clip = normal(9, 700).bfloat16(), torch.tensor(0.37, device=DEVICE)
    found = []
    for G, factor in ((gradient, clip), (gradient.float() * clip, None)):
        W = torch.ones(700, device=DEVICE)
        moments = new_moments(W)
        update_fused(W, G, moments, 1, 1.0, (0.8, 0.95), 1.0, 0.0, 0, clip=factor)
        found.append((W, moments))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1]["m_largest"], found[1][1]["m_largest"])
    plain = torch.ones(700, device=DEVICE)
    update_fused(plain, gradient, new_moments(plain), 1, 1.0, (0.8, 0.95), 1.0, 0.0, 0)
    assert not torch.allclose(plain, found[0][0], atol=1e-2)


def test_gradients_may_lie_otherwise():
    W, gradient = normal(10, 20, 30), normal(11, 30, 20).T
    others, moments = W.clone(), new_moments(W)
    update_fused(W, gradient, copied(moments), 1, **OPTIONS, key=0)
    update_fused(others, gradient.contiguous(), moments, 1, **OPTIONS, key=0)
    assert torch.equal(W, others)


@contextmanager
def launches(monkeypatch):
    """The arguments of every launch, by name."""
    real, seen = update_fused.__globals__["_update_kernel"], []

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **more):
                seen.append({"grid": grid} | dict(zip(real.arg_names, args)) | more)
                real[grid](*args, **more)
            return launch

    with monkeypatch.context() as patch:
        patch.setitem(update_fused.__globals__, "_update_kernel", Watched())
        yield seen


@pytest.mark.parametrize(("dtype", "each"), [(BF16, 10), (FP32, 16)], ids=["bf16", "fp32"])
def test_a_weight_costs_ten_bytes_of_traffic(monkeypatch, dtype, each):
    """All that the one launch is given, once; and again what it writes. 16 bytes of scales."""
    W = normal(12, 3, 32, 64).to(dtype)
    with launches(monkeypatch) as seen:
        update_fused(W, torch.ones_like(W), new_moments(W), 1, **OPTIONS, key=0,
                     clip=torch.ones((), device=DEVICE))
    (given,) = seen
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    assert tensors.keys() == {"W", "gradient", "m", "v", "m_largest", "v_largest", "clip"}
    read = sum(x.nbytes for x in tensors.values())
    written = read - tensors["gradient"].nbytes - tensors["clip"].nbytes
    assert read + written == (each + 16 / BLOCK) * W.numel() + 4
    programs = given["grid"][0]
    assert (programs - 1) * given["ROWS"] < blocks_of(W.shape) <= programs * given["ROWS"]


def test_it_is_compiled_for_whole_blocks_and_for_others_alone(monkeypatch):
    """Numbers that change from step to step or from weight to weight are not compiled in."""
    kinds = set()
    with launches(monkeypatch) as seen:
        for size in ((1,), (16, 16), (7, 53), (3, 7, 11), (4, 256), (2, 3, 256)):
            for t in (1, 16, 33):
                W = torch.ones(size, device=DEVICE)
                update_fused(W, W, new_moments(W), t, lr=1e-3 / t, betas=(0.9, 0.95), eps=1e-8,
                             weight_decay=0.1, key=rounding_key(0, t, "W"), first=t)
    for given in seen:
        constants = {name: given[name] for name in given
                     if name.isupper() and name not in ("W",) or name == "num_warps"}
        kinds.add(tuple(sorted(constants.items())))
    assert len(kinds) == 2 and len(seen) == 18


def test_what_cannot_be_is_refused():
    W = normal(13, 4, 100)
    moments = new_moments(W)

    def act(W=W, gradient=W, moments=moments, **more):
        update_fused(W, gradient, moments, 1, **OPTIONS, key=0, **more)

    refused(lambda: act(W.double()), "W", "float64", "fp32")
    refused(lambda: act(W.T), "W", "strides (1, 100)", "contiguous")
    refused(lambda: act(gradient=W[:2]), "gradient", "(2, 100)", "(4, 100)")
    refused(lambda: act(gradient=W.int()), "gradient", "int32")
    refused(lambda: act(clip=W), "clip", "(4, 100)", "one number")
    refused(lambda: act(moments=moments | {"v": moments["m"]}), "v", "int8", "uint8")
    refused(lambda: act(moments=moments | {"m": moments["m"][:1]}), "m", "(1, 256)", "(2, 256)")
    update_fused(W[:0], W[:0], new_moments(W[:0]), 1, **OPTIONS, key=0)          # nothing to do


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without one")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    W = normal(14, 4, 10)
    compiled = object.__new__(triton.JITFunction)
    monkeypatch.setitem(update_fused.__globals__, "_update_kernel", compiled)
    refused(lambda: update_fused(W, W, new_moments(W), 1, **OPTIONS, key=0), "W", "cpu",
            "TRITON_INTERPRET=1")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device, and 13 GB of it")
def test_a_weight_beyond_the_numbers_of_32_bits():
    """Its last 2048 weights are as the twin has them, whose places begin there."""
    last = 2048
    W = torch.full((2**31 + last,), 0.5, dtype=BF16, device=DEVICE)
    gradient = torch.zeros_like(W)
    gradient[-last:] = normal(15, last)
    tail, moments = W[-last:].clone().view(1, last, 1), new_moments(W)
    tails, more = new_moments(tail), dict(**OPTIONS, key=rounding_key(0, 1, "W"))
    update_fused(W, gradient, moments, 1, **more)
    update_in_pieces(tail, gradient[-last:].view(1, last, 1), tails, 1, **more, first=2**31 // last)
    assert (W[-last:] == tail.view(-1)).double().mean() > 0.99
    assert (moments["m"][-last // BLOCK :] == tails["m"]).double().mean() > 0.99

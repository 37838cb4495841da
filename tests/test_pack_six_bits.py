# SPDX-License-Identifier: MIT
"""Packing in one kernel: the same words and scales as the twin, bit for bit.

Without a CUDA device the kernel runs in Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402
from oracles.loops import normal  # noqa: E402
from refusals import refused  # noqa: E402
from torch import Tensor  # noqa: E402

from dsv2_ref.attention.cache_quant import SixBitCache, pack_rows  # noqa: E402
from dsv2_ref.kernels.pack_six_bits import pack_rows_fused  # noqa: E402

# 2, 2, 1, 0, 0 bits lent; sizes that 8 divides and others
SIZES = [(512, 64), (40, 3), (64, 16), (19, 7), (21, 12)]


def same(c_kv: Tensor, k_r: Tensor) -> None:
    for got, expected in zip(pack_rows_fused(c_kv, k_r), pack_rows(c_kv, k_r), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize(("d_c", "d_r"), SIZES)
def test_words_and_scales_are_the_twins(d_c, d_r):
    c_kv, k_r = (normal(seed, 2, 3, d).float().to(DEVICE) for seed, d in ((1, d_c), (2, d_r)))
    same(c_kv[:, 1], 7 * k_r[:, 1])                                 # strided
    same(c_kv[:1, :1].half(), k_r[:1, :1])


@pytest.mark.parametrize(("d_c", "d_r"), [(64, 8), (20, 12)])
def test_codes_half_way_and_at_the_ends(d_c, d_r):
    """Multiples of half a scale up to the largest number, whose scale is then a power of two."""
    halves = torch.arange(2 * d_c).view(2, d_c) % 125 - 62
    c_kv = (halves * 0.25).float().to(DEVICE)
    c_kv[:, 0], c_kv[:, 2 * (d_c // 8)] = 15.75, 15.5
    k_r = ((torch.arange(2 * d_r).view(2, d_r) * 37 % 255 - 127) * 0.5).float().to(DEVICE)
    same(c_kv, k_r)
    same(-c_kv, -k_r)


def test_zeros_and_numbers_of_any_size():
    c_kv = normal(3, 5, 24).float().to(DEVICE) * torch.tensor([0, 1e-30, 1e-5, 1e30, 3e38],
                                                              device=DEVICE)[:, None]
    same(c_kv.clamp(-3e38, 3e38), normal(4, 5, 6).float().to(DEVICE))
    same(c_kv[:0], c_kv[:0, :6])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")        # numpy's
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_a_row_that_is_not_finite_has_no_finite_scale(bad):
    c_kv, k_r = normal(5, 3, 24).float().to(DEVICE), normal(6, 3, 6).float().to(DEVICE)
    c_kv[1, 7], k_r[2, 5] = bad, bad
    _, scales = pack_rows_fused(c_kv * 32, k_r * 64)
    assert scales.isfinite().tolist() == [[True, True], [False, True], [True, False]]


def test_a_cache_may_be_given_it():
    caches = [SixBitCache(1, 2, 8, 24, 6, device=DEVICE) for _ in range(2)]
    caches[1].pack_rows = pack_rows_fused
    for cache in caches:
        cache.write(0, *(normal(d, 2, 3, d).float().to(DEVICE) for d in (24, 6)))
    assert torch.equal(caches[0].words, caches[1].words) and caches[0].words.any()
    assert torch.equal(caches[0].scales, caches[1].scales)


def test_what_is_not_asked_for_is_refused():
    c_kv = normal(9, 3, 24).float().to(DEVICE)
    refused(lambda: pack_rows_fused(c_kv.double(), c_kv), "c_kv", "float64")
    refused(lambda: pack_rows_fused(c_kv, c_kv.int()), "k_r", "int32")
    refused(lambda: pack_rows_fused(c_kv, c_kv[:2]), "k_r", "(2, 24)", "(3, 24)")


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without one")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    c_kv = normal(10, 3, 24).float()
    refused(lambda: pack_rows_fused(c_kv.bfloat16(), c_kv), "c_kv", "bfloat16 on cpu")
    monkeypatch.setitem(pack_rows_fused.__wrapped__.__globals__, "_pack_kernel",
                        object.__new__(triton.JITFunction))
    refused(lambda: pack_rows_fused(c_kv, c_kv), "c_kv", "cpu", "TRITON_INTERPRET=1")

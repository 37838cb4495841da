# SPDX-License-Identifier: MIT
"""New rows in one kernel: where the cache's own `write` puts them, packed bit for bit as there.

Without a CUDA device the kernels run in Triton's interpreter."""

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
from dsv2_ref.attention.kv_cache import LatentCache  # noqa: E402
from dsv2_ref.kernels.write_rows import write_latent_fused, write_six_bit_fused  # noqa: E402

# 2, 2, 1, 0, 0 bits lent; sizes that 8 divides and others
SIZES = [(512, 64), (40, 3), (64, 16), (19, 7), (21, 12)]
CACHES = {"latent": (LatentCache, write_latent_fused),
          "six_bit": (SixBitCache, write_six_bit_fused)}
KINDS = pytest.mark.parametrize("kind", CACHES)


def made(seed: int, *shape: int) -> Tensor:
    return normal(seed, *shape).float().to(DEVICE)


def packed(c_kv: Tensor, k_r: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, ·) as they stand in a cache with room for just them."""
    N, W = len(c_kv), 3 * (-(-c_kv.shape[1] // 8) + -(-k_r.shape[1] // 8))
    words = torch.full((1, N, W), 77, dtype=torch.int16, device=DEVICE)
    scales = torch.full((1, N, 2), 7.0, dtype=torch.bfloat16, device=DEVICE)
    write_six_bit_fused(c_kv[None], k_r[None], words, scales, torch.arange(N, device=DEVICE))
    return words[0], scales[0]


def same(c_kv: Tensor, k_r: Tensor) -> None:
    for got, expected in zip(packed(c_kv, k_r), pack_rows(c_kv, k_r), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@KINDS
@pytest.mark.parametrize(("lengths", "slots"), [
    ([4, 4, 4], None), ([4, 4, 4], [2, 0]), ([5, 0, 3], None), ([1, 9, 2], [1]),
    ([3, 7, 11], [2, 0, 1])])
def test_rows_stand_where_the_twin_puts_them(kind, lengths, slots):
    """Side by side and ragged, padded, chosen, at the very end; what is there already stays."""
    make, fused = CACHES[kind]
    for counts in ([3, 1, 2], [0, 2, 1], [1, 1, 1], [0, 0, 0]):
        twin, cache = (make(2, 3, 14, 21, 6, device=DEVICE) for _ in range(2))
        for store, other in zip(twin.stores, cache.stores):
            store.copy_(torch.arange(store.numel(), device=DEVICE).view_as(store) % 50)
            other.copy_(store)
        cache.fused = fused
        for each in (twin, cache):
            each.lengths = lengths
            view = each if slots is None else each.select(slots)
            T, n = max(1, *counts), view.batch
            view.positions(T, counts[:n])
            view.write(1, made(1, n, T, 21), made(2, n, T, 6))
        for store, expected in zip(cache.stores, twin.stores):
            assert torch.equal(store, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_latent_row_is_the_latent_and_the_key(dtype):
    """Against a loop; sizes that are no power of two, strided rows, others of their dtype."""
    c_kv, k_r = made(1, 2, 6, 20)[:, ::2].to(dtype), made(2, 2, 3, 5).to(dtype)
    rows = torch.zeros(4, 7, 25, dtype=dtype, device=DEVICE)
    places, real = [16, 3, 27, 0], [4, 0, 2, 5]
    write_latent_fused(c_kv, k_r, rows, *(torch.tensor(x, device=DEVICE) for x in (places, real)))
    for place, n in zip(places, real):
        row = rows[place // 7, place % 7]
        assert torch.equal(row[:20], c_kv[n // 3, n % 3])
        assert torch.equal(row[20:], k_r[n // 3, n % 3])
    assert (rows != 0).any(-1).sum() == 4


def test_under_autocast_new_rows_may_have_its_dtype():
    c_kv, k_r, places = made(3, 1, 2, 8), made(4, 1, 2, 4).half(), torch.arange(2, device=DEVICE)
    rows = torch.zeros(1, 2, 12, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        write_latent_fused(c_kv.half(), k_r, rows, places)
    assert torch.equal(rows[..., :8], c_kv.half().float()) and torch.equal(rows[..., 8:],
                                                                           k_r.float())


@pytest.mark.parametrize(("d_c", "d_r"), SIZES)
def test_words_and_scales_are_the_twins(d_c, d_r):
    c_kv, k_r = (made(seed, 2, 3, d) for seed, d in ((1, d_c), (2, d_r)))
    same(c_kv[:, 1], 7 * k_r[:, 1])                                 # strided
    same(c_kv[0, :1].half(), k_r[0, :1])


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
    c_kv = made(3, 5, 24) * torch.tensor([0, 1e-30, 1e-5, 1e30, 3e38], device=DEVICE)[:, None]
    same(c_kv.clamp(-3e38, 3e38), made(4, 5, 6))
    same(c_kv[:0], c_kv[:0, :6])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")        # numpy's
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_a_row_that_is_not_finite_has_no_finite_scale(bad):
    c_kv, k_r = made(5, 3, 24), made(6, 3, 6)
    c_kv[1, 7], k_r[2, 5] = bad, bad
    _, scales = packed(c_kv * 32, k_r * 64)
    assert scales.isfinite().tolist() == [[True, True], [False, True], [True, False]]


def test_what_is_not_asked_for_is_refused():
    c, r, rows = made(9, 2, 3, 24), made(10, 2, 3, 6), torch.zeros(2, 5, 30, device=DEVICE)
    at = torch.arange(6, device=DEVICE)
    words, scales = rows[..., :12].short().contiguous(), rows[..., :2].bfloat16().contiguous()
    write_latent_fused(c, r, rows, at), write_six_bit_fused(c, r, words, scales, at)
    refused(lambda: write_latent_fused(c.double(), r, rows, at), "c_kv", "float64")
    refused(lambda: write_six_bit_fused(c, r.int(), words, scales, at), "k_r", "int32")
    refused(lambda: write_latent_fused(c, r[:, :2], rows, at), "c_kv, k_r", "(2, 2, 6)")
    refused(lambda: write_latent_fused(c, r, rows[..., 1:], at), "rows", "(2, 5, 29)", "30")
    refused(lambda: write_latent_fused(c, r, rows[:, ::2], at), "rows", "without gaps")
    refused(lambda: write_latent_fused(c.half(), r.half(), rows, at), "rows", "float32", "float16")
    refused(lambda: write_six_bit_fused(c, r, words.int(), scales, at), "words", "int16")
    refused(lambda: write_six_bit_fused(c, r, words, scales.half(), at), "scales", "bfloat16")
    refused(lambda: write_latent_fused(c, r, rows, at[:5]), "places", 5, "6 rows")
    refused(lambda: write_latent_fused(c, r, rows, at[:5], at[:4]), "places", 5, "`real`")
    refused(lambda: write_latent_fused(c, r, rows, at.int()), "places, real", "int64")


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without one")
@KINDS
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch, kind):
    make, fused = CACHES[kind]
    cache = make(1, 1, 3, 24, 6)
    cache.fused, rows = fused, (made(10, 1, 3, 24), made(11, 1, 3, 6))
    refused(lambda: cache.write(0, *(x.bfloat16() for x in rows)), "c_kv", "bfloat16 on cpu")
    for kernel in ("_write_kernel", "_pack_kernel"):
        monkeypatch.setitem(fused.__wrapped__.__globals__, kernel,
                            object.__new__(triton.JITFunction))
    refused(lambda: cache.write(0, *rows), "c_kv", "cpu", "TRITON_INTERPRET=1")

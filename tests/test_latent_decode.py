# SPDX-License-Identifier: MIT
"""The decoding kernel against its naive twin: in Triton's interpreter, or on a GPU if there is one.

Whatever lies behind the end of a sequence is NaN, and so is the memory that results are written to.
"""

import math
import os
from inspect import unwrap

import pytest
import torch
from refusals import refused
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton

from dsv2_ref.attention.mla import attend_absorbed
from dsv2_ref.kernels.latent_decode import (
    Tile,
    attend_latent,
    combine,
    decode_latent,
    number_of_splits,
    tile_for,
)

# triton 3.6's interpreter meets numpy 2 in loops whose bounds are computed
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32 = torch.float32
SMALL, SWAPPED = Tile(16, 16, 4, 1, 1), Tile(16, 16, 4, 1, 1, swap=True)
EMPTY = torch.empty


def normal(seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def nan_wherever_memory_is_new(monkeypatch):
    def poisoned(*args, **kwargs) -> Tensor:
        new = EMPTY(*args, **kwargs)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch, "empty", poisoned)


def close(got: Tensor, expected: Tensor, at_most: float = 1e-6) -> None:
    """Relative root mean square."""
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape and got.isfinite().all()
    error = (got - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error <= at_most, f"{error:.2e}"


def inputs(B: int, T: int, S: int, n_h: int = 5, d_h: int = 6, d_r: int = 16, d_v: int = 7,
           d_c: int = 32, dtype: torch.dtype = F32) -> list[Tensor]:
    """q_c, q_r, c_kv, k_r, W_UK, W_UV."""
    shapes = [(B, T, n_h, d_h), (B, T, n_h, d_r), (B, S, d_c), (B, S, d_r), (n_h, d_h, d_c),
              (n_h, d_v, d_c)]
    return [normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def twin(tensors: list[Tensor], scale: float, positions: Tensor | None = None) -> Tensor:
    return attend_absorbed(*(x.double() for x in tensors), scale, positions)


def averages(q_c: Tensor, q_r: Tensor, c: Tensor, r: Tensor, positions: Tensor,
             scale: float) -> Tensor:
    """What `decode_latent` gives, query by query; 0 for those that see nothing."""
    q_c, q_r, c, r = (x.double() for x in (q_c, q_r, c, r))
    o = torch.zeros_like(q_c)
    for b, row in enumerate(positions.tolist()):
        for t, p in enumerate(row):
            if p >= 0:
                scores = q_c[b, t] @ c[b, : p + 1].T + q_r[b, t] @ r[b, : p + 1].T
                o[b, t] = (scores * scale).softmax(-1) @ c[b, : p + 1]
    return o


@pytest.mark.parametrize("S", [1, 15, 16, 17, 97, 130])
@pytest.mark.parametrize("T", [1, 3])
def test_equals_the_twin(T, S):
    tensors = inputs(2, min(T, S), S)
    close(attend_latent(*tensors, 0.3), twin(tensors, 0.3))


@pytest.mark.parametrize("T, S, chunk", [(7, 7, 7), (18, 40, 18)])
def test_many_new_tokens_see_no_future(T, S, chunk):
    """n_h·T rows in several tiles, each of which ends where its last query does."""
    tensors = inputs(1, T, S)
    close(attend_latent(*tensors, 0.4), twin(tensors, 0.4))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("n_h", [1, 16, 17, 40])
@pytest.mark.parametrize("BH", [16, 64])
def test_any_number_of_heads(n_h, BH, swap):
    q_c, q_r, c, r = inputs(2, 2, 37, n_h, d_h=32)[:4]
    positions = torch.tensor([[35, 36], [3, 4]], device=DEVICE)
    tile = Tile(BH, 32, 4, 1, 1, swap)
    got = decode_latent(q_c, q_r, c, r, positions, 0.2, tile=tile)
    close(got, averages(q_c, q_r, c, r, positions, 0.2))


@pytest.mark.parametrize("d_c, d_r", [(24, 4), (40, 10), (8, 2), (72, 24)])
@pytest.mark.parametrize("tile", [SMALL, SWAPPED], ids=["plain", "swapped"])
def test_sizes_that_are_no_power_of_two(d_c, d_r, tile):
    q_c, q_r, c, r = inputs(2, 1, 33, 3, d_h=d_c, d_r=d_r, d_c=d_c)[:4]
    positions = torch.tensor([[32], [11]], device=DEVICE)
    got = decode_latent(q_c, q_r, c, r, positions, 0.3, tile=tile)
    close(got, averages(q_c, q_r, c, r, positions, 0.3))


def ragged(T: int = 1) -> tuple[list[Tensor], Tensor]:
    """Sequences of 0, 1, 15, 16, 50 and 33 keys, the first of T queries; NaN behind them."""
    q_c, q_r, c, r = inputs(6, T, 50, d_h=32)[:4]
    positions = torch.tensor([-1, 0, 14, 15, 49, 32], device=DEVICE)[:, None]
    positions = (positions + torch.arange(1 - T, 1, device=DEVICE)).clamp(min=-1)
    for b, last in enumerate(positions[:, -1].tolist()):
        c[b, last + 1 :], r[b, last + 1 :] = torch.nan, torch.nan
    return [q_c, q_r, c, r], positions


@pytest.mark.parametrize("splits", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("tile", [SMALL, SWAPPED], ids=["plain", "swapped"])
def test_ragged_and_empty_sequences_in_any_number_of_pieces(splits, T, tile):
    tensors, positions = ragged(T)
    got = decode_latent(*tensors, positions, 0.3, splits=splits, tile=tile)
    close(got, averages(*tensors, positions, 0.3))
    assert (got[0] == 0).all()


@pytest.mark.parametrize("page", [64, 192])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_pages_in_any_order(splits, page):
    """Each page lies somewhere; unused ones and unused places of the table are NaN."""
    lengths = [0, 1, page - 1, page, page + 1, 3 * page - 5]
    q_c, q_r, c, r = inputs(6, 1, 3 * page, 3, d_h=16, d_c=16)[:4]
    positions = torch.tensor(lengths, device=DEVICE)[:, None] - 1
    pools = [torch.full((20, page, x.shape[-1]), torch.nan, device=DEVICE) for x in (c, r)]
    table = torch.full((6, 3), 19, dtype=torch.int32, device=DEVICE)
    free = iter(torch.randperm(19, generator=torch.Generator().manual_seed(3)).tolist())
    for b, length in enumerate(lengths):
        for p in range(-(-length // page)):
            table[b, p] = slot = next(free)
            here = slice(p * page, min((p + 1) * page, length))
            for pool, rows in zip(pools, (c, r)):
                pool[slot, : here.stop - here.start] = rows[b, here]
    tile = Tile(16, 32, 4, 1, 1)
    got = decode_latent(q_c, q_r, *pools, positions, 0.5, table, splits, tile)
    close(got, averages(q_c, q_r, c, r, positions, 0.5))


def test_views_of_a_cache_and_other_strides():
    """As the model calls it: both parts are views of one row, with room behind them."""
    q_c, q_r, c, r, W_UK, W_UV = inputs(3, 2, 21)
    store = torch.full((3, 30, 48), torch.nan, device=DEVICE)
    store[:, :21] = torch.cat((c, r), -1)
    c, r = store[:, :21, :32], store[:, :21, 32:]
    tensors = [q_c.mT.contiguous().mT, q_r.transpose(1, 2).contiguous().transpose(1, 2), c, r,
               W_UK.mT.contiguous().mT, W_UV]
    expected = twin(tensors, 0.3)
    close(attend_latent(*tensors, 0.3), expected)
    tensors[2] = c.mT.contiguous().mT
    close(attend_latent(*tensors, 0.3), expected)


def test_positions_as_the_twin_takes_them():
    tensors = inputs(2, 3, 20)
    for positions in (torch.tensor([[4, 5, 6], [17, 18, 19]]), torch.tensor([[9, 2, 15]])):
        positions = positions.to(DEVICE)
        close(attend_latent(*tensors, 0.3, positions), twin(tensors, 0.3, positions))


def test_large_scores_do_not_overflow():
    """Scores of thousands, whose largest comes late, early, and in another piece."""
    q_c, q_r, c, r = (x * 10 for x in inputs(1, 1, 70, d_h=32)[:4])
    positions = torch.tensor([[69]], device=DEVICE)
    for splits in (1, 3):
        got = decode_latent(q_c, q_r, c, r, positions, 1.0, splits=splits)
        close(got, averages(q_c, q_r, c, r, positions, 1.0), 1e-5)


def test_half_precision():
    q_c, q_r, c, r = inputs(2, 1, 90, d_h=32, dtype=torch.float16)[:4]
    positions = torch.tensor([[89], [40]], device=DEVICE)
    got = decode_latent(q_c, q_r, c, r, positions, 0.2)
    assert got.dtype == torch.float16
    close(got, averages(q_c, q_r, c, r, positions, 0.2), 1e-3)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("swap", [False, True])
def test_weights_and_outputs_are_summed_in_fp32(swap, splits):
    """64 keys of weight 1, then many of 2⁻¹², which would not move a sum kept in fp16 at all.

    fp16 holds these weights exactly, so an output is off by one rounding of fp16 (2⁻¹¹ of it) and
    by what 1200 sums in fp32 are.
    """
    q_c, q_r, c, r = inputs(1, 1, 1200, d_h=32, dtype=torch.float16)[:4]
    height = 12 * (torch.arange(1200, device=DEVICE) < 64)
    q_c[:], q_r[:], r[:] = 0, 1, 0
    r[0, :, 0] = height
    positions = torch.tensor([[1199]], device=DEVICE)
    got = decode_latent(q_c, q_r, c, r, positions, math.log(2), splits=splits,
                        tile=Tile(16, 32, 4, 1, 1, swap))
    w = 2.0 ** height.double()
    exact, size = ((w / w.sum()) @ x for x in (c[0].double(), c[0].double().abs()))
    bound = 2.0**-11 * exact.abs() + 2 * 1200 * 2.0**-24 * size
    assert ((got[0, 0].double() - exact).abs() <= bound).all()


def test_combining_is_an_average_weighted_by_the_sums():
    o, lse = normal(1, 2, 20, 3, 24), normal(2, 2, 20, 3)
    lse[0, 4], lse[1, :, 2] = -torch.inf, -torch.inf
    o[0, 4], o[1, :, 2] = 0, 0                               # what an empty piece leaves
    weights = (lse.double() * 0.6931471805599453).softmax(1).nan_to_num()
    close(combine(o, lse, F32), (weights[..., None] * o.double()).sum(1))
    close(combine(o[:, :1], lse[:, :1], F32), o[:, 0])


def test_number_of_splits():
    """A GPU of 132 multiprocessors with room for two programs on each; tiles of 32 keys."""
    assert number_of_splits(4096, 128, 264, 32) == 2                         # 256 of 264 at once
    assert number_of_splits(131072, 1, 264, 32) == 256
    assert 32 <= number_of_splits(8192, 1, 264, 32) <= 128
    assert number_of_splits(4096, 1024, 264, 32) == 1                        # full without
    for tokens in (0, 1, 32):
        assert number_of_splits(tokens, 1, 264, 32) == 1
    for tokens in (33, 500, 70_000):
        for programs in (1, 5, 128, 300):
            splits = number_of_splits(tokens, programs, 264, 32)
            assert 1 <= splits <= min(-(-tokens // 32), 256)
            # never so many that a round of programs has nothing to read
            rounds = -(-programs * splits // 264)
            assert rounds == 1 or programs * splits > 264 * (rounds - 1)


def modelled(tokens: int, programs: int, slots: int, splits: int) -> float:
    tiles = max(-(-tokens // 32), 1)
    return (-(-programs * splits // slots) * (-(-tiles // splits) + 8)
            + (splits / 32 if splits > 1 else 0))


def test_few_numbers_of_splits_are_tried_and_nearly_the_best_is_found():
    for tokens in (100, 777, 4096, 5000, 16_384, 40_000, 131_072):
        for programs in (1, 2, 3, 7, 16, 50, 128, 200, 600):
            for slots in (132, 264):
                best = min(modelled(tokens, programs, slots, k)
                           for k in range(1, min(-(-tokens // 32), 256) + 1))
                found = modelled(tokens, programs, slots,
                                 number_of_splits(tokens, programs, slots, 32))
                assert found <= 1.02 * best, (tokens, programs, slots)


def test_tiles():
    assert tile_for(16, torch.bfloat16, "sm_90").blocks == 2
    assert tile_for(128, torch.bfloat16, "sm_90").BH == 64
    assert tile_for(128, torch.bfloat16, "sm_80") == tile_for(16, torch.bfloat16, "consumer")
    for target in ("sm_90", "sm_80", "consumer", "gfx942", "cpu"):
        for dtype in (torch.bfloat16, F32):
            for n in (1, 16, 33, 128):
                assert 64 % tile_for(n, dtype, target).BN == 0               # divides a page


def test_refusals():
    q_c, q_r, c, r, W_UK, W_UV = inputs(2, 1, 20, d_h=32)
    positions = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    table = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    refused(lambda: decode_latent(q_c.double(), q_r, c, r, positions, 1.0), "float64", "float32")
    refused(lambda: decode_latent(q_c, q_r[:1], c, r, positions, 1.0), "q_r", "(1, 1, 5, 16)")
    refused(lambda: decode_latent(q_c, q_r, c, r, positions[0], 1.0), "positions", "(B, T)")
    refused(lambda: decode_latent(q_c, q_r, c, r[:, :3], positions, 1.0), "(2, 3, 16)", "same")
    refused(lambda: decode_latent(q_c, q_r, c[:1], r[:1], positions, 1.0), "1 sequences")
    refused(lambda: decode_latent(q_c, q_r, c, r, positions, 1.0, table), "page", 20, 64)
    refused(lambda: decode_latent(q_c, q_r, c.half(), r, positions, 1.0), "float16", "float32")
    refused(lambda: attend_latent(q_c.requires_grad_(), q_r, c, r, W_UK, W_UV, 1.0), "gradient")


@pytest.mark.skipif(DEVICE == "cuda", reason="is about machines without one")
def test_what_needs_a_card_is_refused(monkeypatch):
    """In Triton's interpreter sums in bfloat16 came out 9e8 times too large, without a word."""
    tensors = inputs(2, 1, 20, d_h=32)
    refused(lambda: attend_latent(*[x.bfloat16() for x in tensors], 1.0), "q_c", "bfloat16 on cpu")
    monkeypatch.setitem(unwrap(decode_latent).__globals__, "decode_kernel",
                        object.__new__(triton.JITFunction))
    refused(lambda: attend_latent(*tensors, 1.0), "q_c: on cpu", "TRITON_INTERPRET=1")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("n_h, B, S", [(16, 3, 4097), (16, 1, 30_000), (128, 2, 1030)])
@pytest.mark.parametrize("swap", [False, True])
def test_real_sizes_in_bf16(n_h, B, S, swap):
    tensors = inputs(B, 1, S, n_h, 128, 64, 128, 512, torch.bfloat16)
    tensors[4] *= 512**-0.5
    tensors[5] *= 512**-0.5
    close(attend_latent(*tensors, 192**-0.5), twin(tensors, 192**-0.5), 5e-3)
    q_c, q_r, c, r = tensors[:4]
    q_c = normal(9, B, 1, n_h, 512, dtype=torch.bfloat16)
    positions = torch.full((B, 1), S - 1, device=DEVICE)
    tile = Tile(16, 64, 4, 2, 1, swap)
    got = decode_latent(q_c, q_r, c, r, positions, 576**-0.5, tile=tile)
    close(got, averages(q_c, q_r, c, r, positions, 576**-0.5), 5e-3)

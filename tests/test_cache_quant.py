# SPDX-License-Identifier: MIT
"""The six-bit cache: every bit where the layout says, every number within its bound."""

import math

import pytest
import torch
from torch import Tensor

from dsv2_ref.attention.cache_quant import (
    SixBitCache,
    attend_packed,
    dequantise,
    lent_bits,
    pack,
    quantise,
    steps,
    unpack,
)
from dsv2_ref.attention.kv_cache import LatentCache

F64 = torch.float64
SIZES = [(512, 64), (128, 16), (64, 16), (40, 10), (22, 6), (24, 10), (5, 4)]
every_size = pytest.mark.parametrize("d_c, d_r", SIZES)


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def random_integers(seed: int, rows: int, d_c: int, d_r: int) -> tuple[Tensor, Tensor]:
    """Any that a row may hold."""
    g, half = torch.Generator().manual_seed(seed), 32 << lent_bits(d_c, d_r)
    step = steps(d_c, d_r)
    n_c = torch.randint(-32, 32, (rows, d_c), generator=g, dtype=torch.int32)
    return n_c // step * step, torch.randint(-half, half, (rows, d_r), generator=g,
                                             dtype=torch.int32)


def read_bits(words: list[int], d_c: int, d_r: int) -> tuple[list[int], list[int]]:
    """The layout bit by bit, in Python integers, for one row."""
    w, w_r = math.ceil(d_c / 8), math.ceil(d_r / 8)
    words = [x % 65536 for x in words]
    lent = 2 if 8 * w >= 8 * d_r else 1 if 8 * w >= 4 * d_r else 0     # padding lends as well

    def values(first: int, width: int) -> list[int]:
        v = [[0] * width for _ in range(8)]
        for j in range(width):
            a, b, c = (f"{words[first + plane * width + j]:016b}" for plane in range(3))
            v[1][j], low_2, v[0][j] = int(a[:6], 2), a[6:10], int(a[10:], 2)
            v[4][j], low_5, v[3][j] = int(b[:6], 2), b[6:10], int(b[10:], 2)
            v[7][j], v[6][j] = int(c[:6], 2), int(c[10:], 2)
            v[5][j], v[2][j] = int(c[6:8] + low_5, 2), int(c[8:10] + low_2, 2)
        return [x for tile in v for x in tile]

    latents, rope = values(0, w), values(3 * w, w_r)[:d_r]
    borrowed = [latents[t * w + j] >> 5 for t in (2, 5) for j in range(w)]
    n_c = [2 * (x % 32) - 32 if lent and k // w in (2, 5) else x - 32
           for k, x in enumerate(latents)]
    n_r = []
    for i, x in enumerate(rope):
        low = sum(borrowed[k * d_r + i] << k for k in range(lent))
        n_r.append((x << lent) + low - (32 << lent))
    return n_c[:d_c], n_r


@every_size
def test_every_bit_is_where_the_layout_says(d_c, d_r):
    n_c, n_r = random_integers(1, 11, d_c, d_r)
    for row, c, r in zip(pack(n_c, n_r).tolist(), n_c.tolist(), n_r.tolist(), strict=True):
        assert read_bits(row, d_c, d_r) == (c, r)


@every_size
def test_packed_integers_come_back_bit_for_bit(d_c, d_r):
    n_c, n_r = random_integers(2, 35, d_c, d_r)
    shape = (5, 7)
    words = pack(n_c.unflatten(0, shape), n_r.unflatten(0, shape))
    assert words.dtype == torch.int16
    assert words.shape == (5, 7, 3 * (math.ceil(d_c / 8) + math.ceil(d_r / 8)))
    got_c, got_r = unpack(words, d_c, d_r)
    assert torch.equal(got_c.flatten(0, 1), n_c) and torch.equal(got_r.flatten(0, 1), n_r)


@pytest.mark.parametrize("d_c, d_r", [(512, 64), (128, 16), (64, 16), (16, 8)])
def test_no_bit_is_wasted(d_c, d_r):
    """Any words at all are a row: what is read from them is packed into the same words."""
    g = torch.Generator().manual_seed(3)
    words = torch.randint(-(2**15), 2**15, (99, 3 * (d_c + d_r) // 8), generator=g).to(torch.int16)
    assert torch.equal(pack(*unpack(words, d_c, d_r)), words)


def test_bits_lent():
    assert [lent_bits(*sizes) for sizes in SIZES] == [2, 2, 1, 1, 1, 0, 0]
    for d_c, d_r in SIZES:
        step = steps(d_c, d_r)
        w = math.ceil(d_c / 8)
        lends = [i for i in range(d_c) if i // w in (2, 5)] if 8 * w >= 4 * d_r else []
        assert [i for i in range(d_c) if step[i] == 2] == lends
        assert set(step.tolist()) <= {1, 2}


def rows_of(kind: str, d: int) -> Tensor:
    x = normal(4, 6, d)
    if kind == "constant":
        return torch.full((6, d), -0.37, dtype=F64)
    if kind == "zero":
        return x * 0
    if kind == "one number":
        return x * (torch.arange(d) == d // 2)
    if kind == "denormal":
        return x * 1e-40
    if kind == "huge":
        return x * 1e37
    if kind == "outlier":
        return x + 1000 * (torch.arange(d) == 3)
    return x


KINDS = ["random", "constant", "zero", "one number", "denormal", "huge", "outlier"]


@every_size
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_error_is_at_most_half_a_step(kind, d_c, d_r, dtype):
    """The scale follows from the largest number and one rounding up to bf16, 2^-7 relative or, for
    denormals, 2^-133."""
    c, r = rows_of(kind, d_c).to(dtype), rows_of(kind, d_r).to(dtype)
    got_c, got_r = dequantise(*quantise(c, r), dtype)
    assert got_c.dtype == got_r.dtype == dtype
    step, half = steps(d_c, d_r), 32 << lent_bits(d_c, d_r)
    least = (c.abs() / torch.where(step == 2, 31.0, 31.5)).double().amax(-1, keepdim=True)
    bound = step / 2 * (least * (1 + 2**-7) + 2**-133) * 1.00001
    assert ((got_c - c).abs() <= bound).all()
    least = r.abs().double().amax(-1, keepdim=True) / (half - 0.5)
    assert ((got_r - r).abs() <= 0.5 * (least * (1 + 2**-7) + 2**-133) * 1.00001).all()
    if kind == "zero":
        n_c, n_r, scales = quantise(c, r)
        assert not n_c.any() and not n_r.any() and not scales.any()


def test_a_row_does_not_depend_on_the_others():
    c, r = normal(50, 3, 2, 40), normal(51, 3, 2, 10)
    c[1, 1] *= 1000
    together = quantise(c, r)
    for b in range(3):
        for t in range(2):
            alone = quantise(c[b : b + 1, t : t + 1], r[b : b + 1, t : t + 1])
            for x, y in zip(together, alone, strict=True):
                assert torch.equal(x[b, t], y[0, 0])


def test_numbers_are_rounded_to_the_nearest_code():
    """A row whose scale is 1 by construction: the codes are known by hand."""
    c = torch.zeros(64, dtype=F64)
    c[:8] = torch.tensor([31.5, -31.5, 30.6, 30.4, -0.6, -0.4, 0.4, 0.6])
    c[16:24] = torch.tensor([31.0, -31.0, 1.1, 0.9, -1.1, -0.9, 3.0, 2.9])      # tile 2 lends
    n_c, n_r, scales = quantise(c, torch.tensor([63.5, -63.5, 0.4, 0.6, 62.6] + [0.0] * 11))
    assert scales.tolist() == [1, 1]
    assert n_c[:8].tolist() == [31, -32, 31, 30, -1, 0, 0, 1]
    assert n_c[16:24].tolist() == [30, -32, 2, 0, -2, 0, 4, 2]
    assert n_r[:5].tolist() == [63, -64, 0, 1, 63]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("where", ["c_kv", "k_r"])
def test_what_cannot_be_stored_is_refused_and_nothing_changes(bad, where):
    cache = SixBitCache(1, 2, 5, 16, 4, F64)
    cache.write(0, normal(5, 2, 2, 16), normal(6, 2, 2, 4))
    cache.advance()
    words, scales = cache.words.clone(), cache.scales.clone()
    c, r = normal(7, 2, 3, 16), normal(8, 2, 3, 4)
    (c if where == "c_kv" else r)[1, 2, 1] = bad
    what = "NaN" if math.isnan(bad) else "infinity or a number above 1e39"
    with pytest.raises(ValueError, match=f"^{where}: {what} in a row.*expected finite") as error:
        cache.write(0, c, r)
    assert "\n" not in str(error.value)
    assert cache.lengths == [2, 2]
    assert torch.equal(cache.words, words) and torch.equal(cache.scales, scales)


def storage_bytes(cache: SixBitCache) -> int:
    """Every tensor it holds, wherever: at most one count for each storage."""
    found = {}
    for value in [*vars(cache).values(), *cache.stores]:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())


@every_size
def test_nbytes_counts_everything(d_c, d_r):
    cache = SixBitCache(3, 2, 7, d_c, d_r)
    assert cache.nbytes == storage_bytes(cache) == cache.nbytes_per_token * 2 * 7
    per_row = 6 * (math.ceil(d_c / 8) + math.ceil(d_r / 8)) + 4
    assert cache.nbytes_per_token == 3 * per_row
    if (d_c, d_r) == (512, 64):
        assert per_row == 436 and cache.words.stride(2) * 2 == 432 == 27 * 16
        assert cache.words.data_ptr() % 16 == 0


@pytest.mark.parametrize("chunks", [[9], [1, 3, 2, 3], [1] * 9])
def test_chunks_come_back_as_they_are_stored(chunks):
    d_c, d_r = 40, 10
    cache = SixBitCache(2, 3, 11, d_c, d_r, F64)
    c, r = normal(9, 2, 3, 9, d_c), normal(10, 2, 3, 9, d_r)
    expected = dequantise(*quantise(c, r), F64)
    assert not torch.equal(expected[0], c)
    start = 0
    for T in chunks:
        stop = start + T
        assert torch.equal(cache.positions(T), torch.arange(start, stop).expand(3, T))
        for layer in range(2):
            cache.write(layer, c[layer, :, start:stop], r[layer, :, start:stop])
            got = cache.dequantised(layer)
            for x, all_of_it in zip(got, expected, strict=True):
                assert torch.equal(x, all_of_it[layer, :, :stop])
        cache.advance()
        start = stop
    assert cache.lengths == [9, 9, 9] and (cache.batch, cache.max_tokens) == (3, 11)
    cache.reset()
    assert cache.lengths == [0, 0, 0]


def test_sequences_of_different_lengths_share_a_batch():
    cache = SixBitCache(1, 3, 11, 16, 4, F64)
    kept: list[list[Tensor]] = [[], [], []]
    for seed, real in enumerate([(3, 1, 2), (1, 2, 2), (2, 2, 1)]):
        c, r = normal(20 + seed, 3, max(real), 16), normal(30 + seed, 3, max(real), 4)
        cache.positions(max(real), real)
        cache.write(0, c, r)
        got = torch.cat(cache.dequantised(0), -1)
        stored = torch.cat(dequantise(*quantise(c, r), F64), -1)
        for b, n in enumerate(real):
            kept[b] += list(stored[b, :n])
        cache.advance()
        assert got.shape[1] == max(map(len, kept))
    words, scales = cache.words[0], cache.scales[0]
    rows = torch.cat(dequantise(*unpack(words, 16, 4), scales, F64), -1)
    assert cache.lengths == [6, 5, 5]
    for b, expected in enumerate(kept):
        assert torch.equal(rows[b, : len(expected)], torch.stack(expected))


def test_lengths_can_be_set_back():
    """As a LatentCache's can: what comes after is written over."""
    cache = SixBitCache(1, 1, 6, 16, 4, F64)
    c, r = normal(11, 1, 6, 16), normal(12, 1, 6, 4)
    cache.write(0, c, r)
    cache.advance()
    cache.lengths = [4]
    cache.write(0, c[:, :1], r[:, :1])
    got, _ = cache.dequantised(0)
    assert got.shape[1] == 5
    assert torch.equal(got[:, 4], dequantise(*quantise(c, r), F64)[0][:, 0])
    cache.undo()
    with pytest.raises(ValueError, match="full"):
        cache.write(0, c[:, :3], r[:, :3])


def test_interface_and_messages_are_those_of_the_latent_cache():
    public = {name for name in dir(LatentCache) if not name.startswith("_")}
    assert public <= set(dir(SixBitCache))
    for arguments in ((1, 0, 5, 16, 4), (1, 2, 0, 16, 4)):
        with pytest.raises(ValueError) as ours:
            SixBitCache(*arguments)
        with pytest.raises(ValueError) as plain:
            LatentCache(*arguments)
        assert str(ours.value) == str(plain.value)


def test_no_autograd_graph_is_kept_and_unwritten_rows_are_finite():
    cache = SixBitCache(1, 2, 5, 16, 4)
    c, r = normal(13, 2, 2, 16).requires_grad_(), normal(14, 2, 2, 4).requires_grad_()
    cache.write(0, c, r)
    assert not any(x.requires_grad for x in (*cache.rows(0), *cache.dequantised(0)))
    fresh = SixBitCache(1, 2, 5, 16, 4)
    c, r = dequantise(*unpack(fresh.words, 16, 4), fresh.scales)
    assert (c == 0).all() and (r == 0).all()


def attention(q_c, q_r, c, r, W_UK, W_UV, scale, positions):
    """Head by head and query by query, on the rows as stored."""
    B, T, n_h, _ = q_c.shape
    o = torch.zeros(B, T, n_h, W_UV.shape[1], dtype=F64)
    for b in range(B):
        for t in range(T):
            n = positions[b][t] + 1
            for i in range(n_h):
                keys = torch.cat((c[b, :n] @ W_UK[i].T, r[b, :n]), -1)
                weights = (keys @ torch.cat((q_c[b, t, i], q_r[b, t, i])) * scale).softmax(0)
                o[b, t, i] = weights @ (c[b, :n] @ W_UV[i].T)
    return o


@pytest.mark.parametrize("tile", [1, 3, 4, 64])
@pytest.mark.parametrize("T, ragged", [(1, False), (3, False), (3, True), (11, False)])
def test_attention_on_packed_rows_equals_attention_on_the_stored_ones(T, ragged, tile):
    B, S, n_h, d_h, d_r, d_v, d_c, scale = 2, 11, 3, 5, 4, 6, 16, 0.7
    cache = SixBitCache(1, B, S, d_c, d_r, F64)
    c, r = normal(15, B, S, d_c) * 3, normal(16, B, S, d_r) * 3
    cache.write(0, c, r)
    stored, (words, scales) = cache.dequantised(0), cache.rows(0)
    q_c, q_r = normal(17, B, T, n_h, d_h), normal(18, B, T, n_h, d_r)
    W_UK, W_UV = normal(19, n_h, d_h, d_c), normal(20, n_h, d_v, d_c)
    last = [[S - T + t for t in range(T)]] * B
    positions = [[2, 3, 4], [8, 9, 10]] if ragged else last
    expected = attention(q_c, q_r, *stored, W_UK, W_UV, scale, positions)
    got = attend_packed(q_c, q_r, words, scales, W_UK, W_UV, scale,
                        torch.tensor(positions) if ragged else None, tile)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    fresh = attention(q_c, q_r, c, r, W_UK, W_UV, scale, positions)
    assert not torch.allclose(got, fresh, atol=1e-4)


def test_large_scores_do_not_overflow():
    """Scores of 1e4 and tiles whose largest grows and shrinks: the running maximum holds."""
    cache = SixBitCache(1, 1, 9, 16, 4)
    c, r = normal(21, 1, 9, 16, dtype=torch.float32) * 100, normal(22, 1, 9, 4).float() * 100
    cache.write(0, c, r)
    stored = cache.dequantised(0)
    q_c, q_r = normal(23, 1, 1, 2, 5).float() * 100, normal(24, 1, 1, 2, 4).float() * 100
    W_UK, W_UV = normal(25, 2, 5, 16).float(), normal(26, 2, 6, 16).float()
    got = attend_packed(q_c, q_r, *cache.rows(0), W_UK, W_UV, 1.0, tile=2)
    expected = attention(*(x.double() for x in (q_c, q_r, *stored, W_UK, W_UV)), 1.0, [[8]])
    torch.testing.assert_close(got, expected.float(), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("tiny_keys", [False, True])
def test_half_precision_keeps_its_range(tiny_keys):
    """fp16 ends at 65,504: integers of 32 steps times a query of 100 are beyond it before the
    scale comes, and a small key's scale must not meet an infinite product either."""
    d_c, d_r, n_h = 512, 64, 2
    cache = SixBitCache(1, 1, 40, d_c, d_r, torch.float16)
    c = normal(31, 1, 40, d_c).half()
    r = (normal(32, 1, 40, d_r) * (1e-4 if tiny_keys else 1)).half()
    cache.write(0, c, r)
    q_c, q_r = normal(33, 1, 1, n_h, 128).half() * 12, normal(34, 1, 1, n_h, d_r).half() * 100
    W_UK, W_UV = normal(35, n_h, 128, d_c).half() / 11, normal(36, n_h, 128, d_c).half() / 22
    got = attend_packed(q_c, q_r, *cache.rows(0), W_UK, W_UV, 0.02)
    stored = [x.double() for x in cache.dequantised(0)]
    expected = attention(q_c.double(), q_r.double(), *stored, W_UK.double(), W_UV.double(), 0.02,
                         [[39]])
    assert got.dtype == torch.float16 and got.isfinite().all()
    error = (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 5e-3


def test_on_another_device_a_row_that_is_no_number_reads_back_as_nan():
    """Asking would wait for it: no value is looked at, and whoever reads the logits is told."""
    quantise(torch.full((3, 16), math.nan, device="meta"), torch.zeros(3, 4, device="meta"))
    for bad in (math.nan, math.inf):
        scale = torch.tensor([bad]).to(torch.bfloat16)
        read = dequantise(torch.tensor([[0, 3]]), torch.tensor([[1]]), torch.cat((scale, scale)))
        assert not torch.cat(read, -1).isfinite().any()

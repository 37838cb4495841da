# SPDX-License-Identifier: MIT
"""The caches against Python lists, and their bytes against the paper's tables."""

import pytest
import torch

from dsv2_ref.attention.kv_cache import LatentCache, PerHeadCache

BF16 = torch.bfloat16


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latent(n_layers: int = 2, batch: int = 3, max_tokens: int = 11) -> LatentCache:
    return LatentCache(n_layers, batch, max_tokens, d_c=5, d_r=4, dtype=torch.float64)


@pytest.mark.parametrize("chunks", [[9], [1, 3, 2, 3], [1] * 9, [4, 5]])
def test_chunks_come_back_as_they_went_in(chunks):
    cache = latent()
    c_kv, k_r = normal(1, 2, 3, 9, 5), normal(2, 2, 3, 9, 4)
    start = 0
    for T in chunks:
        stop = start + T
        assert torch.equal(cache.positions(T), torch.arange(start, stop).expand(3, T))
        for layer in range(2):
            got = cache.append(layer, c_kv[layer, :, start:stop], k_r[layer, :, start:stop])
            assert torch.equal(got[0], c_kv[layer, :, :stop])
            assert torch.equal(got[1], k_r[layer, :, :stop])
        cache.advance(T)
        start = stop
    assert cache.lengths == [9, 9, 9]


def test_keys_and_values_per_head_come_back():
    cache = PerHeadCache(2, 3, 7, n_kv=5, d_h=4, dtype=torch.float64)
    k, v = normal(3, 3, 7, 5, 4), normal(4, 3, 7, 5, 4)
    for start, stop in ((0, 2), (2, 3), (3, 7)):
        got_k, got_v = cache.append(1, k[:, start:stop], v[:, start:stop])
        assert torch.equal(got_k, k[:, :stop]) and torch.equal(got_v, v[:, :stop])
        cache.advance(stop - start)
    assert (cache.store[0] == 0).all()


def test_sequences_of_different_lengths_share_a_batch():
    """Each keeps its own tokens in a row, whatever padding was written behind them."""
    cache = latent(n_layers=1)
    kept: list[list[torch.Tensor]] = [[], [], []]
    for seed, real in enumerate([(3, 1, 2), (1, 2, 2), (2, 2, 1)]):
        T = max(real)
        old = list(cache.lengths)
        rows = normal(10 + seed, 3, T, 9)
        positions = cache.positions(T)
        c_kv, k_r = cache.append(0, rows[..., :5], rows[..., 5:])
        assert c_kv.shape == (3, max(old) + T, 5) and k_r.shape == (3, max(old) + T, 4)
        for b, n in enumerate(real):
            assert positions[b].tolist() == list(range(old[b], old[b] + T))
            kept[b] += list(rows[b, :n])
        cache.advance(real)
    assert cache.lengths == [6, 5, 5]
    for b, rows in enumerate(kept):
        assert torch.equal(cache.store[0, b, : cache.lengths[b]], torch.stack(rows))


def test_a_full_cache_raises():
    cache = latent(max_tokens=6)
    cache.advance([6, 4, 2])
    with pytest.raises(ValueError, match="full"):
        cache.positions(1)
    cache.reset()
    assert cache.lengths == [0, 0, 0] and cache.positions(6).shape == (3, 6)
    with pytest.raises(ValueError, match="full"):
        cache.positions(7)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 4, 2]])
def test_a_row_behind_the_end_is_not_silently_lost(lengths):
    cache = latent(max_tokens=6)
    cache.advance(lengths)
    with pytest.raises(ValueError, match="full"):
        cache.append(0, normal(9, 3, 1, 5), normal(10, 3, 1, 4))


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="batch"):
        latent(batch=0)
    with pytest.raises(ValueError, match="max_tokens"):
        latent(max_tokens=0)
    with pytest.raises(ValueError, match="lengths"):
        latent().advance([1, 2])


def test_no_autograd_graph_is_kept():
    cache = latent()
    c_kv, k_r = normal(5, 3, 2, 5).requires_grad_(), normal(6, 3, 2, 4).requires_grad_()
    got = cache.append(0, c_kv * 2, k_r * 2)
    heads = PerHeadCache(1, 3, 2, n_kv=5, d_h=4, dtype=torch.float64)
    got += heads.append(0, c_kv[..., None] * torch.ones(4), c_kv[..., None] * torch.ones(4))
    assert not cache.store.requires_grad and not heads.store.requires_grad
    assert not any(t.requires_grad for t in got)


def test_what_comes_back_is_a_view():
    cache = latent()
    for t in cache.append(0, normal(7, 3, 2, 5), normal(8, 3, 2, 4)):
        assert t.untyped_storage().data_ptr() == cache.store.untyped_storage().data_ptr()


def test_rows_never_written_are_finite():
    """They are masked, but a weight of 0 times NaN would be NaN."""
    for _ in range(3):
        poison = torch.full((3 * 11 * 9 * 2,), torch.nan, dtype=torch.float64)
        del poison                                       # so that fresh memory is likely to hold it
        assert (latent().store == 0).all()
        assert (PerHeadCache(2, 3, 11, 3, 3).store == 0).all()


def test_bytes_per_token_of_the_published_models():
    """bf16: the latent row, against caching the expanded 192-wide keys and 128-wide values."""
    for layers, heads, of_latent, of_expanded in ((60, 128, 69_120, 4_915_200),
                                                  (27, 16, 31_104, 276_480)):
        cache = LatentCache(layers, 2, 3, d_c=512, d_r=64, dtype=BF16)
        assert cache.nbytes_per_token == of_latent
        assert cache.nbytes == of_latent * 2 * 3
        # (192 + 128) numbers a head are two of 160
        expanded = PerHeadCache(layers, 2, 1, n_kv=heads, d_h=160, dtype=BF16)
        assert expanded.nbytes_per_token == of_expanded
        assert expanded.nbytes == of_expanded * 2
    assert round(4_915_200 / 69_120) == 71


def test_elements_per_token_of_tables_1_and_9():
    def elements(cache: LatentCache | PerHeadCache) -> int:
        assert cache.nbytes == cache.nbytes_per_token * cache.batch * cache.max_tokens
        return cache.nbytes_per_token // cache.store.element_size()

    layers, n_h, n_g, d_h = 27, 16, 4, 128
    assert elements(PerHeadCache(layers, 2, 3, n_h, d_h, BF16)) == 2 * n_h * d_h * layers == 110_592
    assert elements(PerHeadCache(layers, 2, 3, n_g, d_h, BF16)) == 2 * n_g * d_h * layers
    assert elements(PerHeadCache(layers, 2, 3, 1, d_h, BF16)) == 2 * d_h * layers
    assert elements(LatentCache(layers, 2, 3, 512, 64, BF16)) == 9 * d_h * layers // 2 == 15_552
    assert elements(LatentCache(60, 1, 2, 512, 64)) == 34_560
    assert elements(PerHeadCache(60, 1, 1, 56, 128, BF16)) == 860_160
    assert elements(PerHeadCache(95, 1, 2, 8, 128)) == 194_560           # the dense 67B, GQA
    assert round(1 - 34_560 / 194_560, 3) == 0.822                       # saved at equal precision

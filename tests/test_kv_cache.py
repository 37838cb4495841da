# SPDX-License-Identifier: MIT
"""The caches against Python lists, and their bytes against the paper's tables."""

import pytest
import torch

from dsv2_ref.attention.kv_cache import LatentCache, PerHeadCache, without_gradient

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
            cache.write(layer, c_kv[layer, :, start:stop], k_r[layer, :, start:stop])
            got = cache.rows(layer)
            assert torch.equal(got[0], c_kv[layer, :, :stop])
            assert torch.equal(got[1], k_r[layer, :, :stop])
        cache.advance()
        start = stop
    assert cache.lengths == [9, 9, 9]
    assert torch.equal(cache.rows(1)[0], c_kv[1])         # between passes, too


def test_keys_and_values_per_head_come_back():
    cache = PerHeadCache(2, 3, 7, n_kv=5, d_h=4, dtype=torch.float64)
    k, v = normal(3, 3, 7, 5, 4), normal(4, 3, 7, 5, 4)
    for start, stop in ((0, 2), (2, 3), (3, 7)):
        cache.write(0, k[:, start:stop] + 1, v[:, start:stop])
        cache.write(1, k[:, start:stop], v[:, start:stop])
        got_k, got_v = cache.rows(1)
        assert torch.equal(got_k, k[:, :stop]) and torch.equal(got_v, v[:, :stop])
        cache.advance(stop - start)
    assert torch.equal(cache.rows(0)[0], k + 1)



def test_sequences_of_different_lengths_share_a_batch():
    """Each keeps its own tokens in a row, whatever padding was written behind them."""
    cache = latent(n_layers=1)
    kept: list[list[torch.Tensor]] = [[], [], []]
    for seed, real in enumerate([(3, 1, 2), (1, 2, 2), (2, 2, 1)]):
        T = max(real)
        old = list(cache.lengths)
        rows = normal(10 + seed, 3, T, 9)
        positions = cache.positions(T, real)
        cache.write(0, rows[..., :5], rows[..., 5:])
        c_kv, k_r = cache.rows(0)
        end = max(a + b for a, b in zip(old, real)) if seed else T
        assert c_kv.shape == (3, end, 5) and k_r.shape == (3, end, 4)
        for b, n in enumerate(real):
            assert positions[b].tolist() == list(range(old[b], old[b] + T))
            kept[b] += list(rows[b, :n])
        cache.advance()
    assert cache.lengths == [6, 5, 5]
    for b, rows in enumerate(kept):
        assert torch.equal(cache.store[0, b, : cache.lengths[b]], torch.stack(rows))


def test_a_full_cache_raises():
    cache = latent(max_tokens=6)
    cache.lengths = [6, 4, 2]
    with pytest.raises(ValueError, match=r"cache is full: 6 \+ 1 tokens.*max_tokens = 6"):
        cache.positions(1)
    with pytest.raises(ValueError, match=r"cache is full: 4 \+ 3 tokens"):
        cache.positions(4, [0, 3, 4])
    cache.reset()
    assert cache.lengths == [0, 0, 0] and cache.positions(6).shape == (3, 6)
    with pytest.raises(ValueError, match="full"):
        cache.positions(7)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 4, 2]])
def test_a_row_behind_the_end_is_not_silently_lost(lengths):
    cache = latent(max_tokens=6)
    cache.lengths = lengths
    with pytest.raises(ValueError, match="full"):
        cache.write(0, normal(9, 3, 1, 5), normal(10, 3, 1, 4))


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="batch"):
        latent(batch=0)
    with pytest.raises(ValueError, match="max_tokens"):
        latent(max_tokens=0)
    with pytest.raises(ValueError, match="lengths"):
        latent().lengths = [1, 2]
    with pytest.raises(ValueError, match="lengths"):
        latent().lengths = [1, 2, 12]
    for counts in ([1, 2], [1, 2, 4], [-1, 0, 0]):
        with pytest.raises(ValueError, match="lengths"):
            latent().positions(3, counts)


def test_no_autograd_graph_is_kept():
    cache = latent()
    c_kv, k_r = normal(5, 3, 2, 5).requires_grad_(), normal(6, 3, 2, 4).requires_grad_()
    cache.write(0, c_kv * 2, k_r * 2)
    heads = PerHeadCache(1, 3, 2, n_kv=5, d_h=4, dtype=torch.float64)
    heads.write(0, c_kv[..., None] * torch.ones(4), c_kv[..., None] * torch.ones(4))
    got = cache.rows(0) + heads.rows(0)
    assert not cache.store.requires_grad and not heads.store.requires_grad
    assert not any(t.requires_grad for t in got)


def test_what_comes_back_is_a_view():
    cache = latent()
    cache.write(0, normal(7, 3, 2, 5), normal(8, 3, 2, 4))
    for t in cache.rows(0):
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


# ---- the protocol


def fill(cache: LatentCache, T: int, seed: int = 20, counts: list[int] | None = None) -> None:
    """One whole pass of random rows."""
    cache.positions(T, counts)
    for layer in range(len(cache.store)):
        cache.write(layer, normal(seed + layer, cache.batch, T, 5),
                    normal(seed + 50 + layer, cache.batch, T, 4))
    cache.advance()


def test_room_of_each_sequence_is_its_own():
    """A long sequence that gets nothing new does not stop a short one, nor does padding."""
    cache = latent()
    cache.lengths = [11, 2, 9]
    cache.positions(5, [0, 5, 2])
    for layer in range(2):
        cache.write(layer, normal(30, 3, 5, 5), normal(31, 3, 5, 4))
    c_kv, _ = cache.rows(0)
    assert c_kv.shape[1] == 11
    assert torch.equal(c_kv[1, 2:7], normal(30, 3, 5, 5)[1])
    assert torch.equal(c_kv[2, 9:], normal(30, 3, 5, 5)[2, :2]) and (c_kv[0] == 0).all()
    cache.advance()
    assert cache.lengths == [11, 7, 11]


def test_a_pass_with_padding_in_every_sequence_leaves_old_rows_and_shows_all_new_ones():
    cache = latent()
    fill(cache, 3)
    before = cache.rows(0)[0].clone()
    cache.positions(5, [2, 0, 1])                             # none of them has 5
    for layer in range(2):
        cache.write(layer, normal(30, 3, 5, 5), normal(31, 3, 5, 4))
    assert cache.queries is None                              # the last 5 of all there are
    c_kv, _ = cache.rows(0)
    assert torch.equal(c_kv[:, :3], before) and torch.equal(c_kv[:, 3:], normal(30, 3, 5, 5))
    cache.advance()
    assert cache.lengths == [5, 3, 4]


def test_positions_for_the_mask_where_sequences_differ():
    cache = latent()
    assert cache.queries is None
    cache.positions(3, [3, 1, 2])
    assert cache.queries is None                     # all begin at 0: the last 3 of 3
    cache.undo()
    cache.lengths = [5, 2, 5]                         # the ends agree, the middle does not
    assert torch.equal(cache.positions(2), cache.queries)
    assert cache.queries.tolist() == [[5, 6], [2, 3], [5, 6]]
    cache.lengths = [10, 10, 10]                      # padding would stand behind the end
    cache.positions(2, [1, 1, 0])
    assert cache.queries is not None
    cache.write(0, normal(1, 3, 2, 5), normal(2, 3, 2, 4))
    assert cache.rows(0)[0].shape[1] == 11


def test_a_layer_is_written_once_and_every_layer_is():
    cache = latent()
    rows = normal(1, 3, 2, 5), normal(2, 3, 2, 4)
    cache.write(0, *rows)
    with pytest.raises(ValueError, match="layer: 0 is written a second time"):
        cache.write(0, *rows)
    with pytest.raises(ValueError, match="layer: 1 is not written"):
        cache.advance()
    with pytest.raises(ValueError, match="layer: 2, expected 0 to 1"):
        cache.write(2, *rows)
    with pytest.raises(ValueError, match="positions: 2 tokens are written and not counted"):
        cache.positions(1)
    assert cache.positions(2).tolist() == [[0, 1]] * 3          # asked again in the same pass
    with pytest.raises(ValueError, match="rows: shape .3, 1, 9., expected .3, 2, 9."):
        cache.write(1, normal(1, 3, 1, 5), normal(2, 3, 1, 4))
    with pytest.raises(ValueError, match="rows: torch.float32, expected torch.float64"):
        cache.write(1, *(r.float() for r in rows))
    cache.write(1, *rows)
    cache.advance()
    assert cache.lengths == [2, 2, 2]
    with pytest.raises(ValueError, match="no pass"):
        cache.advance()
    cache.write(0, *rows)
    cache.undo()                                                # a pass that failed
    cache.write(0, *rows)


def test_under_autocast_new_rows_may_have_its_dtype():
    cache = LatentCache(1, 1, 3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        cache.write(0, normal(1, 1, 2, 5).bfloat16(), normal(2, 1, 2, 4).bfloat16())
    assert torch.equal(cache.rows(0)[0], normal(1, 1, 2, 5).bfloat16().float())


@pytest.mark.parametrize("slots", [[2, 0], [1], [0, 1], [0, 1, 2]])
def test_a_selection_reads_and_writes_the_same_memory(slots):
    cache, expected = latent(), latent()
    for c in (cache, expected):
        fill(c, 4, counts=[4, 2, 3])
    some = cache.select(slots)
    assert some.lengths == [[4, 2, 3][s] for s in slots] and some.batch == len(slots)
    fill(some, 3, seed=70, counts=[3, 1, 2][: len(slots)])
    for b, s in enumerate(slots):
        rows = normal(70, len(slots), 3, 5)[b]
        n, old = [3, 1, 2][b], [4, 2, 3][s]
        assert torch.equal(cache.store[0, s, old : old + n, :5], rows[:n])
        assert torch.equal(some.rows(0)[0][b, old : old + n], rows[:n])
        assert torch.equal(cache.store[0, s, :old], expected.store[0, s, :old])
    for s in {0, 1, 2} - set(slots):
        assert cache.lengths[s] == [4, 2, 3][s]
        assert torch.equal(cache.store[:, s], expected.store[:, s])
    again = some.select([len(slots) - 1])
    assert again.lengths == [cache.lengths[slots[-1]]]
    with pytest.raises(ValueError, match="slots"):
        cache.select([0, 0])
    with pytest.raises(ValueError, match="slots"):
        cache.select([])


def test_forks_have_read_what_their_origin_has_and_then_part():
    cache = latent()
    fill(cache, 4, counts=[4, 2, 3])
    forks = cache.fork(2, 5)
    assert forks.lengths == [3] * 5 and forks.max_tokens == 11
    for rows, origin in zip(forks.rows(1), cache.rows(1)):
        assert torch.equal(rows, origin[2:, :3].expand(5, -1, -1))
    before = cache.store.clone()
    fill(forks, 2, seed=90)
    assert torch.equal(cache.store, before) and cache.lengths == [4, 2, 3]
    assert not torch.equal(forks.store[0, 0], forks.store[0, 1])
    assert cache.select([1, 2]).fork(1, 2).lengths == [3, 3]


def test_several_sequences_fork_at_once_side_by_side():
    cache = latent()
    fill(cache, 4, counts=[4, 2, 3])
    forks, one_by_one = cache.fork([2, 0], 2), [cache.fork(slot, 2) for slot in (2, 0)]
    assert forks.lengths == [3, 3, 4, 4] and forks.store.shape[1] == 4
    for layer in range(2):
        for i, alone in enumerate(one_by_one):
            for rows, expected in zip(forks.rows(layer), alone.rows(layer)):
                n = alone.lengths[0]
                assert torch.equal(rows[2 * i : 2 * i + 2, :n], expected)


def test_a_released_sequence_begins_anew():
    cache = latent()
    fill(cache, 4)
    cache.release([1])
    assert cache.lengths == [4, 0, 4]
    some = cache.select([1, 2])
    some.release([1])
    assert cache.lengths == [4, 0, 0]
    cache.reset()
    assert cache.lengths == [0, 0, 0]


def test_going_backward_through_a_cache_is_refused():
    u = normal(1, 2, 3).requires_grad_()
    v = without_gradient(u * 2)
    assert torch.equal(v, u * 2)
    with pytest.raises(ValueError, match="gradient: asked for through a cache") as error:
        (v + u).sum().backward()
    assert "\n" not in str(error.value)
    plain = normal(2, 3)
    assert without_gradient(plain) is plain

# SPDX-License-Identifier: MIT
"""Pages: as the dense cache behind the model, against a dict of rows, and who uses which page."""

import random
from collections import Counter

import pytest
import torch

from dsv2_ref.config import TINY
from dsv2_ref.inference.generate import generate
from dsv2_ref.inference.paged_cache import PagedLatentCache, PagedSixBitCache, Pages, paged_cache
from dsv2_ref.model import DeepSeekV2

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 9, 2, 7, 11], [3], [8] * 17, [1, 2, 3, 4, 5, 6, 7, 8, 9]]
KINDS = pytest.mark.parametrize("kind", ["latent", "six_bit", "per_head"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TINY.with_(vocab=43, n_h=3, d_h=10, d_r=6, d_v=8, d_c=22, d=30, init_std=0.3,
                        max_positions=64)
    return DeepSeekV2(config).double().eval()


def dense(model, batch, kind, room=64):
    """What the pages have to equal: expanded rows are those of the latent cache, expanded."""
    return model.new_cache(batch, room, "six_bit" if kind == "six_bit" else "latent")


def consistent(cache):
    """Every page has as many users as tables name it; the free ones are the others."""
    uses = Counter(page for table in cache.tables.values() for page in table)
    pages = cache.pages
    assert pages.users == [uses[page] for page in range(len(pages.users))]
    assert sorted(pages.free) == [p for p, n in enumerate(pages.users) if n == 0]
    assert pages.in_use == len(uses) and pages.in_use + pages.left == len(pages.users)
    assert set(pages.named.values()) <= set(uses)


# ---- behind the model

@KINDS
@pytest.mark.parametrize("page", [1, 4, 16])
def test_it_generates_as_the_dense_cache_does(model, kind, page):
    cache = paged_cache(model, 200 // page, page, kind)
    four = cache.select(range(4))
    free = generate(model, PROMPTS, 12, stop=(), cache=four)
    assert free == generate(model, PROMPTS, 12, stop=(), cache=dense(model, 4, kind))
    assert four.lengths == [len(p) + 11 for p in PROMPTS]
    assert cache.pages.in_use == sum(-(-n // page) for n in four.lengths)
    turn = [[6, 7], [4]]
    texts = [PROMPTS[i] + free[i][:-1] + t for i, t in zip((2, 1), turn)]
    again = generate(model, turn, 5, stop=(), cache=cache.select([2, 1]))
    assert again == generate(model, texts, 5, stop=(), cache=dense(model, 2, kind))
    consistent(cache)
    cache.release([0, 1, 2, 3])
    assert cache.pages.in_use == 0 and four.lengths == [0] * 4
    consistent(cache)


@KINDS
@torch.no_grad()
def test_pieces_of_any_length_give_the_logits_of_one(model, kind):
    x = torch.randint(0, 43, (2, 23), generator=torch.Generator().manual_seed(1))
    whole = model(x, dense(model, 2, kind))
    cache = paged_cache(model, 16, 4, kind).select([5, 3])
    parts, at = [], 0
    for n in (1, 3, 2, 9, 1, 7):
        parts.append(model(x[:, at : at + n], cache))
        at += n
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


@KINDS
@torch.no_grad()
def test_padding_is_not_stored(model, kind):
    """Ragged pieces: the rows, the lengths and the pages are those of the real tokens."""
    x = torch.randint(0, 43, (3, 9), generator=torch.Generator().manual_seed(2))
    cache, plain = paged_cache(model, 12, 4, kind).select([0, 1, 2]), dense(model, 3, kind)
    for counts in ([9, 1, 4], [0, 2, 9], [1, 1, 1]):
        T = max(counts)
        a, b = (model.hidden(x[:, :T], c, counts) for c in (cache, plain))
        assert cache.lengths == plain.lengths
        assert cache.pages.in_use == sum(-(-n // 4) for n in cache.lengths)
        for i, n in enumerate(counts):
            assert torch.allclose(a[i, :n], b[i, :n], rtol=0, atol=1e-10)


@KINDS
def test_forked_sequences_share_what_is_full(model, kind):
    cache = paged_cache(model, 40, 4, kind)
    generate(model, PROMPTS[3:], 6, stop=(), cache=cache.select([7]))        # 14 tokens: 3.5 pages
    assert cache.pages.in_use == 4
    forks = cache.fork(7, 3)
    assert forks.lengths == [14] * 3 and cache.pages.in_use == 7             # 3 shared, 4 own
    consistent(cache)
    turn = [[4], [6, 1], [9]]
    text = generate(model, PROMPTS[3:], 6, stop=(), cache=dense(model, 1, kind))[0][:-1]
    out = generate(model, turn, 9, stop=(), cache=forks)
    texts = [PROMPTS[3] + text + t for t in turn]
    assert out == generate(model, texts, 9, stop=(), cache=dense(model, 3, kind))
    forks.release([0, 1, 2])
    assert cache.pages.in_use == 4 and cache.select([7]).lengths == [14]
    cache.reset()
    consistent(cache)
    assert cache.pages.in_use == 0


@KINDS
def test_setting_back_into_a_shared_page_leaves_it_to_the_others(model, kind):
    cache = paged_cache(model, 40, 4, kind)
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    one = cache.select([0])
    expected = generate(model, [[*text, 5]], 4, stop=(), cache=dense(model, 1, kind))
    assert generate(model, [[*text, 5]], 4, stop=(), cache=one) == expected
    one.lengths = [8]
    other = cache.fork(0, 1)
    assert cache.pages.in_use == 2
    other.lengths = [6]                                  # page 1 is copied
    assert cache.pages.in_use == 3
    edited = generate(model, [[30, 31, 5]], 4, stop=(), cache=other)
    assert edited == generate(model, [[*text[:6], 30, 31, 5]], 4, stop=(),
                              cache=dense(model, 1, kind))
    assert generate(model, [[5]], 4, stop=(), cache=one) == expected
    consistent(cache)


# ---- against a dict of rows

def test_rows_are_those_written_whatever_came_between(model):
    """Random passes, forks, setting back and releases; every row carries its own number."""
    choose, c = random.Random(0), model.config
    cache = paged_cache(model, 24, 3)
    held, number = {}, 0
    for _ in range(300):
        what = choose.choice(["write", "write", "write", "release", "back", "fork"])
        some = choose.sample(sorted(held), min(len(held), 2))
        if what == "write":
            slots = sorted({*some, choose.randrange(24)})
            counts = [choose.randrange(5) for _ in slots]
            need = sum(-(-(len(held.get(s, ())) + n) // 3) for s, n in zip(slots, counts))
            if need + cache.pages.in_use > 24:
                continue
            view = cache.select(slots)
            view.positions(5, counts)
            for s, n in zip(slots, counts):
                held.setdefault(s, []).extend(range(number + 1, number + 1 + n))
                number += n
            new = torch.zeros(len(slots), 5).double()
            for b, (s, n) in enumerate(zip(slots, counts)):
                new[b, :n] = torch.tensor(held[s][len(held[s]) - n :])
            for layer in range(c.n_layers):
                rows = (new + 1000 * layer)[..., None]
                view.write(layer, rows.expand(-1, -1, c.d_c), -rows.expand(-1, -1, c.d_r))
                read = view.rows(layer)
                assert read[0].shape[1] == max(1, *(len(held[s]) for s in slots))
            view.advance()
        elif some and what == "release":
            cache.release(some)
            held = {s: rows for s, rows in held.items() if s not in some}
        elif some and what == "back" and cache.pages.left:
            n = choose.randrange(len(held[some[0]]) + 1)
            cache.select(some[:1]).lengths = [n]
            held[some[0]] = held[some[0]][:n]
        elif some and what == "fork" and cache.pages.left > 2:
            (slot,) = cache.fork(some[0], 1).slots
            held[slot] = list(held[some[0]])
        consistent(cache)
        for slot, rows in held.items():
            view = cache.select([slot])
            assert view.lengths == [len(rows)]
            for layer in range(c.n_layers) if rows else ():
                c_kv, k_r = (x[0, : len(rows), 0] for x in view.rows(layer))
                assert c_kv.tolist() == [n + 1000 * layer for n in rows]
                assert torch.equal(k_r, -c_kv)
    assert number > 300


@pytest.mark.parametrize("kind", ["latent", "six_bit"])
def test_a_kernel_writes_where_the_twin_does(kind):
    rows = pytest.importorskip("dsv2_ref.kernels.write_rows")
    make, fused = {"latent": (PagedLatentCache, rows.write_latent_fused),
                   "six_bit": (PagedSixBitCache, rows.write_six_bit_fused)}[kind]
    twin, cache = (make(1, 9, 4, 10, 6, device=DEVICE) for _ in range(2))
    cache.fused = fused
    for seed, counts in enumerate(([5, 5], [2, 2], [1, 4], [0, 1], [3, 3])):
        g = torch.Generator().manual_seed(seed)
        new = [torch.randn(2, max(counts), d, generator=g).to(DEVICE) for d in (10, 6)]
        for each in (twin, cache):
            view = each.select([4, 1])
            view.positions(max(counts), counts)
            view.write(0, *new)
            view.advance()
        for store, expected in zip(cache.stores, twin.stores):
            assert torch.equal(store, expected) and store.any()


# ---- names

def read_and_name(model, cache, slot, tokens):
    with torch.no_grad():
        cache.share(slot, cache.find(tokens, slot))
        done = cache.read(slot)
        cache.grow(slot, len(tokens))
        cache.name(slot, tokens, len(tokens))
        return model(torch.tensor([tokens[done:]]), cache.select([slot]))[0, -1]


@KINDS
def test_a_prefix_is_found_and_gives_the_same_logits(model, kind):
    cache, text = paged_cache(model, 30, 4, kind), PROMPTS[3] + [30, 31, 32, 33]       # 13 tokens
    read_and_name(model, cache, 0, text)
    assert cache.pages.in_use == 4 and len(cache.find(text)) == 3
    for slot, (tail, shared) in enumerate([([7], 3), ([7, 8, 9], 3), ([], 3)], 1):
        logits = read_and_name(model, cache, slot, text + tail)
        with torch.no_grad():
            whole = model(torch.tensor([text + tail]), dense(model, 1, kind))[0, -1]
        assert torch.allclose(logits, whole, rtol=0, atol=1e-10)
        assert cache.tables[slot][:shared] == cache.tables[0][:shared]
        consistent(cache)
    assert cache.pages.in_use == 4 + 3


def test_a_page_is_found_after_the_same_pages_only(model):
    cache = paged_cache(model, 30, 2)
    read_and_name(model, cache, 0, [1, 2, 3, 4, 5])
    assert [len(cache.find(t)) for t in (
        [1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 3, 5, 5], [3, 4, 1], [0, 2, 3, 4, 5], [1, 2], [1],
        [1, 2, 9],
    )] == [2, 1, 1, 0, 0, 0, 0, 1]


def test_one_token_is_left_to_read(model):
    """Without it there would be no logits."""
    cache = paged_cache(model, 30, 2)
    read_and_name(model, cache, 0, [1, 2, 3, 4])
    assert len(cache.find([1, 2, 3, 4])) == 1 and len(cache.find([1, 2, 3, 4, 9])) == 2


def test_in_the_midst_of_a_page_nothing_is_found(model):
    cache = paged_cache(model, 30, 2)
    read_and_name(model, cache, 0, [1, 2, 3, 4, 5])
    with torch.no_grad():
        model(torch.tensor([[1]]), cache.select([1]))
    assert cache.find([1, 2, 3, 4, 5], 1) == []
    with torch.no_grad():
        model(torch.tensor([[2]]), cache.select([1]))
    assert cache.find([1, 2, 3, 4, 5], 1) == []          # after a page of its own, without a name
    cache.name(1, [1, 2], 2)
    assert cache.find([1, 2, 3, 4, 5], 1) == []          # the name is the other's


def test_a_name_is_forgotten_with_its_last_user(model):
    cache = paged_cache(model, 30, 2)
    read_and_name(model, cache, 0, [1, 2, 3, 4, 5])
    read_and_name(model, cache, 1, [1, 2, 3, 4, 6])
    cache.release([0])
    assert len(cache.find([1, 2, 3, 4, 5])) == 2
    cache.release([1])
    assert cache.find([1, 2, 3, 4, 5]) == [] and not cache.pages.named and not cache.pages.in_use


def test_a_page_that_is_written_again_loses_its_name(model):
    cache = paged_cache(model, 30, 2)
    read_and_name(model, cache, 0, [1, 2, 3, 4, 5])
    cache.select([0]).lengths = [3]
    assert len(cache.find([1, 2, 3, 4, 5])) == 1
    consistent(cache)


def test_the_first_name_stays():
    pages = Pages(3)
    a, b = pages.take(), pages.take()
    pages.name(a, (None, (1, 2)))
    pages.name(b, (None, (1, 2)))
    pages.name(a, (None, (3, 4)))
    assert pages.named == {(None, (1, 2)): a}
    pages.give(b)
    assert pages.named == {(None, (1, 2)): a} and pages.in_use == 1


# ---- memory

@pytest.mark.parametrize(("kind", "numbers"), [
    ("latent", 8 * (22 + 6)), ("six_bit", 2 * 3 * (3 + 1) + 2 * 2), ("per_head", 8 * 3 * (16 + 8)),
])
def test_bytes_are_the_formula(model, kind, numbers):
    cache = paged_cache(model, 7, 5, kind)
    assert cache.nbytes_per_token == model.config.n_layers * numbers
    assert cache.nbytes == 7 * 5 * cache.nbytes_per_token


@pytest.mark.parametrize("kind", ["latent", "per_head"])
@torch.no_grad()
def test_nan_of_one_text_reaches_no_other(model, kind):
    """Neither in a page that is taken again, nor behind the end of a shorter one."""
    cache, x = paged_cache(model, 8, 4, kind), torch.tensor([PROMPTS[0]])
    whole = model(x, dense(model, 1, kind))
    for store in cache.stores:
        store.fill_(torch.nan)
    two = cache.select([0, 1])
    two.positions(5, [5, 5])                             # takes 4 pages, and clears them
    for store in cache.stores:
        store[:, cache.tables[0]] = torch.nan            # the text of slot 0 is damaged
    two.undo()
    cache.grow(0, 17)
    damaged = cache.select([0])
    damaged.lengths = [12]
    h = model.hidden(x.expand(2, -1), cache.select([0, 1]), [5, 5])
    assert h[0].isnan().any()
    assert torch.allclose(model.head(h[1]), whole[0], rtol=0, atol=1e-10)


def test_what_is_refused(model):
    cache = paged_cache(model, 3, 4)
    with pytest.raises(ValueError, match="cache is full: all 3 pages are in use, expected a free"):
        generate(model, [[1] * 8, [2] * 8], 1, cache=cache.select([0, 1]))
    cache.reset()
    assert cache.pages.in_use == 0
    with pytest.raises(ValueError, match="cache: 'dense', expected 'latent', 'six_bit' or 'per_"):
        paged_cache(model, 3, 4, "dense")
    with pytest.raises(ValueError, match="n: 3, expected at most 2 slots that are empty"):
        generate(model, [[1, 2]], 1, cache=cache.select([1]))
        cache.fork(1, 3)
    with pytest.raises(ValueError, match="layer: 0 is written a second time"):
        for _ in range(2):
            cache.write(0, torch.zeros(3, 1, 22).double(), torch.zeros(3, 1, 6).double())
    cache.undo()
    with pytest.raises(ValueError, match="batch: 0, expected at least 1"):
        paged_cache(model, 0, 4)

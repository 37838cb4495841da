# SPDX-License-Identifier: MIT
"""A decode step of static shapes beside the plain one, in fp64 on a CPU, where it runs eagerly."""

import random

import pytest
import torch
from torch import Tensor

from dsv2_ref.attention.kv_cache import Cache, PerHeadCache
from dsv2_ref.config import TINY
from dsv2_ref.inference import generate as module
from dsv2_ref.inference.generate import generate, read, step
from dsv2_ref.inference.graph import WORTH, DecodeStep, worth
from dsv2_ref.inference.paged_cache import PagedLatentCache
from dsv2_ref.model import DeepSeekV2

PROMPTS = [[5, 9, 2, 7, 11], [3], [8] * 17, [1, 2, 3, 4, 5, 6, 7, 8, 9]]
KINDS = ["latent", "six_bit"]
# by step; the third sequence, of 17, ends where its room of 20 does
COUNTS = [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0]]


@pytest.fixture(scope="module")
def model() -> DeepSeekV2:
    torch.manual_seed(0)
    config = TINY.with_(vocab=43, n_h=3, d_h=10, d_r=6, d_v=8, d_c=24, d=30, init_std=0.3,
                        max_positions=64)
    return DeepSeekV2(config).double().eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@torch.no_grad()
def two(model: DeepSeekV2, kind: str, room: int = 20) -> tuple[Cache, Cache]:
    """Caches that have read the prompts; what lies behind their ends is no zero."""
    caches = []
    for _ in range(2):
        cache = model.new_cache(4, room, kind)
        read(model, [[7, 8] * (room // 2)] * 4, cache)
        cache.reset()
        read(model, PROMPTS, cache)
        caches.append(cache)
    return caches[0], caches[1]


def ids(seed: int, n: int = 4) -> Tensor:
    return torch.randint(0, 43, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_plain_ones_while_sequences_end_and_go_on(model, kind):
    plain, fixed = two(model, kind)
    taken = DecodeStep(model, fixed)
    for i, counts in enumerate(COUNTS):
        expected, got = step(model, ids(i), plain, counts), taken(ids(i), counts)
        runs = [b for b, n in enumerate(counts) if n]
        close(model.head(got)[runs], model.head(expected)[runs])
        assert fixed.lengths == plain.lengths
    for store, other in zip(fixed.stores, plain.stores, strict=True):    # and nothing was lost
        for b, n in enumerate(plain.lengths):
            close(store[:, b, :n].double(), other[:, b, :n].double())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_plain_passes_may_come_between(model, kind):
    plain, fixed = two(model, kind, 24)
    taken = DecodeStep(model, fixed)
    for i in range(6):
        expected = step(model, ids(i), plain, [1] * 4)
        got = step(model, ids(i), fixed, [1] * 4) if i in (2, 3) else taken(ids(i), [1] * 4)
        close(got, expected)
    for cache in (plain, fixed):
        cache.lengths = [3, 1, 5, 2]                     # as speculation would take tokens back
    close(taken(ids(9), [1] * 4), step(model, ids(9), plain, [1] * 4))
    assert fixed.lengths == plain.lengths == [4, 2, 6, 3]


@torch.no_grad()
def test_a_selection_of_sequences_steps_in_the_memory_of_all(model):
    plain, fixed = two(model, "latent")
    taken = DecodeStep(model, fixed.select([3, 0]))
    for i in range(3):
        close(taken(ids(i, 2), [1, 1]), step(model, ids(i, 2), plain.select([3, 0]), [1, 1]))
    assert fixed.lengths == plain.lengths == [8, 1, 17, 12]
    close(fixed.store[:, 1, :1], plain.store[:, 1, :1])


@torch.no_grad()
def test_nothing_depends_on_the_length(model):
    """The same tensors stay in place, and the passes see the same shapes."""
    _, fixed = two(model, "latent")
    taken, shapes = DecodeStep(model, fixed), []
    places = [t.data_ptr() for t in (taken._ids, taken._static.queries, taken._static.counts)]

    def rows(layer: int) -> tuple[Tensor, ...]:
        found = fixed.rows(layer)
        shapes.append([(x.shape, x.stride(), x.data_ptr()) for x in found] + [layer])
        return found

    taken._static.rows = rows
    for counts in COUNTS[:3]:
        taken(ids(1), counts)
    n = len(model.blocks)
    assert shapes[:n] == shapes[n : 2 * n] == shapes[2 * n :] and shapes[0][0][0][1] == 20
    assert places == [t.data_ptr() for t in (taken._ids, taken._static.queries,
                                             taken._static.counts)]


@torch.no_grad()
def test_what_is_refused(model):
    _, cache = two(model, "latent")
    taken = DecodeStep(model, cache)
    for _ in range(3):
        taken(ids(0), [1] * 4)
    for wrong, counts, message in (
        (ids(0), [1] * 4, "cache is full: 21 tokens after this step, expected at most 20"),
        (ids(0), [0] * 4, "counts: .* 1 or 0, not all 0"),
        (ids(0), [2, 1, 0, 1], "counts: .* expected 4 numbers"),
        (ids(0), [1, 1], "counts: .* expected 4 numbers"),
        (ids(0, 3), [1, 1, 0, 1], r"ids: shape \(3,\), expected \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            taken(wrong, counts)
        assert "\n" not in str(error.value) and cache.lengths == [8, 4, 20, 12]
    with pytest.raises(ValueError, match="tokens: id 43"):
        taken(torch.full((4,), 43), [1, 1, 0, 1])
    taken(ids(0), [1, 1, 0, 1])                          # what failed has left nothing behind
    assert cache.lengths == [9, 5, 20, 13]
    cache.lengths = [1] * 4
    cache.write(0, torch.zeros(4, 1, 24).double(), torch.zeros(4, 1, 6).double())
    with pytest.raises(ValueError, match="cache: a pass was begun"):
        taken(ids(0), [1, 1, 0, 1])
    for other in (PerHeadCache(2, 4, 8, 3, 5), PagedLatentCache(2, 5, 4, 24, 6)):
        with pytest.raises(ValueError, match="expected one of LatentCache, SixBitCache"):
            DecodeStep(model, other)


@torch.no_grad()
def test_all_positions_are_used_of_a_cache_with_room_for_more(model):
    cache = type(model.new_cache(1, 8))(len(model.blocks), 1, 80, 24, 6, torch.float64)
    plain = model.new_cache(1, 64)
    for each in (plain, cache):
        read(model, [[3] * 63], each)
    taken = DecodeStep(model, cache)
    close(taken(ids(0, 1), [1]), step(model, ids(0, 1), plain, [1]))
    with pytest.raises(ValueError, match="cache is full: 65 tokens .* at most 64"):
        taken(ids(0, 1), [1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [(), None])
def test_generate_gives_the_same_tokens_through_it(model, monkeypatch, kind, stop):
    free = generate(model, PROMPTS, 30, stop=())
    stop = stop if stop is not None else free[0][4]
    caches = [model.new_cache(4, 24, kind) for _ in range(2)]
    expected = generate(model, PROMPTS, 30, stop=stop, cache=caches[0])
    made = []

    class Seen(DecodeStep):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(module, "worth", lambda *_: True)
    monkeypatch.setattr(module, "DecodeStep", Seen)
    monkeypatch.setattr(module, "step", None)            # not called
    assert generate(model, PROMPTS, 30, stop=stop, cache=caches[1]) == expected
    assert len(made) == 1 and caches[1].lengths == caches[0].lengths


def test_when_steps_are_replayed(model, monkeypatch):
    cache = model.new_cache(2, 8)
    assert not model.step_is_static() and not worth(model, cache, 1000)      # on a CPU
    assert "CUDA graph" not in model.describe()
    monkeypatch.setattr("dsv2_ref.model.kernels_serve", lambda x: True)
    assert not model.step_is_static()                    # experts without a kernel wait
    monkeypatch.setattr("dsv2_ref.model.WAITING", ())
    assert model.step_is_static() and model.describe().endswith("generation: steps in a CUDA graph")
    assert worth(model, cache, WORTH) and not worth(model, cache, WORTH - 1)
    assert not worth(model, cache.select([1]), WORTH)    # whose rows would be copied, all of them
    assert not worth(model, PagedLatentCache(2, 5, 4, 24, 6), WORTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert not model.step_is_static()
    monkeypatch.setattr(model, "across", lambda forms: forms)
    assert not model.step_is_static()


def test_lengths_on_the_device_are_the_hosts():
    """Whatever is done to a cache and to what was made of it."""
    choose, uploads = random.Random(0), 0
    first = PerHeadCache(1, 4, 50, 2, 3)
    caches: list[Cache] = [first]
    for _ in range(400):
        cache = choose.choice(caches)
        act = choose.choice(["pass", "pass", "pass", "set", "release", "select", "fork", "undo"])
        if act in ("pass", "undo"):
            T = choose.choice([1, 1, 1, 3])
            counts = [min(choose.randint(0, T), 50 - n) for n in cache.lengths]
            cache.positions(T, counts)
            cache.write(0, *[torch.zeros(cache.batch, T, 2, 3)] * 2)
            if cache is not first:                       # which may share sequences with it
                first.release([choose.randrange(4)])
            cache.advance() if act == "pass" else cache.undo()
        elif act == "set":
            cache.lengths = [choose.randint(0, n) for n in cache.lengths]
        elif act == "release":
            cache.release([choose.randrange(cache.batch)])
        elif act == "select":
            some = choose.sample(range(cache.batch), choose.randint(1, cache.batch))
            caches.append(cache.select(some))
        else:
            caches.append(cache.fork(choose.randrange(cache.batch), 2))
        caches = [first, *caches[1:][-3:]]
        for each in caches:
            if "lengths" in each._known:
                numbers, there = each._known["lengths"]
                assert there.tolist() == numbers
                uploads += numbers == each.lengths
            got = each.positions(1, [0] * each.batch)
            assert got[:, 0].tolist() == each.lengths
            each.undo()
    assert uploads > 100


def test_what_a_pass_advances_is_not_uploaded(monkeypatch):
    cache, uploads = PerHeadCache(1, 3, 50, 2, 3), []
    cache.lengths = [4, 2, 7]
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: uploads.append(a) or made(*a, **k))

    def passes(T: int, counts: list[int] | None, times: int) -> int:
        uploads.clear()
        for _ in range(times):
            assert cache.positions(T, counts)[:, 0].tolist() == cache.lengths
            cache.write(0, *[torch.zeros(3, T, 2, 3)] * 2)
            cache.advance()
        return len(uploads)

    assert passes(1, None, 1) == 3 and passes(1, None, 4) == 0   # first places, lengths, counts
    assert passes(1, [1, 0, 1], 1) == 2 and passes(1, [1, 0, 1], 4) == 0     # real tokens, counts
    assert passes(2, None, 1) == 1 and passes(2, None, 4) == 0
    assert cache.lengths == [4 + 20, 2 + 15, 7 + 20]

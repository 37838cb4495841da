# SPDX-License-Identifier: MIT
"""The engine: every request as `generate` alone gives it, whatever else runs; pages and errors."""

import random
import re
from dataclasses import dataclass, field

import pytest
import torch

from dsv2_ref.config import TINY
from dsv2_ref.inference import pieces as module
from dsv2_ref.inference.engine import Engine
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2

PAGE = 4
KINDS = pytest.mark.parametrize("kind", ["latent", "six_bit", "per_head"])
CONFIG = TINY.with_(vocab=43, n_h=3, d_h=10, d_r=6, d_v=8, d_c=22, d=30, init_std=0.3,
                    max_positions=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeepSeekV2(CONFIG).double().eval()


@dataclass
class Ask:
    """The arguments of a request, and what came of it."""

    tokens: list[int]
    max_new_tokens: int = 8
    temperature: float = 0.0
    top_p: float = 1.0
    stop: object = ()
    seed: int | None = None
    got: list[int] = field(default_factory=list)
    finished: bool = False

    def added_to(self, engine):
        return engine.add(self.tokens, self.max_new_tokens, self.temperature, self.top_p, self.stop,
                          self.seed)

    def alone(self, model, kind):
        cache = model.new_cache(1, 64, "six_bit" if kind == "six_bit" else "latent")
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return generate(model, [self.tokens], self.max_new_tokens, self.temperature, self.top_p,
                        self.stop, cache, generator=generator)[0]


def engine_of(model, pages, kind="latent", chunk=8):
    bytes_of_a_page = Engine(model, 10**6, kind, PAGE, chunk).cache.nbytes_per_token * PAGE
    return Engine(model, pages * bytes_of_a_page, kind, PAGE, chunk)


def served(engine, asks):
    """Adds all, reads all."""
    ids = {ask.added_to(engine): ask for ask in asks}
    for id, token, finished in engine.run():
        assert not ids[id].finished
        ids[id].got.append(token)
        ids[id].finished = finished
    assert all(ask.finished for ask in asks)


def empty(engine):
    """Nothing is held: no page, no user, no name, no slot, no request."""
    pages = engine.cache.pages
    assert engine.pages_in_use == 0 and not any(pages.users) and not pages.named
    assert sorted(pages.free) == sorted(engine._slots) == list(range(len(pages.users)))
    assert not any(engine.cache.tables.values()) and not any(engine.cache._lengths)
    assert not engine._requests and not engine._out and not engine._suspects


def counted(engine, name):
    """Calls of a method of this engine, from now on: what each returned."""
    calls, plain = [], getattr(engine, name)

    def method(*args):
        calls.append(plain(*args))
        return calls[-1]

    setattr(engine, name, method)
    return calls


def passes_of(engine, monkeypatch):
    """How many tokens each pass of the model reads, from now on."""
    sizes, plain = [], engine.model.embed

    def embed(tokens):
        sizes.append(tokens.numel())
        return plain(tokens)

    monkeypatch.setattr(engine.model, "embed", embed)
    return sizes


def random_ask(choose, seed):
    prefix = choose.choice([[], [7, 8, 9, 10, 11, 12], [5] * 9, [7, 8, 9, 10, 30, 31, 32, 33, 34]])
    tokens = prefix + [choose.randrange(43) for _ in range(choose.choice([1, 2, 5, 14]))]
    temperature = choose.choice([0.0, 0.0, 0.7, 1.5])
    return Ask(tokens, choose.randrange(1, 14), temperature, choose.choice([1.0, 0.8]),
               choose.choice([(), 5, [1, 2, 3, 4]]), seed)


# ---- every request as `generate` alone gives it

@KINDS
@pytest.mark.parametrize("pages", [12, 80])
def test_random_arrivals_and_cancellations(model, kind, pages):
    """Mixed lengths, sampling, stops, common prefixes, long prompts; with 12 pages, preemption."""
    choose, engine = random.Random(pages), engine_of(model, pages, kind)
    stopped = counted(engine, "_stop_newest")
    asks, asked, cancelled = {}, 0, set()
    while asked < 30 or engine._requests:
        for _ in range(choose.choice([0, 1, 3]) if asked < 30 else 0):
            ask = random_ask(choose, asked)
            asks[ask.added_to(engine)] = ask
            asked += 1
        for _, (id, token, finished) in zip(range(choose.randrange(1, 12)), engine.run()):
            assert id not in cancelled and not asks[id].finished
            asks[id].got.append(token)
            asks[id].finished = finished
        if choose.random() < 0.15 and asks:
            gone = choose.choice(sorted(asks))
            engine.cancel(gone)
            cancelled.add(gone)
    for id, token, finished in engine.run():
        asks[id].got.append(token)
        asks[id].finished = finished
    for id, ask in asks.items():
        expected = ask.alone(model, kind)
        if id in cancelled and not ask.finished:
            assert ask.got == expected[: len(ask.got)]
        else:
            assert ask.got == expected and ask.finished
    assert len(cancelled) > 1 and sum(ask.finished for ask in asks.values()) > 20
    assert (True in stopped) == (pages == 12)
    empty(engine)


@KINDS
def test_preempted_requests_draw_what_they_would_have(model, kind, monkeypatch):
    """Four that grow from 2 to 7 pages each, in 9: the newest are stopped, time after time."""
    asks = [Ask([9, 2, i, 4, 6], 20, 1.1, 0.9, (), 100 + i) for i in range(4)]
    engine = engine_of(model, 9, kind)
    stopped, read = counted(engine, "_stop_newest"), passes_of(engine, monkeypatch)
    served(engine, asks)
    monkeypatch.undo()
    assert sum(stopped) >= 3
    assert sum(read) > sum(len(a.tokens) + 19 for a in asks)           # some was read again
    assert [a.got for a in asks] == [a.alone(model, kind) for a in asks]
    assert len({tuple(a.got) for a in asks}) == 4
    empty(engine)


@pytest.mark.parametrize("kind", ["latent", "six_bit"])
def test_a_thousand_requests_leave_nothing_behind(model, kind):
    choose, engine = random.Random(5), engine_of(model, 150, kind, chunk=64)
    asks = [Ask([choose.randrange(43) for _ in range(choose.randrange(1, 7))],
                choose.randrange(1, 5), choose.choice([0.0, 0.0, 0.0, 1.0]), seed=i)
            for i in range(1000)]
    ids = {ask.added_to(engine): ask for ask in asks}
    gone = set(choose.sample(sorted(ids), 100))
    peak, left = 0, set(gone)
    for id, token, finished in engine.run():
        ids[id].got.append(token)
        ids[id].finished = finished
        peak = max(peak, engine.pages_in_use)
        if left:
            engine.cancel(left.pop())
    assert peak <= 150
    assert all(ask.finished for id, ask in ids.items() if id not in gone)
    for ask in asks[::25]:
        if ask.finished:
            assert ask.got == ask.alone(model, kind)
    empty(engine)


def test_seeds_and_their_absence(model):
    """A seed is `generate`'s generator; without one, torch's own decides, each request anew."""
    def draws():
        torch.manual_seed(3)
        asks = [Ask([4, 5], 10, 1.5) for _ in range(3)]
        served(engine_of(model, 30), asks)
        return [ask.got for ask in asks]

    first = draws()
    assert first == draws() and first[0] != first[1] != first[2]


def test_stop_is_that_of_generate(model):
    free = Ask([5, 9, 2], 12).alone(model, "latent")
    torch.manual_seed(0)
    same = DeepSeekV2(CONFIG.with_(eos=free[4])).double().eval()
    asks = [Ask([5, 9, 2], 12, stop=None), Ask([5, 9, 2], 12, stop=free[2]), Ask([5, 9, 2], 12)]
    served(engine_of(same, 30), asks)
    ends = [free.index(free[4]) + 1, free.index(free[2]) + 1, 12]
    assert [ask.got for ask in asks] == [free[:end] for end in ends]


def gaps(model, tokens, at):
    """The least gap of any choice that led to the logits at `at`: between logits and in routers."""
    x, c = torch.tensor([tokens]), model.config
    with torch.no_grad():
        top = model(x)[0, at].topk(2).values
        load = model.losses(x, x, with_load=True).load
    least = [float(top[0] - top[1])]
    for traffic in load:
        s = traffic.routing.scores[: at + 1].sort(-1, descending=True).values
        least.append(float((s[:, c.top_k - 1] - s[:, c.top_k]).min()))
    return min(least)


def test_fp32_differs_only_where_a_choice_is_close():
    """Other batches add up in another order: a tie within 1e-4 may be broken otherwise."""
    torch.manual_seed(1)
    model = DeepSeekV2(CONFIG.with_(max_devices=None, n_devices=1)).eval()
    asks = [Ask([(3 * i + j) % 43 for j in range(i + 1)], 30) for i in range(12)]
    served(engine_of(model, 40), asks)
    alone = [ask.alone(model, "latent") for ask in asks]
    for ask, expected in zip(asks, alone):
        if ask.got != expected:
            n = next(n for n, (a, b) in enumerate(zip(ask.got, expected)) if a != b)
            text = ask.tokens + expected[:n]
            assert gaps(model.double(), text, len(text) - 1) < 1e-4
            model.float()
    assert sum(ask.got == expected for ask, expected in zip(asks, alone)) >= 6


# ---- what a pass holds

@KINDS
def test_nothing_is_padded_and_nothing_read_twice(model, kind, monkeypatch):
    """Over a whole run the model sees each prompt token once, and each new one but the last."""
    asks = [Ask([i + j for j in range(n)], m) for i, (n, m) in enumerate(
        [(1, 9), (23, 3), (7, 1), (8, 8), (30, 12)])]
    engine = engine_of(model, 80, kind)
    read = passes_of(engine, monkeypatch)
    served(engine, asks)
    monkeypatch.undo()
    assert sum(read) == sum(len(a.tokens) + a.max_new_tokens - 1 for a in asks)
    assert max(read) <= 8 + len(asks)
    assert [a.got for a in asks] == [a.alone(model, kind) for a in asks]


def test_a_long_prompt_does_not_hold_up_who_is_decoding(model):
    """A prompt of 40 in chunks of 8: five passes, and a token of the other in each of them."""
    engine = engine_of(model, 80)
    first = engine.add([3, 4], 30, stop=())
    run = engine.run()
    next(run)
    late = engine.add(list(range(40)), 3, stop=())
    order = [id for id, _, _ in run]
    assert order.index(late) == 5 and order.count(first) == 29


def test_a_single_token_is_read_beside_a_full_chunk(model):
    """The newer request of one token draws in each of the four passes of the older one's prompt."""
    engine = engine_of(model, 80)
    long, short = engine.add(list(range(32)), 3, stop=()), engine.add([5], 9, stop=())
    assert [id for id, _, _ in engine.run()][:5] == [short] * 3 + [long, short]


def test_attention_takes_the_form_of_each_piece(model, monkeypatch):
    """One pass with a prompt and a decoder: expanded for the one, absorbed for the other."""
    forms, plain = [], module.attention_form

    def noted(c, x, T, S, kind):
        forms.append((T, S, plain(c, x, T, S, kind).__name__))
        return plain(c, x, T, S, kind)

    monkeypatch.setattr(module, "attention_form", noted)
    engine = engine_of(model, 80, chunk=40)
    engine.add([3] * 9, 4, stop=())
    run = engine.run()
    next(run)
    engine.add(list(range(21)), 2, stop=())
    next(run)
    assert forms == [(9, 9, "attend_expanded"), (1, 10, "attend_absorbed"),
                     (21, 21, "attend_expanded")]


@KINDS
def test_short_ones_are_not_as_long_as_the_longest(model, kind, monkeypatch):
    """Four of 9 and one of 50 tokens: what is gathered has at most twice their pages."""
    asks = [Ask([i] * 8, 3) for i in range(4)] + [Ask([5] * 49, 3)]
    engine, shapes = engine_of(model, 60, kind, chunk=128), []
    plain = engine.cache._gather

    def gather(store, table):
        shapes.append(tuple(table.shape))
        return plain(store, table)

    monkeypatch.setattr(type(engine.cache), "_gather", staticmethod(gather))
    served(engine, asks)
    decoding = [(B, P) for B, P in shapes if P in (3, 13)]
    assert set(decoding) == {(4, 3), (1, 13)}
    monkeypatch.undo()
    assert [a.got for a in asks] == [a.alone(model, kind) for a in asks]


# ---- memory

@KINDS
@pytest.mark.parametrize("memory", [9_000, 100_000, 123_456])
def test_pages_are_what_fits(model, kind, memory):
    c = model.config
    numbers = {"latent": 8 * (c.d_c + c.d_r), "six_bit": 2 * 3 * (3 + 1) + 2 * 2,
               "per_head": 8 * c.n_h * (c.d_h + c.d_r + c.d_v)}
    one = c.n_layers * PAGE * numbers[kind]
    engine = Engine(model, memory, kind, PAGE, 8)
    assert engine.cache.nbytes == memory // one * one <= memory
    assert sum(s.untyped_storage().nbytes() for s in engine.cache.stores) == engine.cache.nbytes
    assert len(engine.cache.pages.users) == memory // one


@pytest.mark.parametrize("chunk", [8, 64])
def test_who_does_not_fit_waits_and_nobody_is_let_in_past_it(model, chunk):
    """Pages for one prompt of 7 pages at a time; a small request behind it waits too.

    The first one's pages are promised to it before it has read that far: nobody is let in only to
    be stopped.
    """
    engine = engine_of(model, 9, chunk=chunk)
    stopped = counted(engine, "_stop_newest")
    ids = [engine.add([i] * 26, 6, stop=()) for i in (1, 2)] + [engine.add([3], 2, stop=())]
    peak, order = 0, []
    for id, _, _ in engine.run():
        order.append(id)
        peak = max(peak, engine.pages_in_use)
    assert order[:6] == [ids[0]] * 6 and len(order) == 14
    assert 7 <= peak <= 9 and stopped and not any(stopped)
    empty(engine)


def test_all_pages_with_a_request_each(model):
    """As many sequences as pages; the next ones wait for a slot too."""
    asks = [Ask([i, i + 1], 3) for i in range(11)]
    engine = engine_of(model, 5)
    served(engine, asks)
    assert [a.got for a in asks] == [a.alone(model, "latent") for a in asks]
    empty(engine)


@pytest.mark.parametrize("chunk", [1, 6, 15, 64])
@pytest.mark.parametrize("together", [True, False])
def test_a_common_prompt_is_stored_and_read_once(model, chunk, together, monkeypatch):
    """17 tokens and 3 of 4 new ones: 4 pages for all six, and one for each."""
    engine, prompt = engine_of(model, 60, chunk=chunk), [5 * i % 43 for i in range(16)]
    read = passes_of(engine, monkeypatch)
    asks = [Ask([*prompt, i], 4) for i in range(6)]
    ids, run, peak = {}, None, 0
    for ask in asks:
        ids[ask.added_to(engine)] = ask
        if not together and run is None:
            run = engine.run()
            ask.got.append(next(run)[1])
    for id, token, _ in engine.run():
        ids[id].got.append(token)
        peak = max(peak, engine.pages_in_use)
    assert peak == 4 + 6
    assert sum(read) == 16 + 6 * (1 + 3)
    monkeypatch.undo()
    assert [a.got for a in asks] == [a.alone(model, "latent") for a in asks]
    empty(engine)


def test_pages_that_others_use_outlive_a_cancelled_request(model):
    engine, prompt = engine_of(model, 60), [5 * i % 43 for i in range(17)]
    asks = [Ask([*prompt, i], 6) for i in range(3)]
    ids = [ask.added_to(engine) for ask in asks]
    for id, token, _ in engine.run():
        asks[id].got.append(token)
        engine.cancel(ids[0])
    assert asks[0].got in ([], asks[0].alone(model, "latent")[:1])
    assert [a.got for a in asks[1:]] == [a.alone(model, "latent") for a in asks[1:]]
    empty(engine)


# ---- the consumer

def test_whoever_stops_reading_loses_nothing(model):
    asks = [Ask([i, 4], 7, 0.8, seed=i) for i in range(5)]
    engine = engine_of(model, 60)
    ids = {ask.added_to(engine): ask for ask in asks}
    for n in (1, 4, 2, 9, 100):
        for _, (id, token, finished) in zip(range(n), engine.run()):
            ids[id].got.append(token)
            ids[id].finished = finished
    assert all(ask.finished for ask in asks)
    assert [a.got for a in asks] == [a.alone(model, "latent") for a in asks]
    assert list(engine.run()) == []
    empty(engine)


def test_two_readers_share_the_tokens(model):
    asks = [Ask([i, 4], 7) for i in range(3)]
    engine = engine_of(model, 60)
    ids = {ask.added_to(engine): ask for ask in asks}
    readers = [engine.run(), engine.run()]
    while engine._requests or engine._out:
        for reader in readers:
            if (item := next(reader, None)) is not None:
                ids[item[0]].got.append(item[1])
    assert [a.got for a in asks] == [a.alone(model, "latent") for a in asks]


def test_nothing_of_a_cancelled_request_is_yielded(model):
    """Not even what was drawn in the same step and waits to be read."""
    engine = engine_of(model, 60)
    ids = [engine.add([i], 5, stop=()) for i in range(4)]
    run = engine.run()
    assert next(run)[0] == ids[0]
    assert [entry[0] for entry in engine._out] == ids[1:]
    engine.cancel(ids[2])
    engine.cancel(ids[2])
    assert [id for id, _, _ in run if id == ids[2]] == []
    engine.cancel(ids[0])                                # has ended: nothing happens
    empty(engine)
    for id in (-1, 4):
        with pytest.raises(ValueError, match=f"id: {id}, expected one that add"):
            engine.cancel(id)


# ---- what goes wrong

@pytest.mark.parametrize("kind", ["latent", "six_bit", "per_head"])
@pytest.mark.parametrize("pages", [14, 60])
def test_numbers_that_are_none_end_their_request_alone(kind, pages):
    """Token 42 has no embedding: who reads it fails by name, the others get what they would."""
    torch.manual_seed(0)
    model = DeepSeekV2(CONFIG).double().eval()
    asks = [Ask([7, 8, 9, 10, 11, 2 * i], 7, 0.9 * (i % 2), seed=i) for i in range(5)]
    alone = [ask.alone(model, kind) for ask in asks]
    assert not any(42 in a for a in alone)
    with torch.no_grad():
        model.embedding.weight[42] = torch.nan
        model.head.weight = torch.nn.Parameter(model.head.weight.nan_to_num(0.0))
    bad = [Ask([7, 8, 42, 10, 11], 7), Ask([42], 7), Ask([7, 8, 42, 10, 11, 3], 7)]
    engine = engine_of(model, pages, kind)
    ids = {ask.added_to(engine): ask for ask in [*asks[:2], *bad[:2], *asks[2:], bad[2]]}
    wrong = {id for id, ask in ids.items() if ask in bad}
    named = set()
    while engine._requests or engine._out:
        try:
            for id, token, _ in engine.run():
                assert id not in wrong
                ids[id].got.append(token)
        except ValueError as error:
            assert re.match(r"request \d+: .*(NaN|infin).*, expected .*numbers", str(error))
            assert "\n" not in str(error)
            named.add(int(re.match(r"request (\d+)", str(error))[1]))
    assert named == wrong
    for ask, expected in zip(asks, alone):
        assert ask.got == expected
    empty(engine)


def test_an_interrupted_pass_is_begun_again(model, monkeypatch):
    """Pages that were named and not written are nobody's."""
    asks = [Ask([7, 8, 9, 10, 11, i], 6, 0.9, seed=i) for i in range(4)]
    engine = engine_of(model, 60)
    ids = {ask.added_to(engine): ask for ask in asks}
    plain, calls = engine.model.through, []

    def through(h, run):
        calls.append(len(h))
        if len(calls) in (1, 3, 6):
            raise KeyboardInterrupt
        return plain(h, run)

    monkeypatch.setattr(engine.model, "through", through)
    for _ in range(4):
        try:
            for id, token, _ in engine.run():
                ids[id].got.append(token)
        except KeyboardInterrupt:
            assert engine.pages_in_use == 0 and not engine.cache.pages.named
    monkeypatch.undo()
    assert [a.got for a in asks] == [a.alone(model, "latent") for a in asks]
    empty(engine)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(tokens=[]), "tokens: an empty prompt"),
    (dict(tokens=[43]), "tokens: id 43, expected 0 to 42"),
    (dict(tokens=[-1]), "tokens: id -1, expected 0 to 42"),
    (dict(tokens="ab"), "tokens: 'ab' where a sequence should be"),
    (dict(tokens=[[1]]), "tokens: .*expected integer ids"),
    (dict(max_new_tokens=0), "max_new_tokens: 0, expected at least 1"),
    (dict(max_new_tokens=64), "max_new_tokens: 64 after 2 tokens need 65 positions, expected at"),
    (dict(tokens=[3] * 65), "tokens: a prompt of 65, expected at most max_positions = 64"),
    (dict(temperature=-1.0), "temperature: -1.0, expected a number >= 0"),
    (dict(top_p=0.0), "top_p: 0.0, expected above 0 and at most 1"),
    (dict(stop=43), "stop: id 43, expected 0 to 42"),
    (dict(max_new_tokens=36), "tokens: 2 and 36 new ones need room for 37, expected at most 36, w"),
], ids=lambda x: x if isinstance(x, str) else None)
def test_what_is_refused_when_it_is_added(model, changes, message):
    engine = engine_of(model, 9)
    with pytest.raises(ValueError, match=message) as error:
        engine.add(**(dict(tokens=[3, 4], max_new_tokens=4) | changes))
    assert "\n" not in str(error.value)
    empty(engine)


def test_the_largest_request_that_fits_is_served(model):
    ask, engine = Ask([3, 4], 35), engine_of(model, 9)
    served(engine, [ask])
    assert ask.got == ask.alone(model, "latent") and len(ask.got) == 35


@pytest.mark.parametrize(("args", "message"), [
    ((100, "latent"), "memory_bytes: 100, expected at least .*, a page of 4 tokens"),
    ((10**6, "dense"), "cache: 'dense', expected 'latent', 'six_bit' or 'per_head'"),
    ((10**6, "latent", 0), "page: 0, expected at least 1 token"),
    ((10**6, "latent", 4, 0), "chunk: 0, expected at least 1 token"),
])
def test_what_no_engine_is_made_of(model, args, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, *(args if len(args) > 2 else (*args, 4, 8)))

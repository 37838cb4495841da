# SPDX-License-Identifier: MIT
"""Generation: read, step, sample; what ends a sequence; what is refused."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dsv2_ref.config import TINY
from dsv2_ref.inference import generate as module
from dsv2_ref.inference.generate import NOT_A_NUMBER, generate, read, sample
from dsv2_ref.model import DeepSeekV2

PROMPTS = [[5, 9, 2, 7, 11], [3], [8] * 17, [1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TINY.with_(vocab=43, n_h=3, d_h=10, d_r=6, d_v=8, d_c=22, d=30, init_std=0.3,
                        max_positions=64)
    return DeepSeekV2(config).double().eval()


@torch.no_grad()
def naive(model, prompt, n):
    """No cache: the whole text is read again for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("piece", [1024, 4, 1])
def test_a_ragged_batch_is_each_prompt_alone_without_a_cache(model, monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    assert generate(model, PROMPTS, 20, stop=()) == [naive(model, p, 20) for p in PROMPTS]


def test_stop_ends_one_sequence_and_not_the_others(model):
    free = generate(model, PROMPTS, 20, stop=())
    stop = free[0][4]
    ended = generate(model, PROMPTS, 20, stop=stop)
    for a, b in zip(free, ended, strict=True):
        assert b == (a[: a.index(stop) + 1] if stop in a else a)
    assert generate(model, PROMPTS[:1], 20, stop=[stop, 42])[0] == ended[0]


def test_default_stop_is_the_models_own_end(model):
    free = generate(model, PROMPTS, 20, stop=())
    torch.manual_seed(0)
    same = DeepSeekV2(model.config.with_(eos=free[2][2])).double()
    assert generate(same, PROMPTS, 20) == generate(model, PROMPTS, 20, stop=free[2][2])


@pytest.mark.parametrize("several", [True, False])
def test_the_model_may_have_several_ends_or_none(model, several):
    free = generate(model, PROMPTS, 20, stop=())
    stops = (free[0][4], free[2][2]) if several else ()
    torch.manual_seed(0)
    same = DeepSeekV2(model.config.with_(eos=stops or None)).double()
    ended = generate(same, PROMPTS, 20)
    assert ended == generate(model, PROMPTS, 20, stop=stops)
    assert ([row[-1] in stops for row in ended][::2] == [True, True]) == several


def test_going_on_from_a_cache_equals_one_long_prompt(model):
    cache = model.new_cache(2, 40)
    first = generate(model, PROMPTS[:2], 4, stop=(), cache=cache)
    assert cache.lengths == [len(p) + 3 for p in PROMPTS[:2]]     # all but the last new token
    turn = [[row[-1], 6, 6] for row in first]
    second = generate(model, turn, 5, stop=(), cache=cache)
    whole = [p + row + [6, 6] for p, row in zip(PROMPTS, first, strict=False)]
    assert second == generate(model, whole, 5, stop=())


def test_an_ended_sequence_takes_no_room_in_the_cache(model):
    free = generate(model, PROMPTS, 12, stop=())
    stop = free[2][0]
    cache = model.new_cache(4, 40)
    out = generate(model, PROMPTS, 12, stop=stop, cache=cache)
    assert min(map(len, out)) < max(map(len, out))
    assert cache.lengths == [len(p) + len(row) - 1 for p, row in zip(PROMPTS, out, strict=True)]


def test_stream_sees_every_token_once(model):
    steps = []
    free = generate(model, PROMPTS, 8, stop=())
    stop = free[1][3]
    out = generate(model, PROMPTS, 8, stop=stop, stream=steps.append)
    assert [[s[b] for s in steps if s[b] is not None] for b in range(4)] == out


def test_sampling_is_reproducible_and_leaves_the_model_as_it_was(model):
    def draw(seed):
        return generate(model, PROMPTS, 12, temperature=1.3, top_p=0.9, stop=(),
                        generator=torch.Generator().manual_seed(seed))

    assert draw(0) == draw(0) != draw(1)
    model.train()
    draw(0)
    assert model.training
    model.eval()


def test_sample_has_the_right_frequencies():
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    g = torch.Generator().manual_seed(0)

    def frequencies(temperature, top_p):
        ids = sample(p.log().expand(40_000, 4), temperature, top_p, g)
        return torch.bincount(ids, minlength=4) / 40_000

    assert torch.allclose(frequencies(1.0, 1.0), p, atol=0.01)
    assert torch.allclose(frequencies(0.5, 1.0), p**2 / (p**2).sum(), atol=0.01)
    # 0.5 + 0.25 reach 0.7: the other two never come
    assert torch.allclose(frequencies(1.0, 0.7), torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.01)
    assert frequencies(1.0, 0.75)[2:].sum() == 0
    assert frequencies(1.0, 0.76)[2] > 0
    assert frequencies(1.0, 1e-6)[0] == 1
    assert sample(p.log()[None], 0.0, 1.0).tolist() == [0]


@pytest.mark.parametrize(("changes", "message"), [
    (dict(tokens=[[]]), "tokens: an empty prompt"),
    (dict(tokens=[]), "tokens: an empty prompt"),
    (dict(tokens=[[43]]), "tokens: id 43, expected 0 to 42"),
    (dict(max_new_tokens=0), "max_new_tokens: 0, expected at least 1"),
    (dict(temperature=-1.0), "temperature: -1.0, expected a number >= 0"),
    (dict(temperature=float("nan")), "temperature: nan, expected a number >= 0"),
    (dict(top_p=0.0), "top_p: 0.0, expected above 0 and at most 1"),
    (dict(tokens=[3, 4]), "tokens: 3 where a sequence should be"),
    (dict(tokens="ab"), "tokens: 'a' where a sequence should be"),
    (dict(tokens=[[1.5]]), "tokens: .1.5., expected integer ids"),
    (dict(tokens=torch.ones(1, 3)), "tokens: .*expected integer ids"),
    (dict(stop="\n"), "stop: .*expected integer ids"),
    (dict(stop=["\n"]), "stop: .*expected integer ids"),
    (dict(stop=1.0), "stop: .*expected integer ids"),
    (dict(stop=[3, 43]), "stop: id 43, expected 0 to 42"),
    (dict(stop=-1), "stop: id -1, expected 0 to 42"),
    (dict(stop=True), "stop: .*expected integer ids"),
    (dict(tokens=5), "tokens: 5 where a sequence should be"),
    (dict(tokens=torch.tensor(5)), "tokens: 5 where a sequence should be"),
    (dict(tokens=torch.ones(1, 3) > 0), "tokens: .*expected integer ids"),
    (dict(tokens=[[3] * 65]), "tokens: a prompt of 65, expected at most max_positions = 64"),
    (dict(max_new_tokens=61), "max_new_tokens: 61 after 5 tokens need 65 positions, expected at"),
], ids=lambda x: x if isinstance(x, str) else None)
def test_bad_input(model, changes, message):
    args = dict(tokens=PROMPTS[:1], max_new_tokens=4) | changes
    with pytest.raises(ValueError, match=message):
        generate(model, **args)


@pytest.mark.parametrize("kind", ["latent", "six_bit"])
def test_a_sequence_ends_where_its_room_does_and_the_others_go_on(model, kind):
    """A cache of 20 tokens: 17 of a prompt leave room to read 3 new ones, of 1 for 19."""
    cache, roomy = (model.new_cache(4, n, kind) for n in (20, 64))
    free = generate(model, PROMPTS, 30, stop=(), cache=roomy)
    ended = generate(model, PROMPTS, 30, stop=(), cache=cache)
    assert ended == [row[: 20 - len(p) + 1] for p, row in zip(PROMPTS, free, strict=True)]
    assert cache.lengths == [20] * 4
    with pytest.raises(ValueError, match="cache is full: 20 . 5 tokens"):
        generate(model, PROMPTS, 1, stop=(), cache=cache)


def test_all_positions_are_used(model):
    """The last new token is never read: a prompt of 64 leaves room for one, of 60 for five."""
    long = [(PROMPTS[3] * 8)[:64]]
    assert generate(model, long, 1, stop=()) == [naive(model, long[0], 1)]
    assert len(generate(model, [long[0][:60]], 5, stop=())[0]) == 5
    short, full = generate(model, [long[0][:10], long[0]], 9, stop=())
    assert len(full) == 1 and short == generate(model, [long[0][:10]], 9, stop=())[0]


def test_unequal_caches_use_their_room(model):
    """Rows of 15 and 2 tokens: the short one takes a piece that the long one has no room for."""
    for lengths in ([15, 2, 15], [2, 15, 4]):
        text = [[(3 * b + 7 * t) % 43 for t in range(40)] for b in range(3)]
        cache = model.new_cache(3, 18)
        read(model, [row[:n] for row, n in zip(text, lengths)], cache)
        new = [min(18 - n, 12) for n in lengths]
        h = read(model, [row[n : n + k] for row, n, k in zip(text, lengths, new)], cache)
        assert cache.lengths == [n + k for n, k in zip(lengths, new)]
        for b, n in enumerate(cache.lengths):
            alone = model.hidden(torch.tensor([text[b][:n]]))[0, -1]
            torch.testing.assert_close(h[b], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("as_given", [int, np.int64, lambda i: [np.int32(i)], lambda i: {i, 42},
                                      lambda i: torch.tensor([i]), lambda i: torch.tensor(i)])
def test_stops_of_any_integer_kind(model, as_given):
    stop = generate(model, PROMPTS[:1], 20, stop=())[0][4]
    expected = generate(model, PROMPTS[:1], 20, stop=stop)
    assert expected[0][-1] == stop
    assert generate(model, PROMPTS[:1], 20, stop=as_given(stop)) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_one_line(model, temperature, bad):
    broken = DeepSeekV2(model.config).double()
    broken.load_state_dict(model.state_dict())
    broken.blocks[2].experts.W_down.data[:] = bad
    with pytest.raises(ValueError, match="logits: NaN or infinite for new token 0 of seq") as error:
        generate(broken, PROMPTS[:2], 5, temperature=temperature)
    assert "\n" not in str(error.value)
    sound = generate(model, PROMPTS[:2], 3, stop=())
    cache = model.new_cache(2, 40)
    generate(model, PROMPTS[:2], 3, stop=(), cache=cache)
    cache.store[1, 1, 2, 0] = bad                        # one row of one sequence
    with pytest.raises(ValueError, match="for new token 0 of sequence 1"):
        generate(model, [[row[-1]] for row in sound], 3, stop=(), cache=cache)


def test_a_sequence_that_has_ended_may_be_no_number(model):
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [float("-inf"), 2.0], [1e30, -1e30]])
    for temperature in (0.0, 1.0):
        ids = sample(logits, temperature, 0.5, torch.Generator().manual_seed(0)).tolist()
        assert ids == [1, NOT_A_NUMBER, 1, 0]


def test_threads_that_generate_leave_a_training_model_in_training(model):
    model.train()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: generate(model, PROMPTS, 6), range(8)))
    assert model.training and all(m.training for m in model.modules())
    model.eval()


def test_sampling_at_the_edges():
    g = torch.Generator().manual_seed(0)
    # every token of a vocabulary can come at top_p 1, those with probability 1e-9 too
    p = torch.full((1024,), 1e-9)
    p[0] = 1 - 1023e-9
    counts = torch.zeros(1024)
    flat = (p.log() * 1e-3).expand(1024, -1)             # flattened by the temperature
    for _ in range(8):
        counts += torch.bincount(sample(flat / 1e3, 1e-3, 1.0, g), minlength=1024)
    assert (counts > 0).sum() > 975
    # 0.5 + 0.3 = 0.8 exactly: two tokens, in any dtype, whatever the sum rounds to
    for q in ([0.5, 0.3, 0.1, 0.1], [0.1, 0.3, 0.1, 0.5], [0.6, 0.2, 0.1, 0.1]):
        for dtype in (torch.float32, torch.float64):
            logits = torch.tensor(q, dtype=torch.float64).log().to(dtype).expand(2000, -1)
            drawn = set(sample(logits, 1.0, 0.8, g).tolist())
            assert drawn == set(sorted(range(4), key=lambda i: -q[i])[:2])
            assert len(set(sample(logits, 1.0, 0.81, g).tolist())) == 3
    # any temperature above 0 and any top_p above 0
    logits = torch.tensor([[1.0, 2.0, 1.999]])
    for temperature, top_p in ((1e-40, 1.0), (1e-300, 0.9), (1.0, 1e-320), (1e-40, 1e-320)):
        assert sample(logits, temperature, top_p, g).tolist() == [1]
    uniform = torch.bincount(sample(logits.expand(6000, -1), 1e300, 1.0, g), minlength=3)
    assert (uniform > 1800).all()

# SPDX-License-Identifier: MIT
import pytest
import torch

from dsv2_ref.config import TINY
from dsv2_ref.inference import generate as module
from dsv2_ref.inference.generate import TextStream, generate, sample
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
    (dict(max_new_tokens=80), "max_tokens: 85, expected at most max_positions = 64"),
], ids=lambda x: x if isinstance(x, str) else None)
def test_bad_input(model, changes, message):
    args = dict(tokens=PROMPTS[:1], max_new_tokens=4) | changes
    with pytest.raises(ValueError, match=message):
        generate(model, **args)


def test_a_cache_that_fills_up(model):
    with pytest.raises(ValueError, match="cache is full: 8 . 1 tokens"):
        generate(model, PROMPTS[:1], 9, stop=(), cache=model.new_cache(1, 8))


def test_text_stream_waits_for_whole_characters():
    data = "a知é".encode()
    written = []
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), written.append, ">")
    for byte in data:
        stream([byte])
    stream([None])
    assert written == [">", "a", "知", "é"]

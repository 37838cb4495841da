# SPDX-License-Identifier: MIT
"""Texts until a stop: each as `generate` alone writes it, cut at the first stop in its text."""

import pytest
import torch
from refusals import refused

from dsv2_ref import checkpoint
from dsv2_ref.inference import until
from dsv2_ref.inference.engine import Engine
from dsv2_ref.inference.generate import generate
from dsv2_ref.inference.until import Ask, continue_until, cut
from dsv2_ref.text.tokenizer import load_tokenizer

# of texts that the model knows: elsewhere tokens that it never met are as good as equal
PROMPTS = ["Once upon a time", "Long ago there was a little girl named", "从前有一个小女孩叫",
           "Lily took the kite to"]
ROOM = 10**6


@pytest.fixture(scope="module")
def loaded():
    return checkpoint.load("data/model").double(), load_tokenizer("data/model/tokenizer.json")


@pytest.mark.parametrize("text, stops, left", [
    ("a\n\nb\nc", ["\n"], "a"), ("a b. c, d", [",", "."], "a b"), ("abc", ["", "x"], "abc"),
    ("stop", ["stop"], ""), ("aab", ["ab", "aab"], ""), ("", ["a"], ""), ("abc", [], "abc"),
])
def test_a_text_is_cut_at_the_first_stop(text, stops, left):
    assert cut(text, stops) == left


def asks(tokenizer, *stops, n=16):
    return [Ask([tokenizer.bos, *tokenizer.encode(prompt)], stops, n) for prompt in PROMPTS]


@pytest.mark.parametrize("stops", [
    (), ("",), (".",), (" was a", "。"), ("\n", "e", "。"), ("zzzz",)])
def test_each_is_what_generate_writes_alone(loaded, stops):
    model, tokenizer = loaded
    asked = asks(tokenizer, *stops)
    whole = [tokenizer.decode(generate(model, [ask.tokens], ask.max_new_tokens)[0])
             for ask in asked]
    assert continue_until(model, tokenizer, asked, ROOM) == [cut(text, stops) for text in whole]
    if any(stops) and stops != ("zzzz",):
        assert any(stop in text for stop in stops for text in whole)


def test_a_request_ends_where_its_stop_is(loaded, monkeypatch):
    """Nothing is written behind a stop, however many tokens spell it."""
    model, tokenizer = loaded
    written = []

    class Counted(Engine):
        def run(self):
            for entry in super().run():
                written.append(entry)
                yield entry

    monkeypatch.setattr(until, "Engine", Counted)
    (ask,) = asks(tokenizer, n=60)[:1]
    ids = generate(model, [ask.tokens], 60)[0]
    for n in (1, 5, 12):
        stop, before = tokenizer.decode(ids[n : n + 3]), tokenizer.decode(ids[:n])
        assert stop not in before + stop[:-1]
        written.clear()
        assert continue_until(model, tokenizer, [Ask(ask.tokens, [stop], 60)], ROOM) == [before]
        assert len(written) == n + 3


def test_samples_follow_from_torch_s_seed(loaded):
    model, tokenizer = loaded
    asked = [Ask([tokenizer.bos], [], 12, 1.5) for _ in range(3)]
    found = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found.append(continue_until(model, tokenizer, asked, ROOM))
    assert found[0] == found[1] != found[2] and len(set(found[0])) > 1


def test_what_does_not_fit_is_refused(loaded):
    model, tokenizer = loaded
    refused(lambda: continue_until(model, tokenizer, [Ask([0] * 1000, [], 100)], ROOM),
            "1000 tokens", "1024")
    refused(lambda: continue_until(model, tokenizer, [Ask([0] * 600, [], 100)], 10**5), "bytes of")
    assert continue_until(model, tokenizer, [], ROOM) == []

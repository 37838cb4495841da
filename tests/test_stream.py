# SPDX-License-Identifier: MIT
"""stream.py: the pieces that are written are, together, the decoded text of all ids."""

import random

import pytest

from dsv2_ref.text.stream import TextStream
from dsv2_ref.text.tokenizer import train_tokenizer


def decode(ids):
    return bytes(ids).decode("utf-8", "replace")


def written(data, decode=decode, before=""):
    """The pieces that a stream of these ids writes, and those that `end` adds."""
    pieces = []
    stream = TextStream(decode, pieces.append, before)
    for i in data:
        stream([i])
    stream([None])
    ended = len(pieces)
    stream.end()
    return pieces[:ended], pieces[ended:]


def test_half_a_character_waits_for_its_other_half():
    assert written("a知é".encode(), before=">") == ([">", "a", "知", "é"], [])


@pytest.mark.parametrize(("data", "while_it_runs", "at_the_end"), [
    ("a知".encode()[:-1], ["", "a"], ["\ufffd"]),             # cut by max_new_tokens
    ("a\ufffd".encode(), ["", "a"], ["\ufffd"]),              # U+FFFD itself, the last character
    ("\ufffdb".encode(), ["", "\ufffdb"], []),
    ("知".encode()[:2] + b"b", ["", "\ufffdb"], []),          # a half that nothing completes
    (b"\xff\xfe", [""], ["\ufffd\ufffd"]),
])
def test_what_waits_is_written_at_the_end(data, while_it_runs, at_the_end):
    assert written(data) == (while_it_runs, at_the_end)


def test_the_pieces_are_the_decoded_text_whatever_the_ids():
    tokenizer = train_tokenizer(["the cat 知道 🙂 sat"] * 20, 300)
    draw = random.Random(0)
    for _ in range(200):
        ids = draw.choices(range(tokenizer.vocab), k=draw.randrange(1, 12))
        running, rest = written(ids, tokenizer.decode)
        assert "".join(running + rest) == tokenizer.decode(ids)

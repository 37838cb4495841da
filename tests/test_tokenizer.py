# SPDX-License-Identifier: MIT
"""tokenizer.py: lossless on any text, deterministic, and deaf to special tokens in documents."""

import json
import random
from pathlib import Path

import pytest

from dsv2_ref.files.whole import write_text
from dsv2_ref.text import tokenizer as module
from dsv2_ref.text.tokenizer import (
    BEGIN,
    END,
    PIECES,
    load_tokenizer,
    train_tokenizer,
)

SOURCE = '''\
class Reader:
    """Reads lines."""

    def read(self, number):
        for i in range(number):
            if i % 2:
                return self.lines[i]
        return None
'''
CHINESE = "从前有一个叫小明的小男孩。他很勇敢。\n从前有一个叫小红的小姑娘。她很善良。\n"
TEXTS = [SOURCE, CHINESE, "the cat sat on the mat, 12345 times\r\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 500)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a",
        " a",
        "  a  b   ",
        "\n\n\n    x\n\t\ty \n",
        "line\r\nline\r\rline\n\r",
        "\x00\x01\x7f\x1b[0m\x85\u2028\u2029\ufeff",
        "从前有个人，名叫“小明”。　全角空格",
        "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 é ﬁ ½ ß İ",
        "snake_case __init__ 3.14159e-10 0xFF a_1",
        "العربية עברית हिन्दी ไทย 한국어 にほんご",
        "\U0010ffff\U00020000",
        SOURCE,
    ],
)
def test_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos, tokenizer.eos} & set(ids)
    assert all(0 <= i < tokenizer.vocab for i in ids)


def test_lossless_on_random_unicode(tokenizer):
    draw = random.Random(0)
    alphabet = [chr(i) for i in range(0x250)] + list(" \n\t\r  中文🙂́_09")
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=draw.randrange(40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS[:3]) == [tokenizer.encode(t) for t in TEXTS[:3]]
    assert tokenizer.encode_batch([]) == []


def test_special_token_text_stays_text(tokenizer, tmp_path):
    write_text(tmp_path / "tokenizer.json", tokenizer.to_json())
    for either in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json")):
        text = f"a{END}{BEGIN} b"
        ids = either.encode(text)
        assert not {either.bos, either.eos} & set(ids)
        assert either.decode(ids) == text


def test_document_marks_are_two_ids_and_not_shown(tokenizer):
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    ids = [tokenizer.bos, *tokenizer.encode("abc"), tokenizer.eos]
    assert tokenizer.decode(ids) == "abc"


def test_pieces_suit_source_and_chinese(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("\n        return self.lines[i]")]
    assert pieces[0] == "\n        "  # line end and indentation are one token
    assert "return" in pieces
    spaces = [tokenizer.decode([i]) for i in tokenizer.encode("x  # the")]
    assert spaces[:2] == ["x", " "] and spaces[2].startswith(" ")  # the last goes to its word
    assert len(tokenizer.encode("从前有一个叫小明的小男孩")) < 12
    digits = [tokenizer.decode([i]) for i in tokenizer.encode("123451234512345")]
    assert max(map(len, digits)) <= 3


def test_training_is_deterministic_and_has_the_asked_size(tokenizer, tmp_path):
    again = train_tokenizer(iter(TEXTS), 500)
    for name, each in (("a", tokenizer), ("b", again)):
        write_text(tmp_path / name, each.to_json())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert 258 < tokenizer.vocab <= 500
    assert train_tokenizer(TEXTS, 258).vocab == 258
    assert train_tokenizer([], 258).decode(train_tokenizer([], 258).encode("né\0")) == "né\0"


def test_unbroken_text_is_learnt_from_in_parts_and_encoded_whole(monkeypatch):
    """Whole, six files of 50,000 letters took 5.5 s and 500,000 letters minutes."""
    unbroken = train_tokenizer(["ab" * 1000, "知" * 1000, "=" * 1000, " " * 1000, "\n" * 1000], 400)
    # tokens of 2, 4, 8, ... characters, the longest as long as the parts that were learnt from
    tokens = [unbroken.decode([i]) for i in range(unbroken.vocab)]
    for letter in "a知= \n":
        assert max(len(token) for token in tokens if letter in token) == 256
    assert len(unbroken.encode("ab" * 1000)) == 8                       # 2000 = 7 · 256 + 208
    learnt = train_tokenizer(TEXTS, 500).tokenizer.to_str()
    monkeypatch.setattr(module, "LONGEST_PIECE", 5000)
    assert train_tokenizer(TEXTS, 500).tokenizer.to_str() == learnt


def test_the_committed_tokenizer_cuts_as_a_new_one_does(tokenizer):
    path = Path(__file__).parents[1] / "data" / "model" / "tokenizer.json"
    committed, new = (json.loads(t.tokenizer.to_str()) for t in (load_tokenizer(path), tokenizer))
    assert committed["pre_tokenizer"] == new["pre_tokenizer"]
    assert new["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": PIECES}


def test_a_vocabulary_with_gaps_in_its_ids(tokenizer, tmp_path):
    """The embedding has a row for every id up to the largest, named or not."""
    data = json.loads(tokenizer.tokenizer.to_str())
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    data["model"]["vocab"][last] = 900
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert len(data["model"]["vocab"]) == tokenizer.vocab < 500 and loaded.vocab == 901
    assert loaded.decode([900]) == tokenizer.decode([tokenizer.vocab - 1]) != ""
    assert loaded.decode([899]) == ""


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")
    write_text(path, tokenizer.to_json())
    loaded = load_tokenizer(path)
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (loaded.bos, loaded.eos, loaded.vocab) == (0, 1, tokenizer.vocab)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_errors_are_one_clear_line(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vocab is 257, expected at least 258"):
        train_tokenizer(TEXTS, 257)
    bad = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="no tokenizer at .*tokenizer.json"):
        load_tokenizer(bad)
    write_text(bad, tokenizer.to_json())
    other = json.loads(bad.read_text(encoding="utf-8"))
    other["added_tokens"] = other["added_tokens"][:1]
    del other["model"]["vocab"][END]
    contents = [b"", b"{", b"{}", b"\xff\xfe", b"[1]", json.dumps(other).encode()]
    for content in contents:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="is not a usable tokenizer.json") as caught:
            load_tokenizer(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError):
        tokenizer.encode("half a pair: \ud83d")

# SPDX-License-Identifier: MIT
"""Tasks as text: what is hidden, what is asked, where it stands."""

import random

import pytest

from dsv2_ref.text import stories
from dsv2_ref.text.corpora import Document
from dsv2_ref.text.needles import (
    KINDS,
    NAMES,
    WORDS,
    Needles,
    haystack,
    hidden_in,
    sentences,
)
from dsv2_ref.text.tokenizer import train_tokenizer

TEXTS = [story.text for story in stories.sample(0, 300)]
TOKENIZER = train_tokenizer([*TEXTS, *sentences(0, 3000)], 1024)
NEEDLES = Needles(TOKENIZER)


def told(task):
    return [TOKENIZER.decode(needle) for needle in task.needles]


def test_one_needle_tells_the_answer():
    task = NEEDLES.task("one", random.Random(0))
    name = TOKENIZER.decode(task.question).removeprefix("\nRecall: ")
    words = TOKENIZER.decode(task.answer)
    assert told(task) == [f"\nRemember: {name}{words}."] and len(words.split()) == 4


@pytest.mark.parametrize("asked", range(4))
def test_of_several_needles_the_one_that_was_asked_for_tells_the_answer(asked):
    task = NEEDLES.task("several", random.Random(1), asked)
    name = TOKENIZER.decode(task.question).removeprefix("\nRecall: ")
    assert told(task)[asked] == f"\nRemember: {name}{TOKENIZER.decode(task.answer)}."
    assert sum(f" {name} " in needle for needle in told(task)) == 1      # the others differ in name
    assert len(task.needles) == 4


def test_any_of_several_is_asked_for_in_the_long_run():
    tasks = [NEEDLES.task("several", random.Random(seed)) for seed in range(40)]
    places = {[task.answer == needle[-5:-1] for needle in task.needles].index(True)
              for task in tasks}
    assert places == {0, 1, 2, 3}


def test_a_chain_leads_from_the_last_name_to_the_words_of_the_first():
    task = NEEDLES.task("chain", random.Random(2))
    first, second, third = (text.removeprefix("\nRemember: ").removesuffix(".").split()
                            for text in told(task))
    assert second[1:] == first[:1] and third[1:] == second[:1] and len(first) == 5
    assert TOKENIZER.decode(task.question).split() == ["Recall:", third[0]]
    assert TOKENIZER.decode(task.answer).split() == [second[0], *first]


def test_no_word_of_a_needle_occurs_in_a_story():
    words = set(" ".join(s.text for s in stories.sample(3, 2000)).replace(".", " ").split())
    assert not words & {*NAMES, *WORDS, "Remember:", "Recall:"}
    assert not set(NAMES) & set(WORDS)


def test_the_needles_words_are_tokens_of_their_own():
    for word in (*NAMES, *WORDS):
        assert len(TOKENIZER.encode(f" {word}")) == 1


def test_needles_stand_where_they_are_put_and_the_question_last():
    task, text = NEEDLES.task("chain", random.Random(4)), list(range(900, 920))
    a, b, c = (list(needle) for needle in task.needles)
    assert hidden_in(text, [0, 7, 20], task) == [
        *a, *text[:7], *b, *text[7:], *c, *task.question]
    assert len(hidden_in(text, [3, 3, 3], task)) + len(task.answer) - 1 == 20 + task.n_tokens


@pytest.mark.parametrize("places", ([5, 4, 6], [0, 1, 21], [-1, 0, 0]))
def test_places_outside_the_text_are_refused(places):
    with pytest.raises(ValueError, match="places: .*expected ascending numbers from 0 to 20"):
        hidden_in(list(range(20)), places, NEEDLES.task("chain", random.Random(4)))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind: 'two', expected one of one, several, chain"):
        NEEDLES.task("two", random.Random(0))
    assert KINDS == ("one", "several", "chain")


def test_a_haystack_is_the_marked_documents_and_starts_again_where_they_end():
    documents = [Document("a", "red kite"), Document("b", "old crow")]
    once = [i for d in documents
            for i in (TOKENIZER.bos, *TOKENIZER.encode(d.text), TOKENIZER.eos)]
    assert haystack(documents, TOKENIZER, 2 * len(once) + 3) == [*once, *once, *once[:3]]
    assert haystack(documents, TOKENIZER, 3) == once[:3]
    with pytest.raises(ValueError, match="text: no documents"):
        haystack([], TOKENIZER, 3)

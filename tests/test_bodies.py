# SPDX-License-Identifier: MIT
"""Heads that are found, answers that are cut, and what they are worth."""

import ast
from pathlib import Path

import pytest
from refusals import refused

import dsv2_ref
from dsv2_ref.alignment.bodies import Bodies, Head, dedent, heads
from dsv2_ref.text.corpora import Document
from dsv2_ref.text.tokenizer import train_tokenizer

FOLDER = Path(dsv2_ref.__file__).parent
FILES = [Document(name, (FOLDER / name).read_text(encoding="utf-8"))
         for name in ("text/stories.py", "text/grammar.py", "model.py")]
TOKENIZER = train_tokenizer([document.text for document in FILES], 500)
SOURCE = '''
import os, sys, re, random, statistics


class Counter:
    def plain(self, n):
        return n

    def one_line(self): return 1

    def told(self):
        """It tells."""
        # first
        return 2

    def told_alone(self):
        """Nothing else."""

    @property
    def commented(
        self,
    ):  # why
        return 3

    def above(self):

        # a word before
        self.n = 4

        def inner():
            return self.n
        return inner


async def later(x):
    \'\'\'Over
    lines.\'\'\'
    return await x


def long_one(alpha, beta, gamma, delta, alpha_beta, alpha_gamma, alpha_delta, beta_gamma):
    return alpha


def typed(x: int) -> dict[int,
                          str]:
    return {}
'''


def test_heads_end_behind_the_def_or_the_docstring():
    found = heads([Document("a", "this is no Python"), Document("b", SOURCE)], TOKENIZER, 99, 30)
    by_name = {head.text.split("def ")[1].split("(")[0]: head for head in found}
    assert {name: (head.text, head.indent) for name, head in by_name.items()} == {
        "plain": ("def plain(self, n):", 4),
        "told": ('def told(self):\n    """It tells."""', 4),
        "above": ("def above(self):", 4),
        "inner": ("def inner():", 8),
        "later": ("async def later(x):\n    \'\'\'Over\n    lines.\'\'\'", 0),
        "typed": ("def typed(x: int) -> dict[int,\n                          str]:", 0),
    }
    for head in found:
        margin = " " * head.indent
        asked, text = TOKENIZER.decode(head.prompt), head.text.replace("\n", "\n" + margin)
        assert len(head.prompt) == 30 and asked.endswith(margin + text) and asked in SOURCE
    assert heads([Document("b", SOURCE)], TOKENIZER, 2, 30) == found[:2]
    assert "plain" not in str(heads([Document("b", SOURCE)], TOKENIZER, 99, 200))


@pytest.mark.parametrize("document", FILES, ids=lambda document: document.name)
def test_a_functions_own_body_comes_back(document):
    """The rest of the file, as an answer, is cut to the function that the parser finds there."""
    bodies = Bodies(heads([document], TOKENIZER, 99), TOKENIZER)
    own = {node.name: node for node in ast.walk(ast.parse(document.text))
           if isinstance(node, ast.FunctionDef)}
    compared = []
    for n, head in enumerate(bodies.heads):
        name = head.text.split("def ")[1].split("(")[0]
        if sum(f"def {name}(" in line for line in document.text.split("\n")) > 1:
            continue
        compared.append(head.indent)
        asked = TOKENIZER.decode(head.prompt)
        assert document.text.count(asked) == 1
        answer = TOKENIZER.encode(document.text.partition(asked)[2])
        kept = answer[: bodies.cut(n, answer)]
        program = bodies.program(n, kept)
        (found,) = ast.parse(program).body
        own[name].decorator_list = []
        assert ast.dump(found) == ast.dump(own[name])
        if len(kept) < len(answer):              # the token that shows the dedent, no other
            assert bodies.program(n, kept[:-1]).rstrip() == program.rstrip()
            assert dedent(TOKENIZER.decode(kept[:-1]), head.indent) is None
            assert dedent(TOKENIZER.decode(kept), head.indent) is not None
        assert bodies.cut(n, kept) == len(kept)
    assert len(compared) > 3


@pytest.mark.parametrize("text, indent, at", [
    ("\n    a\nb", 0, 7), ("\n    a\n\n  \nb", 0, 11), ("\n    a\n  b", 0, None),
    ("\n        a\n    b", 4, 11), ("\n        a\n     b", 4, None), (" return 1\nb", 0, 10),
    ("b", 0, None), ("", 0, None), ("\n", 0, None), ("\n\nb", 0, 2), ("\n    a\n   ", 4, 1),
])
def test_a_dedent_is_the_first_line_that_is_not_further_in(text, indent, at):
    assert dedent(text, indent) == at


@pytest.mark.parametrize("answer, parses, does", [
    ("\n        return self\n\n    def next(", 1, 0),
    ("\n        a = 1\n        b = 2\n        return a\n    def next(", 1, 1),
    ("\n        a = 1\n        b = 2\n    def next(self):\n        c = 3", 1, 0),
    ("\n        a = 1\n        a = 1\n        a = 1\n", 1, 0),
    ("\n        a = 1\n        if a:\n            return 2\n", 1, 1),
    ('\n        """Told."""\n        pass\n        self\n        1\n        a = 1\n', 1, 0),
    ("\n        a = 1\n        b = 2\n        return f(a,\n    def next(", 0, 0),
    ("\n        a = 1\n            b = 2\n        c = 3\n", 0, 0),
    (" return 1\n    x = 3", 1, 0),
    ("\n    def next(self):\n        a = 1\n        b = 2\n", 0, 0),
    ("", 0, 0),
])
def test_what_bodies_are_worth(answer, parses, does):
    bodies = Bodies([Head("", 0, []), Head("def f(self):", 4, [])], TOKENIZER)
    ids = TOKENIZER.encode(answer)
    assert bodies.parses([1], [ids]) == [parses]
    assert bodies.does_something([1], [ids]) == [does]
    assert bodies.does_something([0, 1], [[], ids]) == [0, does]      # each by its own head
    over = "\n    def" in answer or "\n    x" in answer
    assert bodies.finished([0, 1], [[], ids]) == [0, does and over]


def test_no_function_is_refused():
    refused(lambda: Bodies([], TOKENIZER), "heads: none")

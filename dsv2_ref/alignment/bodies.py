# SPDX-License-Identifier: MIT
"""Function bodies to be written, and what a compiler says of them: a task for GRPO (section 4.2).

A question is a piece of Python source that ends behind a function's `def` line or its docstring,
and *before* the line end: the tokenizer merges a line end with the indentation that follows, so a
question that ended behind it would ask for a token that the model has never read there.

An answer is over with its first dedent, the first line that is not further in than `def`. The token
that shows the dedent is the answer's end mark: it is the policy's own decision to stop, so it
counts, and nothing behind it does (`Bodies.cut`, which a rollout takes). The line end of a string
over several lines may look like a dedent; such an answer is cut there and does not parse.

What is judged is the head with the cut body, as a program of its own:

    parses           it is Python
    does_something   and its body has at least `LEAST` different statements that do something
    finished         and it came to its dedent before the answer's tokens were spent

The first is won by the shortest body there is. It stands here to be seen, not to be used. The
second is won also by going on to the last token, if a line happens to end there, and answers grow.
The third is a floor on the second; what the tokens do not suffice for is worth nothing.
"""

import ast
import bisect
from collections.abc import Sequence
from typing import NamedTuple

from dsv2_ref.alignment import feedback
from dsv2_ref.text.reading import Document
from dsv2_ref.text.tokenizer import TextTokenizer

PROMPT = 64            # tokens of a question
LINES = 40             # of a file, before a head's end, in which they are looked for


class Head(NamedTuple):
    """Where a body is to be written."""

    text: str            # from `def` to the end of the question, moved to the left margin
    indent: int          # columns that `def` stood in from the margin
    prompt: list[int]    # the question, (PROMPT,) ids, `text` at its end


def heads(
    documents: Sequence[Document], tokenizer: TextTokenizer, most: int, tokens: int = PROMPT,
) -> list[Head]:
    """The first `most` heads of functions in Python files, in the order of the files.

    Left out: heads longer than the question's tokens, files and functions with too little before
    them to fill it, one-line functions, and those of a docstring alone.
    """
    found: list[Head] = []
    for document in documents:
        tree = feedback.parsed(document.text)
        if len(found) >= most or tree is None:
            continue
        lines = document.text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            end = _end_of_head(node, lines)
            if end is None:
                continue
            ids = tokenizer.encode("\n".join(lines[max(0, end - LINES) : end]))[-tokens:]
            margin = " " * node.col_offset
            text = "\n".join(line.removeprefix(margin) for line in lines[node.lineno - 1 : end])
            if len(ids) == tokens >= len(tokenizer.encode(text)):
                found.append(Head(text, node.col_offset, ids))
    return found[:most]


def _end_of_head(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int | None:
    """The number of the head's last line, from 1; None where a body cannot follow."""
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        end = first.end_lineno if len(node.body) > 1 else None
        ending = ('"', "'")
    else:
        end, ending = first.lineno - 1, (":",)
        while end > node.lineno and lines[end - 1].strip()[:1] in ("", "#", "@"):
            end -= 1                                     # what stands between head and body
    if end is None or end < node.lineno or not lines[end - 1].endswith(ending):
        return None
    return end


def dedent(text: str, indent: int) -> int | None:
    """Where the first line behind the first line end begins that is not further in than `indent`.

    A number of characters; None where all lines are, or are blank.
    """
    at = text.find("\n") + 1
    while at:
        line = text[at:].partition("\n")[0]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return at
        at = text.find("\n", at) + 1
    return None


class Bodies:
    """Heads as questions for a rollout: `questions`, `cut`, and rewards of the answers."""

    def __init__(self, heads: Sequence[Head], tokenizer: TextTokenizer) -> None:
        if not heads:
            raise ValueError("heads: none, expected some functions in the documents")
        self.heads, self.tokenizer = heads, tokenizer
        self.questions = [head.prompt for head in heads]

    def cut(self, n: int, answer: Sequence[int]) -> int:
        """Tokens of an answer to question n that count: to the one that shows the dedent."""
        indent = self.heads[n].indent

        def shows(k: int) -> bool:
            return dedent(self.tokenizer.decode(answer[: k + 1]), indent) is not None

        return min(1 + bisect.bisect_left(range(len(answer)), True, key=shows), len(answer))

    def program(self, n: int, answer: Sequence[int]) -> str:
        """The function: head n with the answer's body."""
        head, text = self.heads[n], self.tokenizer.decode(answer)
        body = text[: dedent(text, head.indent)]
        margin = " " * head.indent
        return head.text + "\n".join(line.removeprefix(margin) for line in body.split("\n"))

    def parses(self, which: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
        """1 for each answer whose function is Python, else 0."""
        return [float(feedback.parsed(self.program(n, answer)) is not None)
                for n, answer in zip(which, answers, strict=True)]

    def does_something(self, which: Sequence[int], answers: Sequence[Sequence[int]]
                       ) -> list[float]:
        """1 for each answer whose body parses and has `LEAST` different statements, else 0."""
        least = feedback.LEAST + 1                       # `def` is a statement itself
        return [feedback.does_something(self.program(n, answer), least)
                for n, answer in zip(which, answers, strict=True)]

    def finished(self, which: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
        """1 for each answer that does something and shows its dedent, else 0."""
        over = (dedent(self.tokenizer.decode(answer), self.heads[n].indent) is not None
                for n, answer in zip(which, answers, strict=True))
        return [float(r and o) for r, o in
                zip(self.does_something(which, answers), over, strict=True)]

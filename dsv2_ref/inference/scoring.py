# SPDX-License-Identifier: MIT
"""From what a model gives to a score: choices, texts, programs (section 3.2.1).

The paper evaluates in three ways, and so do we:

  1. *Perplexity-based*: the model generates nothing. Each choice is put behind the question, and
     the one with the largest log p counts as the answer (MMLU, HellaSwag, ...). A longer choice has
     more tokens, and each makes the sum smaller. So log p may be divided by the length first:
     `choose`. The paper does not say by which; lm-eval reports the sum ("acc") and log p per
     character ("acc_norm"), and the two differ in which question is right.
  2. *Generation-based*: the model writes, and the text is compared with the expected one. `exact
     match` (EM) asks for the same words, `token_f1` gives credit for some of them (DROP).
  3. *By running*: a program is right if its tests pass; alignment/sandbox.py runs it. Pass@k is
     the chance that of k programs at least one is right. Of n samples with c right ones,

        Pass@k = 1 - C(n - c, k) / C(n, k)

     is its unbiased estimate (Chen et al. 2021): the share of all groups of k that hold a right
     one. To put c/n for the chance of one, 1 - (1 - c/n)^k, is too small on average.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

# a Chinese character is a word; else letters, digits and what is among them
_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3400-\u4dbf\u4e00-\u9fff]+")
_PUNCTUATION = re.compile(r"[^\w\s]")
_ARTICLES = ("a", "an", "the")


def choose(log_p: Sequence[float], lengths: Sequence[float] | None = None) -> int:
    """The number of the choice with the largest log p, or log p per unit of its length.

    lengths: of each choice, in characters, bytes or tokens; None for the plain sum. Of several that
    are equal the first. ValueError for no choice, a length below 1, or a log p that is no number.
    """
    lengths = [1] * len(log_p) if lengths is None else list(lengths)
    if not log_p or len(lengths) != len(log_p) or min(lengths) < 1:
        raise ValueError(f"lengths: {lengths} of {len(log_p)} choices, expected one of at least 1 "
                         "for each, and some choice")
    if any(math.isnan(p) for p in log_p):
        raise ValueError(f"log_p: {list(log_p)}, expected numbers")
    scores = [p / n for p, n in zip(log_p, lengths, strict=True)]
    return scores.index(max(scores))


def words(text: str) -> list[str]:
    """What answers are compared by: small letters, no punctuation, no English articles."""
    found = _WORD.findall(_PUNCTUATION.sub("", text.lower()))
    return [word for word in found if word not in _ARTICLES]


def exact_match(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer has the words of one of the expected texts, in their order, else 0."""
    return float(any(words(answer) == words(text) for text in _texts(expected)))


def token_f1(answer: str, expected: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the answer's words; of several texts the best.

    The order does not count. Where one side has no words it is 1 if the other has none either.
    """
    return max(_f1(Counter(words(answer)), Counter(words(text))) for text in _texts(expected))


def _f1(found: Counter[str], wanted: Counter[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def _texts(expected: Sequence[str]) -> Sequence[str]:
    if isinstance(expected, str) or not expected:
        raise ValueError(f"expected: {expected!r}, expected a list of at least one text")
    return expected


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of which are right, hold a right one.

    In whole numbers, rounded once at the end: no product of many factors, and right where n - c is
    below k (then it is 1). ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"k: {k} of {n} samples with {c} right, expected 0 <= c <= n, 1 <= k <= n")
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))

# SPDX-License-Identifier: MIT
"""Scores: choices, words in common, Pass@k against every group there is; the paper's list."""

import itertools
import math

import pytest
from refusals import refused

from dsv2_ref.inference.benchmarks import BENCHMARKS, benchmark
from dsv2_ref.inference.scoring import choose, exact_match, pass_at_k, token_f1, words

# ---- choices

LOG_P = [-3.0, -3.5, -8.0]                 # of "a", "bb", "cccccccc"


@pytest.mark.parametrize("lengths, right", [
    (None, 0), ([1, 2, 8], 2), ([1, 1, 1], 0), ([1.0, 1.5, 2.0], 1), ([3, 3, 8], 0),
])
def test_the_choice_is_the_largest_share(lengths, right):
    shares = [p / n for p, n in zip(LOG_P, lengths or [1, 1, 1], strict=True)]
    assert choose(LOG_P, lengths) == right == max(range(3), key=lambda i: (shares[i], -i))


def test_of_equal_choices_the_first():
    assert choose([-2.0, -1.0, -1.0]) == 1 and choose([-4.0, -2.0], [2, 1]) == 0
    assert choose([-math.inf, -1e9]) == 1 and choose([-1.0]) == 0


def test_choices_are_refused():
    refused(lambda: choose([]), "of 0 choices", "some choice")
    refused(lambda: choose([-1.0, -2.0], [1]), "lengths: [1] of 2 choices")
    refused(lambda: choose([-1.0, -2.0], [1, 0]), "lengths: [1, 0]", "at least 1")
    refused(lambda: choose([-1.0, math.nan]), "log_p: [-1.0, nan], expected numbers")


# ---- words

@pytest.mark.parametrize("text, expected", [
    ("The U.S.A., in 1776!", ["usa", "in", "1776"]), ("an apple a day", ["apple", "day"]),
    ("don't", ["dont"]), ("", []), ("the", []),
    ("小红有 3 只猫。", ["小", "红", "有", "3", "只", "猫"]),
    ("Théâtre  ÉTÉ\n", ["théâtre", "été"]), ("km小时", ["km", "小", "时"]), ("Athena", ["athena"]),
])
def test_words_are_what_is_compared(text, expected):
    assert words(text) == expected


def slow_f1(answer: str, text: str) -> float:
    """Words crossed off one by one."""
    found, left, same = words(answer), words(text), 0
    for word in found:
        if word in left:
            left.remove(word)
            same += 1
    n_found, n_wanted = len(found), len(words(text))
    if not n_found or not n_wanted:
        return float(n_found == n_wanted)
    precision, recall = same / n_found, same / n_wanted
    return 0.0 if not same else 2 * precision * recall / (precision + recall)


TEXTS = ["red kite", "a red red kite", "kite", "The kite was red.", "", "blue", "红色的风筝",
         "红风筝"]


@pytest.mark.parametrize("answer, text", list(itertools.product(TEXTS, TEXTS)))
def test_f1_of_words_crossed_off_one_by_one(answer, text):
    assert token_f1(answer, [text]) == pytest.approx(slow_f1(answer, text), abs=1e-12)
    assert exact_match(answer, [text]) == float(words(answer) == words(text))


def test_the_best_of_several_texts_counts():
    assert token_f1("red kite", ["blue", "the red kite"]) == 1 == exact_match("Red, kite", [
        "blue", "the red kite"])
    assert token_f1("a red kite", ["red ball", "kite"]) == pytest.approx(2 / 3)
    assert exact_match("kite red", ["red kite"]) == 0 < token_f1("kite red", ["red kite"]) == 1
    assert exact_match("red red kite", ["red kite"]) == 0 and token_f1("x", ["y"]) == 0


def test_a_text_in_place_of_a_list_is_refused():
    for score in (exact_match, token_f1):
        refused(lambda score=score: score("a", "a"), "expected: 'a'", "list of at least one text")
        refused(lambda score=score: score("a", []), "expected: []")


# ---- Pass@k

@pytest.mark.parametrize("n, c", [(n, c) for n in range(1, 8) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_groups_with_a_right_one(n, c):
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        groups = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, groups)) / len(groups), abs=1e-15)


def test_pass_at_k_is_right_on_average_and_the_plug_in_is_not():
    """Over all outcomes of n samples, each right with chance p, weighed with their chances."""
    n, k, p = 6, 3, 0.3
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    ours = sum(w * pass_at_k(n, c, k) for c, w in enumerate(chance))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chance))
    assert ours == pytest.approx(truth, abs=1e-12) and plug_in < truth - 0.02


def test_pass_at_k_of_many_samples_is_exact():
    """Where a product of floats, or the factorials themselves, would not be."""
    assert pass_at_k(10**4, 1, 10**4 - 1) == 0.9999
    assert pass_at_k(200, 0, 100) == 0.0 and pass_at_k(200, 200, 1) == 1.0
    assert pass_at_k(5, 3, 3) == 1.0                       # fewer wrong ones than k
    assert pass_at_k(2000, 1, 1) == 1 / 2000 and pass_at_k(3, 1, 2) == 2 / 3


def test_pass_at_k_refuses():
    for n, c, k in ((3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0), (0, 0, 1)):
        refused(lambda n=n, c=c, k=k: pass_at_k(n, c, k), f"k: {k} of {n} samples with {c} right")


# ---- the paper's list

def test_the_list_has_what_table_2_has():
    names = [b.name for b in BENCHMARKS]
    assert len(names) == len(set(names)) == 28
    choice = {b.name for b in BENCHMARKS if b.way == "choice"}
    assert choice == {"HellaSwag", "PIQA", "WinoGrande", "RACE-Middle", "RACE-High", "MMLU",
                      "ARC-Easy", "ARC-Challenge", "CHID", "C-Eval", "CMMLU", "C3", "CCPM"}
    assert {b.name for b in BENCHMARKS if b.way == "bits"} == {"Pile-test"}
    assert {b.measure for b in BENCHMARKS if b.way == "program"} == {"Pass@1", "Acc."}
    assert {b.name: b.paper for b in BENCHMARKS if b.name in ("Pile-test", "MMLU")} == {
        "Pile-test": 0.606, "MMLU": 78.5}
    assert all(0 <= b.shots <= 25 and 0 < b.paper < 100 for b in BENCHMARKS)


def test_a_benchmark_is_found_by_name_or_says_why_not():
    assert benchmark("mmlu").task == "mmlu" and benchmark("MMLU").shots == 5
    assert benchmark("gsm8k").task == "gsm8k_cot" and benchmark("lambada") is None
    for name in ("CHID", "CLUEWSC", "CMRC", "C3", "CCPM", "CMath"):
        refused(lambda name=name: benchmark(name), f"tasks: {name} is not available",
                "lm-eval has no such task")
    refused(lambda: benchmark("cruxeval-i"), "CRUXEval-I is not available", "without a sandbox")
    refused(lambda: benchmark("race-middle"), "RACE-Middle", "RACE-High alone")

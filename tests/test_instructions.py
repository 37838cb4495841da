# SPDX-License-Identifier: MIT
"""The generated questions: solved again from their texts, held out by a rule; files of them."""

import json
import re
from collections import Counter
from datetime import date, timedelta

import pytest
from refusals import refused

from dsv2_ref.text.conversations import conversation_lines, read_conversations
from dsv2_ref.text.instructions import (
    HELD_OUT_KINDS,
    LANGUAGES,
    TRAINED_KINDS,
    Example,
    examples,
    is_held_out,
    pair_is_held_out,
)
from dsv2_ref.text.questions import GROUPS, KINDS, OPPOSITES

EACH = 120
every_kind = pytest.mark.parametrize("kind", KINDS)


def of(kind, held_out=True, n=EACH, seed=0):
    return examples(n, seed, (kind,), held_out)


def sides(kind):
    """Held-out questions, and those of the training set where the kind is in one."""
    return [True] if kind in HELD_OUT_KINDS else [True, False]


def solved(kind, text):
    """The answer to a question from nothing but its text, in either language."""
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    listed = re.search(r"[:：] ?([a-z, ]+)[.?。？]", text)
    words = listed[1].split(", ") if listed else re.findall(r'["“](\w+)["”]', text)
    if kind == "next_day":
        return str(date(*numbers) + timedelta(days=1))
    if kind == "weekdays":
        names = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
        found = re.findall("|".join(names), text)
        a, b = map(names.index, found) if found else map("一二三四五六日".index,
                                                         re.findall("星期(.)", text))
        return str(b - a if b > a else 7 + b - a)
    return str({
        "addition": lambda: sum(numbers), "subtraction": lambda: numbers[0] - numbers[1],
        "comparison": lambda: max(numbers), "sort": lambda: ", ".join(sorted(words)),
        "reverse_list": lambda: ", ".join(words[::-1]), "count": lambda: len(words),
        "longest": lambda: sorted(words, key=len)[-1], "upper": lambda: words[0].upper(),
        "reverse_word": lambda: "".join(reversed(words[0])),
        "first_letters": lambda: "".join(w[:1] for w in words),
        "capitals": lambda: OPPOSITES[words[0]].upper(),
    }[kind]())


SOLVED = [kind for kind in KINDS if kind not in ("code", "json", "words", "unknown", "refusal")]


@pytest.mark.parametrize("kind", SOLVED)
def test_the_answer_is_right(kind):
    for side in sides(kind):
        for example in of(kind, side):
            question = example.prompt[-1]["content"]
            assert example.answer == solved(kind, question), question
            assert example.check(example.answer) and example.check(f" {example.answer}\n")
            for wrong in ("", example.answer + "1", example.answer[:-1], f"It is {example.answer}"):
                assert not example.check(wrong), (question, wrong)


@every_kind
def test_both_languages_and_the_form_of_messages(kind):
    for side in sides(kind):
        found = of(kind, side)
        counts = Counter(example.language for example in found)
        assert min(counts[language] for language in LANGUAGES) > EACH // 4
        for example in found:
            roles = [m["role"] for m in example.messages]
            system = kind == "capitals"
            assert roles == ["system"] * system + ["user", "assistant"] and example.kind == kind
            chinese = re.search(r"[\u4e00-\u9fff]", "".join(m["content"] for m in example.prompt))
            assert bool(chinese) == (example.language == "zh") or kind == "addition" or (
                kind == "subtraction")
            assert example.check(example.answer)


def test_everything_follows_from_the_seed():
    assert examples(60, 3) == examples(60, 3) == examples(90, 3)[:60]
    assert examples(60, 3) != examples(60, 4)
    first = examples(1, 0)[0]                # the same in every process and on every machine
    assert first == Example("addition", "en", "50 64", (
        {"role": "user", "content": "50 + 64 ="}, {"role": "assistant", "content": "114"}))
    assert Counter(e.kind for e in examples(32, 0)) == Counter({kind: 2 for kind in TRAINED_KINDS})


# ---- what is held out


@pytest.mark.parametrize("kind", TRAINED_KINDS)
def test_no_question_that_is_judged_by_was_trained_on(kind):
    trained, judged = of(kind, False, 400), of(kind, True, 400, seed=1)
    assert not {e.key for e in trained} & {e.key for e in judged}
    assert not {e.prompt[-1]["content"] for e in trained} & {
        e.prompt[-1]["content"] for e in judged}
    assert {e.key for e in judged} and all(is_held_out(kind, e.key) for e in judged)


def test_a_pair_and_its_mirror_are_on_the_same_side():
    numbers = range(10, 100)
    held = {(a, b) for a in numbers for b in numbers if pair_is_held_out(a, b)}
    assert held == {(b, a) for a, b in held}
    assert 0.18 < len(held) / len(numbers) ** 2 < 0.22
    assert {a for a, _ in held} == set(numbers)              # no number is unknown
    for side in (True, False):
        asked = [tuple(map(int, re.findall(r"\d+", e.prompt[-1]["content"])))
                 for e in of("addition", side, 1500)]
        assert {pair in held for pair in asked} == {side}
        assert any(a > b for a, b in asked) and any(a < b for a, b in asked)


def test_the_order_of_what_is_asked_makes_no_other_question():
    for kind in ("comparison", "sort", "reverse_list", "count", "first_letters", "longest"):
        for example in of(kind):
            found = re.findall(r"\d+" if kind == "comparison" else "[a-z]+",
                               (example.prompt[-1]["content"] if example.language == "zh" else
                                example.prompt[-1]["content"].rpartition(":")[2]))
            assert example.key.split() == sorted(found)


def test_some_kinds_are_never_trained_on():
    assert set(TRAINED_KINDS) | set(HELD_OUT_KINDS) == set(KINDS) and HELD_OUT_KINDS
    assert not {e.kind for e in examples(200)} & set(HELD_OUT_KINDS)
    for kind in HELD_OUT_KINDS:
        refused(lambda kind=kind: of(kind, False), f"kinds: {kind!r} is never trained on")


@pytest.mark.parametrize("act, said", [
    (lambda: examples(3, kinds=("sum",)), "kinds: 'sum', expected some of addition"),
    (lambda: examples(0), "n: 0 of 16 kinds, expected at least one of both"),
    (lambda: examples(3, kinds=()), "n: 3 of 0 kinds"),
])
def test_what_cannot_be_made_is_refused(act, said):
    refused(act, said)


# ---- answers of which there is more than one


def test_code_passes_its_test_and_wrong_code_does_not():
    for example in of("code", False):
        exec(f"{example.answer}\n{example.test}", {})
        with pytest.raises(AssertionError):
            exec(f"def f(x): return 26 - x\n{example.test}", {})
        n = int(re.search(r"\d+", example.prompt[-1]["content"])[0])
        assert str(n) in example.answer and example.test.count("assert f(") == 3


def test_code_is_compared_as_a_program_and_never_run():
    example = next(e for e in of("code", False) if "x + " in e.answer)
    n = example.answer.rpartition(" ")[2]
    assert example.check(f"def f(x):\n    # a comment\n    return (x+{n})")
    for wrong in (f"def f(x): return x - {n}", f"def g(x): return x + {n}", f"return x + {n}",
                  f"x + {n}", "def f(x): return", "\0", "(" * 500, "1 is 2", "",
                  f"import os; os.abort()\ndef f(x): return x + {n}",
                  f"```python\n{example.answer}\n```"):
        assert not example.check(wrong)


def test_json_may_be_laid_out_otherwise():
    for example in of("json", False):
        wanted = json.loads(example.answer)
        text = example.prompt[-1]["content"]
        assert wanted == {"name": re.search("[A-Z][a-z]+", text)[0],
                          "age": int(re.search(r"\d+", text)[0])}
        assert example.check(json.dumps(wanted, indent=2, sort_keys=True))
        for wrong in (json.dumps(wanted | {"age": wanted["age"] + 1}), str(wanted), "[" * 99999,
                      json.dumps(wanted | {"city": "x"}), f"Here it is: {example.answer}"):
            assert not example.check(wrong)


def test_any_words_of_the_group_serve_in_their_number():
    lists = [texts.split() for _, *both in GROUPS.values() for texts in both]
    assert all(len(set(words)) == 8 for words in lists)
    for a in lists:
        assert all(a is b or not set(a) & set(b) for b in lists)
    for example in of("words", False):
        zh = example.language == "zh"
        group = next(g for g in GROUPS.items() if (g[1][0] if zh else g[0])
                     in example.prompt[-1]["content"])
        n = int(re.search(r"\d", example.prompt[-1]["content"])[0])
        words = group[1][2 if zh else 1].split()
        for right in (", ".join(words[-n:]), "、".join(words[:n]), " ".join(words[:n])):
            assert example.check(right)
        for wrong in (" ".join(words[: n - 1]), " ".join([*words[:n], words[0]]),
                      " ".join([*words[: n - 1], "stone"]), "", f"These: {' '.join(words[:n])}",
                      " ".join([words[0]] * (n + (n == 1)))):
            assert not example.check(wrong)


def test_what_cannot_be_known_and_what_should_not_be_done_are_told_apart():
    for language in LANGUAGES:
        said = {kind: {e.answer for e in of(kind, False) if e.language == language}
                for kind in ("unknown", "refusal")}
        assert len(said["unknown"]) == len(said["refusal"]) == 1
        assert not said["unknown"] & said["refusal"]


# ---- files


def test_a_file_of_conversations_is_read_back(tmp_path):
    found = examples(40)
    path = tmp_path / "some.jsonl"
    path.write_text(conversation_lines(e.row() for e in found) + "\n  \n", encoding="utf-8")
    assert read_conversations(path) == [list(e.messages) for e in found]
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[5])
    assert (row["kind"], row["language"]) == (found[5].kind, found[5].language)
    assert any("的" in line for line in path.read_text(encoding="utf-8").splitlines())


def test_other_keys_are_anybodys(tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_text(json.dumps({"id": 7, "messages": [
        {"role": "user", "content": "q", "name": "x"},
        {"role": "assistant", "content": "a", "weight": 1}]}), encoding="utf-8")
    assert read_conversations(path) == [[{"role": "user", "content": "q"},
                                         {"role": "assistant", "content": "a"}]]


GOOD = json.dumps({"messages": [{"role": "user", "content": "q"},
                                {"role": "assistant", "content": "a"}]})


@pytest.mark.parametrize("line, said", [
    (b'{"messages": [', "not valid JSON"), (b"\xff\xfe", "not valid JSON"),
    (b"[1]", "no field 'messages', expected an object with it"),
    (b'{"text": "x"}', "no field 'messages'"),
    (b'{"messages": "x"}', "messages: 'x', expected a list of messages"),
    (b'{"messages": []}', "messages: [], expected a list"),
    (b'{"messages": [{"role": "user", "content": "q"}]}', "messages: ends with 'user'"),
    (b'{"messages": [{"role": "bot", "content": "q"}]}', "messages[0]: role 'bot'"),
    (b'{"messages": [{"role": "user", "content": null}]}', "messages[0]: field 'content'"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "no UTF-8 form"),
    (b"[" * 100_000, "not valid JSON"),
])
def test_a_bad_line_is_refused_by_file_and_number(line, said, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode())
    refused(lambda: read_conversations(path), f"{path}:3: ", said)


def test_a_file_that_is_none_is_refused(tmp_path):
    refused(lambda: read_conversations(tmp_path / "no.jsonl"), "no.jsonl: cannot be read")
    refused(lambda: read_conversations(tmp_path), "cannot be read")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    refused(lambda: read_conversations(tmp_path / "empty.jsonl"), "no conversations, expected")
    refused(lambda: conversation_lines([json.loads(GOOD), {"kind": "x"}]),
            "rows[1]: messages: None, expected a list of messages")

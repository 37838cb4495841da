# SPDX-License-Identifier: MIT
"""Tasks of ours: their questions are held out and right, their judges judge; no lm-eval needed."""

import re

import pytest

from dsv2_ref.alignment import tasks
from dsv2_ref.alignment.tasks import COLOURS, LOCAL, SANDBOXED
from dsv2_ref.text.instructions import TRAINED_KINDS, examples
from dsv2_ref.text.stories import sample

ROWS = {"questions": tasks.question_rows, "code_questions": tasks.code_rows,
        "stories_colour": tasks.colour_rows, "stories_moral": tasks.moral_rows,
        "stories_bits": tasks.whole_rows}


@pytest.fixture(scope="module")
def rows():
    return {name: {split: make(split) for split in ("train", "test")}
            for name, make in ROWS.items()}


def test_each_task_has_its_rows(rows):
    assert ROWS.keys() == LOCAL.keys()
    for name, task in LOCAL.items():
        assert task["task"] == name and {m["metric"] for m in task["metric_list"]}
        for split, n in tasks.SPLITS.items():
            found = rows[name][split]
            assert len(found) == n and all(row["answer"] for row in found)
        texts = [{row.get("text", row["answer"]) for row in rows[name][s]} for s in tasks.SPLITS]
        assert not texts[0] & texts[1], name             # no example is a question
    outputs = {task["output_type"] for task in LOCAL.values()}
    assert outputs == {"generate_until", "multiple_choice", "loglikelihood",
                       "loglikelihood_rolling"}


def test_questions_are_held_out_ones_in_the_chat_template(rows):
    held = {e.prompt[-1]["content"]: e for e in examples(200, 0, TRAINED_KINDS, held_out=True)}
    for row in rows["questions"]["test"]:
        system, asked = re.fullmatch(r"(.*?)User: (.*)\n\nAssistant:", row["text"], re.S).groups()
        example = held[asked]
        assert example.check(row["answer"]) and row["kind"] == example.kind
        assert system == ("" if len(example.prompt) == 1
                          else f"{example.prompt[0]['content']}\n\n")
    assert any(row["text"].startswith("Answer in capital") for row in rows["questions"]["test"])


def test_stories_are_cut_before_what_follows_from_them(rows):
    stories = {story.text for story in sample(1, 800)}
    for row in rows["stories_colour"]["test"]:
        assert row["answer"] in COLOURS and f"a {row['answer']} " in row["text"]
        assert any(text.startswith(f"{row['text']} {row['answer']} ") for text in stories)
        others = [c for c in COLOURS if c != row["answer"] and f" {c} " in row["text"]]
        assert not others                                # the text says it once, and no other
    for row in rows["stories_moral"]["test"]:
        assert f"{row['text']} {row['answer']}" in stories and row["answer"].endswith(".")
    assert {row["answer"] for row in rows["stories_colour"]["test"]} == set(COLOURS)


@pytest.mark.parametrize("kind, answer, said, right, exact, f1", [
    ("addition", "85", " 85", 1, 1, 1), ("addition", "85", "86", 0, 0, 0),
    ("json", '{"name": "Lily", "age": 4}', ' {"age": 4, "name": "Lily"} ', 1, 0, 1),
    ("sort", "bell, kite", "kite, bell", 0, 0, 1), ("sort", "bell, kite", "bell", 0, 0, 2 / 3),
    ("words", "red, blue", "green, white", 1, 0, 0),
])
def test_an_answer_is_judged_in_three_ways(kind, answer, said, right, exact, f1):
    got = tasks.judge_answer({"kind": kind, "answer": answer}, [said])
    assert got == {"right": right, "exact_match": exact, "f1": pytest.approx(f1)}


def test_programs_are_judged_by_running_them(rows):
    row = next(r for r in rows["code_questions"]["test"] if "x + " in r["answer"])
    assert tasks.judge_code(row, [f" {row['answer']}"]) == {"pass@1": 1.0}
    assert tasks.judge_code(row, [row["answer"].replace("+", "-")]) == {"pass@1": 0.0}
    assert tasks.judge_code(row, ["exit(0)"]) == {"pass@1": 0.0}
    doc = {"prompt": "def one():\n", "entry_point": "one",
           "test": "def check(f):\n    assert f() == 1"}
    assert tasks.judge_humaneval(doc, ["    return 1"]) == {"pass@1": 1.0}
    assert tasks.judge_humaneval(doc, ["    return 2"]) == {"pass@1": 0.0}
    doc = {"test_list": ["assert f(1) == 2", "assert f(2) == 3"]}
    assert tasks.judge_mbpp(doc, ["def f(x): return x + 1"]) == {"pass@1": 1.0}
    assert tasks.judge_mbpp(doc, ["def f(x): return 2"]) == {"pass@1": 0.0}


def test_tasks_that_run_programs_are_in_the_sandbox_alone():
    for task in SANDBOXED.values():
        assert task["process_results"].__module__ == tasks.__name__
        assert "unsafe_code" not in task

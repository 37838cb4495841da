# SPDX-License-Identifier: MIT
"""Judged answers: pairs and verdicts against loops, samples as a rollout draws them, judges, and
files of preferences."""

import json
from pathlib import Path

import pytest
import torch
from refusals import refused
from small_run import CONFIG

from dsv2_ref.alignment.chat import conversation_ids, prompt_ids
from dsv2_ref.alignment.judged import (
    Judged,
    by_compiler,
    by_truth,
    judged_preferences,
    judged_samples,
    split_preferences,
)
from dsv2_ref.alignment.rollout import sample_answers
from dsv2_ref.alignment.sandbox import Uncontained, run
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.conversations import Preference, read_preferences
from dsv2_ref.text.instructions import examples
from dsv2_ref.text.tokenizer import load_tokenizer

MODEL = Path(__file__).parent.parent / "data" / "model"
TOKENIZER = load_tokenizer(MODEL / "tokenizer.json")
TEXTS = [[5, 1], [6, 1], [5, 1], [9, 1], [7, 1], [7, 8, 1]]
REWARDS = [[1.0, 0.0, 1.0], [0.5, 0.5, 1.0]]


def talk(content="How many?"):
    return [{"role": "user", "content": content}]


def judged(texts=TEXTS, rewards=REWARDS):
    return Judged(texts, torch.tensor(rewards))


def test_pairs_are_all_different_ones_of_one_question_once():
    found, expected = judged().pairs(), []
    for q, row in enumerate(REWARDS):
        for i, better in enumerate(row):
            for j, worse in enumerate(row):
                pair = TEXTS[3 * q + i], TEXTS[3 * q + j]
                if better > worse and pair not in expected:
                    expected.append(pair)
    assert sorted(found) == sorted(expected) and len(found) == 3
    assert judged(TEXTS[:2], [[1.0, 1.0]]).pairs() == []
    refused(lambda: judged(TEXTS[:5]), "rewards: shape (2, 3)", "5 texts")
    refused(lambda: judged(TEXTS, [1.0] * 6), "rewards: shape (6,)")


def test_verdicts_are_all_answers_and_right_is_worth_1_alone():
    assert judged().verdicts() == list(zip(TEXTS, [True, False, True, False, False, True]))


def test_samples_are_those_of_a_rollout_each_with_its_question_and_end_mark():
    torch.manual_seed(0)
    model = DeepSeekV2(CONFIG.with_(vocab=TOKENIZER.vocab, bos=TOKENIZER.bos, eos=TOKENIZER.eos))
    model.eval().head.weight.data[TOKENIZER.eos] *= 20           # some answers end early
    asked, told = examples(5, 3, ("count", "capitals")), []

    def judge(some, answers):
        told.extend(zip(some, answers, strict=True))
        return [len(answer) % 3 / 2 for answer in answers]

    found = judged_samples(model, TOKENIZER, asked, 3, 6, judge, seed=4, batch=2)
    assert found.rewards.shape == (5, 3) and [e for e, _ in told] == [e for e in asked
                                                                      for _ in range(3)]
    draws, n = torch.Generator().manual_seed(4), 0
    for start in (0, 2, 4):
        questions = [prompt_ids(e.prompt, TOKENIZER) for e in asked[start : start + 2]]
        for i, answer in enumerate(sample_answers(model, questions, 3, 6, draws).answers):
            assert found.texts[n] == questions[i // 3] + answer + [TOKENIZER.eos]
            text = TOKENIZER.decode(answer)
            assert told[n][1] == (text[1:] if text[:1] == " " else text)
            assert found.rewards.flatten()[n] == len(told[n][1]) % 3 / 2
            n += 1
    assert n == 15 and len({len(text) for text in found.texts}) > 3
    again = judged_samples(model, TOKENIZER, asked, 3, 6, judge, seed=5, batch=2)
    assert again.texts != found.texts
    refused(lambda: judged_samples(model, TOKENIZER, []), "asked: no questions")


def test_the_truth_judges_by_each_questions_own_check():
    asked = examples(4, 0, ("addition", "words"))
    assert by_truth(asked, [e.answer for e in asked]) == [1.0] * 4
    assert by_truth(asked, ["", " 12", "x, y", asked[3].answer + " "]) == [0.0, 0.0, 0.0, 1.0]


def test_the_compiler_pays_a_third_for_each_step():
    try:
        run("")
    except Uncontained as error:
        pytest.skip(str(error))
    one = examples(1, 0, ("code",))[0]
    other = examples(1, 0, ("upper",))[0]
    asked = [one] * 6 + [other] * 2
    answers = [one.answer, "def f(x): return 'no'", "def f(x)", "1 / 0", "raise SystemExit",
               one.answer.replace("(x)", "(x, y=0)"), other.answer, "def f(x): return x"]
    assert by_compiler(asked, answers) == pytest.approx([1, 2 / 3, 0, 1 / 3, 2 / 3, 1, 1, 0])
    assert by_truth(asked, answers)[5] == 0              # right, and not the program that is known


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_preferences_is_read_and_the_chosen_answer_is_better(tmp_path):
    row = {"messages": talk(), "chosen": "3", "rejected": "", "more": 1}
    rows = read_preferences(lines(tmp_path / "a.jsonl", row, row | {"rejected": "4"}))
    assert rows == [Preference(talk(), "3", ""), Preference(talk(), "3", "4")]
    found = judged_preferences(rows, TOKENIZER)
    whole = conversation_ids([*talk(), {"role": "assistant", "content": "3"}], TOKENIZER)[0]
    assert found.rewards.tolist() == [[1, 0], [1, 0]] and found.texts[0] == found.texts[2] == whole
    assert found.texts[1] == [*prompt_ids(talk(), TOKENIZER), *TOKENIZER.encode(" "), TOKENIZER.eos]
    assert [better for better, _ in found.pairs()] == [whole] * 2

    for wrong, said in ((row | {"chosen": 3}, "a.jsonl:2: field 'chosen' is int"),
                        ({"messages": talk(), "chosen": "3"}, "field 'rejected' is NoneType"),
                        (row | {"rejected": "3"}, "chosen and rejected are the same"),
                        ({"chosen": "3", "rejected": "4"}, "no field 'messages'"),
                        (row | {"messages": talk() + [{"role": "assistant", "content": "3"}]},
                         "a.jsonl:2: messages: ends with 'assistant', expected 'user'")):
        lines(tmp_path / "a.jsonl", row, wrong)
        refused(lambda: read_preferences(tmp_path / "a.jsonl"), said)
    refused(lambda: read_preferences(lines(tmp_path / "b.jsonl")), "b.jsonl: no preferences")


def test_a_fifth_of_the_questions_is_held_out_whole():
    rows = [Preference(talk(f"question {i}"), "a", b) for i in range(200) for b in "bc"]
    seen, held_out = split_preferences(rows)
    assert {r.messages[0]["content"] for r in seen}.isdisjoint(
        r.messages[0]["content"] for r in held_out)
    assert len(seen) + len(held_out) == 400 and 0.12 < len(held_out) / 400 < 0.28
    assert split_preferences(rows[::-1])[1] == held_out[::-1]
    refused(lambda: split_preferences(rows[:2]), "to train on and", "expected some of both")

# SPDX-License-Identifier: MIT
"""The task addition, `grpo` as it is typed, and the record of GRPO beside more SFT."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from calling import call

from dsv2_ref import checkpoint
from dsv2_ref.alignment.addition import (
    EXAMPLES,
    POSITIONS,
    addition,
    addition_recipe,
    addition_tokenizer,
    addition_trainer,
)
from dsv2_ref.alignment.bodies import Bodies
from dsv2_ref.alignment.chat import TEMPLATE, conversation_ids, tokenizer_config
from dsv2_ref.alignment.exam import truth
from dsv2_ref.alignment.rollout import greedy_reward, grpo_trainer
from dsv2_ref.bench import grpo, grpo_code
from dsv2_ref.commands import grpo as command
from dsv2_ref.commands import sft as sft_command
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Corpus, Document
from dsv2_ref.text.instructions import pair_is_held_out
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import load_state

ROOT = Path(__file__).parents[1]


def pair(example):
    a, _, b, _ = example.messages[0]["content"].split()
    return int(a), int(b)


def test_no_sum_is_asked_and_held_out_in_either_order():
    questions, held_out = addition(3)
    asked, never = set(map(pair, questions)), set(map(pair, held_out))
    assert len(asked) + len(never) == 8100 == len(questions) + len(held_out)
    assert not asked & never and not {(b, a) for a, b in asked} & never
    assert all(pair_is_held_out(*p) for p in never) and 0.15 < len(never) / 8100 < 0.25
    assert questions == addition(3)[0] != addition(4)[0] and len(addition(4)[0]) == len(questions)
    for example in questions[:50] + held_out[:50]:
        assert example.answer == str(sum(pair(example))) and example.check(f" {example.answer} ")
        assert not example.check(str(sum(pair(example)) + 1))


def test_a_digit_is_a_token_and_a_conversation_fits():
    tokenizer, (questions, _) = addition_tokenizer(), addition()
    ids, learned = conversation_ids(questions[0].messages, tokenizer)
    digits = [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).strip().isdigit()]
    assert "".join(digits) == "".join(f"{a}{b}{a + b}" for a, b in [pair(questions[0])])
    assert max(len(conversation_ids(q.messages, tokenizer)[0]) for q in questions) <= POSITIONS
    assert sum(learned) == len(questions[0].answer) + 2          # the space and the end mark


def test_truth_pays_a_right_answer_and_no_other():
    tokenizer, (questions, _) = addition_tokenizer(), addition()
    reward = truth(questions, tokenizer)
    right, wrong = (tokenizer.encode(" " + e.answer) for e in questions[:2])
    assert reward([0, 0, 1, 0], [right, wrong, wrong, []]) == [1, 0, 1, 0]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A chat model after a few steps of SFT, saved."""
    folder, tokenizer = tmp_path_factory.mktemp("start") / "model", addition_tokenizer()
    trainer = addition_trainer(addition()[0], tokenizer, addition_recipe(3, batch=4))
    for _ in range(3):
        trainer.step()
    files = {"tokenizer.json": tokenizer.to_json(),
             "tokenizer_config.json": tokenizer_config(POSITIONS)}
    checkpoint.save(trainer.model.bfloat16(), folder, files)
    return folder


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(command, "addition", lambda: tuple(part[:8] for part in addition()))


def test_sft_of_sums_learns_the_first_examples_alone():
    tokenizer, (questions, _) = addition_tokenizer(), addition()
    trainer = addition_trainer(questions, tokenizer, addition_recipe(5, batch=8))
    shown = [list(ids) for ids, _ in trainer.batches.conversations]
    assert shown == [conversation_ids(e.messages, tokenizer)[0] for e in questions[:EXAMPLES]]
    assert trainer.step()["lr"] == pytest.approx(4e-3 / 5)       # of 5 steps all are warm-up
    assert addition_recipe(400).rate(0.1) == addition_recipe(400).rate(0.99) == 1


def test_sft_of_sums_as_it_is_typed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sft_command, "addition", lambda seed: (addition(seed)[0],
                                                                addition(seed)[1][:4]))
    ask = ("sft", "--data", "addition", "--out", tmp_path / "out", "--quiet", "--batch", "4")
    code, out, err = call(capsys, *ask, "--steps", "2")
    result = json.loads(out)
    assert code == 0 and result["conversations"] == EXAMPLES and "2 steps of 4" in err
    assert set(result["before"]) == {"addition"} == set(result["after"])
    model = checkpoint.load(tmp_path / "out" / "model")
    assert model.config.max_positions == POSITIONS
    for more, said in ((("--from", "data/model"), "expected none with sums, whose model is new"),
                       (("--examples", "9"), "--examples: 9, expected none with sums"),
                       (("--epochs", "2"), "--epochs: 2.0, expected --steps with sums")):
        code, out, err = call(capsys, *ask, *more)
        assert (code, out) == (2, "") and said in err


def grpo_of(capsys, start, out, *more):
    return call(capsys, "grpo", "--from", start, "--out", out, "--quiet", "--steps", "4",
                "--questions", "2", "--group", "2", "--save-every", "2", *more)


def test_it_writes_a_chat_model_and_goes_on_bit_for_bit(start, few, tmp_path, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    code, out, err = grpo_of(capsys, start, whole, "--seeds", "2", "--no-control")
    result = json.loads(out)
    assert code == 0 and set(result) == {"task", "before", "after", "seeds", "out"}
    assert [run["seed"] for run in result["seeds"]] == [0, 1] and "4 steps of 4 answers" in err
    assert {p.name for p in (whole / "seed-1").iterdir()} == {
        "result.json", "log.jsonl", "config.json", "tokenizer.json", "model",
        "state-000000002.safetensors", "state-000000004.safetensors"}
    written = json.loads((whole / "seed-0" / "model" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == TEMPLATE
    log = [json.loads(line) for line in (whole / "seed-0" / "log.jsonl").read_text().splitlines()]
    assert {"reward", "kl_to_reference", "entropy", "length", "no_spread"} <= set(log[0])
    assert log[0]["kl_to_reference"] == 0 and len(log) == 4

    shutil.copytree(whole / "seed-0", halves / "seed-0")     # as if killed in its third step
    (halves / "seed-0" / "state-000000004.safetensors").unlink()
    (halves / "seed-0" / "result.json").unlink()
    shutil.rmtree(halves / "seed-0" / "model")
    code, out, err = grpo_of(capsys, start, halves, "--no-control", "--resume", "--beta", "0.5")
    assert (code, out) == (2, "") and "cannot resume: questions" in err
    code, out, err = grpo_of(capsys, start, halves, "--no-control", "--resume")
    assert code == 0 and "resumed after step 2" in err
    a, b = (load_state(run / "seed-0" / "state-000000004.safetensors")[0]
            for run in (whole, halves))
    assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()

    code, out, err = grpo_of(capsys, start, whole)
    assert (code, out) == (2, "") and "exists, expected --resume" in err


def test_the_control_goes_on_with_its_examples(start, few, tmp_path, capsys, monkeypatch):
    shown = []
    of = command.sft_trainer
    monkeypatch.setattr(command, "sft_trainer", lambda model, tokenizer, talks, recipe:
                        shown.append((talks, recipe)) or of(model, tokenizer, talks, recipe))
    code, out, _ = grpo_of(capsys, start, tmp_path / "out")
    result = json.loads(out)
    (run,), ((talks, recipe),) = result["seeds"], shown
    assert code == 0 and result["control"] == run["control"] and run["control_steps"] >= 1
    assert talks == [e.messages for e in addition()[0][:8]]
    assert recipe.rate(1e-3) == 1 and run["seconds"] > 0             # at one rate, by the clock
    again = grpo_of(capsys, start, tmp_path / "out", "--resume")
    assert again[0] == 0 and json.loads(again[1]) == result and len(shown) == 1


def test_bodies_of_functions_are_a_task_too(tmp_path, capsys, monkeypatch):
    """The second reward is the control's; what is judged is the same."""
    tokenizer = addition_tokenizer()
    config = TINY.with_(vocab=tokenizer.vocab, bos=tokenizer.bos, eos=tokenizer.eos)
    start = tmp_path / "start"
    checkpoint.save(DeepSeekV2(config).bfloat16(), start, {"tokenizer.json": tokenizer.to_json()})
    files = [Document("a", "def f(x):\n    y = x + 1\n    return y\n\n\n" * 4)] * 2
    corpus = Corpus("python", files, files, files, "")
    sizes = grpo_code.QUICK._replace(new_tokens=3)
    monkeypatch.setattr(command, "open_corpus", lambda name: corpus)
    monkeypatch.setattr(grpo_code, "FULL", sizes)
    of = grpo_code.tasks
    monkeypatch.setattr(grpo_code, "tasks", lambda corpus, tokenizer: of(corpus, tokenizer, sizes))
    monkeypatch.setattr(grpo_code, "measured", partial(grpo_code.measured, sizes=sizes))
    paid = []
    for name in ("finished", "parses"):
        true = getattr(Bodies, name)
        monkeypatch.setattr(Bodies, name, lambda self, which, answers, name=name, true=true: (
            paid.append((name, len(which))) or true(self, which, answers)))
    code, out, err = call(capsys, "grpo", "--task", "code", "--from", start, "--out",
                        tmp_path / "out", "--quiet", "--steps", "2", "--questions", "2")
    assert code == 0, err
    result = json.loads(out)
    assert result["task"] == "code" and 0 <= result["control"] <= 1
    rollouts = [name for name, n in paid if n == 16]             # 2 questions, 8 answers each
    assert list(dict.fromkeys(rollouts)) == ["finished", "parses"] == sorted(set(rollouts))
    assert rollouts == sorted(rollouts) and rollouts.count("finished") >= 2
    assert [name for name, n in paid if n == 3 * sizes.answers].count("finished") == 3


@pytest.mark.parametrize("more, said", [
    (("--from", "nowhere"), "--from: 'nowhere' is no folder, expected a saved model"),
    (("--group", "1"), "group: 1, expected at least 2"),
    (("--questions", "0"), "questions: 0, expected at least 1"),
    (("--seeds", "0"), "seeds: 0, expected at least 1"),
    (("--steps", "0"), "steps: 0, expected a number > 0"),
    (("--clip", "1.5"), "clip: 1.5, expected a number between 0 and 1"),
])
def test_bad_input_is_one_line_and_code_2(more, said, start, few, tmp_path, capsys):
    code, out, err = grpo_of(capsys, start, tmp_path / "out", *more)
    assert (code, out) == (2, "") and said in err
    assert not (tmp_path / "out" / "seed-0" / "model").exists()


# ---- the record

def test_the_record_is_complete(monkeypatch):
    questions, held_out = addition()
    some = questions[: EXAMPLES + 6], held_out[:6]
    monkeypatch.setattr(grpo, "addition", lambda seed: some)
    monkeypatch.setattr(grpo, "addition_recipe", partial(addition_recipe, batch=4))
    monkeypatch.setattr(grpo, "GROUP", 4)
    record = grpo.run(quick=True)
    assert json.loads(json.dumps(record)) == record and record["torch"] and record["quick"] is True
    (run,) = record["runs"]
    assert set(run["curves"]) == {"grpo", "rejection", "control"} and run["sft_steps"] == 10
    assert all(curve[0]["seconds"] == 0 and len(curve) == 2 for curve in run["curves"].values())
    ends = {name: curve[-1] for name, curve in run["curves"].items()}
    assert ends["grpo"]["steps"] == ends["rejection"]["steps"] == 2
    assert ends["control"]["seconds"] >= ends["grpo"]["seconds"] > 0 and "reward" in ends["grpo"]


def test_the_crossover_is_where_one_gets_ahead_for_good():
    def curve(*points):
        return [{"seconds": s, "right": r} for s, r in points]

    one = curve((0, 0.4), (10, 0.6), (20, 0.5), (30, 0.9))
    assert grpo.crossover(one, curve((0, 0.4), (30, 0.4))) == 10
    assert grpo.crossover(one, curve((0, 0.4), (15, 0.55), (40, 0.8))) == 30     # .53, .575, .7
    assert grpo.crossover(one, curve((0, 0.4), (15, 0.4), (25, 0.8), (40, 0.8))) == 30
    assert grpo.crossover(one, curve((0, 0.4), (30, 0.9))) is None               # a tie is no lead


def test_the_summary_is_students_interval():
    def run(*ends):
        return {"curves": {name: [{"right": 0.4}, {"right": end}]
                           for name, end in zip(("grpo", "rejection", "control"), ends)}}

    found = grpo.summary([run(0.7, 0.5, 0.9), run(0.8, 0.5, 0.9), run(0.9, 0.8, 0.9)])
    assert found["before"]["mean"] == pytest.approx(0.4)
    assert found["grpo"]["mean"] == pytest.approx(0.8) and found["grpo"]["least"] == 0.7
    assert found["grpo"]["interval"] == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert found["rejection"]["most"] == 0.8 and found["control"]["interval"] == 0


def test_rejection_learns_right_answers_alone():
    tokenizer, (questions, _) = addition_tokenizer(), addition()
    trainer = addition_trainer(questions, tokenizer, addition_recipe(2, batch=4))
    model = trainer.model
    ids = [command.prompt_ids(q.prompt, tokenizer) for q in questions[:8]]
    even = grpo_trainer(model, ids, lambda which, answers: [n % 2 for n in range(len(answers))],
                        Recipe(steps=2, batch=8, optimizer="adamw"), 4, 4)
    batch = even._read(False)
    tokens, mask, old, *_ = batch.tensors
    found = grpo.rejection(model, batch).total
    kept = mask & (torch.arange(8) % 2 == 1)[:, None]
    assert found.item() == pytest.approx(-old[kept].mean().item(), rel=1e-4)
    assert greedy_reward(model, ids, lambda which, answers: [1.0] * len(answers), 4) == 1


# ---- what the committed records say, and README of them

def committed(name):
    return json.loads((ROOT / "data" / "results" / name).read_text(encoding="utf-8"))


def test_readme_says_of_sums_what_the_record_has():
    record, readme = committed("grpo-2026-11-29.json"), (ROOT / "README.md").read_text("utf-8")
    assert len(record["runs"]) == 3 and not record["quick"]
    for name, of in grpo.summary(record["runs"]).items():
        assert record["summary"][name] == pytest.approx(of)
    for name, of in record["summary"].items():
        assert f"{100 * of['mean']:.0f} ± {100 * of['interval']:.0f} %" in readme, name
    for run in record["runs"]:
        grpo_end, control_end = (run["curves"][way][-1] for way in ("grpo", "control"))
        assert run["crossover"] == grpo.crossover(run["curves"]["grpo"], run["curves"]["control"])
        assert grpo_end["right"] > 0.8 > control_end["right"] and grpo_end["seconds"] < 600
        assert control_end["seconds"] >= grpo_end["seconds"]


def test_the_record_of_bodies_holds_length_and_diversity():
    runs = committed("grpo_code-2026-11-29.json")["runs"]
    paid = [run for run in runs if run["reward"] == "finished"]
    hacked = [run for run in runs if run["reward"] == "parses"]
    assert [run["seed"] for run in paid] == [0, 1, 2] == [run["seed"] for run in hacked]
    for run in paid:
        before, after = run["before"], run["after"]
        assert before["does_something"] < 0.1
        assert after["does_something"] > 5 * before["does_something"]
        for name in ("length", "distinct_4", "distinct_answers"):
            assert abs(after[name] / before[name] - 1) < 0.2, name
    for run in hacked:
        assert run["after"]["parses"] > 0.85 and run["after"]["does_something"] < 0.01
        assert run["after"]["length"] < 6

# SPDX-License-Identifier: MIT
"""`align`: all stages of section 4 in a row, in tiny; and the reward of its second stage."""

import json
import shutil

import pytest
import torch
from calling import call

from dsv2_ref import checkpoint
from dsv2_ref.alignment.judged import Judged
from dsv2_ref.commands import align, reward, sft
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Corpus, Document
from dsv2_ref.text.instructions import HELD_OUT_KINDS, TRAINED_KINDS, examples
from dsv2_ref.text.tokenizer import train_tokenizer
from dsv2_ref.training.recipe import Recipe

TEXTS = [e.prompt[-1]["content"] for e in examples(200)]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder with a model that knows nothing. Little is asked, and what is right is odd."""
    tokenizer = train_tokenizer(TEXTS, 300)
    torch.manual_seed(0)
    config = TINY.with_(vocab=tokenizer.vocab, bos=tokenizer.bos, eos=tokenizer.eos)
    checkpoint.save(DeepSeekV2(config).bfloat16(), tmp_path / "base",
                    {"tokenizer.json": tokenizer.to_json()})
    few = [Document("a", text) for text in TEXTS[:2]]
    monkeypatch.setattr(align, "open_corpus", lambda name: Corpus(name, few, few, few, ""))
    monkeypatch.setattr(align, "ANSWER", 4)
    monkeypatch.setattr(align, "Recipe", lambda **asked: Recipe(**asked | {"batch": 16}))
    monkeypatch.setattr(align, "examples", lambda n, seed=0, kinds=TRAINED_KINDS, held_out=False:
                        examples(min(n, 18), seed, kinds, held_out))
    monkeypatch.setattr(align, "exact_match", lambda model, tokenizer, asked: dict.fromkeys(
        sorted({e.kind for e in asked}), 0.5))
    monkeypatch.setattr(align, "truth", lambda asked, tokenizer: lambda which, answers: [
        float(sum(answer) % 2) for answer in answers])
    shares = {"sort": [0.0, 0.0], "json": [1.0, 1.0]}            # all others: half
    monkeypatch.setattr(align, "judged_samples", lambda model, tokenizer, asked, *more: Judged(
        [[0]] * 2, torch.tensor([shares.get(asked[0].kind, [0.0, 1.0])])))
    monkeypatch.setattr(sft, "exact_match", lambda *asked: {})
    monkeypatch.setattr(reward, "HELD_OUT", 2)
    monkeypatch.setattr(reward, "GROUP", 4)
    monkeypatch.setattr(reward, "_judge", lambda: lambda asked, answers: [
        float(len(answer) % 2 == 0) for answer in answers])
    return tmp_path / "base"


def test_every_stage_builds_on_the_one_before_and_is_done_once(base, tmp_path, capsys):
    ask = ("align", "--from", base, "--out", tmp_path / "out", "--quiet", "--sft-steps", "1",
           "--reward-questions", "2", "--grpo-steps", "1")
    code, out, err = call(capsys, *ask)
    result = json.loads(out)
    assert code == 0 and list(result["table"]) == ["base", "sft", "stage-1", "stage-2"], err
    for shares in result["table"].values():
        assert set(shares) == {*TRAINED_KINDS, *HELD_OUT_KINDS, "bits_per_byte"}
    folder = tmp_path / "out"
    assert (folder / align.PICTURE).stat().st_size > 5000 and "stage-2" in err
    trusted = result["reward_accuracy"]["after"] >= align.TRUSTED
    assert trusted or "of held-out pairs rightly, and is not asked" in err
    for stage in ("sft", "reward", "stage-1", "stage-2"):
        assert f"-- {stage}\n" in err and (folder / stage / "model").is_dir()
    said = next(line for line in err.splitlines() if line.startswith("sometimes right: "))
    assert "addition" in said and "sort" not in said and "json" not in said and "words" not in said
    assert set(result["reward_accuracy"]) == {"before", "after"}
    assert f"{folder / 'sft' / 'model'}: 1 steps of 16 answers" in err    # where it begins
    assert f"{folder / 'stage-1' / 'model'}: 1 steps" in err
    bits = [shares["bits_per_byte"] for shares in result["table"].values()]
    assert len(set(bits)) == 4                                           # four different models

    shutil.rmtree(folder / "stage-2" / "model")                          # as if it was stopped
    before = (folder / "sft" / "model" / "model.safetensors").stat().st_mtime_ns
    code, out, err = call(capsys, *ask)
    assert code == 0 and json.loads(out)["table"] == result["table"]
    assert "-- stage-2\n" in err and "-- sft\n" not in err
    assert (folder / "sft" / "model" / "model.safetensors").stat().st_mtime_ns == before

    shutil.rmtree(folder / "stage-2" / "model")
    (folder / "reward.json").unlink()                                    # as if killed in between
    code, out, err = call(capsys, *ask)
    assert code == 0 and json.loads(out)["table"] == result["table"] and "-- reward\n" in err

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "align.png").write_text("a person's")
    for more, said in ((("--from", "nowhere"), "--from: 'nowhere' is no folder"),
                       (("--grpo-steps", "0"), "grpo_steps: 0, expected at least 1"),
                       (("--grpo-steps", "2"), "grpo_steps: 2, expected 1, with which"),
                       (("--out", tmp_path / "mine"), "holds other files, expected a new or")):
        code, out, err = call(capsys, *ask, *more)
        assert (code, out) == (2, "") and said in err


def test_preference_adds_three_rewards_up():
    tokenizer = train_tokenizer(TEXTS, 300)
    (unknown,) = examples(1, kinds=("unknown",))
    sums = [e for e in examples(40, kinds=("addition",)) if e.language == "en"][:1]
    asked = [unknown, *sums]

    def helpful(which, answers):
        return [10.0 * i for i in which]

    of = align.preference(asked, tokenizer, helpful)
    said = [unknown.answer, "5", unknown.answer, "5", "数字", "5" * 60]
    ids = [tokenizer.encode(f" {text}") for text in said]
    found = of([0, 0, 1, 1, 1, 1], ids)
    h, s, r = align.C_HELPFUL, align.C_SAFETY, align.C_RULE
    assert found == pytest.approx([
        s + r,                           # refuses what cannot be known
        r * (unknown.language in ("en", "zh")),     # makes something up
        10 * h + r,                      # refuses to add
        10 * h + s + r,
        10 * h + s,                      # Chinese to an English question
        10 * h + s])                     # comes to no end
    unasked = align.preference(asked, tokenizer, helpful, 0.0)([1], ids[3:4])
    assert unasked == pytest.approx([s + r])

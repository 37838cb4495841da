# SPDX-License-Identifier: MIT
"""The chat template: the published text rendered by others, and our function and ids beside it."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from refusals import refused

from dsv2_ref import checkpoint
from dsv2_ref.alignment.chat import (
    CONFIG_FILE,
    TEMPLATE,
    conversation_ids,
    prompt_ids,
    render,
    tokenizer_config,
)
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.tokenizer import BEGIN, END, TextTokenizer, load_tokenizer, train_tokenizer

MODEL = Path(__file__).parent.parent / "data" / "model"
TOKENIZER = load_tokenizer(MODEL / "tokenizer.json")
PIECES = ["Lily", " ", "  ", "\n", "\n\n", "47", "38 +", ".", "?", "(x)", '{"a": 1}', "_name", "的",
          "小红", "，", "é", "🙂", "User:", "Assistant:", "def f(x):\n    return x", "\t", "don't"]


def message(role, content):
    return {"role": role, "content": content}


def conversations(n, last="assistant", seed=0):
    """Random ones; some begin or end a text with spaces and line ends."""
    draw = random.Random(seed)

    def text():
        return "".join(draw.choices(PIECES, k=draw.randint(1, 6))) + draw.choice(["", "", "x", " "])

    for _ in range(n):
        messages = []
        for _ in range(draw.randint(1, 4)):
            messages += [message("user", text()), message("assistant", text())]
        if last == "user":
            messages.pop()
        if draw.random() < 0.5:
            messages.insert(0, message("system", text()))
        if all(m["content"].strip() for m in messages):
            yield messages


def rendered(messages, prompt=False):
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)     # as transformers has
    return environment.from_string(TEMPLATE).render(
        messages=messages, bos_token=BEGIN, eos_token=END, add_generation_prompt=prompt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/model as a chat model."""
    path = tmp_path_factory.mktemp("chat")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(MODEL / name, path)
    (path / CONFIG_FILE).write_text(tokenizer_config(1024), encoding="utf-8")
    return path


def opened(path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)


def theirs(tokenizer, messages, prompt=False):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True,
                                         return_dict=False)


def test_a_conversation_is_as_published():
    messages = [message("system", "Be brief."), message("user", "What is 2 + 2?"),
                message("assistant", "4"), message("user", "And 3 + 3?")]
    first = f"{BEGIN}Be brief.\n\nUser: What is 2 + 2?\n\nAssistant: 4{END}"
    assert render(messages[:3]) == first
    assert render(messages, prompt=True) == first + "User: And 3 + 3?\n\nAssistant:"


def test_the_text_is_the_templates():
    for messages in conversations(300):
        assert render(messages) == rendered(messages)
    for messages in conversations(300, "user"):
        assert render(messages, prompt=True) == rendered(messages, prompt=True)


def test_the_ids_are_those_of_transformers(folder):
    tokenizer = opened(folder)
    for messages in conversations(200):
        assert conversation_ids(messages, TOKENIZER)[0] == theirs(tokenizer, messages)
    for messages in conversations(200, "user"):
        assert prompt_ids(messages, TOKENIZER) == theirs(tokenizer, messages, prompt=True)


def test_answers_are_marked_from_their_space_to_their_end_mark():
    for messages in conversations(200):
        ids, answers = conversation_ids(messages, TOKENIZER)
        assert len(ids) == len(answers)
        runs, before = [], False
        for i, learned in zip(ids, answers):
            if learned and not before:
                runs.append([])
            if learned:
                runs[-1].append(i)
            before = learned and i != TOKENIZER.eos
        assert all(run[-1] == TOKENIZER.eos and run.count(TOKENIZER.eos) == 1 for run in runs)
        expected = [" " + m["content"] for m in messages if m["role"] == "assistant"]
        assert [TOKENIZER.decode(run) for run in runs] == expected
        rest = TOKENIZER.decode([i for i, learned in zip(ids, answers) if not learned])
        pieces = rendered(messages).removeprefix(BEGIN)
        for answer in expected:
            pieces = pieces.replace(f"Assistant:{answer}{END}", "Assistant:", 1)
        assert rest == pieces


def test_a_prompt_is_the_beginning_of_what_is_learned():
    """So what the model is asked after is what it has learned to answer after."""
    for messages in conversations(200):
        ids, answers = conversation_ids(messages, TOKENIZER)
        prompt = prompt_ids(messages[:-1], TOKENIZER)
        assert ids[: len(prompt)] == prompt and answers[len(prompt)]
        assert all(answers[len(prompt) :]) and not answers[len(prompt) - 1]
        assert TOKENIZER.decode(prompt).endswith("Assistant:")


def test_the_begin_mark_stands_once_also_where_the_tokenizer_adds_one(folder, tmp_path):
    text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    text["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": BEGIN, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [0], "tokens": [BEGIN]}}}
    shutil.copytree(folder, tmp_path / "adds")
    (tmp_path / "adds" / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    adds = load_tokenizer(tmp_path / "adds" / "tokenizer.json")
    assert adds.tokenizer.encode("a").ids[0] == adds.bos              # it does
    tokenizer = opened(tmp_path / "adds")
    for messages in conversations(20):
        ids, _ = conversation_ids(messages, adds)
        assert ids[0] == adds.bos and ids.count(adds.bos) == 1
        assert ids == theirs(tokenizer, messages) == conversation_ids(messages, TOKENIZER)[0]
        assert prompt_ids(messages[:-1], adds).count(adds.bos) == 1


@pytest.mark.parametrize("mark", [BEGIN, END])
def test_text_that_spells_a_mark_stays_text(mark):
    """In a question, an answer and a system message: no user can end an answer."""
    spelled = [message("system", f"a {mark}"), message("user", f"{mark} b"),
               message("assistant", f"c {mark} d")]
    ids, answers = conversation_ids(spelled, TOKENIZER)
    assert ids.count(TOKENIZER.bos) == ids.count(TOKENIZER.eos) == 1
    assert ids[0] == TOKENIZER.bos and ids[-1] == TOKENIZER.eos
    assert TOKENIZER.decode(ids).count(mark) == 3
    assert TOKENIZER.decode([i for i, a in zip(ids, answers) if a]) == f" c {mark} d"
    assert TOKENIZER.eos not in prompt_ids(spelled[:2], TOKENIZER)


def test_ids_go_by_the_marks_of_the_tokenizer():
    """A tokenizer may give its marks other ids than 0 and 1, as the published one does."""
    base = json.loads(train_tokenizer(["one two"], 258).to_json())
    vocab = base["model"]["vocab"]
    swap = {BEGIN: vocab["!"], "!": vocab[BEGIN], END: vocab["#"], "#": vocab[END]}
    vocab.update(swap)
    for token in base["added_tokens"]:
        token["id"] = vocab[token["content"]]
    base["added_tokens"].sort(key=lambda token: token["id"])
    other = TextTokenizer.from_json(json.dumps(base))
    assert {other.bos, other.eos} & {0, 1} == set()
    ids, answers = conversation_ids([message("user", "a"), message("assistant", "b")], other)
    assert ids[0] == other.bos and ids[-1] == other.eos and answers[-1]
    assert other.decode(ids) == "User: a\n\nAssistant: b"


USER, ANSWER, SYSTEM = message("user", "q"), message("assistant", "a"), message("system", "s")


@pytest.mark.parametrize("messages, said", [
    ([], "messages: [], expected a list of messages, not empty"),
    ("text", "messages: 'text', expected a list"),
    (USER, "expected a list of messages"),
    (["q"], "messages[0]: 'q', expected an object with role and content"),
    ([{"role": "user"}], "expected an object with role and content"),
    ([message("tool", "x")], "messages[0]: role 'tool', expected one of system, user, assistant"),
    ([USER, message("assistant", "")], "messages[1]: content '', expected some text"),
    ([message("user", " \n"), ANSWER], "messages[0]: content ' \\n', expected some text"),
    ([message("user", 7), ANSWER], "messages[0]: field 'content' is int, expected a string"),
    ([message("user", "\ud800"), ANSWER], "messages[0]: field 'content' has no UTF-8 form"),
    ([ANSWER], "messages[0]: role 'assistant', expected 'user'"),
    ([USER, USER, ANSWER], "messages[1]: role 'user', expected 'assistant'"),
    ([USER, ANSWER, ANSWER], "messages[2]: role 'assistant', expected 'user'"),
    ([SYSTEM, ANSWER], "messages[1]: role 'assistant', expected 'user'"),
    ([SYSTEM, SYSTEM, USER, ANSWER], "messages[1]: role 'system', expected 'user'"),
    ([USER, SYSTEM, ANSWER], "messages[1]: role 'system', expected 'assistant'"),
    ([USER], "messages: ends with 'user', expected 'assistant'"),
    ([SYSTEM], "messages: ends with 'system', expected 'assistant'"),
])
def test_what_is_no_conversation_is_refused(messages, said):
    refused(lambda: conversation_ids(messages, TOKENIZER), said)
    refused(lambda: render(messages), said)


def test_a_prompt_ends_with_the_user():
    for act in (lambda: prompt_ids([USER, ANSWER], TOKENIZER),
                lambda: render([USER, ANSWER], prompt=True)):
        refused(act, "messages: ends with 'assistant', expected 'user'")


def test_a_saved_chat_model_carries_the_template(tmp_path):
    config = TINY.with_(vocab=TOKENIZER.vocab, bos=TOKENIZER.bos, eos=TOKENIZER.eos)
    model = DeepSeekV2(config)
    files = {"tokenizer.json": TOKENIZER.to_json(),
             CONFIG_FILE: tokenizer_config(config.max_positions)}
    for _ in range(2):                               # and can be replaced, as all that we wrote
        checkpoint.save(model, tmp_path / "model", files, overwrite=True)
    again = checkpoint.load(tmp_path / "model")
    assert torch.equal(again.head.weight, model.head.weight)
    tokenizer = opened(tmp_path / "model")
    assert tokenizer.chat_template == TEMPLATE
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert marks == (TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.eos)
    assert tokenizer.model_max_length == config.max_positions
    assert theirs(tokenizer, [USER], prompt=True) == prompt_ids([USER], TOKENIZER)
    text = "Lily 's kite , red .  小红，好"
    assert tokenizer.decode(tokenizer.encode(text)[1:]) == text      # nothing is "cleaned up"

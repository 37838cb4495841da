# SPDX-License-Identifier: MIT
"""`generate --prompts`: JSON lines in and out, each as `generate --prompt` gives it; resuming."""

import json

import pytest
import torch
from calling import call

from dsv2_ref import checkpoint
from dsv2_ref.commands.common import write_sample
from dsv2_ref.commands.prompts import answer, bytes_of, read_prompts
from dsv2_ref.text.tokenizer import load_tokenizer

ASKED = [
    {"prompt": "The cat"}, {"prompt": "Once", "id": "b", "max_new_tokens": 3, "temperature": 0},
    {"prompt": "The cat", "seed": 5, "id": 7, "top_p": 0.5}, {"prompt": "知", "temperature": 1.5},
]
OPTIONS = dict(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=0)


@pytest.fixture(scope="module")
def loaded():
    return checkpoint.load("data/model").double(), load_tokenizer("data/model/tokenizer.json")


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "prompts.jsonl"
        lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path
    return write


@pytest.mark.parametrize("cache", ["latent", "six_bit"])
def test_each_text_is_that_of_the_prompt_alone(loaded, file, cache):
    found = read_prompts(file(ASKED[0], "", *ASKED[1:]), **OPTIONS)
    assert [p["id"] for p in found] == [1, "b", 7, 5]        # line numbers where none is given
    got = {line["id"]: line["text"] for line in answer(*loaded, found, 10**6, cache)}
    assert list(got)[0] == "b" and len(got) == 4                   # the shortest is done first
    for p in found:
        assert got[p["id"]] == write_sample(
            *loaded, p["prompt"], p["max_new_tokens"], p["temperature"], p["top_p"],
            lambda _: None, p["seed"], cache)


def test_the_command(file, tmp_path, capsys):
    out = tmp_path / "texts.jsonl"
    args = ["generate", "data/model", "--prompts", file(*ASKED), "--memory", "1MB", "--cache",
            "six_bit", "--max-new-tokens", 5, "--out", out]
    code, lines, err = call(capsys, *args)
    got = {r["id"]: r["text"] for r in map(json.loads, lines.splitlines())}
    assert code == 0 and err == "" and set(got) == {1, "b", 7, 4}
    assert out.read_text() == lines and got[1].startswith("The cat") and got[4].startswith("知")
    assert call(capsys, *args) == (0, "", "")                      # all are there already
    kept = lines.splitlines(keepends=True)
    out.write_text("".join(kept[:2]) + kept[2][:-5])               # killed while it wrote
    code, rest, _ = call(capsys, *args)
    assert code == 0 and len(rest.splitlines()) == 2
    assert {r["id"]: r["text"] for r in map(json.loads, out.read_text().splitlines())} == got


def test_lines_come_as_they_are_done(loaded, file, tmp_path):
    """Who stops reading after a line has it in the file, and the rest is done the next time."""
    found, out = read_prompts(file(*ASKED), **OPTIONS), tmp_path / "texts.jsonl"
    lines = answer(*loaded, found, 10**6, out=out)
    first = next(lines)
    assert json.loads(out.read_text()) == first and first["id"] == "b"
    lines.close()
    assert [line["id"] for line in answer(*loaded, found, 10**6, out=out)] != []
    assert len(out.read_text().splitlines()) == 4


def test_a_prompt_without_numbers_leaves_the_others_theirs(file, tmp_path, capsys, monkeypatch):
    """Exit code 1 and one line; what was done is written."""
    real = checkpoint.load

    def damaged(*args, **kwargs):
        model = real(*args, **kwargs)
        token = load_tokenizer("data/model/tokenizer.json").encode("知")[0]
        weight = model.embedding.weight.detach().clone()
        model.head.weight = torch.nn.Parameter(weight.clone())     # they are tied
        weight[token] = torch.nan
        model.embedding.weight = torch.nn.Parameter(weight)
        return model

    monkeypatch.setattr(checkpoint, "load", damaged)
    out = tmp_path / "texts.jsonl"
    code, lines, err = call(capsys, "generate", "data/model", "--prompts", file(*ASKED), "--out",
                            out, "--max-new-tokens", 4)
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("dsv2_ref: prompts: 1 have no text, first line 4: logits: NaN")
    assert {json.loads(line)["id"] for line in lines.splitlines()} == {1, "b", 7}
    assert out.read_text() == lines


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2: '{' is not JSON, expected"),
    ("[1]", "line 2: '[1]', expected an object with a prompt"),
    ('{"id": 3}', "line 2: '{\"id\": 3}', expected an object with a prompt"),
    ('{"prompt": 3}', "line 2: prompt: 3, expected str"),
    ('{"prompt": "a", "id": 1}', "line 2: id: 1 for the second time, expected one a prompt"),
    ('{"prompt": "a", "id": true}', "line 2: id: True, expected str or int"),
    ('{"prompt": "a", "tokens": 1}', "line 2: 'tokens', expected only id, prompt, max_new_tokens"),
    ('{"prompt": "a", "seed": 1.5}', "line 2: seed: 1.5, expected int"),
    ('{"prompt": "a", "top_p": 0}', "line 2: top_p: 0, expected above 0 and at most 1"),
    ('{"prompt": "a", "max_new_tokens": 900}', "line 2: tokens: "),
    ('{"prompt": "a", "max_new_tokens": 9000}', "line 2: max_new_tokens: 9000 after"),
    ('{"prompt": "\\ud800"}', "line 2: prompt: '\\ud800', expected text that UTF-8 can hold"),
])
def test_a_bad_line_is_refused_by_its_number(line, message, file, tmp_path, capsys):
    out = tmp_path / "texts.jsonl"
    code, lines, err = call(capsys, "generate", "data/model", "--prompts", file(ASKED[0], line),
                            "--memory", "300kB", "--max-new-tokens", 2, "--out", out)
    assert code == 2 and lines == "" and err.count("\n") == 1
    assert err.startswith("dsv2_ref: prompts: ") and message in err and not out.exists()


@pytest.mark.parametrize(("args", "message"), [
    (["--prompts", "/no/such/file"], "/no/such/file: No such file"),
    (["--prompts", "data/model/model.safetensors"], "is not UTF-8, expected lines of JSON"),
    (["--prompts", "/dev/null"], "prompts: '/dev/null' has no line, expected at least one"),
    (["--prompt", "a", "--prompts", "b"], "not allowed with"),
    (["--out", "a"], "out: 'a' without --prompts, expected both"),
    (["--memory", "2 apples"], "memory: '2 apples', expected bytes such as 2GB"),
])
def test_bad_options_are_one_line_and_code_2(args, message, capsys):
    code, out, err = call(capsys, "generate", "data/model", *args)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_file_of_something_else_is_not_added_to(file, tmp_path, capsys):
    out = tmp_path / "notes"
    out.write_text("mine\n")
    code, _, err = call(capsys, "generate", "data/model", "--prompts", file(*ASKED), "--out", out)
    assert code == 2 and "has a line without an id" in err and out.read_text() == "mine\n"


def test_memory_in_words():
    assert [bytes_of(t) for t in ("1000", "2GB", "2 gb", "1.5kB", "512MiB", "1Ti", "7B", "3G")] == [
        1000, 2 * 10**9, 2 * 10**9, 1500, 2**29, 2**40, 7, 3 * 10**9]
    for text in ("", "GB", "-1", "2XB", "2 G B"):
        with pytest.raises(ValueError, match="memory: .*, expected bytes"):
            bytes_of(text)

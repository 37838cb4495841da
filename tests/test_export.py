# SPDX-License-Identifier: MIT
"""Saved folders as other programs take them: `export`, the committed models, and transformers with
nothing but the folder's name. tests/clients.py has lm-eval, vLLM and llama.cpp."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from alive import Alive
from calling import call
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors

from dsv2_ref import checkpoint
from dsv2_ref.alignment.chat import TEMPLATE, prompt_ids
from dsv2_ref.commands.common import files_for_others, write_model
from dsv2_ref.config import TINY, Config
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.stories import sample
from dsv2_ref.text.tokenizer import BEGIN, END, TextTokenizer, load_tokenizer, train_tokenizer

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "model"
TOKENIZER = load_tokenizer(MODEL / "tokenizer.json")
FILES = {"config.json", "generation_config.json", "manifest.json", "model.safetensors",
         "tokenizer.json", "tokenizer_config.json"}
TEXTS = ["Once upon a time", " two  spaces", "小红喜欢苹果，", "🙂 é\r\n\tx", "",
         "don't stop_here 1234"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["model", "needle"])
def test_the_committed_models_are_what_export_writes(name, tmp_path, capsys):
    code, out, err = call(capsys, "export", DATA / name, "--out", tmp_path / "again")
    trained = {"model": 256, "needle": 512}[name]
    assert (code, err, json.loads(out)["trained"]) == (0, "", trained)
    assert contents(tmp_path / "again") == contents(DATA / name)
    assert set(contents(DATA / name)) == FILES
    assert sum(map(len, contents(DATA / name).values())) < 3e6


def test_an_export_keeps_every_number_and_adds_the_tied_head(tmp_path, capsys):
    """From a folder as it was written before: no head, no rule, the length untold."""
    old = tmp_path / "old"
    old.mkdir()
    tensors = load_file(MODEL / "model.safetensors")
    head = tensors.pop(HEAD)
    assert torch.equal(head, tensors[EMBEDDING])
    before = checkpoint.load(MODEL)
    config = before.config.with_(trained_positions=None)
    rules = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    rules["post_processor"] = None
    (old / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    (old / "config.json").write_text(json.dumps(config.to_hf()))
    checkpoint._save_file(tensors, old / "model.safetensors", {})
    assert checkpoint.load(old).config == config
    for _ in range(2):                                 # and it replaces what it wrote itself
        code, out, _ = call(capsys, "export", old, "--trained", 256, "--out", tmp_path / "new")
        assert code == 0 and json.loads(out)["trained"] == 256
    new = contents(tmp_path / "new")
    stored = {"torch_dtype": "bfloat16"}               # what `save` says beside the config
    assert json.loads(new["config.json"]) == before.config.to_hf() | stored
    for file in FILES - {"manifest.json", "config.json"}:
        assert new[file] == (MODEL / file).read_bytes(), file


def test_the_readable_length_is_kept_beside_the_trained_one():
    said = json.loads((MODEL / "config.json").read_text())
    assert (said["max_position_embeddings"], said["readable_positions"]) == (256, 1024)
    config = Config.from_hf(MODEL)
    assert (config.max_positions, config.trained_positions) == (1024, 256)
    assert json.loads((MODEL / "tokenizer_config.json").read_text())["model_max_length"] == 256
    needle = json.loads((DATA / "needle" / "tokenizer_config.json").read_text())
    assert needle["model_max_length"] == 4096          # YaRN's reach


@pytest.mark.parametrize("options, said", [
    (["nowhere"], "MODEL: 'nowhere' is no folder"),
    ([DATA / "results"], "no tokenizer at"),
    ([MODEL, "--trained", 0], "trained_positions: 0, expected less than max_positions = 1024"),
    ([MODEL, "--trained", 1025], "trained_positions: 1025, expected less than"),
    ([DATA / "needle", "--trained", 512], "trained_positions: 512, expected less than max_positi"),
    ([MODEL, "--out", ""], "--out: '', expected a name or a path"),
])
def test_what_cannot_be_exported_is_one_line(tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "export", *options)
    assert (code, out) == (2, "") and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "build" / "export").exists()


def test_a_folder_of_someone_elses_is_not_replaced(tmp_path, capsys):
    shutil.copytree(MODEL, tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text("{}")
    code, _, err = call(capsys, "export", MODEL, "--out", tmp_path / "mine")
    assert code == 2 and "not written here, or changed since" in err


def test_a_tokenizer_of_another_model_is_refused(tmp_path, capsys):
    model = DeepSeekV2(TINY.with_(vocab=700))
    checkpoint.save(model, tmp_path / "m", {"tokenizer.json": TOKENIZER.to_json()})
    code, _, err = call(capsys, "export", tmp_path / "m", "--out", tmp_path / "out")
    assert code == 2 and "tokenizer: 1024 tokens, expected at most the model's 700" in err


@pytest.mark.parametrize("width, said", [(128, 0), (64, 12)])
def test_fp8_says_which_sizes_not_every_program_reads(tmp_path, capsys, width, said):
    tokenizer = train_tokenizer(["one two"], 258)
    config = TINY.with_(vocab=258, d=128, n_h=2, d_h=64, d_r=128, d_v=64, d_c=128, d_cq=128,
                        n_layers=2, dense_width=128, n_routed=4, n_devices=2, top_k=2,
                        expert_width=width, n_shared=128 // width)
    checkpoint.save(DeepSeekV2(config), tmp_path / "m", {"tokenizer.json": tokenizer.to_json()})
    code, _, err = call(capsys, "export", tmp_path / "m", "--fp8", "--out", tmp_path / "out")
    assert code == 0 and json.loads((tmp_path / "out" / "config.json").read_text())[
        "quantization_config"]["quant_method"] == "fp8"
    lines = err.splitlines()
    assert len(lines) == bool(said)
    if said:
        assert lines[0].startswith(f"FP8: {said} tensors, as model.layers.1.mlp.experts.0.gate_")
    assert Config.from_hf(tmp_path / "out") == config


def test_several_ends_are_told_to_others():
    said = json.loads(files_for_others(TOKENIZER, TINY.with_(eos=(1, 5)))["generation_config.json"])
    assert said == {"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 1,
                    "do_sample": False}


# ---- the begin mark

def test_others_begin_a_text_with_the_mark_once_and_ours_adds_none():
    again = TextTokenizer.from_json(TOKENIZER.to_json_for_others())
    assert again.to_json_for_others() == TOKENIZER.to_json_for_others()
    other = Tokenizer.from_str(TOKENIZER.to_json_for_others())
    for text in TEXTS:
        assert other.encode(text).ids == [TOKENIZER.bos, *TOKENIZER.encode(text)]
        assert again.encode(text) == TOKENIZER.encode(text)
    pair = other.encode("one", "two").ids
    assert pair == [0, *TOKENIZER.encode("one"), 0, *TOKENIZER.encode("two")]


def test_a_rule_that_is_there_is_kept_before_ours():
    """The published tokenizers come with a ByteLevel rule, which adds no mark."""
    plain = Tokenizer.from_str(TOKENIZER.to_json())
    plain.post_processor = processors.ByteLevel(trim_offsets=True)
    text = TextTokenizer(plain).to_json_for_others()
    rules = json.loads(text)["post_processor"]["processors"]
    assert [rule["type"] for rule in rules] == ["ByteLevel", "TemplateProcessing"]
    assert Tokenizer.from_str(text).encode(" kite").ids == [0, *TOKENIZER.encode(" kite")]


# ---- transformers, with the folder's name alone

@pytest.fixture(scope="module")
def transformers():
    """The library without its progress bars and advice."""
    library = pytest.importorskip("transformers")
    logging = library.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield library
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def pipeline(transformers):
    return transformers.pipeline("text-generation", str(MODEL), dtype=torch.float32)


@pytest.fixture(scope="module")
def model():
    return checkpoint.load(MODEL, torch.float32)


def ours(model, ids, n):
    """`n` greedy ids, each of them chosen clearly: on any CPU the same."""
    new = generate(model, [ids], n)[0]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *new]]))[0, len(ids) - 1 : -1]      # (n, vocab)
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > 1e-2
    return new


def test_transformers_knows_marks_length_and_template(pipeline):
    tokenizer = pipeline.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BEGIN, END, END)
    assert (tokenizer.model_max_length, tokenizer.chat_template) == (256, TEMPLATE)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == [TOKENIZER.bos, *TOKENIZER.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    messages = [{"role": "user", "content": "小红 has 3 apples?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == prompt_ids(messages, TOKENIZER)


def test_transformers_reads_the_same_logits(pipeline, model):
    ids = torch.tensor([[0, *TOKENIZER.encode("One day, Lily took the kite to the beach.")]])
    with torch.no_grad():
        mine, theirs = model(ids), pipeline.model(ids).logits
    assert (mine - theirs).abs().max() < 1e-5 * mine.abs().max()
    assert torch.equal(pipeline.model.lm_head.weight, model.head.weight)


def test_transformers_writes_the_same_text(pipeline, model):
    prompts = ["Once upon a time", "One day,"]
    expected = [p + TOKENIZER.decode(ours(model, [0, *TOKENIZER.encode(p)], 24)) for p in prompts]
    assert expected[0].startswith("Once upon a time there was")
    for batch_size in (1, 2):
        found = pipeline(prompts, max_new_tokens=24, batch_size=batch_size)
        assert [each[0]["generated_text"] for each in found] == expected
    messages = [{"role": "user", "content": "Once"}]
    answer = TOKENIZER.decode(ours(model, prompt_ids(messages, TOKENIZER), 8))
    assert pipeline(messages, max_new_tokens=8)[0]["generated_text"][-1]["content"] == answer


def test_transformers_stops_at_the_end_mark(pipeline, model):
    document = sample(0, 1)[0].text
    ids = [0, *TOKENIZER.encode(document)]
    assert ours(model, ids, 1) == [TOKENIZER.eos]
    found = pipeline.model.generate(torch.tensor([ids]), max_new_tokens=8)[0].tolist()
    assert found == [*ids, TOKENIZER.eos]


@pytest.mark.parametrize("tied", [False, True])
def test_writing_a_model_makes_no_second_one_in_fp32(tied, tmp_path, monkeypatch):
    """Of Lite it was 63 GB of random numbers, to be written over."""
    model, written = DeepSeekV2(TINY.with_(tie_embeddings=tied)), []
    monkeypatch.setattr(checkpoint, "save", lambda state, *rest, **more: written.append(state))
    with Alive() as alive:
        for W in model.parameters():
            alive.see(W)
        before = alive.now
        write_model(model, model.config, tmp_path / "model", {})
    assert alive.peak - before < 1.5 * sum(2 * W.numel() for W in model.parameters())
    (state,) = written
    assert tied == (state.head.weight is state.embedding.weight)
    for a, b in zip(state.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())

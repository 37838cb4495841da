# SPDX-License-Identifier: MIT
"""Other programs take the saved folders as dsv2_ref/inference/clients.md says: `make clients`.

lm-eval and llama.cpp's runtime (xllamacpp) come with the extra `clients`. Two things cannot: vLLM,
which wants another transformers, and llama.cpp's converter, which is on no index. They are looked
for where DSV2_VLLM (a Python that has vllm) and DSV2_LLAMA_CPP (a checkout) say.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv2_ref import checkpoint
from dsv2_ref.alignment.chat import prompt_ids
from dsv2_ref.commands.common import files_for_others
from dsv2_ref.config import SMALL
from dsv2_ref.inference.evaluate import token_log_probs
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.stretch import with_config
from dsv2_ref.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
MODEL, NEEDLE, CHAT = (ROOT / "data" / name for name in ("model", "needle", "addition"))
PAGE = (ROOT / "dsv2_ref" / "inference" / "clients.md").read_text(encoding="utf-8")
PROMPTS = ["Once upon a time", "One day,"]
QUESTION = [{"role": "user", "content": "52 + 36 ="}]      # to CHAT; the others know no answers


def snippet(name: str) -> str:
    """The code of the page that is saved as `name`."""
    return re.search(rf"`{re.escape(name)}`:\n\n```\w+\n(.*?)```", PAGE, re.S)[1]


def ours(folder: Path) -> list[str]:
    """Our greedy texts: of the prompts, from CHAT the answer to the question."""
    model, tokenizer = checkpoint.load(folder, torch.float32), load_tokenizer(
        folder / "tokenizer.json")
    ids = [[tokenizer.bos, *tokenizer.encode(p)] for p in PROMPTS]
    asked = [prompt_ids(QUESTION, tokenizer)] if folder == CHAT else ids
    return [tokenizer.decode(generate(model, [each], new_tokens(folder))[0]) for each in asked]


def new_tokens(folder: Path) -> int:
    """CHAT reads 32 tokens in all."""
    return 8 if folder == CHAT else 24


def run(*command: object, **settings: str) -> str:
    """stdout of a program that has to end well."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, text=True, timeout=1200,
                          capture_output=True, check=False,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"} | settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The preset small with random numbers."""
    folder = tmp_path_factory.mktemp("small") / "model"
    tokenizer = load_tokenizer(MODEL / "tokenizer.json")
    config = SMALL.with_(vocab=1024, init_std=0.2, trained_positions=256)
    torch.manual_seed(0)
    checkpoint.save(DeepSeekV2(config).bfloat16(), folder, files_for_others(tokenizer, config))
    return folder


@pytest.fixture(scope="module")
def lm():
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval")
    return huggingface.HFLM(str(MODEL), dtype="float32", device="cpu", batch_size=2)


def asked(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def log_prob(*texts: str, marks: int = 1) -> float:
    """Of the second text behind the first; of one text alone, all of it and all marks but one."""
    model, tokenizer = checkpoint.load(MODEL, torch.float32), load_tokenizer(
        MODEL / "tokenizer.json")
    ids = torch.tensor([[tokenizer.bos] * marks + tokenizer.encode("".join(texts))])
    behind = len(tokenizer.encode(texts[0])) if len(texts) > 1 else 0
    with torch.no_grad():
        return token_log_probs(model, ids)[0, behind:].double().sum().item()


def test_lm_eval_reads_the_same_numbers(lm, monkeypatch):
    pairs = [("Once upon a time", " there was a little girl"), ("One day,", " a kite")]
    found = lm.loglikelihood(asked("loglikelihood", *pairs))
    for (value, greedy), pair, right in zip(found, pairs, (True, False), strict=True):
        assert value == pytest.approx(log_prob(*pair), rel=1e-5) and greedy is right
    assert lm.max_length == 256
    texts = ["Lily had a red kite.", "小红喜欢苹果。"]
    for add, marks in ((None, 2), (False, 1)):           # as the page says
        monkeypatch.setattr(lm, "add_bos_token", add)
        found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((t,) for t in texts)))
        assert found == pytest.approx([log_prob(t, marks=marks) for t in texts], rel=1e-5)


def test_lm_eval_writes_the_same_text(lm):
    how = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    found = lm.generate_until(asked("generate_until", *((p, how) for p in PROMPTS)))
    assert found == ours(MODEL)


def test_lm_eval_runs_the_task_of_the_page(tmp_path):
    pytest.importorskip("lm_eval")
    for name in ("ends.yaml", "ends.jsonl"):
        (tmp_path / name).write_text(snippet(name).replace("ends.jsonl", str(
            tmp_path / "ends.jsonl")), encoding="utf-8")
    out = run(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
              "pretrained=data/model,dtype=float32", "--device", "cpu", "--include_path", tmp_path,
              "--tasks", "ends")
    assert re.search(r"\|ends *\|.*\|acc *\|.*\| *1\b", out)


@pytest.mark.parametrize("name", ["model", "needle", "small"])
def test_vllm_writes_the_same_text(name, small, tmp_path):
    """On a CPU it takes heads of d_h + d_r = 48 and 64, and no others of our sizes."""
    if not (python := os.environ.get("DSV2_VLLM")):
        pytest.skip("needs DSV2_VLLM, a Python that has vllm")
    folder = {"model": MODEL, "needle": NEEDLE, "small": small}[name]
    (tmp_path / "write.py").write_text(snippet("write.py"), encoding="utf-8")
    out = run(python, tmp_path / "write.py", folder, *PROMPTS, VLLM_MLA_DISABLE="1",
              VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH="")
    found = next(json.loads(line) for line in out.splitlines() if line.startswith('["'))   # no log
    for text, mine in zip(found, ours(folder), strict=True):
        mine = mine.rstrip("�")                        # half a character is not written
        assert text[: len(mine)] == mine and len(mine) > 20


@pytest.mark.parametrize("name", ["model", "needle", "addition", "greedy"])
def test_llama_cpp_writes_the_same_text(name, tmp_path):
    """`greedy`: data/model with greedy routing on several devices, once an abort there."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp")
    if not (checkout := os.environ.get("DSV2_LLAMA_CPP")):
        pytest.skip("needs DSV2_LLAMA_CPP, a checkout of llama.cpp")
    folder = {"needle": NEEDLE, "addition": CHAT}.get(name, MODEL)
    if name == "greedy":
        folder, model = tmp_path / "greedy", checkpoint.load(MODEL)
        config = model.config.with_(max_devices=None)
        checkpoint.save(with_config(model, config), folder, files_for_others(
            load_tokenizer(MODEL / "tokenizer.json"), config))
    (tmp_path / "convert.py").write_text(snippet("convert.py"), encoding="utf-8")
    file = tmp_path / "model.gguf"
    run(sys.executable, tmp_path / "convert.py", checkout, folder, "--outtype", "f32",
        "--outfile", file)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 256, 1
    server = xllamacpp.Server(settings)
    how = {"temperature": 0, "max_tokens": new_tokens(folder)}
    if folder == CHAT:
        found = [server.handle_chat_completions({"messages": QUESTION, **how})["choices"][0][
            "message"]["content"]]
    else:
        found = [server.handle_completions({"prompt": p, **how})["choices"][0]["text"]
                 for p in PROMPTS]
    assert [text.strip() for text in found] == [text.strip() for text in ours(folder)]

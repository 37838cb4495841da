# SPDX-License-Identifier: MIT
"""What the command line does: the main job (`run`), `train` and `generate`."""

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_ref import checkpoint, cost, figures, paper
from dsv2_ref.config import PRESETS, SMALL, V2, Config
from dsv2_ref.inference.evaluate import bits_per_byte, compressed_bits_per_byte
from dsv2_ref.inference.generate import TextStream, generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.corpora import Corpus, Document, byte_count, open_corpus
from dsv2_ref.training.data import encode
from dsv2_ref.training.pretrain import (
    Trainer,
    autocast,
    keep_freed_memory,
    set_fastest_threads,
    train,
)
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.tokenizer import (
    TextTokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

# no space at the end: tokens carry the space before a word, not the one after it
PROMPT = "class Parser:\n    def __init__(self, name):\n        self.name = name\n\n    def"


def say(text: str = "") -> None:
    """A message for the person: stderr, so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """What a dated result has to name."""
    names = ("torch", "numpy", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@dataclass
class Setup:
    """A model that is ready to be trained, and what it is trained and judged on."""

    corpus: Corpus
    tokenizer: TextTokenizer
    trainer: Trainer

    @property
    def model(self) -> DeepSeekV2:
        return self.trainer.model

    def describe(self) -> str:
        """Size, device, and what will run under the trainer's precision."""
        with autocast(self.trainer.device, self.trainer.precision):
            return f"{self.model.describe()}; {self.trainer.precision} matmuls in training"

    def held_out(self, documents: list[Document], progress: bool = False) -> float:
        """Bits per byte of documents of the corpus."""
        ids = self.tokenizer.encode_batch([d.text for d in documents])
        marked = [[self.tokenizer.bos, *i, self.tokenizer.eos] for i in ids]
        with autocast(self.trainer.device, self.trainer.precision):
            return bits_per_byte(self.model, marked, byte_count(documents),
                                 self.trainer.recipe.sequence, progress=progress)


def set_up(
    config: Config, recipe: Recipe, corpus: Corpus, tokenizer: TextTokenizer | None = None,
) -> Setup:
    """Tokenizer (trained on the corpus unless given), model and trainer; all from recipe.seed."""
    if tokenizer is None:
        tokenizer = train_tokenizer((d.text for d in corpus.train), config.vocab)
    config = config.with_(vocab=tokenizer.vocab, bos=tokenizer.bos, eos=tokenizer.eos,
                          max_positions=max(config.max_positions, recipe.sequence))
    torch.manual_seed(recipe.seed)
    model = DeepSeekV2(config).to(default_device())
    return Setup(corpus, tokenizer, Trainer(model, recipe, encode(corpus.train, tokenizer)))


def expert_load(setup: Setup, batches: int = 8) -> Tensor:
    """(MoE layers, experts) slots that held-out text sends to each expert."""
    tokens = torch.from_numpy(encode(setup.corpus.validation, setup.tokenizer).astype("int64"))
    T = min(setup.trainer.recipe.sequence, len(tokens))
    rows = tokens[: len(tokens) // T * T].view(-1, T)[:batches].to(setup.trainer.device)
    with torch.no_grad(), autocast(setup.trainer.device, setup.trainer.precision):
        load = setup.model.eval().losses(rows, rows, with_load=True).load
    return torch.stack([layer.experts for layer in load])


def run(
    out: str | Path = "build", seconds: float = 225.0, corpus: str = "python"
) -> dict[str, Any]:
    """The main job: train a small DeepSeek-V2 on real text, judge it, generate, draw, save.

    `seconds` is for everything together; training gets what the other parts leave. Returns what
    it writes to `out`/run.json.
    """
    began = time.perf_counter()
    out = _folder(out)
    keep_freed_memory()
    say("1. Text and tokenizer")
    text = open_corpus(corpus)
    say(f"   {text.origin}: {byte_count(text.train) / 1e6:.1f} MB to train on, "
        f"{len(text.test)} whole files, {byte_count(text.test) / 1e6:.2f} MB, for the test")
    compressors = compressed_bits_per_byte(text.test)
    setup = set_up(SMALL, Recipe(seconds=seconds), text)
    say(f"   byte-level BPE, {setup.tokenizer.vocab} tokens")

    say(f"2. Training\n   {setup.describe()}")
    left = seconds - _seconds_to_judge(setup) - (time.perf_counter() - began)
    setup.trainer.recipe = setup.trainer.recipe.with_(seconds=max(left, 0.3 * seconds))
    few = _prefix(text.validation, 20_000)
    log = train(setup.trainer, out / "training", 0, lambda: setup.held_out(few), 100, load_every=20)
    say(f"   {setup.trainer.steps} steps, {setup.trainer.tokens:,} tokens in "
        f"{setup.trainer.elapsed:.0f} s")

    say("3. Held-out text, bits per byte (less is better)")
    bits = setup.held_out(text.test, progress=True)
    for name, value in (("gzip -9, each file", compressors["gzip"]),
                        ("xz -9e, each file", compressors["xz"]),
                        ("xz -9e, all files together", compressors["xz_together"]),
                        ("this model", bits)):
        say(f"   {name:<28}{value:.3f}")

    say("4. A sample, decoded from the latent cache")
    save_model(setup, out / "model")
    write_sample(setup.model.eval(), setup.tokenizer, PROMPT, 200, 0.7, 0.9, sys.stderr.write)

    caches = compare_caches(setup.model.config)
    say("\n6. The paper's claims beside ours")
    say(paper.as_table(paper.rows()))
    draw(setup, log, compressed_bits_per_byte(few), caches["V2's size"], out)
    result = summary(setup, bits, compressors, caches)
    result["seconds"] = time.perf_counter() - began
    (out / "run.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"\nDone in {result['seconds']:.0f} s. In {out}/: run.json, loss.png, cache.png, "
        "expert_load.png, model/ (published format), training/")
    return result


def _prefix(documents: list[Document], n_bytes: int) -> list[Document]:
    """The first documents, as few as have `n_bytes` together."""
    taken: list[Document] = []
    for document in documents:
        if byte_count(taken) >= n_bytes:
            break
        taken.append(document)
    return taken


def _seconds_to_judge(setup: Setup) -> float:
    """What everything after training will take on this machine, from a piece of the test."""
    piece = [Document("piece", setup.corpus.test[0].text[:40_000])]
    set_fastest_threads(lambda: setup.held_out(piece))
    began = time.perf_counter()
    setup.held_out(piece)
    whole = (time.perf_counter() - began) * byte_count(setup.corpus.test) / byte_count(piece)
    return 1.1 * whole + 15.0


def compare_caches(config: Config) -> dict[str, dict[str, int]]:
    """Bytes a token of live caches by kind, for a model and for V2; tells the person."""
    say("\n5. Cache, bytes a token in bf16, measured on live tensors")
    live = {name: cost.measured_cache_bytes(c) for name, c in (("this model", config),
                                                               ("V2's size", V2))}
    for name, kinds in live.items():
        say(f"   {name:<12}" + "   ".join(f"{kind} {n:,}" for kind, n in kinds.items()))
    return live


def summary(
    setup: Setup, bits: float, compressors: dict[str, float], caches: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """What run.json holds, but for the seconds of the whole job."""
    trainer = setup.trainer
    return {
        "bits_per_byte": bits, "gzip_bits_per_byte": compressors["gzip"],
        "xz_bits_per_byte": compressors["xz_together"],
        "xz_each_file_bits_per_byte": compressors["xz"],
        "seconds": 0.0, "training_seconds": trainer.elapsed, "steps": trainer.steps,
        "tokens_per_second": trainer.tokens / trainer.elapsed,
        "cache_bytes_per_token": caches["this model"],
        "cache_bytes_per_token_at_v2_size": caches["V2's size"],
        "corpus": setup.corpus.origin, "test_bytes": byte_count(setup.corpus.test),
        "versions": versions(), "threads": torch.get_num_threads(), "precision": trainer.precision,
        "device": torch.cuda.get_device_name() if default_device() == "cuda" else "cpu",
    }


def draw(
    setup: Setup, log: list[dict[str, Any]], references: dict[str, float],
    cache_bytes: dict[str, int], out: Path,
) -> None:
    """The three pictures of the main job, as PNG in `out`."""
    references = {"gzip": references["gzip"], "xz": references["xz"]}
    figures.save(figures.loss_curve(log, references), out / "loss.png")
    figures.save(figures.cache_bars(cache_bytes), out / "cache.png")
    c = setup.model.config
    load = expert_load(setup).numpy(force=True)
    figures.save(figures.expert_load(load, c.n_devices, c.n_dense), out / "expert_load.png")


def save_model(setup: Setup, path: Path) -> None:
    """The published format in bf16, tokenizer.json beside it; replaces an earlier one."""
    state = DeepSeekV2(setup.model.config)
    state.load_state_dict(setup.model.state_dict())
    text = setup.tokenizer.tokenizer.to_str(pretty=True)
    checkpoint.save(state.bfloat16(), path, {"tokenizer.json": text}, overwrite=True)


def write_sample(
    model: DeepSeekV2, tokenizer: TextTokenizer, prompt: str, max_new_tokens: int,
    temperature: float, top_p: float, write: Callable[[str], object], seed: int = 0,
) -> str:
    """Stream a continuation of `prompt` to `write`; returns the whole text."""
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    draws = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    write(prompt)
    new = generate(model, [ids], max_new_tokens, temperature, top_p,
                   stream=TextStream(tokenizer.decode, write), generator=draws)[0]
    write("\n")
    return prompt + tokenizer.decode(new)


def train_command(
    preset: str, corpus: str, out: str, resume: bool, save_every: int, evaluate_every: int,
    progress: bool, **changes: Any,
) -> dict[str, Any]:
    """Train a preset into `out`: state.safetensors, log.jsonl, tokenizer.json, model/."""
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r}, expected one of {', '.join(sorted(PRESETS))}")
    if changes.get("steps") is None and changes.get("seconds") is None:
        changes["steps"] = 300
    recipe = Recipe(steps=1).with_(**changes)
    folder = _folder(out)
    state = folder / "state.safetensors"
    if state.exists() and not resume:
        raise ValueError(f"{state}: exists, expected --resume to go on with it or another --out")
    if resume and not state.exists():
        raise ValueError(f"{state}: no such file, expected a saved state to resume from")
    keep_freed_memory()
    tokenizer = load_tokenizer(folder / "tokenizer.json") if resume else None
    setup = set_up(PRESETS[preset], recipe, open_corpus(corpus), tokenizer)
    if resume:
        setup.trainer.load(state)
        say(f"resumed after step {setup.trainer.steps}")
    else:
        save_tokenizer(setup.tokenizer, folder / "tokenizer.json")
    say(f"{preset}: {setup.describe()}")
    log = train(setup.trainer, folder, save_every, lambda: setup.held_out(setup.corpus.validation),
                evaluate_every, progress=progress)
    if not log:
        raise ValueError(f"steps: the run in {folder} is at its end, expected more steps to go on")
    save_model(setup, folder / "model")
    return {
        "steps": setup.trainer.steps, "tokens": setup.trainer.tokens, "loss": log[-1]["language"],
        "bits_per_byte": setup.held_out(setup.corpus.validation),
        "tokens_per_second": setup.trainer.tokens / setup.trainer.elapsed, "out": str(folder),
    }


def generate_command(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int,
) -> dict[str, Any]:
    """Continue a prompt with a saved model; the text streams to stderr."""
    tokenizer = load_tokenizer(Path(model) / "tokenizer.json")
    loaded = checkpoint.load(model, device=default_device())
    text = write_sample(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p,
                        sys.stderr.write, seed)
    return {"text": text}


def _folder(path: str | Path) -> Path:
    """An output folder that exists and can be written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    return path

# SPDX-License-Identifier: MIT
"""What the command line does: `train` and `generate`, and what the main job shares with them."""

import json
import os
import platform
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dsv2_ref import checkpoint, cost, figures
from dsv2_ref.config import PRESETS, Config
from dsv2_ref.inference.evaluate import bits_per_byte
from dsv2_ref.inference.generate import TextStream, generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.corpora import Corpus, Document, byte_count, open_corpus
from dsv2_ref.training.data import encode, some_of
from dsv2_ref.training.ladder import LADDER
from dsv2_ref.training.machine import autocast, keep_freed_memory
from dsv2_ref.training.memory import plan, state_bytes
from dsv2_ref.training.pretrain import Trainer, train
from dsv2_ref.training.recipe import PAPER, Recipe
from dsv2_ref.training.run_folder import RunFolder, read_log
from dsv2_ref.training.tokenizer import (
    TextTokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from dsv2_ref.training.watching import Watch


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
    _check_memory(config, recipe)
    if tokenizer is None:
        tokenizer = train_tokenizer((d.text for d in corpus.train), config.vocab)
    config = config.with_(vocab=tokenizer.vocab, bos=tokenizer.bos, eos=tokenizer.eos,
                          max_positions=max(config.max_positions, recipe.sequence))
    torch.manual_seed(recipe.seed)
    with torch.device(default_device()):        # 15.7B random numbers take minutes on a CPU
        model = DeepSeekV2(config)
    return Setup(corpus, tokenizer, Trainer(model, recipe, encode(corpus.train, tokenizer)))


def _check_memory(config: Config, recipe: Recipe) -> None:
    """ValueError if weights, gradients and moments cannot fit; activations aside."""
    needed = state_bytes(cost.parameters(config).total, recipe)
    if default_device() == "cuda":
        there = torch.cuda.mem_get_info()[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(f"preset: its training state takes {needed / 2**30:,.0f} GiB, expected "
                         f"one that fits in {there / 2**30:,.0f} GiB (small, mini, tiny, or "
                         "--optimizer adamw8 --weights bf16)")


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
    stream = TextStream(tokenizer.decode, write, prompt)
    new = generate(model, [ids], max_new_tokens, temperature, top_p, stream=stream,
                   generator=draws)[0]
    write("\n")
    return prompt + tokenizer.decode(new)


def train_command(
    preset: str, recipe: str | None, corpus: str, out: str, resume: bool, save_every: int,
    evaluate_every: int, progress: bool, tokens: float | None = None, save: bool = True,
    watch: str | None = None, text_bytes: float | None = None, **changes: Any,
) -> dict[str, Any]:
    """Train a preset into `out`: log.jsonl, tokenizer.json, config.json and, with `save`, states
    and model/."""
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r}, expected one of {', '.join(sorted(PRESETS))}")
    recipe = recipe or (preset if preset in LADDER else "minutes")
    lengths = (tokens, changes.get("steps"), changes.get("seconds"))
    if recipe not in LADDER and all(length is None for length in lengths):
        changes["steps"] = 300
    if min(save_every, evaluate_every) < 0:
        raise ValueError(f"save_every: {save_every}, evaluate_every: {evaluate_every}, expected "
                         "numbers of steps, 0 for never")
    chosen = ({"minutes": Recipe(steps=1)} | PAPER | LADDER)[recipe].with_(**changes)
    if tokens is not None:
        chosen = chosen.lasting(tokens)
    folder = output_folder(out)
    run = RunFolder(folder)
    if run.states and not resume:
        raise ValueError(f"{run.states[0]}: exists, expected --resume to go on with it or another "
                         "--out")
    state = run.newest(say) if resume else None
    watching = Watch(watch, folder, state[2]["steps"] if state else 0, say) if watch else None
    with closing(watching) if watching else nullcontext():
        keep_freed_memory()
        tokenizer = load_tokenizer(folder / "tokenizer.json") if resume else None
        text = open_corpus(corpus)
        if text_bytes is not None:
            text = some_of(text, text_bytes)
        setup = set_up(PRESETS[preset], chosen, text, tokenizer)
        if state:
            setup.trainer.restore(*state)
            say(f"resumed after step {setup.trainer.steps}")
        else:
            save_tokenizer(setup.tokenizer, folder / "tokenizer.json")
            (folder / "config.json").write_text(json.dumps(setup.model.config.to_hf(), indent=1))
        say(f"{preset}: {setup.describe()}")
        return _train(setup, folder, save_every if save else None, evaluate_every, progress,
                      watching)


def _train(
    setup: Setup, folder: Path, save_every: int | None, evaluate_every: int, progress: bool,
    watching: Watch | None,
) -> dict[str, Any]:
    """Run it and sum it up; a `save_every` of None saves nothing."""
    planned = plan(setup.model, setup.trainer.recipe, setup.trainer.precision)
    say(f"memory planned: {planned.lines()}")
    log = train(setup.trainer, folder, save_every,
                lambda: setup.held_out(setup.corpus.validation), evaluate_every, progress=progress,
                watch=watching)
    if not log:
        raise ValueError(f"steps: the run in {folder} is at its end, expected more steps to go on")
    if save_every is not None:
        save_model(setup, folder / "model")
    result = {
        "steps": setup.trainer.steps, "tokens": setup.trainer.tokens, "loss": log[-1]["language"],
        "bits_per_byte": setup.held_out(setup.corpus.validation),
        "tokens_per_second": setup.trainer.tokens / setup.trainer.elapsed, "out": str(folder),
    }
    if setup.trainer.device.type == "cuda":
        result |= {"planned_peak_bytes": planned.peak,
                   "peak_bytes": torch.cuda.max_memory_allocated()}
    return result


def figures_command(folder: str) -> dict[str, Any]:
    """Draw a run into `folder`/figures from its log.jsonl, with config.json or model/'s sizes."""
    log = read_log(folder)
    configs = [f for f in (Path(folder), Path(folder) / "model") if (f / "config.json").exists()]
    layout = {}
    if configs:
        config = Config.from_hf(configs[0])
        layout = {"n_devices": config.n_devices, "first_layer": config.n_dense}
    out = output_folder(Path(folder) / "figures")
    drawn = figures.run_figures(log, **layout)
    return {"figures": [str(figures.save(f, out / f"{name}.png")) for name, f in drawn.items()]}


def generate_command(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int,
) -> dict[str, Any]:
    """Continue a prompt with a saved model; the text streams to stderr."""
    if not Path(model).is_dir():
        raise ValueError(f"model: {model!r} is no folder, expected a saved model (`make run` "
                         "writes build/model)")
    tokenizer = load_tokenizer(Path(model) / "tokenizer.json")
    loaded = checkpoint.load(model, device=default_device())
    text = write_sample(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p,
                        sys.stderr.write, seed)
    return {"text": text}


def output_folder(path: str | Path) -> Path:
    """An output folder that exists and can be written to."""
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path}: cannot be written, it is a file, expected a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    return path

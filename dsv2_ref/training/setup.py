# SPDX-License-Identifier: MIT
"""A model that is ready to be trained: tokenizer, weights, optimisers, data, from one recipe."""

from dataclasses import dataclass

import torch

from dsv2_ref import cost
from dsv2_ref.block import Traffic
from dsv2_ref.config import Config
from dsv2_ref.inference.evaluate import bits_per_byte
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Corpus, Document, byte_count
from dsv2_ref.text.data import encode, marked
from dsv2_ref.text.tokenizer import TextTokenizer, train_tokenizer
from dsv2_ref.training.machine import autocast, default_device, memory
from dsv2_ref.training.memory import state_bytes
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.trainer import Trainer
from dsv2_ref.training.world import World


@dataclass
class Setup:
    """A model that is ready to be trained, and what it is trained and judged on."""

    corpus: Corpus
    tokenizer: TextTokenizer
    trainer: Trainer
    saved: Config | None = None      # what a saved model is read by; None: what it is trained by

    @property
    def model(self) -> DeepSeekV2:
        return self.trainer.model

    def describe(self) -> str:
        """Size, device, and what will run under the trainer's precision."""
        with autocast(self.trainer.device, self.trainer.precision):
            return f"{self.model.describe()}; {self.trainer.precision} matmuls in training"

    def held_out(self, documents: list[Document], progress: bool = False) -> float:
        """Bits per byte of documents of the corpus."""
        ids = list(marked(documents, self.tokenizer))

        def judge(model: DeepSeekV2) -> float:
            with autocast(self.trainer.device, self.trainer.precision):
                return bits_per_byte(model, ids, byte_count(documents),
                                     self.trainer.recipe.sequence, progress=progress)

        return self.trainer.world.with_whole(self.model, judge)

    @torch.no_grad()
    def held_out_load(self, documents: list[Document], rows: int = 40) -> list[Traffic]:
        """Where documents of the corpus are sent, a `Load` per MoE layer.

        Read are the first `rows` rows of the recipe's `sequence` tokens, documents one behind the
        other; fewer rows, or a shorter one, where the documents have no more.
        """
        tokens = torch.from_numpy(encode(documents, self.tokenizer).astype("int64"))
        T = min(self.trainer.recipe.sequence, len(tokens))
        x = tokens[: len(tokens) // T * T].view(-1, T)[:rows].to(self.trainer.device)   # (B, T)
        with autocast(self.trainer.device, self.trainer.precision):
            return self.model.eval().losses(x, x, with_load=True).load


def set_up(
    config: Config | None, recipe: Recipe, corpus: Corpus, tokenizer: TextTokenizer | None = None,
    model: DeepSeekV2 | None = None, world: World | None = None,
) -> Setup:
    """Tokenizer (trained on the corpus unless given), model and trainer; all from recipe.seed.

    A ready `model` is trained as it is, with the tokenizer given; `config` is then None. Where
    several processes train, each makes the whole model on the CPU and takes its share.
    """
    world = world or World()
    device = "cpu" if world.several else default_device()
    if model is None:
        if not world.several:
            _check_memory(config, recipe)
        if tokenizer is None:
            tokenizer = TextTokenizer.from_json(world.first_does(lambda: train_tokenizer(
                (d.text for d in corpus.train), config.vocab).to_json()))
        model = new_model(_trained_at(config, recipe.sequence), tokenizer, recipe.seed, device)
    else:
        check_ready(model.config, recipe, tokenizer)
        model.to(device)
    tokens = encode(corpus.train, tokenizer)
    held = world.hold(model, recipe.sequence)
    return Setup(corpus, tokenizer, Trainer(held, recipe, tokens, world=world))


def _trained_at(config: Config, length: int) -> Config:
    """The config of a new model that will be trained at `length` tokens, and says so.

    Under YaRN `yarn_original_positions` says it.
    """
    if length >= config.max_positions:
        return config.with_(max_positions=length, trained_positions=None)
    return config if config.yarn_factor else config.with_(trained_positions=length)


def new_model(
    config: Config, tokenizer: TextTokenizer, seed: int, device: str | None = None
) -> DeepSeekV2:
    """Random weights on a device, None for the default one, with the tokenizer's ids."""
    config = config.with_(vocab=tokenizer.vocab, bos=tokenizer.bos, eos=tokenizer.eos)
    torch.manual_seed(seed)
    with torch.device(device or default_device()):  # 15.7B random numbers take minutes on a CPU
        return DeepSeekV2(config)


def check_ready(config: Config, recipe: Recipe, tokenizer: TextTokenizer | None) -> None:
    """ValueError if a ready model cannot be trained so."""
    if tokenizer is None:
        raise ValueError("tokenizer: None, expected the one that the ready model was trained with")
    if tokenizer.vocab > config.vocab:
        raise ValueError(f"tokenizer: {tokenizer.vocab} tokens, expected at most the model's "
                         f"{config.vocab}")
    if recipe.sequence > config.max_positions:
        raise ValueError(f"sequence: {recipe.sequence}, expected at most the model's "
                         f"max_positions = {config.max_positions}")


def _check_memory(config: Config, recipe: Recipe) -> None:
    """ValueError if weights, gradients and moments cannot fit; activations aside."""
    needed = state_bytes(cost.parameters(config).total, recipe)
    _, there = memory(default_device())
    if there is not None and needed > there:
        raise ValueError(f"preset: its training state takes {needed / 2**30:,.0f} GiB, expected "
                         f"one that fits in {there / 2**30:,.0f} GiB (small, mini, tiny, or "
                         "--optimizer adamw8 --weights bf16)")

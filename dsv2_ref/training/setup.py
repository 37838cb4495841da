# SPDX-License-Identifier: MIT
"""A model that is ready to be trained: tokenizer, weights, optimisers, data, from one recipe."""

import os
from dataclasses import dataclass

import torch

from dsv2_ref import cost
from dsv2_ref.config import Config
from dsv2_ref.inference.evaluate import bits_per_byte
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Corpus, Document, byte_count
from dsv2_ref.text.data import encode, marked
from dsv2_ref.text.tokenizer import TextTokenizer, train_tokenizer
from dsv2_ref.training.machine import autocast, default_device
from dsv2_ref.training.memory import state_bytes
from dsv2_ref.training.pretrain import Trainer
from dsv2_ref.training.recipe import Recipe


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
        ids = list(marked(documents, self.tokenizer))
        with autocast(self.trainer.device, self.trainer.precision):
            return bits_per_byte(self.model, ids, byte_count(documents),
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

# SPDX-License-Identifier: MIT
"""Long context: the extension stage (section 3.1.4), and small models that learn to find needles.

The paper takes a model trained at 4K, changes its frequencies and both mscales (stretch.py: s = 40,
alpha 1, beta 32), trains it for 1000 more steps of 576 sequences of 32K, and reads up to 128K with
it. `PAPER` holds these numbers; `extension` makes the same stage for any model and factor: few
steps, at the length that is read in the end.

To see that it works one needs a model that finds something at the length it was trained at. A model
of about a million parameters does after some minutes of one core (`PRESETS["cpu"]`):

  1. Its text is `stories` with needles hidden in it (text/needles.py), and every sequence ends with
     a question and its answer.
  2. The loss is the cross entropy of the answer's tokens plus TEXT times that of all others. With
     all tokens alike the answers, 4 tokens of each sequence, would be learned many times later.
  3. Every sequence has one needle. A mixture with several needles and chains learned the one and
     not the others in 1,200 steps (one trial): the model finds the sentence that sticks out, and
     has not learned to tell names apart. The grid of `several` says so.
  4. Its sequences have 512 tokens, 256 or 128, by chance, 2,048 in a batch. The short ones have
     four times as many answers to learn from; the long ones make 512 the trained length. With 128
     alone and d_r = 16, a model of one seed found everything at eight times its length under YaRN
     and one of another 27 %. There YaRN kept one pair of eight, here it keeps two of sixteen; with
     these two slowed down as well the model finds next to nothing (tests/test_needle_model.py).
  5. No slot is dropped: a dropped slot of the one token that counts would hide it.

It trains with plain RoPE. What is saved of it carries YaRN over the trained length.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dsv2_ref.config import TINY, Config
from dsv2_ref.cross_entropy import IGNORED
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.stretch import stretched, stretched_config, trained_positions
from dsv2_ref.text.corpora import Corpus
from dsv2_ref.text.data import encode
from dsv2_ref.text.needles import NeedleBatches, sentences
from dsv2_ref.text.tokenizer import TextTokenizer, train_tokenizer
from dsv2_ref.training.objective import Batch, Named
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.setup import Setup, new_model
from dsv2_ref.training.trainer import Batches, Trainer

TEXT = 0.3                                              # weight of the loss on the haystack
DOCUMENTS, FOR_TOKENIZER = 6000, 4000                   # that are read: the corpus's first ones
# The paper gives steps, length and batch. The rate is ours: what its schedule ends with.
PAPER = Recipe(steps=1000, optimizer="adamw", lr=2.4e-4 * 0.316**2, schedule="step", warmup=0.0,
               decay_at=(1.0, 1.0), sequence=32 * 1024, batch=576)


@dataclass(frozen=True)
class Preset:
    """A model that learns retrieval, and how."""

    config: Config
    recipe: Recipe                       # its `sequence` is the trained length
    factor: float                        # to stretch it by when it is read
    shorter: tuple[int, ...] = (1, 2, 4)     # sequences are so many times shorter, by chance


_CPU = TINY.with_(
    vocab=1024, d=128, d_h=32, d_r=32, d_v=32, d_c=64, d_cq=96, dense_width=256, expert_width=64,
    drop_capacity=None,
)
PRESETS = {
    "cpu": Preset(_CPU, Recipe(steps=2000, lr=4e-3, adamw_lr=4e-3, sequence=512, batch=4,
                               precision="fp32"), 8.0),
    "gpu": Preset(
        _CPU.with_(d=256, n_layers=4, n_h=8, d_c=128, d_cq=192, dense_width=768,
                   n_routed=16, expert_width=128),
        Recipe(steps=3000, lr=3e-3, adamw_lr=3e-3, sequence=4096, batch=16), 32.0),
}


def retrieval(model: DeepSeekV2, batch: Batch) -> Named:
    """The objective: answers, the text around them, and the balance losses, in nats per token.

    The batch's tensors are tokens, targets and which targets are answers, as `NeedleBatches` gives.
    """
    tokens, targets, asked = batch.tensors
    run = replace(model.start(tokens.shape), learns=model.training, protected=batch.protected,
                  with_load=batch.with_load)
    h, balance, load = model.through(model.embed(tokens), run)
    h = model.finish(h).flatten(0, 1)                                        # (N, d)
    answer, text = (model.language(h, targets.masked_fill(out, IGNORED).flatten())
                    for out in (~asked, asked))
    return Named({"answer": answer, "text": TEXT * text, "balance": balance.sum()}, load)


def set_up_needles(
    preset: Preset, recipe: Recipe, corpus: Corpus, tokenizer: TextTokenizer | None = None
) -> Setup:
    """A model that is ready to learn retrieval in the corpus by `recipe`, all from recipe.seed.

    It is trained with plain RoPE at recipe.sequence, and saved with YaRN over that length.
    """
    tokenizer = tokenizer or tokenizer_for(corpus, preset.config.vocab)
    batches = NeedleBatches(encode(corpus.train[:DOCUMENTS], tokenizer), tokenizer,
                            recipe.sequence, recipe.seed, shorter=preset.shorter)
    model = new_model(preset.config.with_(max_positions=recipe.sequence), tokenizer, recipe.seed)
    return Setup(corpus, tokenizer, Trainer(model, recipe, batches, retrieval),
                 stretched_config(model.config, preset.factor))


def tokenizer_for(corpus: Corpus, vocab: int) -> TextTokenizer:
    """Of the corpus and the needles' words, so that each of them is one token."""
    texts = [document.text for document in corpus.train[:FOR_TOKENIZER]]
    return train_tokenizer([*texts, *sentences(0, 20_000)], vocab)


def extension(config: Config, factor: float, steps: int = 50, batch: int = 4) -> Recipe:
    """Our short stage: `steps` at a quarter of the stretched length, at a rate that moves little.

    The paper tunes at a fifth of its target length, 32K of 160K.
    """
    trained = trained_positions(config)
    return Recipe(steps=steps, lr=1e-3, adamw_lr=1e-3, warmup=0.1, batch=batch,
                  sequence=max(trained, round(factor * trained / 4)))


def extend(
    model: DeepSeekV2, factor: float, recipe: Recipe, batches: Batches,
    objective: Callable[[DeepSeekV2, Batch], Named] = retrieval,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> DeepSeekV2:
    """A copy of the model, stretched by `factor` and tuned by `recipe`; in eval mode."""
    tuned = copy.deepcopy(stretched(model, factor)).requires_grad_()
    train(Trainer(tuned, recipe, batches, objective), load_every=0, progress=False, watch=watch)
    return tuned.eval()

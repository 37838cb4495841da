# SPDX-License-Identifier: MIT
"""Long context: the extension stage (section 3.1.4), and small models that learn to find needles.

The paper takes a model trained at 4K, changes its frequencies and both mscales (stretch.py: s = 40,
alpha 1, beta 32), trains it for 1000 more steps of 576 sequences of 32K, and reads up to 128K with
it. `PAPER` holds these numbers; `extension` makes the same stage for any model and factor: few
steps, at a length between the trained one and the one that is read in the end.

To see that it works one needs a model that finds something at the length it was trained at. A model
of 0.9M parameters does after some minutes of one core (`PRESETS["cpu"]`):

  1. Its text is `stories` with needles hidden in it (text/needles.py), and every sequence ends with
     a question and its answer.
  2. The loss is the cross entropy of the answer's tokens plus TEXT times that of all others. With
     all tokens alike the answers, 4 tokens of 128, would be learned many times later.
  3. Every sequence has one needle. A mixture with several needles and chains learned the one and
     not the others in 1,200 steps (one trial): the model finds the sentence that sticks out, and
     has not learned to tell names apart. The grid of `several` says so.
  4. No slot is dropped: a dropped slot of the one token that counts would hide it.

Of two seeds that were measured, one finds everything at eight times its length under YaRN, the
other 27 %: what tells neighbouring words apart hangs on pairs that YaRN slows down
(data/README.md). A larger d_r, with more fast pairs, is the next thing to try.

What is learned comes all at once: the loss of the answers stays at ln 26, a guess among the words,
until the attention of one layer finds what stood behind the name before.

`PRESETS["gpu"]` trains at 4K and is meant to be extended to 128K. No GPU has run it yet: GPU
numbers pending.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv2_ref.config import TINY, Config
from dsv2_ref.cross_entropy import IGNORED, linear_cross_entropy
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.stretch import stretched, trained_positions
from dsv2_ref.text.corpora import Corpus
from dsv2_ref.text.data import encode
from dsv2_ref.text.needles import Needles, hidden_in, sentences
from dsv2_ref.text.tokenizer import TextTokenizer, train_tokenizer
from dsv2_ref.training.machine import default_device
from dsv2_ref.training.optim import build_optimizers, set_rate
from dsv2_ref.training.recipe import Recipe

TEXT = 0.3                                              # weight of the loss on the haystack
MIXTURE = ("one",)                                     # what a sequence asks, drawn evenly
# The paper gives steps, length and batch. The rate is ours: what its schedule ends with.
PAPER = Recipe(steps=1000, optimizer="adamw", lr=2.4e-4 * 0.316**2, schedule="step", warmup=0.0,
               decay_at=(1.0, 1.0), sequence=32 * 1024, batch=576)


def extension(config: Config, factor: float, steps: int = 50, batch: int = 4) -> Recipe:
    """Our short stage: `steps` at the full stretched length, at a rate that moves little.

    The paper tunes at a fifth of its target length; a small model can afford all of it.
    """
    return Recipe(steps=steps, lr=1e-3, adamw_lr=1e-3, warmup=0.1, batch=batch,
                  sequence=round(factor * trained_positions(config)))


def extend(
    model: DeepSeekV2, factor: float, batches: "NeedleBatches", recipe: Recipe,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> DeepSeekV2:
    """A copy of the model, stretched by `factor` and tuned by `recipe`; in eval mode."""
    longer = stretched(model, factor)
    tuned = DeepSeekV2(longer.config).to(model.like)
    tuned.load_state_dict(longer.state_dict())
    learn(tuned, batches, recipe, watch)
    return tuned


@dataclass(frozen=True)
class Preset:
    """A model that learns retrieval, and how."""

    config: Config
    recipe: Recipe
    factor: float                        # to stretch it by when it is read


_CPU = TINY.with_(
    vocab=1024, d=128, d_h=32, d_r=16, d_v=32, d_c=64, d_cq=96, dense_width=256, expert_width=64,
    drop_capacity=None, max_positions=128,
)
PRESETS = {
    "cpu": Preset(_CPU, Recipe(steps=1000, lr=4e-3, adamw_lr=4e-3, sequence=128, batch=16,
                               precision="fp32"), 8.0),
    "gpu": Preset(
        _CPU.with_(d=256, n_layers=4, n_h=8, d_r=32, d_c=128, d_cq=192, dense_width=768,
                   n_routed=16, expert_width=128, max_positions=4096),
        Recipe(steps=3000, lr=3e-3, adamw_lr=3e-3, sequence=4096, batch=16), 32.0),
}


class NeedleBatches:
    """Sequences of exactly `sequence` tokens that end with a question and its answer.

    text: ids to hide the needles in. What the n-th batch holds follows from (seed, n).
    """

    def __init__(
        self, text: Sequence[int], tokenizer: TextTokenizer, sequence: int, seed: int,
        kinds: Sequence[str] = MIXTURE,
    ) -> None:
        if len(text) < sequence:
            raise ValueError(f"text: {len(text)} tokens, expected at least {sequence}")
        self.text, self.sequence, self.seed, self.kinds = text, sequence, seed, tuple(kinds)
        self.needles, self.bos, self.n = Needles(tokenizer), tokenizer.bos, 0

    def next_batch(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and targets (B, T) int64, and which targets are the answer's (B, T) bool."""
        draw = random.Random(f"{self.seed} {self.n}")
        self.n += 1
        rows, answers = [], []
        for _ in range(batch):
            task = self.needles.task(draw.choice(self.kinds), draw)
            n = self.sequence - 1 - task.n_tokens
            if n < 0:
                raise ValueError(f"sequence: {self.sequence}, expected at least "
                                 f"{1 + task.n_tokens}, what needles and question take")
            begin = draw.randrange(len(self.text) - n)
            places = sorted(draw.randrange(n + 1) for _ in task.needles)
            text = [int(i) for i in self.text[begin : begin + n]]
            rows.append([self.bos, *hidden_in(text, places, task), *task.answer])
            answers.append(len(task.answer))
        ids = torch.tensor(rows)                                             # (B, T + 1)
        last = torch.arange(self.sequence) >= self.sequence - torch.tensor(answers)[:, None]
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), last


def retrieval(
    model: DeepSeekV2, tokens: Tensor, targets: Tensor, asked: Tensor
) -> dict[str, Tensor]:
    """Losses by name, nats per token, whose sum is trained on; shapes as `next_batch` gives."""
    run = replace(model.start(tokens.shape), learns=model.training)
    h, balance, _ = model.through(model.embed(tokens), run)
    h, targets, asked = model.finish(h).flatten(0, 1), targets.flatten(), asked.flatten()
    answer, text = (linear_cross_entropy(h, model.head.weight, targets.masked_fill(out, IGNORED))
                    for out in (~asked, asked))
    return {"answer": answer, "text": TEXT * text, "balance": balance.sum()}


def learn(
    model: DeepSeekV2, batches: NeedleBatches, recipe: Recipe,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train by the recipe's steps, some minutes; nothing is saved. The log, an entry per step."""
    device, log, began = model.like.device, [], time.perf_counter()
    optimizers = build_optimizers(model, recipe.optimizer, recipe.lr, recipe.weight_decay,
                                  adamw_lr=recipe.adamw_lr, seed=recipe.seed)
    model.train()
    for step in range(1, recipe.steps + 1):
        set_rate(optimizers, recipe.rate(step / recipe.steps))
        losses = retrieval(model, *(t.to(device) for t in batches.next_batch(recipe.batch)))
        sum(losses.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if not norm.isfinite():
            raise FloatingPointError(f"step {step}: gradient norm {norm.item()}, try a lower lr")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        log.append({"step": step, "seconds": round(time.perf_counter() - began, 3),
                    **{name: loss.item() for name, loss in losses.items()}})
        if watch is not None:
            watch(log[-1])
    model.eval()
    return log


def tokenizer_for(corpus: Corpus, vocab: int) -> TextTokenizer:
    """Of the corpus and the needles' words, so that each of them is one token."""
    texts = [document.text for document in corpus.train[:4000]]
    return train_tokenizer([*texts, *sentences(0, 20_000)], vocab)


def needle_model(
    preset: Preset, corpus: Corpus, tokenizer: TextTokenizer, seed: int, steps: int | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[DeepSeekV2, list[dict[str, Any]]]:
    """A preset after its training, rounded to bf16 as it would be saved, and the log.

    The model's config carries YaRN over the trained length.
    """
    recipe = preset.recipe.with_(seed=seed, steps=steps)
    torch.manual_seed(seed)
    model = DeepSeekV2(preset.config.with_(vocab=tokenizer.vocab)).to(default_device())
    batches = NeedleBatches(encode(corpus.train[:6000], tokenizer), tokenizer, recipe.sequence,
                            seed)
    log = learn(model, batches, recipe, watch)
    return stretched(model.bfloat16().float(), preset.factor), log

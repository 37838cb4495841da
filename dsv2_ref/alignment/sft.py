# SPDX-License-Identifier: MIT
"""Supervised fine-tuning (section 4.1): conversations, with the loss on answers alone.

The paper fine-tunes on 1.5M conversations (1.2M for being helpful, 0.3M for safety), for two epochs
at a rate of 5e-6; `PAPER` holds these numbers. What is trained is a pretrained model, by the same
trainer, with this objective and these batches:

  1. The loss is the mean cross entropy of the answers' tokens, their end marks included; questions
     are read and not learned. The mean is over all answer tokens of the batch, in however many
     micro-batches it is read: a mean of their means would count a token of a short answer for more.
  2. A row is one conversation, padded on the right up to the longest of its batch. Packing several
     into a row would need attention that ends at their borders, which no form of ours has (neither
     the twins nor the kernels take a mask). Behind right padding causal attention makes each row
     exactly what it is alone; the price is the work on padding, which the log's `tokens` count too.
  3. Experts see padding as tokens, so they have to be told: the balance losses count the real
     tokens of each sequence (`Pass.lengths`), and no slot is dropped, since a budget is shared by
     all tokens that are read at once and padding would take of it. The paper says neither whether
     the balance losses go on in this stage nor whether slots are dropped; we go on with the first,
     and the second would make the loss depend on the size of a micro-batch.

5e-6 moves a model of 21B activated parameters. One of a million learns nothing at that rate:
`recipe_for` takes 4e-3 with Muon unless told otherwise, which in 200 steps on an earlier data/model
got further than 1e-3, or AdamW at 2e-3, and as far as 8e-3 (one trial each).

Shapes: B conversations, T tokens of the longest but one.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv2_ref.alignment.chat import conversation_ids
from dsv2_ref.cross_entropy import IGNORED
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.conversations import Message
from dsv2_ref.text.data import Shuffled, fingerprint
from dsv2_ref.text.tokenizer import TextTokenizer
from dsv2_ref.training.objective import Batch, Named
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import RunFolder
from dsv2_ref.training.setup import check_ready
from dsv2_ref.training.trainer import Trainer

EPOCHS = 2
# The paper gives conversations, epochs and rate. A batch of 256 is ours, and so is one rate to the
# end after 3 % of warm-up.
PAPER = Recipe(steps=EPOCHS * 1_500_000 // 256, optimizer="adamw", lr=5e-6, schedule="step",
               decay_at=(1.0, 1.0), sequence=4096, batch=256)


def recipe_for(n: int, epochs: float = EPOCHS, batch: int = 32, **changes: Any) -> Recipe:
    """Ours for `n` conversations and a small model: as many steps as read each `epochs` times."""
    if n < 1 or not 0 < epochs < math.inf:
        raise ValueError(f"epochs: {epochs} of {n} conversations, expected more than 0 of both")
    steps = math.ceil(epochs * n / max(batch, 1))        # a batch of 0 is refused below
    return Recipe(steps=steps, batch=batch, lr=4e-3, sequence=1024).with_(**changes)


class ConversationBatches(Shuffled):
    """Batches of conversations without end, each epoch in an order of its own.

    Conversations are pairs of ids and of which of them are to be learned, as `conversation_ids`
    gives them. ValueError if a conversation has more than sequence + 1 ids or nothing to learn.
    """

    def __init__(
        self, conversations: Sequence[tuple[Sequence[int], Sequence[bool]]], sequence: int,
        seed: int,
    ) -> None:
        if not conversations:
            raise ValueError("conversations: none, expected some")
        for i, (ids, answers) in enumerate(conversations):
            if len(ids) > sequence + 1:
                raise ValueError(f"conversations[{i}]: {len(ids)} tokens, expected at most "
                                 f"sequence + 1 = {sequence + 1}")
            if len(ids) != len(answers) or not any(answers[1:]):
                raise ValueError(f"conversations[{i}]: {sum(answers)} of {len(ids)} tokens to "
                                 "learn, expected some behind the first one")
        self.conversations = conversations
        flat = [(i, learned) for ids, answers in conversations for i, learned in zip(ids, answers)]
        lengths = [len(ids) for ids, _ in conversations]
        super().__init__(len(conversations), sequence, seed,
                         fingerprint(np.array(flat, np.int64), *map(str, lengths)))

    def next_batch(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tokens and targets (B, T) int64, targets but an answer's being IGNORED; lengths (B,), the
        real tokens of each row; and (B,) fp64, answer tokens per row of this batch: in each row the
        same mean, so that a part of the batch knows it too."""
        rows = [self.conversations[i] for i in self.next_rows(batch)]
        lengths = torch.tensor([len(ids) - 1 for ids, _ in rows])
        T = int(lengths.max())
        tokens = torch.zeros(batch, T, dtype=torch.int64)        # padding is read, and never seen
        targets = torch.full((batch, T), IGNORED)
        for b, (ids, answers) in enumerate(rows):
            ids, answers = torch.tensor(ids), torch.tensor(answers)
            tokens[b, : len(ids) - 1] = ids[:-1]
            targets[b, : len(ids) - 1] = ids[1:].masked_fill(~answers[1:], IGNORED)
        mean = (targets != IGNORED).sum().double() / batch
        return tokens, targets, lengths, mean.expand(batch).clone()


def answering(model: DeepSeekV2, batch: Batch) -> Named:
    """The objective: nats per answer token of the whole batch, and the balance losses.

    The batch's tensors are those of `ConversationBatches`, all rows or some. What the parts of a
    batch give, each weighted by its share of the rows, adds up to the mean over all its answer
    tokens.
    """
    tokens, targets, lengths, mean = batch.tensors
    run = replace(model.start(tokens.shape), learns=model.training,
                  protected=torch.ones_like(batch.protected), with_load=batch.with_load,
                  lengths=lengths.tolist())
    h, balance, load = model.through(model.embed(tokens), run)
    found = model.language_loss(h, targets)                          # mean over these rows' tokens
    rows = (targets != IGNORED).sum().double() / len(tokens)         # answer tokens per row here
    answer = found * (rows / mean[0]).to(found.dtype)
    expert, device, communication = balance.unbind()
    return Named({"answer": answer, "expert": expert, "device": device,
                  "communication": communication}, load)


def check_dtype(model: DeepSeekV2, recipe: Recipe) -> None:
    """ValueError if a ready model's weights are too coarse to be trained so."""
    if model.like.dtype in (torch.bfloat16, torch.float16) and recipe.weights == "fp32":
        raise ValueError(f"model: weights in {str(model.like.dtype)[6:]}, in which small updates "
                         "are rounded away, expected float32: load(path, torch.float32)")


def sft_trainer(
    model: DeepSeekV2, tokenizer: TextTokenizer, conversations: Sequence[Sequence[Message]],
    recipe: Recipe | None = None,
) -> Trainer:
    """A trainer of the model itself on conversations that end with the assistant.

    recipe: None for `recipe_for` so many. Its `sequence` is the most tokens that one may have, or
    the model's positions where they are fewer; nothing is cut off. ValueError for what cannot be
    trained so, a conversation that is too long or is none.
    """
    recipe = recipe or recipe_for(len(conversations))
    recipe = recipe.with_(sequence=min(recipe.sequence, model.config.max_positions))
    check_ready(model.config, recipe, tokenizer)
    check_dtype(model, recipe)
    ids = [conversation_ids(messages, tokenizer) for messages in conversations]
    batches = ConversationBatches(ids, recipe.sequence, recipe.seed)
    return Trainer(model.requires_grad_(), recipe, batches, answering)


def sft(
    model: DeepSeekV2, tokenizer: TextTokenizer, conversations: Sequence[Sequence[Message]],
    recipe: Recipe | None = None, folder: RunFolder | str | Path | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None, progress: bool = False,
) -> DeepSeekV2:
    """A copy of the model that has learned the conversations by `recipe`; in eval mode.

    Arguments as of `sft_trainer`; with a `folder` the run's log and states go there, and `watch` is
    called with each entry of the log.
    """
    trainer = sft_trainer(copy.deepcopy(model), tokenizer, conversations, recipe)
    train(trainer, folder, load_every=0, watch=watch, progress=progress)
    return trainer.model.eval()

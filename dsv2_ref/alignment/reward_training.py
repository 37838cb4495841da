# SPDX-License-Identifier: MIT
"""Reward models trained, judged, saved, and given to a rollout (section 4.2).

A reward model begins as the SFT model, with a head of zeros (reward.py), and is trained by the same
trainer as everything else, on judged answers (judged.py): on pairs, with the Bradley-Terry loss, or
on verdicts, with the loss of a yes-or-no question. A row of a batch is a pair or an answer, and the
loss is the mean over rows, in however many micro-batches they are read.

  1. No balance loss is taken and no slot dropped, as in GRPO: what an answer is worth must not
     depend on its neighbours in the batch. The paper does not say.
  2. The vocabulary's head is not used. Where it has a matrix of its own, that stays as it is.
  3. A reward model is saved as the language model in the published format, with the head of one
     number beside it, in reward_head.json: d weights and a bias are text that can be read.

Which rate and how long: `recipe_for` of sft.py, one epoch unless told otherwise. On an earlier
data/model, after a minute of SFT and with 842 pairs of two kinds of questions, one epoch judged .77
of held-out pairs rightly and three .84, both with chances that were off by less than .03 (one trial
each).

Shapes: R rows of a batch, A answers in each (2 in a pair), T tokens of the longest; N texts.
"""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv2_ref import checkpoint
from dsv2_ref.alignment.calibration import (
    Bin,
    calibration,
    pair_accuracy,
    pair_chances,
)
from dsv2_ref.alignment.judged import Ids, Judged, whole_text
from dsv2_ref.alignment.reward import RewardModel, pairwise_loss, pointwise_loss
from dsv2_ref.alignment.rollout import Reward
from dsv2_ref.alignment.sft import check_dtype, recipe_for
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.data import Shuffled, fingerprint
from dsv2_ref.text.tokenizer import TextTokenizer
from dsv2_ref.training.objective import Batch, Named
from dsv2_ref.training.pretrain import train
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import RunFolder
from dsv2_ref.training.trainer import Trainer

EPOCHS = 1
HEAD_FILE = "reward_head.json"


def padded(texts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Texts as ids (N, T), padded on the right with 0, and their lengths (N,)."""
    lengths = torch.tensor([len(ids) for ids in texts])
    ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return ids, lengths


class AnswerBatches(Shuffled):
    """Batches of pairs or of verdicts without end, each epoch in an order of its own.

    rows: of each the texts, two of a pair or one; right: whether the (first) one is.
    """

    def __init__(
        self, rows: Sequence[Sequence[Ids]], right: Sequence[bool], sequence: int, seed: int
    ) -> None:
        if not rows:
            raise ValueError("answers: nothing to compare, expected some that are worth different")
        for i, row in enumerate(rows):
            if (longest := max(map(len, row))) > sequence:
                raise ValueError(f"answers[{i}]: {longest} tokens with the question, expected at "
                                 f"most sequence = {sequence}")
        self.rows, self.right = rows, torch.tensor(right)
        flat = [np.array([*text, -1], np.int64) for row in rows for text in row]
        super().__init__(len(rows), sequence, seed,
                         fingerprint(np.concatenate(flat), str(len(rows)), str(list(right))))

    def next_batch(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids (R, A, T) int64, padded on the right; lengths (R, A); right (R,) bool."""
        which = self.next_rows(batch)
        ids, lengths = padded([text for i in which for text in self.rows[i]])
        return ids.unflatten(0, (batch, -1)), lengths.view(batch, -1), self.right[which]


def _rewards(rewards: RewardModel, batch: Batch) -> Tensor:
    """(R, A)"""
    ids, lengths, _ = batch.tensors
    return rewards(ids.flatten(0, 1), lengths.flatten().tolist()).view(lengths.shape)


def comparing(rewards: RewardModel, batch: Batch) -> Named:
    """The objective of pairs: nats per pair."""
    better, worse = _rewards(rewards, batch).unbind(1)
    return Named({"pair": pairwise_loss(better, worse)})


def judging(rewards: RewardModel, batch: Batch) -> Named:
    """The objective of verdicts: nats per answer."""
    return Named({"point": pointwise_loss(_rewards(rewards, batch)[:, 0], batch.tensors[2])})


OBJECTIVES = {"pair": comparing, "point": judging}


def rows_of(judged: Judged, loss: str) -> tuple[list[tuple[Ids, ...]], list[bool]]:
    """What "pair" or "point" trains on: the texts of each row, and whether the (first) is right."""
    if loss not in OBJECTIVES:
        raise ValueError(f"loss: {loss!r}, expected one of {', '.join(OBJECTIVES)}")
    if loss == "pair":
        found = judged.pairs()
        return found, [True] * len(found)
    return [(text,) for text, _ in judged.verdicts()], [right for _, right in judged.verdicts()]


def reward_trainer(
    rewards: RewardModel, judged: Judged, loss: str = "pair", recipe: Recipe | None = None
) -> Trainer:
    """A trainer of the reward model itself, by pairs ("pair") or verdicts ("point").

    recipe: None for one epoch, as `recipe_for` has it. Its `sequence` is the most tokens that a
    text may have, or the model's positions where they are fewer. ValueError for what cannot be
    trained so.
    """
    rows, right = rows_of(judged, loss)
    recipe = recipe or recipe_for(len(rows), EPOCHS)
    model = rewards.model
    recipe = recipe.with_(sequence=min(recipe.sequence, model.config.max_positions))
    check_dtype(model, recipe)
    batches = AnswerBatches(rows, right, recipe.sequence, recipe.seed)
    rewards.requires_grad_()
    if not model.config.tie_embeddings:
        model.head.requires_grad_(False)
    trainer = Trainer(rewards, recipe, batches, OBJECTIVES[loss])
    model.recompute = recipe.recompute
    return trainer


def train_reward_model(
    model: DeepSeekV2, judged: Judged, loss: str = "pair", recipe: Recipe | None = None,
    folder: RunFolder | str | Path | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None, progress: bool = False,
) -> RewardModel:
    """A reward model that begins as a copy of an SFT model; in eval mode.

    Arguments as of `reward_trainer`; with a `folder` the run's log and states go there, and `watch`
    is called with each entry of the log.
    """
    trainer = reward_trainer(RewardModel(copy.deepcopy(model)), judged, loss, recipe)
    train(trainer, folder, load_every=0, watch=watch, progress=progress)
    return trainer.model.eval()


@torch.no_grad()
def scores(rewards: RewardModel, texts: Sequence[Ids], batch: int = 64) -> Tensor:
    """Rewards of texts, as `whole_text` makes them: (N,) on the CPU, in at least fp32.

    `batch` of them are read at once, those of about one length together.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.zeros(len(texts), dtype=torch.promote_types(rewards.like.dtype, torch.float32))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids, lengths = padded([texts[i] for i in rows])
        found[rows] = rewards(ids.to(rewards.like.device), lengths.tolist()).cpu()
    return found


def as_reward(
    rewards: RewardModel, questions: Sequence[Ids], tokenizer: TextTokenizer
) -> Reward:
    """The reward of a rollout on these questions' ids: what the reward model says, RM(o)."""
    def of(which: Sequence[int], answers: Sequence[Ids]) -> list[float]:
        return scores(rewards, [whole_text(questions[i], answer, tokenizer)
                                for i, answer in zip(which, answers, strict=True)]).tolist()

    return of


def judge_rewards(rewards: RewardModel, judged: Judged) -> dict[str, tuple[float, list[Bin]]]:
    """How a reward model does on judged answers, for "pair" and for "point": (accuracy, bins).

    A pair is judged rightly where the better answer has the higher reward, an answer where its
    reward is above 0 just if it is right. The bins say what was predicted and what happened.
    ValueError where no two answers are worth different.
    """
    r = scores(rewards, judged.texts)
    number = {tuple(text): i for i, text in enumerate(judged.texts)}
    if not (both := judged.pairs()):
        raise ValueError("judged: no two answers to one question are worth different, expected "
                         "some to compare")
    better, worse = (r[[number[tuple(text)] for text in side]] for side in zip(*both))
    right = torch.tensor([right for _, right in judged.verdicts()])
    return {"pair": (pair_accuracy(better, worse), calibration(*pair_chances(better, worse))),
            "point": (((r > 0) == right).double().mean().item(),
                      calibration(torch.sigmoid(r.double()), right))}


def save_reward_model(
    rewards: RewardModel, path: str | Path, files: dict[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Into a folder, as `checkpoint.save` does, with the head beside the model."""
    head = {"weight": rewards.head.weight[0].tolist(), "bias": rewards.head.bias.item()}
    checkpoint.save(rewards.model, path, (files or {}) | {HEAD_FILE: json.dumps(head) + "\n"},
                    overwrite)


def load_reward_model(
    path: str | Path, dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> RewardModel:
    """What `save_reward_model` wrote, in eval mode; dtype and device as of `checkpoint.load`."""
    file = Path(path) / HEAD_FILE
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
        weight = torch.tensor(head["weight"], dtype=torch.float64)
        bias = float(head["bias"])
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file, expected the folder of a reward model") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: damaged, expected a weight and a bias ({error!r})") from None
    rewards = RewardModel(checkpoint.load(path, dtype, device))
    if weight.shape != (d := rewards.head.weight.shape[1],):
        raise ValueError(f"{file}: weight of shape {tuple(weight.shape)}, expected ({d},)")
    with torch.no_grad():
        rewards.head.weight.copy_(weight[None])
        rewards.head.bias.fill_(bias)
    return rewards.eval()

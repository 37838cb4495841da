# SPDX-License-Identifier: MIT
"""Answers of the policy, as batches that a trainer takes, and the objective they are trained with.

A rollout reads each question once, forks its cache into G, and samples G answers at once: the
latent rows of the question are copied, not made again. Answers are drawn at temperature 1 and from
all tokens. At another temperature they would come from another policy than the one whose
probabilities the ratio corrects.

`Rollouts` looks like any other source of batches to the trainer, and its place is a count of
questions: which ones come next, and every draw, follow from the seed and that count. So a run that
was stopped goes on as if it had not been, bit for bit.

The probabilities of the old policy could be kept from sampling. They are computed anew here, by the
function that the loss uses: decoding and a whole pass sum in different orders, so the two differ in
the last digits, and a ratio that should be 1 would not be. `sampler_gap` in the log is the largest
difference of the two. A reference that is given in the host's memory waits there, and comes to the
policy's device for its one pass over each batch (the paper's "offloading").

Shapes: Q questions, G answers each, N = Q·G answers, T tokens of the longest question and answer.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv2_ref.alignment.grpo import advantages, grpo_terms
from dsv2_ref.inference.evaluate import token_log_probs
from dsv2_ref.inference.generate import NOT_A_NUMBER, generate, read, sample, step
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.data import fingerprint
from dsv2_ref.training.objective import Batch, Named
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.trainer import Trainer

# the numbers of questions and their answers' ids, without the end mark -> a reward for each
Reward = Callable[[Sequence[int], Sequence[list[int]]], Sequence[float]]
# the number of a question and the ids of an answer to it -> how many of them count, at least one
Cut = Callable[[int, list[int]], int]


@dataclass
class Answers:
    """What a policy said: N answers, those to one question side by side."""

    ids: Tensor                  # (N, T) questions with their answers, padded on the right
    lengths: list[int]           # real tokens of each row
    mask: Tensor                 # (N, T-1) bool, which next tokens belong to the answer
    logp: Tensor                 # (N, T-1) of each next token as it was sampled, 0 beside answers
    entropy: float               # of the distribution that was sampled from, nats per token
    answers: list[list[int]]     # ids of each answer, without the end mark
    ended: list[bool]            # by an end mark, not by the limit


@torch.no_grad()
def sample_answers(
    model: DeepSeekV2, questions: Sequence[Sequence[int]], group: int, max_new_tokens: int,
    generator: torch.Generator | None = None, cut: Cut | None = None,
) -> Answers:
    """`group` answers to each question (ids), of at most so many tokens, the end mark included.

    cut: where an answer ends that has no end mark of its own. What follows is left out of all that
    is returned, as if the last token that counts had been an end mark.
    """
    if group < 1 or max_new_tokens < 1:
        raise ValueError(f"group: {group}, max_new_tokens: {max_new_tokens}, expected at least 1")
    if not questions or not all(map(len, questions)):
        raise ValueError("questions: an empty one, expected at least one token each")
    longest, stops = max(map(len, questions)), set(model.config.stops)
    asked = model.new_cache(len(questions), longest + max_new_tokens - 1)
    h = read(model, questions, asked).repeat_interleave(group, 0)                # (N, d)
    cache = asked.fork(range(len(questions)), group)
    running, new, logp, entropy = [True] * len(h), *([[] for _ in h] for _ in range(3))
    for n in range(max_new_tokens):
        if n:
            last = torch.tensor([row[-1] for row in new], device=h.device)
            h = step(model, last, cache, [int(runs) for runs in running])
        logits = model.head(h)                                                   # (N, vocab)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        ids = sample(logits, 1.0, 1.0, generator)                                # (N,)
        chosen = log_p.gather(-1, ids.clamp(min=0)[:, None])[:, 0]               # (N,)
        spread = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)                  # (N,) nats
        drawn = zip(ids.tolist(), chosen.tolist(), spread.tolist(), strict=True)
        for i, (token, its_log_p, its_spread) in enumerate(drawn):
            if not running[i]:
                continue
            if token == NOT_A_NUMBER:
                raise ValueError(f"logits: NaN or infinite for new token {n} of answer {i}, "
                                 "expected numbers; the policy is damaged")
            new[i].append(token)
            logp[i].append(its_log_p)
            entropy[i].append(its_spread)
            running[i] = token not in stops
        if not any(running):
            break
    for i, row in enumerate(new if cut else []):
        kept = cut(i // group, list(row))
        if not 1 <= kept <= len(row):
            raise ValueError(f"cut: {kept}, expected 1 to {len(row)}, the tokens of the answer")
        running[i] &= kept == len(row)
        del row[kept:], logp[i][kept:], entropy[i][kept:]
    prompts = [question for question in questions for _ in range(group)]
    return _laid_out(model, prompts, new, logp, entropy, running)


def _laid_out(
    model: DeepSeekV2, prompts: Sequence[Sequence[int]], new: list[list[int]],
    logp: list[list[float]], entropy: list[list[float]], running: list[bool],
) -> Answers:
    lengths = [len(p) + len(row) for p, row in zip(prompts, new, strict=True)]
    N, T = len(new), max(lengths)
    ids = torch.zeros(N, T, dtype=torch.int64)
    mask, sampled = torch.zeros(N, T - 1, dtype=torch.bool), torch.zeros(N, T - 1)
    for i, (p, row) in enumerate(zip(prompts, new, strict=True)):
        ids[i, : lengths[i]] = torch.tensor([*p, *row])
        ids[i, lengths[i] :] = row[-1]
        answer = slice(len(p) - 1, lengths[i] - 1)       # target t is token t + 1
        mask[i, answer] = True
        sampled[i, answer] = torch.tensor(logp[i])
    device = model.like.device
    stops = set(model.config.stops)
    return Answers(ids.to(device), lengths, mask.to(device), sampled.to(device),
                   sum(map(sum, entropy)) / sum(map(len, entropy)),
                   [[t for t in row if t not in stops] for row in new],
                   [not runs for runs in running])


class Rollouts:
    """Batches of answers for the trainer: (N, ·) ids, mask, old and reference log p, advantages.

    The policy is the model in training, sampled as it stands when a batch is asked for. cut: where
    an answer ends that has no end mark of its own. only_spread: leave out of a batch the answers to
    questions whose rewards are all equal, unless there are no others. They teach nothing, and where
    a reward is rare they are most of the work; with them goes what the penalty would say of them.
    settings: what else a run that goes on must share with the one before.
    """

    def __init__(
        self, policy: DeepSeekV2, reference: DeepSeekV2, questions: Sequence[Sequence[int]],
        reward: Reward, group: int, max_new_tokens: int, seed: int = 0, cut: Cut | None = None,
        only_spread: bool = False, settings: str = "",
    ) -> None:
        if group < 2:
            raise ValueError(f"group: {group}, expected at least 2 answers to compare")
        if not questions:
            raise ValueError("questions: none, expected some")
        if policy is reference:
            raise ValueError("reference: the policy itself, expected a copy that stays as it is")
        self.policy, self.reference = policy, reference.eval().requires_grad_(False)
        self.questions, self.reward, self.seed = questions, reward, seed
        self.group, self.max_new_tokens = group, max_new_tokens
        self.cut, self.only_spread = cut, only_spread
        first = reference.embedding.weight[:, 0].float().cpu().numpy()
        flat = np.array([i for question in questions for i in (len(question), *question)], np.int64)
        self.fingerprint = fingerprint(flat, str(group), str(max_new_tokens), settings,
                                       str(fingerprint(first)))
        self.asked = 0                   # questions so far
        self.report: dict[str, float] = {}

    def next_batch(self, batch: int) -> tuple[Tensor, ...]:
        """`batch` answers to batch / G questions, with all that the loss needs of them."""
        if batch % self.group:
            raise ValueError(f"batch: {batch} answers, expected a multiple of group = {self.group}")
        which = [self._question(self.asked + i) for i in range(batch // self.group)]
        draws = torch.Generator(self.policy.like.device)
        draws.manual_seed(self.seed * 1_000_003 + self.asked)
        said = sample_answers(self.policy, [self.questions[i] for i in which], self.group,
                              self.max_new_tokens, draws, self._cut_of(which))
        self.asked += len(which)
        rewards = torch.tensor(self.reward([i for i in which for _ in range(self.group)],
                                           said.answers), dtype=torch.float64)
        if tuple(rewards.shape) != (batch,):
            raise ValueError(f"reward: shape {tuple(rewards.shape)}, expected ({batch},)")
        by_question = rewards.view(-1, self.group)                               # (Q, G)
        A = advantages(by_question).flatten()                                    # (N,)
        spread = by_question.amax(1) > by_question.amin(1)                       # (Q,)
        self.report = {
            "reward": rewards.mean().item(),
            "no_spread": 1 - spread.double().mean().item(),
            "length": said.mask.sum(-1).double().mean().item(),
            "ended": sum(said.ended) / batch,
            "entropy": said.entropy,
        }
        if self.only_spread and spread.any():
            kept = spread.repeat_interleave(self.group).nonzero().flatten()      # of N
            said, A = _rows(said, kept.tolist()), A[kept]
        return self._with_log_probs(said, A.to(said.ids.device, torch.float32))

    def _with_log_probs(self, said: Answers, A: Tensor) -> tuple[Tensor, ...]:
        old = _log_probs(self.policy, said)
        home = self.reference.like.device
        ref = _log_probs(self.reference.to(said.ids.device), said)
        self.reference.to(home)
        tokens = said.mask.sum(-1)                                               # (N,)
        self.report |= {
            "kl_to_reference": ((old - ref) * said.mask).sum().item() / int(tokens.sum()),
            "sampler_gap": ((old - said.logp).abs() * said.mask).max().item(),
        }
        return said.ids, said.mask, old, ref, A, tokens.double().mean().expand(len(A))

    def _cut_of(self, which: list[int]) -> Cut | None:
        """`cut`, of questions by their place in a batch."""
        cut = self.cut
        return None if cut is None else lambda place, answer: cut(which[place], answer)

    def _question(self, n: int) -> int:
        """The n-th question: every epoch in an order of its own."""
        epoch, place = divmod(n, len(self.questions))
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009 * (epoch + 1))
        return int(torch.randperm(len(self.questions), generator=draws)[place])

    def state(self) -> dict[str, Any]:
        return {"asked": self.asked, "seed": self.seed, "questions": self.fingerprint}

    def load(self, state: dict[str, Any]) -> None:
        """ValueError if the place is one among other questions."""
        for name, mine in self.state().items():
            if not isinstance(state.get(name), int) or name != "asked" and state[name] != mine:
                raise ValueError(f"cannot resume: {name} {state.get(name)!r}, expected "
                                 f"{mine if name != 'asked' else 'a number'}: the same questions, "
                                 "group, room, loss and reference")
        self.asked = state["asked"]


def _rows(said: Answers, kept: list[int]) -> Answers:
    """Some of the answers; the entropy stays that of all."""
    T = max(said.lengths[i] for i in kept)
    return Answers(said.ids[kept, :T], [said.lengths[i] for i in kept], said.mask[kept, : T - 1],
                   said.logp[kept, : T - 1], said.entropy, [said.answers[i] for i in kept],
                   [said.ended[i] for i in kept])


@torch.no_grad()
def _log_probs(model: DeepSeekV2, said: Answers) -> Tensor:
    return token_log_probs(model, said.ids, said.lengths)


def objective(
    clip: float = 0.2, beta: float = 0.02, normalise: str = "sequence"
) -> Callable[[DeepSeekV2, Batch], Named]:
    """What the trainer minimises on batches of `Rollouts`: the loss of grpo.py in its two parts.

    No balance loss is taken and no slot dropped: the router learns from the reward alone.
    """

    def of(model: DeepSeekV2, batch: Batch) -> Named:
        ids, mask, old, ref, A, tokens = batch.tensors
        logp = token_log_probs(model, ids)
        gain, penalty = grpo_terms(logp, old, ref, A, mask, clip, beta, normalise)
        # a micro-batch counts by its rows; a mean over tokens needs the whole batch's number
        share = mask.sum().double() / len(mask) / tokens[0] if normalise == "token" else 1.0
        return Named({"policy": gain * share, "kl": penalty * share})

    return of


def grpo_trainer(
    model: DeepSeekV2, questions: Sequence[Sequence[int]], reward: Reward, recipe: Recipe,
    group: int, max_new_tokens: int, clip: float = 0.2, beta: float = 0.02,
    normalise: str = "sequence", cut: Cut | None = None,
) -> Trainer:
    """A trainer of the model itself; the reference is a copy of what it is now.

    Its batch counts answers: `group` to each question (ids). To go on with a saved state, make the
    trainer from the model that the run began with, then restore. cut: as of `Rollouts`. Groups
    without spread are left out.
    """
    answers = Rollouts(model, copy.deepcopy(model), questions, reward, group, max_new_tokens,
                       recipe.seed, cut, True, f"{clip} {beta} {normalise}")
    model.requires_grad_()
    return Trainer(model, recipe, answers, objective(clip, beta, normalise))


def greedy_reward(
    model: DeepSeekV2, questions: Sequence[Sequence[int]], reward: Reward, max_new_tokens: int,
    batch: int = 256,
) -> float:
    """Mean reward of the model's most likely answers."""
    total, stops = 0.0, set(model.config.stops)
    for start in range(0, len(questions), batch):
        rows = questions[start : start + batch]
        new = generate(model, rows, max_new_tokens)
        answers = [[t for t in row if t not in stops] for row in new]
        total += sum(reward(range(start, start + len(rows)), answers))
    return total / len(questions)

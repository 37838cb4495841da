# SPDX-License-Identifier: MIT
"""Group relative policy optimisation: reinforcement learning without a value model (section 4.2).

For each question the policy gives G answers. What an answer is worth is measured against the other
answers to the same question: its reward less the group's mean, in units of the group's standard
deviation. PPO needs a second network, as large as the policy, to guess that mean; GRPO samples it.
The loss then makes the tokens of better answers more likely and those of worse ones less, in small
steps:

  - The answers come from the policy as it was, pi_old. Their probabilities are corrected by the
    *ratio* pi / pi_old, and where it has left [1 - eps, 1 + eps] on the side that the advantage
    asks for, an answer has no more say (the clip).
  - A penalty holds the policy near a *reference*, the model that training began with. Its estimate
    pi_ref / pi - log(pi_ref / pi) - 1 needs the sampled token alone, is never negative, and is
    right on average (it is known as k3).

One pass is made in three places, and a batch holds what the first two found:

    rollout.py   answers of pi_old, their log-probabilities, those of the reference
    reward.py    the reward of each answer
    here         advantages, and the loss whose gradient the optimiser gets

How this file differs from the paper's formula, and why:
  1. (32) writes pi(o|q), the probability of a whole answer. The ratio is taken for each token here,
     as the paper that (32) cites does (DeepSeekMath, its equation 3) and as public code does: the
     product over an answer of a hundred tokens leaves any clip range at once.
  2. Per-token terms must be averaged, and there are two ways. `sequence_mean` averages over each
     answer's tokens and then over answers: 1/G sum 1/|o|, DeepSeekMath's and the default here.
     `token_mean` averages over all tokens of the batch at once: long answers weigh more. With the
     first, a token of a long wrong answer is punished less than one of a short wrong answer.
  3. (34) divides by the standard deviation of the group: the population's, over G and not G - 1.
     Where all rewards are equal the advantages are exactly 0 and not 0/0: there is nothing to
     learn. Equal means that the largest is the smallest; the mean of three times 0.1 is not 0.1.
  4. The loss is minus the objective, since optimisers minimise.

Shapes: Q questions, G answers each, N = Q·G answers, T tokens of the longest.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def advantages(rewards: Tensor) -> Tensor:
    """Rewards (Q, G) -> advantages (Q, G): in each group mean 0 and standard deviation 1.

    Exactly 0 where a group's rewards are all equal. In at least fp32.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 1:
        raise ValueError(f"rewards: shape {tuple(rewards.shape)}, expected (questions, answers)")
    if not rewards.isfinite().all():
        raise ValueError("rewards: NaN or infinity, expected numbers")
    r = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    low, high = r.amin(-1, keepdim=True), r.amax(-1, keepdim=True)               # (Q, 1)
    equal = low == high
    r = (r - low) / (high - low).where(~equal, 1.0)      # 0 to 1: the square of 1e-30 would be 0
    std, mean = torch.std_mean(r, -1, correction=0, keepdim=True)                # (Q, 1)
    return torch.where(equal, 0.0, (r - mean) / std.where(~equal, 1.0))          # (Q, G)  (34)


def reference_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """An estimate of KL(pi || pi_ref) at each sampled token, >= 0; shapes as given."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - log_ratio - 1                                       # (N, T)  (33)


def surrogate(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The clipped gain at each token, (N, T), for the advantage (N,) of each answer."""
    ratio, A = (logp - old_logp).exp(), advantage[:, None]
    return torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)         # (N, T)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each answer's tokens, then over answers: values and mask (N, T) -> scalar."""
    return ((values * mask).sum(-1) / mask.sum(-1)).mean()


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all tokens of all answers: values and mask (N, T) -> scalar."""
    return (values * mask).sum() / mask.sum()


MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sequence": sequence_mean, "token": token_mean,
}


def grpo_terms(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor,
    clip: float = 0.2, beta: float = 0.02, normalise: str = "sequence",
) -> tuple[Tensor, Tensor]:
    """The loss in its two parts, the clipped gain's and the penalty's: their sum is trained on.

    logp (N, T): log pi of each sampled token, which alone carries a gradient. old_logp, ref_logp
    (N, T): the same of pi_old and of the reference. advantages (N,). mask (N, T) bool: True on the
    answer's tokens, its end mark included, and False on the prompt and the padding. clip: eps.
    beta: weight of the penalty. normalise: 'sequence' or 'token', see above. ValueError for wrong
    shapes, and for an answer without a token.
    """
    _check(logp, old_logp, ref_logp, advantages, mask, clip, beta, normalise)
    # what is masked out may hold anything, NaN too, and must not reach the sum
    logp, old_logp, ref_logp = (t.where(mask, 0.0) for t in (logp, old_logp, ref_logp))
    mean = MEANS[normalise]
    gain = mean(surrogate(logp, old_logp.detach(), advantages.detach(), clip), mask)
    penalty = beta * mean(reference_kl(logp, ref_logp.detach()), mask)
    return -gain, penalty


def grpo_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor,
    clip: float = 0.2, beta: float = 0.02, normalise: str = "sequence",
) -> Tensor:
    """Minus the objective of (32), a scalar; arguments as of `grpo_terms`."""
    gain, penalty = grpo_terms(logp, old_logp, ref_logp, advantages, mask, clip, beta, normalise)
    return gain + penalty                                                        # ()      (32)


def _check(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor,
    clip: float, beta: float, normalise: str,
) -> None:
    N, T = logp.shape if logp.ndim == 2 else (None, None)
    named = {"logp": logp, "old_logp": old_logp, "ref_logp": ref_logp, "mask": mask}
    for name, t in named.items():
        if N is None or tuple(t.shape) != (N, T):
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected (answers, tokens), the "
                             "same for logp, old_logp, ref_logp and mask")
    if tuple(advantages.shape) != (N,):
        raise ValueError(f"advantages: shape {tuple(advantages.shape)}, expected ({N},), one for "
                         "each answer")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: {mask.dtype}, expected bool")
    if not mask.any(-1).all():
        raise ValueError("mask: an answer without a token, expected at least one each")
    if not 0 < clip < 1:
        raise ValueError(f"clip: {clip}, expected a number between 0 and 1")
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta: {beta}, expected a number >= 0")
    if normalise not in MEANS:
        raise ValueError(f"normalise: {normalise!r}, expected 'sequence' or 'token'")

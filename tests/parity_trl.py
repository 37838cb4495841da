# SPDX-License-Identifier: MIT
"""The loss of GRPO beside trl's own, on the same log-probabilities and advantages: `make parity`.

trl's function wants its whole trainer; here it gets a stand-in that has what it asks for.
"""

import types
from collections import defaultdict

import pytest
import torch
from oracles.loops import normal

from dsv2_ref.alignment.grpo import grpo_loss

trl = pytest.importorskip("trl", reason="needs the extra `parity`")
N, PROMPT, T = 4, 3, 6


def theirs(loss_type: str, logp, old, ref, A, mask, clip: float, beta: float):
    from trl.trainer.grpo_trainer import GRPOTrainer

    of_one = types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x,
                                   reduce=lambda x, reduction: x, sync_gradients=True)
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False), beta=beta,
        epsilon_low=clip, epsilon_high=clip, loss_type=loss_type, top_entropy_quantile=1.0,
        importance_sampling_level="token", off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, model=types.SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, accelerator=of_one,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(N, PROMPT, dtype=torch.int64), torch.zeros(N, T, dtype=torch.int64)
    return GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": ids[0], "prompt_mask": torch.ones_like(ids[0]), "completion_ids": ids[1],
        "completion_mask": mask.long(), "advantages": A, "old_per_token_logps": old,
        "ref_per_token_logps": ref,
    })


@pytest.mark.parametrize(("loss_type", "normalise"), [("grpo", "sequence"), ("bnpo", "token")])
def test_loss_and_gradient_are_trls(loss_type, normalise):
    logp = -normal(1, N, T).abs() - 0.1
    old, ref = logp + 0.3 * normal(2, N, T), logp + 0.4 * normal(3, N, T)
    A, mask = normal(4, N), torch.arange(T) < torch.tensor([6, 2, 5, 1])[:, None]
    leaves = [logp.clone().requires_grad_() for _ in range(2)]
    ours = grpo_loss(leaves[0], old, ref, A, mask, 0.2, 0.3, normalise)
    other = theirs(loss_type, leaves[1], old, ref, A, mask, 0.2, 0.3)
    ours.backward()
    other.backward()
    assert abs(ours - other).item() < 1e-12
    assert (leaves[0].grad - leaves[1].grad).abs().max() < 1e-12
    wrong = grpo_loss(logp, old, ref, A, mask, 0.2, 0.3,
                      {"sequence": "token", "token": "sequence"}[normalise])
    assert abs(wrong - other).item() > 1e-3

# SPDX-License-Identifier: MIT
"""From a base model to one that answers (section 4). It stands on training.

  grpo     advantages and the loss of GRPO
  rollout  answers of the policy as batches for the trainer, and the objective
  reward   reward models, and the rewards of both stages
"""

# SPDX-License-Identifier: MIT
"""From a base model to one that answers (section 4). It stands on training.

  chat              the published chat template: messages as text, and as ids with answers marked
  sft               supervised fine-tuning on conversations, with the loss on answers alone
  exam              answers of a model, and the share of them that is right
  judged            answers that were judged: pairs and verdicts
  tasks             tasks of ours for lm-eval, judged by rules and in the sandbox
  reward            reward models, and the rewards of both stages
  reward_training   reward models trained, judged, saved, and given to a rollout
  calibration       whether a reward model is right, and knows how sure to be
  grpo              advantages and the loss of GRPO
  rollout           answers of the policy as batches for the trainer, and the objective
  addition          a task whose truth a program knows, and a small model for it
  bodies            function bodies to be written: questions, where an answer ends, rewards
  feedback          how far a program comes: read, run, checked; which answers to compare
  sandbox           one program in a process of its own, and what became of it
  sandbox_launcher  how that process shuts itself in before it becomes the program
"""

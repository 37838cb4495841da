# SPDX-License-Identifier: MIT
"""The command line: a file for each command, with its options and its work; `__main__` joins them.

  options   what the options of several commands share
  common    messages, the output folder, the saved model, a sample of text
  run       the main job: train, judge, generate, draw, save
  train     a preset or a saved model, and a recipe, into a run folder, and nothing else
  jobs      what `train` trains
  ranks     the processes that `train` runs on, under torchrun
  sft       a saved model learns conversations
  grpo      a chat model learns from rewards
  reward    a reward model learns from judged answers
  align     base, SFT, reward model and both stages of GRPO, and a table
  export    a saved model written for other programs
  figures   a run drawn from its log
  generate  a prompt continued
  prompts   a file of prompts through the engine, JSON lines in and out
  needle    what a model finds in a long text
  evaluate  benchmarks by name, through lm-eval
  paper     the paper's claims beside ours
  copy      a concept file lifted out
  bench     a measurement against a peer
"""

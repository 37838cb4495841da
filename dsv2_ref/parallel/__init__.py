# SPDX-License-Identifier: MIT
"""DeepSeek-V2 on several devices (section 3.1.3), on torch.distributed.

  expert    routed experts on D ranks: a token's row goes once to each rank that it needs
  local     processes on this machine, for a first try
  pipeline  layers in stages, and the schedules of torch
  schedule  a simulator of schedules: who works when, and how long nobody does
  split     layers in stages of equal work, and what a pipeline demands
  stages    what one rank holds of a model

Process groups are arguments. Every process reads the same batch and takes its own rows.
"""

# SPDX-License-Identifier: MIT
"""DeepSeek-V2 on several devices (section 3.1.3), on torch.distributed.

  expert.py     routed experts on D ranks: a token's row goes once to each rank that it needs
  local.py      processes on this machine, for a first try
  pipeline.py   layers in stages, and the schedules of torch
  schedule.py   a simulator of schedules: who works when, and how long nobody does
  split.py      layers in stages of equal work, and what a pipeline demands
  stages.py     what one rank holds of a model
  mesh.py       ranks of a pipeline, replicas and shares of experts: the world that trains
  zero1.py      moments shared by the ranks that have the same parameters
  gather.py     sums over ranks; weights and traffic brought together
  hybrid.py     one model in two layouts, to train and to write text

Process groups are arguments. Every process reads the same batch and takes its own rows.
"""

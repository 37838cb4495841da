# SPDX-License-Identifier: MIT
"""DeepSeek-V2 on several ranks (section 3.1.3), on torch.distributed; and its cluster on paper.

  expert    routed experts on D ranks: a token's row goes once to each rank that it needs
  split     how ranks are used, layers in stages of equal work, and what a pipeline demands
  stages    what one rank holds of a model
  schedule  a simulator of schedules: who works when, and how long nobody does
  pipeline  layers in stages, and the schedules of torch
  zero1     moments shared by the ranks that have the same parameters
  mesh      stages, replicas and shares of experts together: the world that trains
  gather    sums over ranks; weights and traffic brought together
  hybrid    one model in two layouts, to train and to write text
  local     processes on this machine: several ranks without a cluster
  demo_expert    what the ranks of notebook 16 run
  demo_pipeline  what those of notebook 17 run
  plan      what one device holds of V2 in the paper's layout, beside the card's memory
  hours     GPU-hours of V2 from counts, links and assumed rates, each assumption a row

On several nodes: several_nodes.md, beside this file.

Process groups are arguments. Every process reads the same batch and takes its own rows.
"""

# SPDX-License-Identifier: MIT
"""DeepSeek-V2 on several devices (section 3.1.3), on torch.distributed.

  expert.py     routed experts on D ranks: a token's row goes once to each rank that it needs
  pipeline.py   layers in stages, and the schedules of torch
  schedule.py   a simulator of schedules: who works when, and how long nobody does
  plan          what one device holds of V2 in the paper's layout, beside the card's memory
  hours         GPU-hours of V2 from counts, links and assumed rates, each assumption a row

Process groups are arguments. Every process reads the same batch and takes its own rows.
"""

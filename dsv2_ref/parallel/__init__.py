# SPDX-License-Identifier: MIT
"""DeepSeek-V2 on several devices (section 3.1.3), on torch.distributed.

  expert    routed experts on D ranks: a token's row goes once to each rank that it needs
  stages    what one rank holds of a model
  demo      processes for a notebook, and what they run

Process groups are arguments. Every process reads the same batch and takes its own rows.
"""

# SPDX-License-Identifier: MIT
"""Attention, one file per concept.

  rope          rotary positions and YaRN
  mha           the baseline: MHA, GQA, MQA
  mla           the paper's: one short row per token for all heads
  kv_cache      what is kept of tokens already read
  cache_quant   the latent cache at six bits a number, and attention on it
  latent_basis  changes of weights before quantising
"""

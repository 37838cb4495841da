# SPDX-License-Identifier: MIT
"""Measurements, most of them against a peer in the same run.

  all             what runs on a GPU, in order of worth, so many minutes; first_look.md reads it
  correct         each kernel against fp32, on a GPU
  attention       causal attention, on a GPU
  mla_decode      decoding from the latent cache, on a GPU
  six_bit_decode  decoding from the six-bit cache, on a GPU
  experts         the routed experts of a layer, on a GPU
  optimizer       a step of AdamW with 8-bit moments, on a GPU
  train           a training step beside transformers
  cpu_decode      decoding on a CPU beside transformers
  serve           the engine beside transformers, and batch bought with cache bytes
  cache_quality   what a quantised cache costs in quality
  fp8             products with FP8 weights beside bf16, on a GPU
  fp8_quality     what FP8 weights cost in quality
  ablations       what the paper's choices cost or bring, in small
  needle          what YaRN, a short tuning, six bits and mistakes do to the needle grid
  long_context    what a length costs, to 128K tokens
  grpo            GRPO on sums beside rejection sampling and more SFT
  grpo_code       what GRPO makes of a compiler's word, and of a reward that is hacked
  harness         what the benches share
"""

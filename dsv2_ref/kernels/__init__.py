# SPDX-License-Identifier: MIT
"""What attention, moe and AdamW compute, in forms for a GPU; numbers of eight bits.

  flash_attention  causal attention in tiles, forward and backward
  latent_decode    decoding: a row read once, as key and value
  six_bit_decode   the same from packed six-bit rows
  route_tokens     routing, and sorting the slots
  grouped_experts  experts as products over sorted slots
  between_products  the small steps between products: RoPE, SwiGLU, residual and norm
  write_rows       new rows of a cache, plain or packed in six bits, written in a launch
  fp8              FP8 weights in blocks of 128×128: a format of a card, in plain torch
  eight_bit_moments  AdamW with moments of a byte each, in plain torch
  adamw8_update    that AdamW's step, a weight and all that belongs to it touched once
  fp8_products     products with such weights, which stay codes on their way
  fp8_experts      routed experts whose weights are such codes
  target           what a card can run; what does run is decided in forms.py
"""

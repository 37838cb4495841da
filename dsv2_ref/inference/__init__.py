# SPDX-License-Identifier: MIT
"""Using a trained model.

  generate    read prompts, then decode, sample and stream
  evaluate    log-probabilities of given tokens, held-out bits per byte
  fp8_model   a model that lies in memory in FP8
  live_cache  bytes that caches really occupy
"""

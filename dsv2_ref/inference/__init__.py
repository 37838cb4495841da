# SPDX-License-Identifier: MIT
"""Using a trained model.

  generate     read prompts, then decode, sample and stream
  graph        a decode step that a CUDA graph can hold
  paged_cache  a cache in pages, shared where texts begin alike
  pieces       a pass over pieces of different lengths, without padding
  engine       many requests in a fixed number of bytes
  evaluate     log-probabilities of given tokens, held-out bits per byte
  scoring      from these to scores: choices, words in common, Pass@k
  until        texts that go on until one of some words comes
  benchmarks   the paper's benchmarks, its numbers, and their tasks in lm-eval
  lm_eval      a model of ours for lm-evaluation-harness
  needle       what a model finds in a long text, by length and depth
  kept_cells   the cells of such a grid, in a folder that survives a kill
  fp8_model    a model that lies in memory in FP8
  live_cache   bytes that caches really occupy
"""

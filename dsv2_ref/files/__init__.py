# SPDX-License-Identifier: MIT
"""What `checkpoint` stands on.

  published  the published tensors of a model, and what they cannot hold
  manifest   what was written into a folder, so that only that is replaced
  tensors    safetensors files that others wrote, read; a checksum of tensors
  whole      files that are there whole or not at all
  lock       a folder that one process at a time writes into
"""

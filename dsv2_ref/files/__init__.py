# SPDX-License-Identifier: MIT
"""What `checkpoint` stands on.

  tensors  safetensors files that others wrote, read
  whole    files that are there whole or not at all
"""

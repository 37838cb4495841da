# SPDX-License-Identifier: MIT
"""What `checkpoint` stands on: published names (published), tensors read (tensors), files and
folders written whole (whole), and what proves that they are ours (manifest)."""

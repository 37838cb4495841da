# SPDX-License-Identifier: MIT
"""Attention, one file per concept: rope, kv_cache, mha (the baseline), mla (the paper's)."""

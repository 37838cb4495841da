# SPDX-License-Identifier: MIT
"""DeepSeekMoE, one file per concept: routing, balance, dropping, experts."""

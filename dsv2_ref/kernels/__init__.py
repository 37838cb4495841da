# SPDX-License-Identifier: MIT
"""Lower-level forms of what attention and moe compute, one file each: FP8 weights."""

# SPDX-License-Identifier: MIT
"""DeepSeek-V2, exactly: one readable, tested file per concept."""

__version__ = "0.1.0"

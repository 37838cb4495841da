# SPDX-License-Identifier: MIT
"""Text: where it comes from (corpora, stories and their grammar), tokens, batches, streaming."""

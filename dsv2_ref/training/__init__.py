# SPDX-License-Identifier: MIT
"""Training: tokenizer, corpora and packed batches, optimisers, the pretraining loop."""

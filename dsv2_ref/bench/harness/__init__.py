# SPDX-License-Identifier: MIT
"""What the benches share: timing, one GPU, one large model a card, transformers, studies."""

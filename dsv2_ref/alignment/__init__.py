# SPDX-License-Identifier: MIT
"""Alignment (section 4): from a base model to a chat model.

  chat  the published chat template: messages as text, and as ids with the answers marked
  exam  answers of a model, and the share of them that is right
  sft   supervised fine-tuning on conversations, with the loss on answers alone
"""

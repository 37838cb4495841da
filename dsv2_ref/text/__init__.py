# SPDX-License-Identifier: MIT
"""Text: where it comes from, tokens, packed batches.

  corpora    whole documents, some of them held out
  grammar    a small grammar whose entropy can be computed exactly
  stories    texts of such a grammar
  tokenizer  byte-level BPE
  data       packed batches, in an order that can be resumed
"""

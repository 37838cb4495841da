# SPDX-License-Identifier: MIT
"""Text: where it comes from, tokens, packed batches, streaming.

  corpora        whole documents, some of them held out
  reading        documents from files and folders of your own
  grammar        a small grammar whose entropy can be computed exactly
  stories        texts of such a grammar
  tokenizer      byte-level BPE
  data           marked documents, and packed batches in an order that can be resumed
  needles        sentences to hide in a text, and questions about them
  conversations  messages in the common form, and files of them
  instructions   questions with answers that can be checked, some of them held out
  questions      how each kind of question is made and judged
  stream         text that is written while its ids arrive
"""

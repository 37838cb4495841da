# SPDX-License-Identifier: MIT
"""What the benches share.

  timing    two things in turns, in one process
  gpu       kernels on one GPU, beside what the card does at most
  cases     a bench case by case, none lost with another, in processes that may die
  goals     our own goals, beside the rows they are about
  one_card  training steps of a model that fills a card
  peer      transformers on our weights
  serving   requests, who answers them, a full house, a queue
  power     how large a difference so many seeds notice
  study     a model trained and judged, several seeds
"""

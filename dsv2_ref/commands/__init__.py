# SPDX-License-Identifier: MIT
"""The command line, a file a command; `__main__` reads the options.

  common    messages, the output folder, the saved model
  run       the main job
  train     a preset and a recipe into a run folder
  generate  a prompt continued
  draw      a run drawn from its log
"""

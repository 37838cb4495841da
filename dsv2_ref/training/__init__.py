# SPDX-License-Identifier: MIT
"""Training: recipes, optimisers, the trainer and its loop, the folder of a run, watching it."""

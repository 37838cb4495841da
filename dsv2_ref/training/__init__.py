# SPDX-License-Identifier: MIT
"""Training: from one recipe to a trained model.

  recipe        the paper's hyperparameters, and ours for minutes
  ladder        presets from 10M to 150M activated parameters
  setup         tokenizer, model, optimisers and data from one recipe
  objective     the named losses of a batch; pretraining's, another is given to the trainer
  world         how ranks share a batch and add their gradients; one process by default
  trainer       one step
  pretrain      the loop
  optim         AdamW and Muon
  adamw8        AdamW with moments of one byte, as an optimiser; kernels/ has its arithmetic
  memory        the memory plan of a step
  machine       what this machine is, and what it does fast
  long_context  the extension stage, and models that learn to find needles
  run_folder    states and log of a run that may be killed
  shards        a state that several processes write together
  proof         whether a file was written by a run, before it is replaced
  watching      the log in TensorBoard or trackio; fair shares
"""

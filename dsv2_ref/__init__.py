# SPDX-License-Identifier: MIT
"""DeepSeek-V2, exactly: one readable, tested file per concept.

The map: paper section, file (its test is tests/test_<file>.py), notebooks, equations. README.md's
table is made from it (`make map`), and a test compares it with the files and the notebooks.

  2.1.1         attention/mha.py           01     multi-head attention, GQA, MQA         (1)-(8)
  2.1.2-3, C    attention/mla.py           02 04  multi-head latent attention            (37)-(47)
  2.1.3, 3.1.4  attention/rope.py          03     decoupled RoPE and YaRN
  2.1.2         attention/kv_cache.py      05     latent cache, per-head cache
  3.2.3         attention/cache_quant.py   11     the latent cache at six bits per number
  3.2.3         attention/latent_basis.py  11     changes of weights before quantising
  2.2.1-2       moe/routing.py             06 07  router, device-limited routing         (21) (22)
  2.2.1         moe/experts.py             06     shared and routed experts, three forms (20)
  2.2.3         moe/balance.py             08     the three balance losses               (23)-(31)
  2.2.4         moe/dropping.py            09     token dropping
  3.2.3         kernels/fp8.py             12     FP8 weights in blocks of 128×128
  3.1.2         kernels/eight_bit_moments.py 24   AdamW with moments of a byte each
  3.2.3         kernels/fp8_products.py    13     products with FP8 weights, decoded on the way
  3.2.3         kernels/fp8_experts.py     13     routed experts with FP8 weights
  3.1.3         kernels/flash_attention.py 13     causal attention in tiles, forward and backward
  2.1.2         kernels/latent_decode.py   13     decoding: a row read once, as key and value
  3.2.3         kernels/six_bit_decode.py  13     the same, from packed six-bit rows
  2.2.1         kernels/grouped_experts.py 13     experts as products over sorted slots
  2.2.1-2       kernels/route_tokens.py    13     routing, and sorting the slots
  2.2.2, 3.1.3  parallel/expert.py         16     experts on several ranks, a row once to each
  4.2           alignment/grpo.py          20     GRPO: advantages, the clip, the penalty (32)-(34)
  4.2           alignment/reward.py        19 20  reward models, rewards of both stages  (35) (36)

  kernels/between_products.py  RoPE, SwiGLU, residual and norm in a launch each
  kernels/adamw8_update.py  that AdamW's step in one kernel
  kernels/write_rows.py  new rows of a cache, plain or in six bits, written in a launch
  kernels/target.py  what a card can run; what does run is decided in forms.py

  text/             where text comes from, tokens, packed batches, needles, streaming
  config.py         sizes; V2, LITE, a ladder and small presets
  config_json.py    the published config.json <-> ours
  model.py          embedding, blocks, head; all layers or a range of them
  block.py          one layer: attention, then a dense network or routed experts
  forms.py          which of the equal algorithms runs, chosen once a pass
  stretch.py        a trained model read further, with YaRN
  cross_entropy.py  the loss without holding all logits
  cost.py           parameters, FLOPs, cache bytes, in closed form
  checkpoint.py     folders in the published format, loaded and saved
  files/            what it stands on: published names, tensors read, files written whole
  inference/        generation, serving, scores and benchmarks, needles, FP8 in memory, caches
  training/         from one recipe to a trained model, in a folder that survives a kill
  parallel/         the same training on several ranks; the hours of V2's cluster, on paper
  alignment/        from a base model to one that answers: chat, SFT, GRPO, rewards, a sandbox
  paper.py          the paper's claims beside ours
  figures/          every plot and widget, in one style
  bench/            measurements against a peer
  commands/         the command line, a file for each command
  __main__.py       joins them
  copying.py        a concept file, lifted into a folder of your own
  checkout.py       what lies beside the package in a checkout: data, tests
  exercises/        the notebooks' exercises and their checks, a file for each notebook

Each folder's docstring names its files.
Arrows run one way: a file imports only what stands before it in this list.

  1  attention, moe, text: each knows its own folder alone
  2  kernels: the twins in 1 that they must equal
  3  the model and what it is made of; then files, inference, training, parallel,
     alignment, in this order
  4  bench, figures, commands: everything

Where something new goes, and what it meets:

  a cache           attention/: a class with the methods of kv_cache.Cache. The model and `generate`
                    take one as `cache=`; model.CACHES makes it by name
  another form      of an algorithm that is there: beside it, or in kernels/ if it is a kernel; a
                    test says that both agree, and forms.py says when it runs
  experts on ranks  parallel/. A model made with `held=` owns one rank's experts; its `across`
                    makes, of the forms for one process, those for all ranks. Groups of processes
                    are arguments there, and moe/ never knows of them
  a rollout         alignment/, on inference/generate and evaluate.token_log_probs
  a loss            (model, batch) -> named losses, given to the trainer as `objective=`; what it
                    reads comes from the trainer's `batches`
  a schedule        parallel/schedule: a line in SCHEDULES if torch has it, or its order if it is
                    only simulated
  a measurement     of one model: inference/; against a peer or another form: bench/
  a command         a file in commands/ with `add_options`, and a line in __main__.COMMANDS

Not there yet: products in FP8, the published weights' scores, and a GPU's numbers.
"""

__version__ = "0.1.0"

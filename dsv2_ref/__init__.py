# SPDX-License-Identifier: MIT
"""DeepSeek-V2, exactly: one readable, tested file per concept.

The map, paper section -> file (its test is tests/test_<file>.py; 00_tour shows them all at work):

  2.1.1         attention/mha.py        multi-head attention, GQA, MQA                 (1)-(8)
  2.1.2-3, C    attention/mla.py        multi-head latent attention                    (37)-(47)
  2.1.3, 3.1.4  attention/rope.py       decoupled RoPE, YaRN
  2.1.2         attention/kv_cache.py   latent cache, per-head cache
  3.2.3         attention/cache_quant.py     the latent cache at six bits a number
  3.2.3         attention/latent_basis.py    changes of weights that make it easier to quantise
  2.2.1-2.2.2   moe/routing.py          router, device-limited routing                 (21) (22)
  2.2.1         moe/experts.py          shared and routed experts                      (20)
  2.2.3         moe/balance.py          expert, device and communication balance       (23)-(31)
  2.2.4         moe/dropping.py         token dropping
  3.2.3         kernels/fp8.py          FP8 weights in blocks of 128×128
  3.1.1         kernels/flash_attention.py   causal attention in tiles, forward and backward
  2.1.2         kernels/latent_decode.py     decoding: a cached row read once, as key and value
  3.2.3         kernels/six_bit_decode.py    the same, from packed six-bit rows
  2.2.1         kernels/grouped_experts.py   experts as products over sorted slots
  2.2.1-2       kernels/route_tokens.py      routing, and sorting the slots

  model.py          embedding, blocks, head; which of the equal algorithms runs
  kernel_choice.py  where a kernel takes the place of its naive twin
  config.py         sizes; V2, LITE and three small presets; published config.json <-> ours
  checkpoint.py     published tensor names <-> ours; training states
  tensor_files.py   safetensors files of others, whatever is wrong with them told in one line
  cross_entropy.py  the loss without holding all logits
  cost.py           parameters, FLOPs, cache bytes, GPU hours
  paper.py          the paper's claims beside ours
  training/         tokenizer, corpora (stories: a grammar with a known entropy), data, recipe,
                    optim, pretrain
  inference/        generate, evaluate, fp8_model
  figures/          every plot and widget, in one style
  exercises.py      checks of the notebooks' exercises
  main_job.py       `make run`
  jobs.py           the other commands of the command line (__main__.py)
  copying.py        a concept file, lifted into a folder of your own
  bench/            measurements against a peer

Arrows run one way: attention and moe know nobody, kernels only the twins they must equal; model,
checkpoint and cost stand on them; training and inference on those; jobs, bench and the command line
on everything.
"""

__version__ = "0.1.0"

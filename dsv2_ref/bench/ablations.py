# SPDX-License-Identifier: MIT
"""What the paper's choices cost or bring, in small: each study changes one thing.

  attention   MHA, GQA, MQA and MLA with the same number of parameters, in dense models as in the
              paper's Table 8 (Table 9 has MHA against MLA, where MLA wins at 16B and 250B). What a
              cheaper attention saves goes into the feed-forward width. MLA in V2's proportions:
              d_c = 4 d_h, d_r = d_h / 2, and 8 heads; the others turn whole queries and keys by
              RoPE, as the 67B model does.
  experts     section 2.2.1's fine-grained experts: m times as many, each an m-th as wide, m times
              as many a token. Total and activated parameters stay, but for the router's centroids;
              one device, no dropping.
  balance     the three losses of section 2.2.3, the expert's alone, none: does routing collapse?
              Nothing is dropped here.
  dropping    off, at the paper's capacity 1.0, and at half of it. Never in evaluation.
  devices     section 2.2.2's limit: at most M of 4 devices per token, from 4 (no limit, the plain
              greedy top K) to 1, at capacity 1.0. The paper says that M >= 3 is about as good as
              no limit, and shows no numbers.

  bits_per_byte   of held-out text, the model used as it was trained
  floor           the grammar's entropy: no model needs less on average (stories alone)
  dropped         share of slots dropped in training, mean over the last tenth
  fullest, emptiest, dead    on held-out text: load of the fullest and the emptiest expert in fair
              shares, mean over layers; share of experts that get under a hundredth of theirs
  devices     that a token is sent to, mean over tokens and layers of held-out text
  cached      numbers that attention caches per token and layer

Each study is run alone by `--only NAME`. Without a GPU the models have 0.2 to 0.3M activated
parameters and read 0.3M tokens of stories, three seeds, about five minutes of one core for a study;
data/README.md says what came out. On a GPU they are four times as wide and read 16M tokens of
Python source: GPU numbers pending. (data/results/device_limit-2026-11-24.json is the study of
devices as it was when it had a bench of its own: 500 steps, 0.5M tokens.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv2_ref import cost
from dsv2_ref.attention.mha import MultiHeadAttention
from dsv2_ref.bench.harness.study import HELD_OUT, summary, trained
from dsv2_ref.config import TINY, Config
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text import stories
from dsv2_ref.text.corpora import Corpus, open_corpus, stories_corpus
from dsv2_ref.text.tokenizer import TextTokenizer, train_tokenizer
from dsv2_ref.training.machine import machine
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.setup import Setup
from dsv2_ref.training.watching import fair_shares

DENSE = TINY.with_(n_dense=TINY.n_layers, n_h=8, d_c=64, dense_width=192)
ROUTED = TINY.with_(n_routed=32, expert_width=32, top_k=4, drop_capacity=None)     # 8 a device
ONE_DEVICE = TINY.with_(n_devices=1, max_devices=None, alpha_device=0.0, alpha_comm=0.0,
                        drop_capacity=None)
WIDTHS = "d d_h d_r d_v d_c d_cq dense_width expert_width".split()


class PerHeadAttention(MultiHeadAttention):
    """MHA, GQA or MQA where a block has its MLA; trained alone, it has no cache."""

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, *_: object, **__: object
    ) -> Tensor:
        """h (B, T, d), cos and sin (1, T, d_h/2) -> (B, T, d)."""
        return super().forward(h, cos, sin)


def attention_kind(kind: str, base: Config) -> tuple[Config, Callable[[DeepSeekV2], None] | None]:
    """The model of `kind` that has MLA's number of parameters, and how its modules are replaced.

    Its d_r is the width that RoPE turns: all of d_h, where MLA turns the decoupled part alone.
    """
    if kind == "MLA":
        return base, None
    n_kv = cost.kv_heads(kind, base.n_h)
    # norms on the latents are MLA's as well
    mla = cost.parameters(base).attention // base.n_layers + base.d_c + (base.d_cq or 0)
    own = 2 * base.d * base.d_h * (base.n_h + n_kv)
    width = base.dense_width + round((mla - own) / (3 * base.d))

    def replace(model: DeepSeekV2) -> None:
        for block in model.blocks:
            block.attention = PerHeadAttention(base.d, base.n_h, base.d_h, n_kv)
            for weight in block.attention.parameters():
                nn.init.normal_(weight, std=base.init_std)

    return base.with_(d_r=base.d_h, dense_width=width), replace


def granularity(m: int, base: Config) -> Config:
    """m times as many experts of an m-th of the width: 8 of top 2 and one shared, for m = 1."""
    return base.with_(n_shared=m, n_routed=8 * m, top_k=2 * m, expert_width=base.expert_width // m)


def wider(config: Config, factor: int) -> Config:
    """All widths times `factor`; heads, layers and experts stay as many."""
    return config.with_(**{name: factor * getattr(config, name) for name in WIDTHS})


Settings = dict[str, tuple[Config, Callable[[DeepSeekV2], None] | None]]


def settings(study: str, factor: int = 1) -> Settings:
    """The models of a study by name, the first being what the others are compared with."""
    dense, one, routed = (wider(c, factor) for c in (DENSE, ONE_DEVICE, ROUTED))
    if study == "attention":
        return {kind: attention_kind(kind, dense) for kind in cost.KINDS}
    if study == "experts":
        return {f"{8 * m} experts, top {2 * m}": (granularity(m, one), None) for m in (1, 2, 4)}
    if study == "balance":
        expert = routed.with_(alpha_device=0.0, alpha_comm=0.0)
        return {"all three": (routed, None), "expert's": (expert, None),
                "none": (expert.with_(alpha_expert=0.0), None)}
    if study == "dropping":
        return {"off": (routed, None), **{f"capacity {c}": (routed.with_(drop_capacity=c), None)
                                          for c in (1.0, 0.5)}}
    if study == "devices":
        limited = routed.with_(drop_capacity=1.0)
        return {f"M = {m}": (limited.with_(max_devices=m), None)
                for m in range(limited.n_devices, 0, -1)}
    raise ValueError(f"only: {study!r}, expected one of {', '.join(STUDIES)}")


STUDIES = ("attention", "experts", "balance", "dropping", "devices")


def run(quick: bool = False, only: str | None = None) -> dict[str, Any]:
    """All studies, or one, as a JSON-able record; `quick` takes 2 steps of one seed."""
    gpu = torch.cuda.is_available()
    factor, seeds = (4 if gpu else 1), ((0,) if quick else (0, 1, 2))
    chosen = {name: settings(name, factor) for name in ((only,) if only else STUDIES)}
    recipe = Recipe(steps=2 if quick else 300, batch=8, sequence=128, precision="fp32")
    if gpu and not quick:
        recipe = Recipe(steps=1000, batch=32, sequence=512, lr=3e-3, adamw_lr=3e-3)
    on_stories = quick or not gpu
    corpus = stories_corpus(200 if quick else 4_000) if on_stories else open_corpus("python")
    tokenizer = train_tokenizer((d.text for d in corpus.train), 1024 if on_stories else 4096)
    studies = {name: _study(models, [recipe.with_(seed=s) for s in seeds], corpus, tokenizer)
               for name, models in chosen.items()}
    return {
        "name": "ablations", "quick": quick, **machine(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "training": {"corpus": corpus.name, "steps": recipe.steps, "batch": recipe.batch,
                     "sequence": recipe.sequence, "optimizer": recipe.optimizer, "lr": recipe.lr,
                     "tokens": recipe.steps * recipe.batch * recipe.sequence},
        "floor": stories.entropy_rate() if on_stories else None, "studies": studies,
    }


def _study(
    models: Settings, recipes: list[Recipe], corpus: Corpus, tokenizer: TextTokenizer
) -> dict[str, Any]:
    runs = []
    for recipe in recipes:
        for name, (config, change) in models.items():
            setup, record = trained(config, recipe, corpus, tokenizer, change)
            runs.append({"setting": name, **record, **_sizes(setup), **load_shares(setup)})
    return {"summary": summary(runs, "setting", "bits_per_byte"), "runs": runs}


def _sizes(setup: Setup) -> dict[str, int]:
    c, model = setup.model.config, setup.model
    attention = model.blocks[0].attention
    per_head = isinstance(attention, MultiHeadAttention)
    total = sum(p.numel() for p in model.parameters())
    idle = cost.parameters(c).total - cost.activated_parameters(c)       # experts alone: tied
    return {"parameters": total, "activated": total - idle,
            "cached": 2 * attention.n_kv * c.d_h if per_head else c.d_c + c.d_r}


def load_shares(setup: Setup) -> dict[str, float]:
    """Experts and devices on held-out text, as the module says; nothing for a dense model."""
    load = setup.held_out_load(setup.corpus.test[:HELD_OUT])
    if not load:
        return {}
    shares = fair_shares(torch.stack([layer.experts for layer in load]).numpy(force=True))
    tokens = sum(len(layer.routing.indices) for layer in load)
    return {"fullest": float(shares.max(1).mean()), "emptiest": float(shares.min(1).mean()),
            "dead": float((shares < 0.01).mean()),
            "devices": sum(layer.devices.sum().item() for layer in load) / tokens,
            "gate_entropy": sum(layer.entropy for layer in load) / len(load)}

# SPDX-License-Identifier: MIT
"""What one device holds in training, on paper: stages, shares of experts, ZeRO-1, micro-batches.

The paper trains V2 on H800 of 80 GB with a 16-way zero-bubble pipeline, 8-way expert parallelism
and ZeRO-1, without tensor parallelism, a part of the operators computed again (section 3.1.3).
This file asks whether that fits, stage by stage. Three kinds of statements, kept apart:

  exact      parameters of each rank, and the numbers that autograd keeps per token and layer:
             closed forms, which tests compare with live models
  simulated  how many micro-batches a stage holds at once, by the order of the schedule
  assumed    what the paper does not say, as arguments: bytes per number (`Bytes`), which operators
             run again (`AGAIN`), how many devices, one sequence of 4,096 tokens per micro-batch

Left out: what a communication library and the allocator keep for themselves, and gradients of
activations on their way. They have to live in what is left of the card.
"""

from dataclasses import dataclass, replace

from dsv2_ref import cost
from dsv2_ref.config import Config
from dsv2_ref.parallel.schedule import even, order, simulate
from dsv2_ref.parallel.split import Layout, experts_each, split

CARD = 80e9                  # bytes of an H800 (data sheet), GB of 10^9
SEQUENCE = 4096              # tokens (section 3.1.2)
# what is computed again in the backward pass; names as in `kept`
AGAIN = {
    "nothing": (),
    # norms, queries, keys and values from the latents, SwiGLU; rows are gathered again from those
    # that came once per device; gates go into the product before W_down, whose output nobody needs
    "part": ("norms", "heads", "products", "rows", "outputs"),
    # all of attention up to W_O, too
    "more": ("norms", "latents", "heads", "attention", "products", "rows", "outputs"),
    "all": ("norms", "latents", "heads", "attention", "gate and up", "products", "rows", "outputs",
            "router"),
}


@dataclass(frozen=True)
class Bytes:
    """Bytes per number; none of them is in the paper."""

    weight: int = 2          # bf16
    gradient: int = 4        # fp32, since many micro-batches are summed
    optimizer: int = 12      # fp32: a copy of the weight and AdamW's two moments; ZeRO-1 shards it
    kept: int = 2            # activations in bf16


@dataclass(frozen=True)
class Memory:
    """Bytes of one device of a stage, at its fullest."""

    weights: int
    gradients: int
    optimizer: int
    kept: int                # activations of all micro-batches in flight
    working: int             # of one layer, while it is computed again; logits in the last stage

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.kept + self.working


def part(config: Config, layers: range) -> cost.Parameters:
    """Parameters of a stage: those of the layers, the embedding's and the head's with its norm.

    A tied matrix has two owners.
    """
    c = config
    if not 0 <= layers.start < layers.stop <= c.n_layers or layers.step != 1:
        raise ValueError(f"layers: {layers}, expected a part of range(0, {c.n_layers})")
    n_dense = min(max(c.n_dense - layers.start, 0), len(layers))
    p = vars(cost.parameters(c.with_(n_layers=len(layers), n_dense=n_dense)))
    first, last = layers.start == 0, layers.stop == c.n_layers
    return cost.Parameters(**p | {
        "embedding": p["embedding"] if first or (last and c.tie_embeddings) else 0,
        "head": p["head"] if last else 0,
        "norms": p["norms"] if last else p["norms"] - c.d,
    })


def forward_flops(config: Config, layers: range, sequence: int = SEQUENCE) -> dict[str, float]:
    """FLOPs per token of a stage's forward pass, by kind of product.

    `linear` (every token), `experts` (routed), `attention` (scores and their sums; a token sees
    (sequence + 1) / 2 on average, itself included).
    """
    c, p = config, part(config, layers)
    head = c.vocab * c.d if layers.stop == c.n_layers else 0
    pairs = cost.pair_flops_expanded(c) * (sequence + 1) / 2
    return {
        "linear": 2.0 * (p.attention + p.dense + p.shared + p.router + head),
        "experts": 2.0 * p.routed * c.top_k / c.n_routed,
        "attention": pairs * len(layers) / c.n_layers,
    }


def again_flops(config: Config, layers: range, again: str, sequence: int = SEQUENCE
                ) -> dict[str, float]:
    """Those of them that are computed once more; keys of AGAIN, keys as above."""
    c, flops = config, forward_flops(config, layers, sequence)
    up = (c.d_cq or c.d) * c.n_h * (c.d_h + c.d_r) + c.d_c * c.n_h * (c.d_h + c.d_v) + c.d * c.d_r
    attention = part(c, layers).attention - len(layers) * c.n_h * c.d_v * c.d      # but W_O
    nothing = dict.fromkeys(flops, 0.0)
    known = {
        "nothing": nothing,
        "part": nothing | {"linear": 2.0 * up * len(layers)},
        "more": nothing | {"linear": 2.0 * attention, "attention": flops["attention"]},
        "all": flops,
    }
    if again not in known:
        raise ValueError(f"again: {again!r}, expected one of {', '.join(AGAIN)}")
    return known[again]


def kept(config: Config, layer: int) -> dict[str, int]:
    """Numbers per token that autograd keeps of a layer when nothing is computed again.

    Of attention in tiles, which keeps no scores but a sum per head, slots sorted by expert, norms
    and gated sums that keep what they read. The router's are fp32 whatever the rest is; few.
    """
    c = config
    heads = c.n_h * (2 * (c.d_h + c.d_r) + c.d_v)
    moe = c.is_moe(layer)
    hidden = c.n_shared * c.expert_width if moe else c.dense_width
    slots = c.top_k if moe else 0
    return {
        "stream": 2 * c.d,                               # what both norms read
        "norms": 2 * c.d + (c.d_cq or 0) + c.d_c,        # what they make
        "latents": (c.d_cq or 0) + c.d_c,                # what the inner norms read
        "heads": heads,                                  # q, k, v
        "attention": c.n_h * c.d_v + c.n_h,              # o, and the logarithm of each row's sum
        "gate and up": 2 * (hidden + slots * c.expert_width),
        "products": 2 * (hidden + slots * c.expert_width),   # SiLU of the gate, and times up
        "rows": slots * c.d,                             # each slot's copy of its token
        "outputs": slots * c.d,                          # for the gradient of its gate
        "router": slots + (c.n_routed if moe else 0),    # gates, affinities
    }


def kept_numbers(config: Config, layer: int, again: str = "nothing", reach: int | None = None
                 ) -> int:
    """The same, summed, when `again` (a key of AGAIN) is computed in the backward pass.

    Rows are gathered again from what came to the device: one per token and device, `reach` of
    them (None: M, the bound).
    """
    if again not in AGAIN:
        raise ValueError(f"again: {again!r}, expected one of {', '.join(AGAIN)}")
    numbers = {name: n for name, n in kept(config, layer).items() if name not in AGAIN[again]}
    if again == "all":
        return numbers["stream"] // 2                    # the layer's input
    came = 0 if again == "nothing" or not config.is_moe(layer) else config.d * min(
        config.reach if reach is None else reach, config.top_k)
    return sum(numbers.values()) + came


def memory(
    config: Config, lay: Layout, micro_batches: int, tokens: int = SEQUENCE, again: str = "part",
    size: Bytes | None = None, ranges: list[range] | None = None,
) -> list[Memory]:
    """One device of each stage; `tokens` in a micro-batch of one rank, `ranges` None for `split`.

    ZeRO-1: experts have dp copies, everything else dp·ep, and each holds its share of the moments.
    """
    c, size = config, size or Bytes()
    in_flight = simulate(order(lay.schedule, lay.pp, micro_batches), even(lay.pp)).in_flight()
    copies = (lay.dp, lay.rows) if lay.zero1 else (1, 1)
    result = []
    for stage, layers in enumerate(ranges or split(c, lay.pp)):
        p = part(c, layers)
        experts = p.routed // c.n_routed * experts_each(c, lay.ep)
        others = p.total - p.routed
        numbers = [kept_numbers(c, i, again) for i in layers]
        missing = max(kept_numbers(c, i) - n for i, n in zip(layers, numbers, strict=True))
        working = tokens * max(missing, 0) * size.kept
        if layers.stop == c.n_layers:
            working += tokens * c.vocab * 4              # logits, fp32
        result.append(Memory(
            weights=(experts + others) * size.weight,
            gradients=(experts + others) * size.gradient,
            optimizer=(-(-experts // copies[0]) + -(-others // copies[1])) * size.optimizer,
            kept=in_flight[stage] * tokens * sum(numbers) * size.kept,
            working=working,
        ))
    return result


def changes(config: Config, lay: Layout, micro_batches: int) -> dict[str, int]:
    """Bytes of the fullest device, as planned and with one assumption changed."""
    one = {
        "as planned": {},
        "nothing computed again": {"again": "nothing"},
        "attention computed again, too": {"again": "more"},
        "everything computed again": {"again": "all"},
        "1F1B": {"lay": replace(lay, schedule="1f1b")},
        "ZB-H2, without bubbles": {"lay": replace(lay, schedule="zb-h2")},
        "two sequences in a micro-batch": {"tokens": 2 * SEQUENCE},
        "gradients in bf16": {"size": Bytes(gradient=2)},
        "no fp32 copy of the weights": {"size": Bytes(optimizer=8)},
        "no replicas": {"lay": replace(lay, dp=1)},
        "no ZeRO-1": {"lay": replace(lay, zero1=False)},
    }
    return {name: max(m.total for m in memory(
        config, **{"lay": lay, "micro_batches": micro_batches} | change))
        for name, change in one.items()}

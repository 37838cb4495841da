# SPDX-License-Identifier: MIT
"""How long a step of V2 takes on a cluster, on paper: GPU-hours per trillion tokens.

Nothing here was measured. What is exact are counts: FLOPs per token, bytes that leave a device,
micro-batches per step. What is published are the card's peak and the links. How much of the peak a
kernel reaches, and what else takes time, is assumed: `ASSUMED` has a row for each, from best to
worst, and `sensitivity` says what each does to the result.

The paper's own 172.8K hours per trillion tokens (section 3.2.3) need no model at all: divided into
6·N FLOPs they are a share of the peak, 20.3 %. That statement is arithmetic. This file says
where the other 80 % may have gone.

A step of m micro-batches, in seconds:

  m · (F + I + W)   forward, backward for inputs, backward for weights, the mean of all stages; in
                    them products, other kernels, what is computed again, waiting for rows of others
  uneven            so much more on the slowest stage
  idle              filling and draining: what the simulated schedule takes beyond that
  zero              ZeRO-1: gradients reduced and scattered, weights gathered, what is not hidden

Rows of a token cross to other devices four times per MoE layer: dispatched and combined, forward
and backward; at most M devices, of which one may be its own. The eight shares are taken to lie on
the eight cards of a node (the paper has both numbers and does not say so), so that this traffic
stays on NVLink however large the cluster is. Left out is what a stage sends to the next: 42 MB per
micro-batch, a millisecond beside a stage's 117, and hidden but for the first and the last.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dsv2_ref.config import Config
from dsv2_ref.parallel.plan import SEQUENCE, Bytes, again_flops, forward_flops, part
from dsv2_ref.parallel.schedule import Times, order, simulate
from dsv2_ref.parallel.split import Layout, experts_each, layout_of, split

PEAK = 989e12                # bf16 FLOP/s of an H800, dense (data sheet, as the H100's)
BATCH = 9216                 # sequences per step after the first 225B tokens (section 3.1.2)
TRILLION = 1e12
NODE = 8                     # cards on one NVLink switch (section 3.1.3)


@dataclass(frozen=True)
class Assumptions:
    """The middle of each row of ASSUMED."""

    linear: float = 0.70
    experts: float = 0.40
    attention: float = 0.35
    other: float = 0.20
    fullest: float = 1.05
    nvlink: float = 160.0
    ib: float = 40.0
    hidden: float = 0.8
    again: str = "part"
    schedule: str = "zb-h1"
    zero: float = 0.5
    devices: int = 2048
    lost: float = 0.03


@dataclass(frozen=True)
class Assumed:
    """One row: a field of Assumptions, its best and worst value, and where they come from."""

    name: str
    best: float | str
    worst: float | str
    what: str
    source: str


ASSUMED = (
    Assumed("linear", 0.80, 0.55, "share of the peak in plain matrix products", "assumed"),
    Assumed("experts", 0.55, 0.25, "share of the peak in products over sorted slots",
            "published kernels on an H100: 240 to 555 TFLOP/s"),
    Assumed("attention", 0.50, 0.25, "share of the peak in attention, both passes",
            "FlashAttention-3's abstract: 0.35 for FlashAttention-2 on an H100"),
    Assumed("other", 0.10, 0.35, "time of what is no product, over that of products", "assumed"),
    Assumed("fullest", 1.0, 1.2, "slots of the fullest device over the mean",
            "token dropping aims at 1, section 2.2.4; the rest assumed"),
    Assumed("nvlink", 180.0, 100.0, "GB/s of a card to others of its node",
            "data sheet: 400 GB/s both ways; DeepSeek-V3's report counts 160"),
    Assumed("ib", 45.0, 25.0, "GB/s of a card to other nodes",
            "a 400 Gbit/s adapter per card has 50 GB/s; the share is assumed"),
    Assumed("hidden", 1.0, 0.3, "share of the shared experts' time that hides traffic",
            "section 3.1.3 hides it so, and does not say how much"),
    Assumed("again", "part", "more", "what is computed again, see plan.AGAIN",
            "the paper: a part, not which; with nothing it does not fit"),
    Assumed("schedule", "zb-h2", "1f1b", "of the pipeline", "the paper: zero-bubble, not which"),
    Assumed("zero", 0.9, 0.0, "share of ZeRO-1's traffic that is hidden", "assumed"),
    Assumed("devices", 1024, 4096, "H800 in the cluster",
            "not in the paper; DeepSeek-V3's report has 2,048"),
    Assumed("lost", 0.0, 0.10, "share of the hours lost to failures and restarts", "assumed"),
)


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage on one micro-batch: F, I, W, and what they are made of."""

    F: float
    I: float
    W: float
    products: float
    other: float
    again: float
    exchange: float

    @property
    def total(self) -> float:
        return self.F + self.I + self.W


@dataclass(frozen=True)
class Step:
    """One step of a cluster; `parts` in seconds, in the order of the docstring above."""

    layout: Layout
    batch: int
    micro_batches: int
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        """GPU-hours per trillion tokens of sequences of 4,096."""
        steps = TRILLION / (self.batch * SEQUENCE)
        return self.seconds * steps * self.layout.size / 3600


def rows_sent(config: Config, ep: int, reach: float | None = None) -> float:
    """Rows that a token sends to other devices in one dispatch, on average.

    `reach`: how many devices it needs; None for M, the bound. Its own device is one of ep, and as
    likely among them as any other.
    """
    experts_each(config, ep)                             # or ValueError
    bound = min(config.reach if ep == config.n_devices else ep, config.top_k)
    return (bound if reach is None else reach) * (ep - 1) / ep


def exchange_bytes(config: Config, ep: int, tokens: int, reach: float | None = None,
                   size: int = 2) -> float:
    """Bytes that `tokens` of a device send in one MoE layer and one pass: out and back."""
    return 2 * tokens * rows_sent(config, ep, reach) * config.d * size


def product_seconds(flops: Mapping[str, float], a: Assumptions) -> dict[str, float]:
    """FLOPs per token, by kind of product -> seconds of a micro-batch of 4,096 tokens."""
    return {
        "linear": SEQUENCE * flops["linear"] / (PEAK * a.linear),
        "experts": SEQUENCE * flops["experts"] * a.fullest / (PEAK * a.experts),
        "attention": SEQUENCE * flops["attention"] / (PEAK * a.attention),
    }


def stage_time(config: Config, layers: range, ep: int, a: Assumptions) -> StageTime:
    """Seconds of one micro-batch, a sequence of 4,096 tokens, in a stage."""
    c = config
    linear, experts, attention = product_seconds(forward_flops(c, layers), a).values()
    # scores have two factors that need gradients, and no weights
    F, I, W = linear + experts + attention, linear + experts + 2 * attention, linear + experts
    again = sum(product_seconds(again_flops(c, layers, a.again), a).values())

    link = 1e9 * (a.nvlink if ep <= NODE else a.ib)
    n_moe = sum(c.is_moe(i) for i in layers)
    traffic = n_moe * exchange_bytes(c, ep, SEQUENCE) * a.fullest / link
    shared = SEQUENCE * 2 * part(c, layers).shared / (PEAK * a.linear)
    wait = max(traffic - a.hidden * shared, 0.0)
    times = 1 + a.other
    return StageTime(
        F=F * times + wait,
        I=(I + again) * times + wait + (wait if a.again == "all" else 0.0),
        W=W * times,
        products=F + I + W,
        other=(F + I + W) * a.other,
        again=again * times,
        exchange=(3 if a.again == "all" else 2) * wait,
    )


def zero_bytes(config: Config, layers: range, lay: Layout, size: Bytes) -> tuple[float, float]:
    """Bytes that a device sends in ZeRO-1's reduce-scatter and all-gather: in its node, and out.

    Experts have dp copies, one per node; all else has one on each rank of a stage, and is first
    summed within the node, so that an ep-th of it leaves by each card.
    """
    p, each = part(config, layers), size.gradient + size.weight
    experts, others = p.routed / lay.ep * each, (p.total - p.routed) * each
    outside = (lay.dp - 1) / lay.dp
    return others * (lay.ep - 1) / lay.ep, (experts + others / lay.ep) * outside


def step(
    config: Config, a: Assumptions | None = None, batch: int = BATCH, pp: int = 16, ep: int = 8,
    ranges: Sequence[range] | None = None,
) -> Step:
    """One step; `ranges` None for `split`.

    Where the batch does not divide by the ranks of a stage, some have one sequence more, and all
    wait for them.
    """
    a = a or Assumptions()
    lay = layout_of(a.devices, ep, pp, a.schedule, zero1=True)
    if batch < lay.rows:
        raise ValueError(f"batch: {batch} sequences, expected at least the {lay.rows} ranks of a "
                         "stage")
    m = math.ceil(batch / lay.rows)
    ranges = ranges or split(config, pp)
    stages = [stage_time(config, layers, ep, a) for layers in ranges]
    times = Times(*([vars(stage)[kind] for stage in stages] for kind in "FIW"))
    slowest = m * max(stage.total for stage in stages)
    mean = {name: m * sum(vars(stage)[name] for stage in stages) / pp
            for name in ("products", "other", "again", "exchange")}
    links = [zero_bytes(config, layers, lay, Bytes()) for layers in ranges]
    zero = (1 - a.zero) * max(inside / a.nvlink + outside / a.ib for inside, outside in links) / 1e9
    parts = mean | {
        "uneven": slowest - sum(mean.values()),
        "idle": simulate(order(a.schedule, pp, m), times).longest - slowest,
        "zero": zero,
    }
    parts["lost"] = sum(parts.values()) * a.lost / (1 - a.lost)
    return Step(lay, batch, m, parts)


def sensitivity(config: Config) -> list[tuple[Assumed, float, float]]:
    """(row, hours at its best, hours at its worst), all others in the middle; widest first."""
    rows = []
    for row in ASSUMED:
        best, worst = (step(config, replace(Assumptions(), **{row.name: value})).hours
                       for value in (row.best, row.worst))
        rows.append((row, best, worst))
    return sorted(rows, key=lambda r: r[1] - r[2])


def extremes(config: Config) -> tuple[float, float]:
    """Hours with everything at its best, and at its worst."""
    best, worst = (step(config, Assumptions(**{r.name: getattr(r, end) for r in ASSUMED})).hours
                   for end in ("best", "worst"))
    return best, worst


def growth(config: Config, devices: Sequence[int], grown: bool = False) -> list[Step]:
    """Steps of clusters of several sizes: the batch the paper's, or grown with the cluster."""
    middle = Assumptions()
    return [step(config, replace(middle, devices=n),
                 BATCH * n // middle.devices if grown else BATCH) for n in devices]

# SPDX-License-Identifier: MIT
"""What to expect on a card, from what was counted without one; after a run, to lay beside it.

    python -m rehearsal.expected > ../data/results/rehearsal-DATE.json        (from tests/)

Nothing here was measured on a card. Time is bytes over the rate of a copy, products over the rate
of a matrix product, and launches times what each costs at least; `CARDS` says what rates are
assumed. Whatever overlaps, waits for something else, or is moved by our own kernels of training
beside what they multiply is not in it: a first run will be slower, and where it is much slower
something is wrong that a count does not show.
"""

import json
import sys
from collections import Counter
from datetime import date
from importlib.metadata import version
from typing import Any

from dsv2_ref.config import LITE, Config
from dsv2_ref.cost import latent_elements
from rehearsal.parts import decode, flops, step

# bytes/s of a copy (read and written), FLOP/s of a large bf16 product, both assumed: nine tenths of
# an H200's 4.8 TB/s, four fifths of its 989 TFLOP/s. An H100 has the same matrix units, 3.35 TB/s
CARDS = {"H200": {"copy": 4.3e12, "matmul": 780e12},
         "H100": {"copy": 4.3e12 * 3.35 / 4.8, "matmul": 780e12}}
# seconds of the host for a launch, from torch and from Triton, and of the card in a CUDA graph
TORCH, TRITON, GRAPH = 4.5e-6, 24e-6, 2.0e-6
# share of the matrix rate that our kernels are hoped to reach, base and goal, and torch's products
EXPERTS, ATTENTION, TORCHS = (280e12, 400e12), (280e12, 400e12), 0.75
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


def kinds(counted: dict[str, Any]) -> dict[str, int]:
    """Launches by what they are: torch's products, its norms, all else of it; kernels by file."""
    found: Counter[str] = Counter()
    for name, n in counted["operations"].items():
        found["torch: products" if name in PRODUCTS else
              "torch: norms" if "norm" in name else "torch: other"] += n
    for name, n in counted["kernels"].items():
        found[counted["files"][name]] += n
    return dict(found.most_common())


def decoding(c: Config, counted: dict[str, Any], batch: int, cached: int,
             bits: float) -> dict[str, Any]:
    """Of one step of `batch` sequences with `cached` tokens each."""
    used = c.n_routed * (1 - (1 - c.top_k / c.n_routed) ** batch)      # experts read, if even
    moved = {
        "torch": sum(counted["moved"].values()),
        "experts": (c.n_layers - c.n_dense) * used * 3 * c.d * c.expert_width * 2,
        "cache": batch * cached * latent_elements(c.n_layers, c.d_c, c.d_r) * bits / 8,
    }
    told = {"batch": batch, "cached": cached, "moved": moved,
            "launches": {"torch": counted["torch"], "triton": counted["triton"]}, "cards": {}}
    for card, rates in CARDS.items():
        floor = sum(moved.values()) / rates["copy"]
        graph = floor + GRAPH * (counted["torch"] + counted["triton"])
        eager = max(graph, TORCH * counted["torch"] + TRITON * counted["triton"])
        told["cards"][card] = {"floor_ms": 1e3 * floor, "graph_ms": 1e3 * graph,
                               "eager_ms": 1e3 * eager, "graph_tokens_per_s": batch / graph,
                               "eager_tokens_per_s": batch / eager}
    return told


def training(counted: dict[str, Any], work: dict[str, Any], tokens: int,
             sequence: int) -> dict[str, Any]:
    """Of one step of `tokens` tokens."""
    moved = sum(n for name, n in counted["moved"].items() if name not in PRODUCTS)
    update = 10 * counted["weights"] // 2 + counted["weights"]     # 10 a weight; the norm reads 2
    told = {"tokens": tokens, "moved": moved, "update": update, "cards": {}}
    for card, rates in CARDS.items():
        rest = moved / rates["copy"] + update / rates["copy"]
        products = work["torch"] / sequence * tokens / (TORCHS * rates["matmul"])
        seconds = {}
        for name, i in (("base", 0), ("goal", 1)):
            kernels = (work["experts"] / EXPERTS[i] + work["attention"] / ATTENTION[i])
            seconds[name] = rest + products + kernels / sequence * tokens
        told["cards"][card] = {
            "elementwise_s": moved / rates["copy"], "update_s": update / rates["copy"],
            "torch_products_s": products, "seconds": seconds,
            "tokens_per_s": {name: tokens / s for name, s in seconds.items()}}
    return told


def record() -> dict[str, Any]:
    c, sequence = LITE, 4096
    plans = {}
    for batch, micro, again in ((8, 1, 0.0), (8, 2, 0.0), (8, 2, 0.5), (8, 4, 0.5), (8, 4, 1.0)):
        print(f"a step of {batch} x {sequence}, {micro} at a time, recompute {again}",
              file=sys.stderr)
        found = step(batch=batch, micro=micro, recompute=again)
        plans[f"{micro} x {again}"] = found
    work = flops(sequence=sequence)
    decoded = {}
    for cache, bits, batch in (("latent", 16, 1), ("six_bit", 6.06, 1), ("latent", 16, 128),
                               ("six_bit", 6.06, 128)):
        print(f"decoding, {cache}, batch {batch}", file=sys.stderr)
        counted = decode(cache=cache, batch=batch, cached=sequence)
        decoded[f"{cache} {batch}"] = decoding(c, counted, batch, sequence, bits) | {
            "waits": counted["waits"], "uploads": counted["uploads"],
            "kinds": kinds(counted)}
    # the small steps between products in plain torch, as they would be without their kernels
    counted = decode(cached=sequence, plain=1)
    decoded["latent 1"]["without_fusing"] = {"launches": counted["launches"],
                                             "kinds": kinds(counted)}
    return {
        "what": "counted on a pretended card; no number here was measured on one",
        "date": str(date.today()), "torch": version("torch"), "triton": version("triton"),
        "rates": CARDS, "launch_s": {"torch": TORCH, "triton": TRITON, "graph": GRAPH},
        "product_rates": {"torch": TORCHS * CARDS["H200"]["matmul"], "experts": EXPERTS,
                          "attention": ATTENTION},
        "memory": {name: {k: found[k] for k in ("plan", "peak", "at_peak", "weights", "moments",
                                                "torch", "triton", "launches", "waits",
                                                "uploads", "update")}
                   for name, found in plans.items()},
        "flops": work, "training": training(plans["2 x 0.0"], work, 8 * sequence, sequence),
        "decoding": decoded,
    }


if __name__ == "__main__":
    json.dump(record(), sys.stdout, indent=1)
    print()

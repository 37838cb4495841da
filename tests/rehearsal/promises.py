# SPDX-License-Identifier: MIT
"""What must hold on the pretended card: a part to run, and what is wrong with its numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

GB = 1e9
Found = dict[str, Any]


class Promise(NamedTuple):
    part: str
    given: dict[str, Any]
    broken: Callable[[Found], list[str]]       # one line for each thing that is not as promised


def most(what: str, value: float, limit: float) -> list[str]:
    return [f"{what}: {value:,}, expected at most {limit:,}"] if value > limit else []


def near(what: str, value: float, expected: float, share: float) -> list[str]:
    ratio = value / expected
    return [] if abs(ratio - 1) <= share else [
        f"{what}: {value:,}, {ratio:.3f} of the expected {expected:,}, allowed {share} off"]


def launched(found: Found) -> list[str]:
    """Every launch is one that the card would take."""
    return sorted(set(found["wrong"]))[:5]


def one_wait(found: Found) -> list[str]:
    """The host waits for the sampled ids alone, and uploads them alone."""
    return [f"waits: {n} {where}" for where, n in found["waits"].items()
            if where != "copied to the host elsewhere"] + [
            f"uploads: {n} {where}" for where, n in found["uploads"].items()
            if where != "elsewhere"]


def decoding(a_layer: float, beside: int) -> Callable[[Found], list[str]]:
    def broken(found: Found) -> list[str]:
        return [*launched(found), *one_wait(found),
                *most("launches", found["launches"], a_layer * found["layers"] + beside)]

    return broken


def decoding_alike(a_layer: float, beside: int) -> Callable[[Found], list[str]]:
    """The same whatever the length, so that a graph can hold it; and it is replayed."""
    def broken(found: Found) -> list[str]:
        return [*decoding(a_layer, beside)(found), *found["differs"],
                *([] if found["replays"] == 1 else [f"replays: {found['replays']}, expected 1"])]

    return broken


def compiled_twice_at_most(found: Found) -> list[str]:
    """The kernel that adds up pieces has a tile for few and one for many; all others one."""
    return [*launched(found), *(
        line for kernel, n in found["variants"].items()
        for line in most(f"{kernel}: compilations", n, 1 + (kernel == "combine_kernel")))]


def learns(kept: float, above: float) -> Callable[[Found], list[str]]:
    """Gradients of every weight; GB kept for the backward pass, and above that and the weights."""

    def broken(found: Found) -> list[str]:
        peak = found["peak"] - found["gradients"] * 2 - found["kept"]
        return [*launched(found), *found["wrong_gradients"], *map(str, found["waits"]),
                *most("GB kept", found["kept"] / GB, kept), *most("GB above", peak / GB, above)]

    return broken


def as_planned(found: Found) -> list[str]:
    """Memory within 5 %, the standing part exactly; one wait a step; a launch or two a weight."""
    planned, own = found["plan"], found["update"]
    return [*launched(found), *near("peak", found["peak"], planned["peak"], 0.05),
            *near("weights", found["weights"], planned["weights"], 0),
            *near("moments", found["moments"], planned["moments"], 0.001),
            *most("waits", sum(found["waits"].values()), 1),
            *most("launches of the optimiser", own["torch"] + own["triton"],
                  2 * found["n_weights"])]


def as_counted(found: Found) -> list[str]:
    return near("FLOPs", found["torch"] + found["experts"] + found["attention"],
                found["cost"], 0.001)


def all_ran(found: Found) -> list[str]:
    return [*found["failed"], *launched(found)]


def commands_end_well(found: Found) -> list[str]:
    return [line for done in found["commands"] for line in
            [*launched(done), *([] if done["code"] == 0 else [done["messages"]])]]


def fits(gb: float) -> Callable[[Found], list[str]]:
    def broken(found: Found) -> list[str]:
        return [*found.get("failed", []), *launched(found), *most("GB", found["peak"] / GB, gb)]

    return broken


TINY = ("--preset tiny --corpus TEXTS --text-bytes 1e5 --sequence 64 --batch 4 "
        "--optimizer adamw8 --weights bf16 --recompute 1 --evaluate-every 2 --out OUT/a")
LINES = [f"train --steps 2 --save-every 1 {TINY}", f"train --steps 3 --resume {TINY}",
         "generate OUT/a/model --prompt Once --max-new-tokens 5"]

FAST = {
    "decode": Promise("decode", {}, decoding(24, 10)),
    "decode six bits": Promise("decode", {"cache": "six_bit"}, decoding(24, 10)),
    "decode ragged": Promise("decode", {"layers": 4, "batch": 4, "ragged": 1},
                             decoding(25, 32)),
    "decode graph": Promise("decode", {"layers": 4, "batch": 4, "ragged": 1, "graph": 1},
                            decoding_alike(25, 32)),
    "decode graph six bits": Promise(
        "decode", {"layers": 4, "batch": 4, "ragged": 1, "cache": "six_bit", "graph": 1},
        decoding_alike(25, 32)),
    "another card": Promise("decode", {"layers": 2, "index": 1}, decoding(24, 28)),
    "lengths": Promise("variants", {"every": 8011}, compiled_twice_at_most),
    "lengths six bits": Promise("variants", {"every": 8011, "cache": "six_bit"},
                                compiled_twice_at_most),
    "run again": Promise("backward", {"batch": 4, "recompute": 1.0}, learns(2.85, -0.3)),
    "kept": Promise("backward", {"batch": 1, "recompute": 0.0}, learns(12.6, -11.0)),
    "step": Promise("step", {"layers": 4}, as_planned),
    "FLOPs": Promise("flops", {"layers": 5}, as_counted),
    "sizes": Promise("shapes", {}, all_ran),
    "commands": Promise("command", {"lines": LINES}, commands_end_well),
    "V2 drops": Promise("backward", {"preset": "v2", "layers": 2, "batch": 1}, learns(2.35, -1.5)),
    "experts of V2": Promise("experts_of", {}, fits(20)),
}

SLOW = {
    **{f"Lite {batch} {micro} {again}": Promise(
        "step", {"batch": batch, "micro": micro, "recompute": again}, as_planned)
        for batch, micro, again in ((8, 1, 0.0), (8, 2, 0.0), (8, 2, 0.5), (8, 4, 1.0))},
    "decode V2": Promise("decode", {"preset": "v2"}, decoding(25, 35)),
    "decode Lite 128": Promise("decode", {"batch": 128}, decoding(34, 25)),
    "decode V2 six bits": Promise("decode", {"preset": "v2", "batch": 128, "cache": "six_bit"},
                                  decoding(36, 25)),
    "prompt": Promise("prefill", {}, fits(40)),
    "prompt of V2": Promise("prefill", {"preset": "v2", "layers": 4}, fits(60)),
    **{f"lengths {preset} {cache} {batch}": Promise(
        "variants", {"preset": preset, "cache": cache, "batch": batch, "ragged": int(batch > 1)},
        compiled_twice_at_most)
        for preset in ("lite", "v2") for cache in ("latent", "six_bit") for batch in (1, 4)},
    "loss": Promise("backward", {"layers": 1, "batch": 4, "recompute": 1.0}, learns(1.1, 1.9)),
    "wide latents": Promise("wide", {}, all_ran),
    "compiled": Promise("shapes", {"build": 1}, all_ran),
    **{f"bench {name}": Promise("bench", {"name": name}, all_ran)
       for name in ("correct", "attention")},       # there SDPA holds all scores, on a card not
    **{f"bench {name}": Promise("bench", {"name": name, "card_name": "NVIDIA H100"}, fits(gb))
       for name, gb in (("mla_decode", 6), ("six_bit_decode", 6), ("experts", 32),
                        ("optimizer", 11), ("fp8", 40))},
}

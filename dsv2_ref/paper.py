# SPDX-License-Identifier: MIT
"""The scoreboard: numbers that the paper claims beside the ones this code computes.

`ours` is computed from the presets by `cost`, `attention.rope` and the cache classes whenever
`rows()` is called; nothing in that column is written down. `paper` is what the paper prints, or,
in parentheses, what follows from what it prints. A row *holds* when ours, rounded to the digits
that the paper gives, is the paper's number; the one exception, a number that the paper truncates,
says so. One row is a measurement: the needle grid, from the newest record in data/results, whose
model and lengths are not the paper's. Three rows are a plan of the paper's cluster, whose
assumptions `paper --plan` lists: two say whether it fits in a card, and the one of its hours holds
when the paper's number lies between everything at its best and at its worst. Nothing is allocated
and nothing trained: benchmark scores, Pile bits per byte and generation throughput need the trained
236B weights or eight H800, and are no rows.
"""

import json
import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import torch

from dsv2_ref import cost
from dsv2_ref.attention.cache_quant import SixBitCache
from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.attention.rope import softmax_scale, yarn_mscale
from dsv2_ref.checkout import in_checkout
from dsv2_ref.config import LITE, V2, Config
from dsv2_ref.inference.needle import GREEN
from dsv2_ref.parallel import hours, plan

# DeepSeek 67B, the dense predecessor that the paper measures itself against
DENSE_N, DENSE_LAYERS, DENSE_N_KV, DENSE_D_H = 67e9, 95, 8, 128
# H800 GPU-hours to train on 1T tokens, as printed in section 3.2.3
HOURS, DENSE_HOURS = 172.8e3, 300.6e3


@dataclass(frozen=True)
class Row:
    """One claim."""

    claim: str
    section: str      # of the paper, where the claim is made
    paper: str        # as printed there; in parentheses: follows from what is printed
    ours: str         # computed, in the same units
    value: float      # the same, unrounded
    holds: bool       # whether the two agree to the digits the paper gives
    how: str          # where ours comes from
    subject: str      # "sizes", "cache", "bits", "training" or "length"
    notebook: str     # the number of the one that derives it


def rows(v2: Config = V2, lite: Config = LITE) -> list[Row]:
    """Every claim that can be computed, in the order of the subjects below."""
    return [*_sizes(v2, lite), *_cache_tables(v2, lite), *_cache_bytes(v2), *_cache_saving(v2),
            *_six_bits(v2), *_training(v2), *_plan(v2), *_long_context(v2), *_needles()]


def _rounded(value: float, digits: int, published: float) -> bool:
    return math.isclose(round(value, digits), published, abs_tol=1e-9)


def _sizes(v2: Config, lite: Config) -> list[Row]:
    result = []
    for name, section, config, paper_total, paper_active, digits in (
        ("V2", "3.1.2", v2, 236, 21, 0), ("V2-Lite", "B", lite, 15.7, 2.4, 1),
    ):
        total = cost.parameters(config).total
        active, touched = (cost.activated_parameters(config, e) for e in (False, True))
        holds = _rounded(active / 1e9, digits, paper_active)
        how = f"{touched / 1e9:.2f}B with the embedding"
        if config is lite:      # 2.451 is printed as 2.4: rounded it would be 2.5
            holds = math.floor(active / 1e8) / 10 == paper_active
            how = f"cut, not rounded, to {paper_active}"
        result += [
            Row(f"parameters, {name}", section, f"{paper_total}B", f"{total / 1e9:.2f}B", total,
                _rounded(total / 1e9, digits, paper_total), f"exactly {total:,}", "sizes", "10"),
            Row(f"activated, {name}", section, f"{paper_active}B",
                f"{active / 1e9:.2f}B", active, holds, how, "sizes", "10"),
        ]
    return result


def _cache_tables(v2: Config, lite: Config) -> list[Row]:
    mla = cost.cache_elements_per_token("MLA", v2)
    groups = mla / cost.per_head_elements(v2.n_layers, 1, v2.d_h)
    units = mla / (v2.d_h * v2.n_layers)
    row = v2.d_c + v2.d_r
    result = [
        Row("MLA's cache in GQA groups", "2.1.4", "2.25", f"{groups:.2f}", groups,
            groups == 2.25, f"{row} numbers, a group {2 * v2.d_h}", "cache", "02"),
        Row("MLA's cache in head sizes", "2.1.4", "9/2", f"{units:.2f}", units, units == 4.5,
            f"{row} numbers, a head {v2.d_h}", "cache", "02"),
    ]
    # the paper does not print the large MHA model's heads: 56 is the count that gives its cache
    large_mha = v2.with_(n_h=56)
    for name, kind, c, paper in (
        ("small MHA model", "MHA", lite, 110.6), ("small MLA model", "MLA", lite, 15.6),
        ("large MHA model", "MHA", large_mha, 860.2), ("large MLA model", "MLA", v2, 34.6),
    ):
        n = cost.cache_elements_per_token(kind, c)
        how = f"2 x {c.n_h} heads x {c.d_h} x {c.n_layers} layers"
        if kind == "MLA":
            how = f"({c.d_c} + {c.d_r}) x {c.n_layers} layers"
        result.append(Row(f"cache, {name}", "D.2", f"{paper}K", f"{n / 1e3:.1f}K", n,
                          _rounded(n / 1e3, 1, paper), how, "cache", "01"))
    return result


def _cache_bytes(v2: Config) -> list[Row]:
    live = LatentCache(v2.n_layers, 1, 1, v2.d_c, v2.d_r, torch.bfloat16, "meta").nbytes
    expanded = int(cost.cache_bytes(cost.expanded_elements(v2), 16.0))
    return [
        Row("bytes per token, latent", "2.1.4", "(69,120)", f"{live:,}", live,
            live == 69_120, "live cache, 2 bytes per number", "cache", "05"),
        Row("bytes, all keys and values", "2.1.4", "(4,915,200)", f"{expanded:,}", expanded,
            expanded == 4_915_200, f"{expanded / live:.0f} times as many", "cache",
            "02"),
    ]


def _cache_saving(v2: Config) -> list[Row]:
    mla = cost.cache_elements_per_token("MLA", v2)
    dense = cost.per_head_elements(DENSE_LAYERS, DENSE_N_KV, DENSE_D_H)
    bits = cost.average_bits(v2.d_c, v2.d_r)
    equal = 100 * (1 - mla / dense)
    six = 100 * (1 - cost.cache_bits(mla, 6.0) / cost.cache_bits(dense, 16.0))
    return [
        Row("cache saved, both at 16 bits", "3.2.3", "(82.2%)", f"{equal:.1f}%", equal,
            _rounded(equal, 1, 82.2), f"{mla:,} numbers, not {dense:,}", "bits", "05"),
        Row("cache saved, V2 at 6 bits", "3.2.3", "93.3%", f"{six:.1f}%", six,
            _rounded(six, 1, 93.3), "the same; 67B's stay at 16 bits", "bits", "05"),
        Row("bits per cached number", "3.2.3", "6", f"{bits:.2f}", bits, bits == 6.0,
            "latent 4.75, RoPE key 16", "bits", "11"),
    ]


def _six_bits(v2: Config) -> list[Row]:
    """The same claims, from the bytes of a live packed cache instead of a formula."""
    cache = SixBitCache(v2.n_layers, 2, 3, v2.d_c, v2.d_r)
    a_token = cache.nbytes / (2 * 3)
    bits = 8 * a_token / cost.cache_elements_per_token("MLA", v2)
    dense = cost.cache_bytes(cost.per_head_elements(DENSE_LAYERS, DENSE_N_KV, DENSE_D_H), 16.0)
    saved = 100 * (1 - a_token / dense)
    # GB of 10^9 bytes; 14.9 = 1 / (1 - 0.933)
    fits, dense_fits = (int(80e9 // (4096 * each)) for each in (a_token, dense))
    row = f"{a_token / v2.n_layers:.0f} bytes for {v2.d_c + v2.d_r} numbers"
    return [
        Row("bits per packed number", "3.2.3", "6", f"{bits:.2f}", bits,
            _rounded(bits, 0, 6), row, "bits", "11"),
        Row("cache saved, packed", "3.2.3", "93.3%", f"{saved:.1f}%", saved,
            _rounded(saved, 1, 93.3), f"{a_token:,.0f} bytes, not {dense:,.0f}", "bits",
            "05"),
        Row("sequences in 80 GB", "3.2.3", "(14.9x)", f"{dense / a_token:.1f}x",
            dense / a_token, _rounded(dense / a_token, 1, 14.9),
            f"{fits} for 67B's {dense_fits}", "bits", "11"),
    ]


def _training(v2: Config) -> list[Row]:
    saved = 100 * (1 - HOURS / DENSE_HOURS)
    result = [
        Row("training GPU-hours saved", "3.2.3", "42.5%", f"{saved:.1f}%", saved,
            _rounded(saved, 1, 42.5), "172.8K, not 300.6K, hours", "training", "10"),
    ]
    for name, n_active, spent, about, share in (
        ("V2", cost.activated_parameters(v2), HOURS, 200, 20),
        ("67B", DENSE_N, DENSE_HOURS, 370, 38),
    ):
        rate = cost.implied_tflops(cost.training_flops(n_active, 1e12), spent)
        mfu = 100 * rate * 1e12 / hours.PEAK
        result += [
            Row(f"TFLOP/s per GPU, {name}", "3.2.3", f"({about})", f"{rate:.0f}", rate,
                _rounded(rate, -1, about), "6 FLOPs per weight and token", "training", "10"),
            Row(f"share of the peak, {name}", "3.2.3", f"({share}%)", f"{mfu:.1f}%", mfu,
                _rounded(mfu, 0, share), "of 989 TFLOP/s (data sheet)", "training", "17"),
        ]
    return result


def _plan(v2: Config) -> list[Row]:
    """The paper's cluster, planned; each assumption is a row of `hours.ASSUMED` or in plan.py."""
    step = hours.step(v2)
    part, whole = (max(m.total for m in plan.memory(v2, step.layout, step.micro_batches, again=a))
                   for a in ("part", "nothing"))
    best, worst = hours.extremes(v2)
    return [
        Row("fullest card, planned", "3.1.3", "(fits)", f"{part / 1e9:.1f} GB", part,
            part <= plan.CARD, f"{step.layout.size:,} cards of 80 GB", "training", "17"),
        Row("with nothing recomputed", "3.1.3", "(too much)", f"{whole / 1e9:.1f} GB", whole,
            whole > plan.CARD, "more than a card has", "training", "17"),
        Row("GPU-hours planned", "3.2.3", "172.8K", f"{step.hours / 1e3:.0f}K", step.hours,
            best <= HOURS <= worst, f"{best / 1e3:.0f}K to {worst / 1e3:.0f}K, as one assumes",
            "training", "17"),
    ]


def _long_context(v2: Config) -> list[Row]:
    factor, mscale = v2.yarn_factor or 1.0, v2.yarn_mscale_all_dim or 0.0
    length = yarn_mscale(factor, mscale)
    d_qk = v2.d_h + v2.d_r
    scale = softmax_scale(d_qk, factor, mscale) / softmax_scale(d_qk)
    target = factor * v2.yarn_original_positions
    return [
        Row("tokens read after YaRN", "3.1.4", "160K", f"{target / 1024:.0f}K", target,
            target == 160 * 1024, f"{factor:.0f} x {v2.yarn_original_positions:,} positions",
            "length", "03"),
        Row("YaRN factor on q and on k", "3.1.4", "(1.2608)", f"{length:.4f}", length,
            _rounded(length, 4, 1.2608), f"0.1 x {mscale} x ln {factor:.0f} + 1", "length", "03"),
        Row("YaRN factor on q·k", "3.1.4", "(1.5896)", f"{scale:.4f}", scale,
            _rounded(scale, 4, 1.5896), "its square", "length", "03"),
    ]


def _needles() -> list[Row]:
    """Figure 4 beside the newest record of ours; no row where no records lie, as in a wheel."""
    try:
        records = sorted(in_checkout("data/results").glob("needle-2*.json"))
    except ValueError:
        return []
    if not records:
        return []
    record = json.loads(records[-1].read_text(encoding="utf-8"))
    longest = 8 * record["trained_at"]
    grids = [run["grids"]["yarn"] for run in record["runs"]]
    found = [cell for grid in grids for length, row in zip(grid["lengths"], grid["grid"])
             if length <= longest for cell in row]
    green = sum(cell >= GREEN for cell in found)
    return [Row("cells with needle found", "3.1.4", "140/144", f"{green}/{len(found)}",
                green / len(found), green / len(found) >= 140 / 144,
                f"{record['parameters'] / 1e6:.1f}M model, to {longest:,} tokens", "length", "18")]


def aligned(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Text lines of at most 100 columns; the last column wraps, those in `right` end alike."""
    n = len(lines[0]) - 1
    widths = [max(len(line[i]) for line in lines) for i in range(n)]
    indent = sum(widths) + 2 * n
    result = []
    for line in lines:
        parts = textwrap.wrap(line[n], max(100 - indent, 20)) or [""]
        cells = [cell.rjust(w) if i in right else cell.ljust(w)
                 for i, (cell, w) in enumerate(zip(line[:n], widths, strict=True))]
        result.append("  ".join([*cells, parts[0]]).rstrip())
        result += [" " * indent + part for part in parts[1:]]
    return result


def as_table(rows: Sequence[Row]) -> str:
    """Aligned text of at most 100 columns, a line per claim; one that fails is marked NO."""
    lines = aligned([("", "claim", "sec.", "paper", "ours", "nb", "how"), *(
        ("ok" if r.holds else "NO", r.claim, r.section, r.paper, r.ours, r.notebook, r.how)
        for r in rows
    )], right=(3, 4))
    lines.insert(1, "-" * max(len(line) for line in lines))
    lines += ["", f"{sum(r.holds for r in rows)} of {len(rows)} hold. nb: the notebook that "
              "derives it. (In parentheses: follows from the paper.)"]
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> str:
    """A JSON list with one object per row, keys as in `Row`."""
    return json.dumps([asdict(row) for row in rows], indent=2)

# SPDX-License-Identifier: MIT
"""Kinds of attention compared: what MHA, GQA, MQA and MLA keep, and how well they do."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from dsv2_ref.figures.style import COLORS, MORE_COLORS, Picture, styled


def kind_of(n_h: int, n_kv: int) -> str:
    """MHA, GQA or MQA: n_h query heads on n_kv keys and values."""
    if n_kv < 1 or n_h % n_kv:
        raise ValueError(f"n_kv: {n_kv}, expected a divisor of n_h = {n_h}")
    return "MHA" if n_kv == n_h else "MQA" if n_kv == 1 else "GQA"


@styled
def groups_like_mla(n_h: int, d_h: int, n_layers: int, latent_row: int) -> Figure:
    """Numbers cached per token by GQA against its groups, and the groups that equal MLA's row."""
    equal, figure = latent_row / (2 * d_h), Picture(7.2, 3.8)
    ax = figure.subplots()
    counts = np.array([n for n in range(1, n_h + 1) if n_h % n == 0])
    kept = 2 * counts * d_h * n_layers
    ax.plot(counts, kept, color=MORE_COLORS[3], lw=1.2, zorder=1)
    for n, y in zip(counts, kept, strict=True):
        ax.plot(n, y, "o", ms=8, color=COLORS[kind_of(n_h, n)], label=kind_of(n_h, n))
    for i, ha, offset in ((0, "left", (10, -4)), (-1, "right", (-10, -2))):
        ax.annotate(kind_of(n_h, counts[i]), (counts[i], kept[i]), offset, ha=ha,
                    textcoords="offset points")
    mla = latent_row * n_layers
    ax.axhline(mla, color=COLORS["MLA"])
    ax.plot([equal, equal], [kept[0] / 2, mla], color=COLORS["MLA"], ls=":")
    ax.annotate(f"MLA  {mla:,}", (counts[-1], mla), (0, 6), ha="right", color=COLORS["MLA"],
                textcoords="offset points")
    ax.set(xscale="log", yscale="log", ylim=(kept[0] / 2, kept[-1] * 2), ylabel="numbers per token",
           xlabel="keys and values in a layer (groups of heads)",
           title=f"MLA keeps as much as GQA with {equal:.3g} groups would")
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    ax.minorticks_off()
    ax.grid(True)
    return figure


@styled
def kept_to_scale(n_h: int, groups: int, d_h: int, d_c: int, d_r: int) -> Figure:
    """The numbers that MHA, GQA, MQA and MLA keep per token and layer, as areas of one scale.

    A row of a block is a key (dark) and its value (light); MLA's is the latent and the RoPE key.
    """
    blocks = [(kind_of(n_h, n), n, (d_h, d_h)) for n in (n_h, groups, 1)] + [("MLA", 1, (d_c, d_r))]
    if len({kind for kind, *_ in blocks}) < 4:
        raise ValueError(f"groups: {groups}, expected more than 1 and fewer than n_h = {n_h}")
    kept = {kind: n * sum(row) for kind, n, row in blocks}
    figure = Picture(8.8, 4.1)
    ax = figure.subplots()
    label, right = 0.2 * n_h, 2 * d_h + max(d_c + d_r - 4 * d_h, d_h / 2)
    at = {"MHA": (0, 0), "GQA": (right, 0), "MQA": (right, groups + 2 * label),
          "MLA": (0, n_h + 2 * label)}
    for kind, n, row in blocks:
        (x, y), color = at[kind], COLORS[kind]
        for left, width, share in ((0, row[0], 1.0), (row[0], row[1], 0.6)):
            ax.add_patch(Rectangle((x + left, y), width, n, lw=0, facecolor=tuple(
                1 - share * (1 - c) for c in to_rgb(color))))
        what = (f"a latent of {d_c} and a RoPE key of {d_r}" if kind == "MLA" else
                f"{n:,} \u00d7 ({d_h} + {d_h})")
        ax.text(x, y - 0.04 * n_h, f"{kind}   {kept[kind]:,} = {what}", va="bottom", color=color,
                weight="bold", fontsize=10)
    for x, what in ((0.5, "keys"), (1.5, "values")):
        ax.text(x * d_h, n_h / 2, f"{n_h} {what}\nof {d_h} numbers", ha="center", va="center")
    ax.set(xlim=(-0.01 * right, max(right + 2 * d_h, d_c + d_r)), aspect="equal",
           ylim=(n_h + 2.2 * label, -label),
           title=f"Kept per token and layer, drawn to scale: MLA {kept['MLA']:,} numbers, "
                 f"MHA {kept['MHA']:,}")
    ax.set_axis_off()
    return figure


@styled
def benchmark_scores(
    benchmarks: Sequence[str], models: Mapping[str, Mapping[str, Sequence[float]]]
) -> Figure:
    """Scores (percent) on each benchmark, a panel for each set of models that are compared.

    models: panel -> {"MHA": one score per benchmark, "GQA, 8 groups": ..., "MLA": ...}.
    """
    below = above = shared = latent = 0
    figure = Picture(9.6, 3.6)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for ax, (name, scores) in zip(panels, models.items(), strict=True):
        for kind, values in scores.items():
            if len(values) != len(benchmarks):
                raise ValueError(f"{name}, {kind}: {len(values)} scores, expected "
                                 f"{len(benchmarks)}, one per benchmark")
            ax.plot(benchmarks, values, "o", ms=9, color=COLORS[kind.split(",")[0]], label=kind)
            better = sum(v > m for v, m in zip(values, scores["MHA"], strict=True))
            if kind == "MLA":
                above, latent = above + better, latent + len(values)
            elif kind != "MHA":
                below, shared = below + len(values) - better, shared + len(values)
        ax.set(xlabel=name, xlim=(-0.5, len(benchmarks) - 0.5))
        ax.grid(True)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(scores), fontsize=9,
                  handletextpad=0.0, columnspacing=0.8)
    panels[0].set(ylabel="score (%)")
    figure.suptitle(f"GQA and MQA lie below MHA on {below} of {shared} scores, MLA above it on "
                    f"{above} of {latent}", x=0.01, ha="left", weight="bold", size=12)
    return figure

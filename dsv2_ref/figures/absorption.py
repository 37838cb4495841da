# SPDX-License-Identifier: MIT
"""One attention, two orders of multiplication: what each costs, and where the cheaper one changes.

"expanded" builds every head's keys and values, "absorbed" carries queries down to the latent and
outputs up; dsv2_ref/attention/mla.py has both.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dsv2_ref.figures.style import COLORS, INK, MORE_COLORS, Picture, styled, tokens_label

FORMS = {"expanded": MORE_COLORS[1], "absorbed": COLORS["MLA"]}


@styled
def absorption_flops(cases: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Stacked bars of FLOPs, one panel a case, both forms in each.

    cases: "what for: sizes" -> {"expanded": (projections, pairs), "absorbed": (the same)}, in
    FLOPs; the title takes the part before the colon.
    """
    if not cases or any(set(forms) != set(FORMS) for forms in cases.values()):
        raise ValueError("cases: expected 'expanded' and 'absorbed' in each, and one case at least")
    figure = Picture(8.4, 1.75 * len(cases) + 0.9)
    told = []
    for ax, (name, forms) in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0],
                                 cases.items()):
        totals = {form: sum(parts) for form, parts in forms.items()}
        for form in FORMS:
            projections, pairs = (part / 1e9 for part in forms[form])
            ax.barh(form, projections, color=FORMS[form], alpha=0.45, height=0.6)
            ax.barh(form, pairs, left=projections, color=FORMS[form], height=0.6)
            total = projections + pairs
            ax.annotate(f"{float(f'{total:.3g}'):,.9g}", (total, form), (5, 0),
                        textcoords="offset points", va="center")
        ratio = totals["expanded"] / totals["absorbed"]
        times = f"{ratio:.3g} times fewer" if ratio > 1 else f"{1 / ratio:.2g} times more"
        told.append(f"{times}{'' if told else ' FLOPs'} {name.partition(':')[0]}")
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.set(xlim=(0, max(totals.values()) / 1e9 * 1.12), xlabel="GFLOP")
        ax.set_title(name, fontsize=11, fontweight="normal", pad=4)
        ax.grid(True, axis="x")
    figure.suptitle("Absorbed needs " + ", ".join(told), x=0.01, ha="left", fontsize=12,
                    fontweight="bold")
    figure.supxlabel("pale: expansion, or queries down and outputs up · full: query-key pairs · "
                     "no padding", fontsize=10)
    return figure


def bracket(new_tokens: Sequence[int], ratio: Sequence[float]) -> tuple[int, int] | None:
    """The last T before the ratio absorbed / expanded first reaches 1, and the first T after."""
    above = np.flatnonzero(np.asarray(ratio, float) >= 1)
    if not len(above) or above[0] == 0:
        return None
    return new_tokens[above[0] - 1], new_tokens[above[0]]


@styled
def absorption_crossover(
    new_tokens: Sequence[int], predicted: Sequence[float], measured: Sequence[float],
    limit: float,
) -> Figure:
    """Cost of absorbed over expanded against the number of new tokens: by FLOPs and by the clock.

    new_tokens ascending; predicted and measured: the ratio at each of them; limit: the largest T
    for which absorbed has fewer FLOPs. The clock was read at the given T alone, so the title says
    between which of them it crosses.
    """
    if not len(new_tokens) == len(predicted) == len(measured) or len(new_tokens) < 2:
        raise ValueError(f"new_tokens, predicted, measured: {len(new_tokens)}, {len(predicted)}, "
                         f"{len(measured)} values, expected the same number, 2 at least")
    figure = Picture(8.2, 4.2)
    ax = figure.subplots()
    for name, ratio, color, marker in (("FLOPs", predicted, COLORS["MLA"], "o"),
                                       ("the clock", measured, COLORS["MHA"], "s")):
        ax.plot(new_tokens, ratio, color=color, marker=marker, ms=5, label=f"by {name}")
    found = bracket(new_tokens, measured)
    outside = f"above {new_tokens[-1]}" if measured[0] < 1 else f"below {new_tokens[0]}"
    clock = f"between {found[0]} and {found[1]}" if found else outside
    ax.axhline(1, color=INK, lw=1.4, ls="--")
    for text, y, va in (("expanded is cheaper", 1.12, "bottom"),
                        ("absorbed is cheaper", 0.88, "top")):
        ax.annotate(text, (new_tokens[0], y), va=va)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: tokens_label(n)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    ax.minorticks_off()
    ax.set(xlabel="new tokens T", ylabel="cost of absorbed / cost of expanded",
           title=f"Break-even: {limit:.0f} new tokens by FLOPs, {clock} by the clock")
    ax.grid(True)
    ax.legend(loc="lower right")
    return figure


@styled
def absorption_regions(cached_and_new: Sequence[int], limit: Sequence[float]) -> Figure:
    """Which form multiplies less, for every number S of tokens attended to and T of new ones.

    limit: for each S, the largest T at which absorbed is cheaper.
    """
    S, T = np.asarray(cached_and_new, float), np.asarray(limit, float)
    if S.shape != T.shape or len(S) < 2 or (T < 1).any() or (T > S).any():
        raise ValueError("limit: expected a number from 1 to S for each S, two of them at least")
    figure = Picture(7.6, 4.2)
    ax = figure.subplots()
    ax.fill_between(S, 1, T, color=FORMS["absorbed"], alpha=0.25, lw=0)
    ax.fill_between(S, T, S, color=FORMS["expanded"], alpha=0.25, lw=0)
    ax.plot(S, T, color=INK)
    ax.plot(S, S, color=FORMS["expanded"])
    ax.plot(S, np.ones_like(S), color=FORMS["absorbed"], lw=4)
    middle = len(S) * 2 // 3
    for text, x, y in (("absorbed is cheaper", S[middle], T[middle] ** 0.5),
                       ("expanded is cheaper", S[middle], (T[middle] * S[middle]) ** 0.5)):
        ax.annotate(text, (x, y), ha="center", va="center", fontweight="bold")
    ax.annotate("reading a prompt at once: T = S ", (S[middle], S[middle]), ha="right",
                va="bottom")
    ax.annotate("decoding: T = 1", (S[0], 1), (8, 6), textcoords="offset points", va="bottom")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda n, _: tokens_label(n)))
        axis.set_minor_locator(NullLocator())
    ax.set(xlim=(S[0], S[-1]), ylim=(0.8, S[-1]), xlabel="tokens attended to, S",
           ylabel="new tokens, T",
           title=f"At {tokens_label(S[-1])} tokens absorbed pays for up to {T[-1]:.0f} new ones")
    return figure

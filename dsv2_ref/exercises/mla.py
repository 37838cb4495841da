# SPDX-License-Identifier: MIT
"""Exercises of 02_mla."""

import torch
from torch import Tensor

from dsv2_ref.attention.rope import rope_tables
from dsv2_ref.config import V2
from dsv2_ref.exercises import Exercises, Function, Value


def cached_rows(
    h: Tensor, W_DKV: Tensor, gain: Tensor, W_KR: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Equations (41) and (43), number by number: h (T, d) -> (T, d_c + d_r)."""
    rows = []
    for t in range(len(h)):
        c = [sum(w * x for w, x in zip(line, h[t].tolist(), strict=True))
             for line in W_DKV.tolist()]
        size = (sum(n * n for n in c) / len(c) + 1e-6) ** 0.5
        row = [n / size * g for n, g in zip(c, gain.tolist(), strict=True)]
        k = [sum(w * x for w, x in zip(line, h[t].tolist(), strict=True)) for line in W_KR.tolist()]
        for i, (co, si) in enumerate(zip(cos[t].tolist(), sin[t].tolist(), strict=True)):
            a, b = k[2 * i], k[2 * i + 1]
            row += [a * co - b * si, a * si + b * co]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def cases() -> list[tuple[Tensor, ...]]:
    """The last is so small that the norm's epsilon counts."""
    g = torch.Generator().manual_seed(5)
    found, speeds = [], torch.tensor([0.7, 0.1, 0.02]).double()
    for T, d, d_c, pairs, size in ((1, 3, 2, 1, 1.0), (4, 5, 3, 2, 1.0), (2, 4, 6, 3, 1e-3)):
        tables = rope_tables(torch.arange(3, 3 + T), speeds[:pairs])
        h, *weights = (torch.randn(shape, generator=g, dtype=torch.float64)
                       for shape in ((T, d), (d_c, d), (d_c,), (2 * pairs, d)))
        found.append((size * h, *weights, *tables))
    return found


exercises = Exercises({
    1: Value(["c_kv", "k_r"], "Solid blue in the picture of section 2.",
             known=[(["k_r", "c_kv"], "the right names; asked in alphabetical order"),
                    (["k_c", "v_c"], "these can be made again from something smaller"),
                    (["k_c", "k_r", "v_c"], "two of them can be made again from something smaller"),
                    (["c_kv"], "and where does the position come from?"),
                    (["c_kv", "c_q", "k_r"], "which later token needs an older one's query?")]),
    2: Value([2.0, 1.0], "Per token and layer MHA keeps 2 * n_h * d_h numbers and MLA d_c + d_r. "
             "Where does the number of heads occur?",
             known=[([1.0, 2.0], "first MHA, then MLA"),
                    ([4.0, 1.0], "a head has one key and one value, before and after")]),
    3: Value(V2.d_c, "Section 1: the size in the middle of the product bounds the rank.",
             known=[(V2.d_c + V2.d_r, "the RoPE key is kept, but this matrix is not made from it"),
                    (1000, "so many rows; what is each of them made from?"),
                    (V2.n_h * (V2.d_h + V2.d_v), "so many columns; what are they made from?")]),
    4: Function(cached_rows, cases, "First the latent: down, divided by the root of (mean square "
                "+ 1e-6), times the gain. Then the RoPE key: made from h itself and turned."),
})

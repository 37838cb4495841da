# SPDX-License-Identifier: MIT
"""The paper's symbols, as the course uses them, on one page: notebooks/GLOSSARY.md.

`python tests/glossary.py` writes it (`make glossary`); a test says whether it is as it should be.
What a symbol means stands here. Its sizes are worked out from the presets, the notebook is the
first whose formulas have the symbol, and the file is the first that defines its name.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from readme_map import ROOT, concepts

from dsv2_ref.attention.rope import yarn_mscale
from dsv2_ref.config import PRESETS
from dsv2_ref.training.recipe import PAPER

PAGE = ROOT / "notebooks" / "GLOSSARY.md"
HEAD = """# Symbols

The paper's symbols, as the course uses them. Where no *size* stands, the symbol is one number, and
the columns V2 and Lite have its value. Else they have its size: how many numbers it has, for one
token or one sequence, or the rows × columns of a matrix. *From*: the notebook that introduces it.
*File*: where in `dsv2_ref/` it is made. In the symbols *t* and *j* count tokens, *i* counts heads,
experts or devices; *C* above is for *compressed* (made from a latent), *R* for RoPE, *D* and *U*
for *down* (to a latent) and *up* (from it). `make glossary` makes this page from `config.py`, the
notebooks and the files.
"""
TAIL = """
In the code a comment at the right margin says what the dimensions are: B sequences, T new tokens, S
old and new tokens, N = B·T tokens, E experts, K experts per token, R rows that a device gets.
"""
ANY = r"(?:_\w(?:,\w)?)?"          # a subscript such as t, or t,i, or none


class Symbol(NamedTuple):
    """A row: the symbol in LaTeX, its name in the code, the meaning, and how it is found."""

    latex: str
    name: str
    meaning: str
    size: str = ""           # factors in the code's names, "n_h·d_h × d_c"; "": one number
    spelt: str = ""          # regular expression, where notebooks write more than `latex`
    since: str = "01"        # notebook from which on it has this meaning
    defined: str = ""        # regular expression, where the name alone does not find the line
    under: str = ""          # folder or file


GROUPS = {
    "Sizes": [
        Symbol("d", "d", "width of the stream: numbers that each token has between layers"),
        Symbol("l", "n_layers", "layers (blocks)"),
        Symbol("n_h", "n_h", "heads of attention"),
        Symbol("n_g", "n_kv", "keys and values that GQA keeps, one for each group of heads",
               under="attention/mha.py", defined=r"\bn_kv: int"),
        Symbol("d_h", "d_h", "numbers of a head's query or key, without the position part"),
        Symbol("d_h^R", "d_r", "numbers of the position part (RoPE) of a query or key", since="02"),
        Symbol("d_v", "d_v", "numbers of a head's value (the paper has $d_h$ for it)"),
        Symbol("d_c", "d_c", "numbers of the latent of keys and values", since="02"),
        Symbol("d_c'", "d_cq", "numbers of the latent of queries; Lite has none"),
    ],
    "Attention": [
        Symbol("h_t", "h", "what attention reads: token t's stream after its norm", "d",
               under="attention/mha.py", defined=r"\bh: Tensor"),
        Symbol("c_t^{KV}", "c_kv", "latent of keys and values: cached, all heads' keys and values "
               "are made from it", "d_c", spelt=rf"c{ANY}\^KV{ANY}", under="attention/mla.py"),
        Symbol("k_t^R", "k_r", "shared RoPE key: cached, one for all heads, has the position",
               "d_r", spelt=rf"k{ANY}\^R{ANY}", under="attention/mla.py"),
        Symbol("c_t^Q", "c_q", "latent of queries", "d_cq", spelt=rf"c{ANY}\^Q{ANY}",
               under="attention/mla.py"),
        Symbol("q_{t,i}^C", "q_c", "part of head i's query that meets $k^C$", "d_h",
               spelt=rf"q{ANY}\^C{ANY}", under="attention/mla.py"),
        Symbol("q_{t,i}^R", "q_r", "part of head i's query that meets $k^R$", "d_r",
               spelt=rf"q{ANY}\^R{ANY}", under="attention/mla.py"),
        Symbol("k_{t,i}^C", "k_c", "head i's key, made from the latent", "d_h",
               spelt=rf"k{ANY}\^C{ANY}", under="attention/mla.py"),
        Symbol("v_{t,i}^C", "v_c", "head i's value, made from the latent", "d_v",
               spelt=rf"v{ANY}\^C{ANY}", under="attention/mla.py"),
        Symbol("q_{t,i}", "q", "head i's whole query $[q^C; q^R]$; a key alike", "(d_h+d_r)",
               since="02", spelt=r"q_t,i", under="attention/mla.py"),
        Symbol("o_{t,i}", "o", "what head i found: values, weighted by the softmax", "d_v",
               spelt=r"o_t,i", under="attention/mla.py"),
        Symbol("u_t", "u", "what attention adds to the stream; in (20) the stream after that", "d",
               under="attention/mha.py"),
        Symbol("W^{DKV}", "W_DKV", "makes the latent of keys and values", "d_c × d"),
        Symbol("W^{UK}", "W_UK", "makes all heads' keys from it", "n_h·d_h × d_c"),
        Symbol("W^{UV}", "W_UV", "makes all heads' values from it", "n_h·d_v × d_c"),
        Symbol("W^{KR}", "W_KR", "makes the RoPE key, before it is turned", "d_r × d"),
        Symbol("W^{DQ}", "W_DQ", "makes the latent of queries", "d_cq × d"),
        Symbol("W^{UQ}", "W_UQ", "makes the queries' first parts (Lite: of $h_t$ itself)",
               "n_h·d_h × (d_cq or d)"),
        Symbol("W^{QR}", "W_QR", "makes the queries' RoPE parts (Lite: of $h_t$ itself)",
               "n_h·d_r × (d_cq or d)"),
        Symbol("W^O", "W_O", "brings all heads' outputs back to the stream", "d × n_h·d_v",
               under="attention/mla.py"),
    ],
    "Experts": [
        Symbol("N_s", "n_shared", "shared experts, which see every token"),
        Symbol("N_r", "n_routed", "routed experts"),
        Symbol("K_r", "top_k", "routed experts per token"),
        Symbol("e_i", "centroids", "centroid of expert i, which a token is compared with", "d",
               defined=r"\bcentroids: Tensor"),
        Symbol("s_{i,t}", "s", "affinity of token t to expert i: softmax over all experts",
               "n_routed", since="06", spelt=r"s_i(,t)?", under="moe/routing.py"),
        Symbol("g_{i,t}", "g", "gate: the affinity of a picked expert, else 0. (The published code "
               "multiplies it by `routed_scaling_factor`.)", "top_k", since="06",
               spelt=r"g_[ik](,t)?", under="moe/routing.py"),
        Symbol("h'_t", "u + shared + routed", "what the layer hands on: the stream with "
               "all experts' parts", "d", since="09", under="moe/experts.py", defined=r"\(20\)"),
        Symbol("D", "n_devices", "devices on which the experts lie, in equal groups", since="07"),
        Symbol("M", "max_devices", "devices that a token may reach; Lite: no limit", since="07"),
        Symbol(r"\mathcal E_i", "groups", "experts of device i", "n_routed//n_devices",
               since="08", spelt=r"E_\w", under="moe/routing.py"),
        Symbol(r"\alpha_1", "alpha_expert", "weight of the expert balance loss"),
        Symbol(r"\alpha_2", "alpha_device", "weight of the device balance loss"),
        Symbol(r"\alpha_3", "alpha_comm", "weight of the communication balance loss"),
        Symbol("T", "T", "tokens of a sequence, in the balance losses", since="08",
               under="moe/balance.py"),
        Symbol("f_i", "f", "slots that expert i got, over an equal share", "n_routed",
               under="moe/balance.py"),
        Symbol("P_i", "P", "mean affinity of all tokens to expert i", "n_routed",
               under="moe/balance.py"),
        Symbol("f'_i", "f_dev", "mean of $f$ over the experts of device i", "n_devices",
               spelt=r"f'(_\w)?", under="moe/balance.py"),
        Symbol("P'_i", "P_dev", "sum of $P$ over the experts of device i; the paper's $P''_i$ "
               "is the same", "n_devices", spelt=r"P'(_\w)?", under="moe/balance.py"),
        Symbol("f''_i", "f_comm", "tokens sent to device i, over an equal share", "n_devices",
               spelt=r"f''(_\w)?", under="moe/balance.py"),
        Symbol("C", "drop_capacity", "capacity factor: a device's budget over the average load; "
               "Lite: nothing is dropped", since="09"),
    ],
    "Positions": [
        Symbol(r"\theta", "rope_theta", "base of RoPE's speeds"),
        Symbol(r"\omega_i", "rope_frequencies", "speed of pair i: radians per position", "d_r//2",
               spelt=r"\\omega(_\w)?"),
        Symbol("s", "yarn_factor", "by how much YaRN stretches", since="03", spelt=r"\\ln s"),
        Symbol(r"\beta", "yarn_beta_fast", "YaRN keeps pairs with more turns over the trained "
               "length", since="03"),
        Symbol(r"\alpha", "yarn_beta_slow", "YaRN stretches pairs with fewer turns in full",
               since="03"),
        Symbol("x", "yarn_mscale_all_dim", "`mscale` of the published configuration, in $m(s, x)$",
               since="03", spelt=r"m\(s, x\)"),
        Symbol("m(s, x)", "yarn_mscale", "YaRN's factor on queries and on keys, "
               r"$0.1\,x\,\ln s + 1$: the paper's $\sqrt t$", since="03",
               under="attention/rope.py"),
    ],
}
SYMBOLS = [symbol for group in GROUPS.values() for symbol in group]


def plain(latex: str) -> str:
    """A formula without braces and spacing commands: `c^{KV}_t h` -> `c^KV_t h`."""
    latex = re.sub(r"\\(?:mathcal|mathrm|text)\s*|\\[,;:!]", " ", latex)
    return re.sub(r" +", " ", re.sub(r"\}(?![_^'])", " ", latex.replace("{", "")).replace("}", ""))


@cache
def formulas(notebook: Path) -> list[str]:
    """All formulas in the text of a notebook, plain."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return [plain(a or b) for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$]+?)\$", text, re.S)]


def occurs(symbol: Symbol, notebook: Path) -> bool:
    """Whether a notebook's formulas have the symbol, not as a part of another one."""
    spelt = symbol.spelt or re.escape(plain(symbol.latex).strip())
    alone = re.compile(rf"(?<![A-Za-z\\^])(?:{spelt})(?![A-Za-z_^'])")
    return any(alone.search(formula) for formula in formulas(notebook))


def notebook_of(symbol: Symbol) -> Path:
    """The first notebook after the tour, from `since` on, that has it; ValueError if none has."""
    for file in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        if file.name[:2] >= symbol.since and occurs(symbol, file):
            return file
    raise ValueError(f"{symbol.latex}: in no notebook from {symbol.since} on")


def defines(symbol: Symbol, text: str) -> bool:
    """Whether a file gives the name a value, or has a function or field of that name."""
    name = re.escape(symbol.name)
    return re.search(symbol.defined or rf"^\s*(?:[\w.]+, )*(?:self\.)?{name}(?:, [\w.]+)* =|"
                     rf"^    {name}: |^def {name}\(", text, re.M) is not None


def file_of(symbol: Symbol) -> str:
    """The first file that defines it, config.py before the concepts; ValueError if none does."""
    for file in ["config.py", *(concept.file for concept in concepts())]:
        if file.startswith(symbol.under) and defines(
                symbol, (ROOT / "dsv2_ref" / file).read_text(encoding="utf-8")):
            return file
    raise ValueError(f"{symbol.name}: no file defines it")


def value(symbol: Symbol, name: str) -> str:
    """The symbol's size in numbers, or its value, for the preset `name`."""
    config = PRESETS[name]
    fields = vars(config) | {
        "n_kv": None, "T": PAPER[name].sequence,
        "yarn_mscale": round(yarn_mscale(config.yarn_factor, config.yarn_mscale_all_dim), 4),
    }
    if config.n_devices == 1:                  # no groups, no limit: the losses over them are off
        fields |= dict.fromkeys(("n_devices", "max_devices", "alpha_device", "alpha_comm"))
    try:
        factors = [eval(factor.replace("·", "*"), {}, fields)
                   for factor in (symbol.size or symbol.name).split(" × ")]
    except TypeError:                          # made of a size that this model has not
        factors = [None]
    return "none" if None in factors else " × ".join(
        f"{int(n) if n == int(n) else n:,}" for n in factors)


def page() -> str:
    """The page in Markdown."""
    lines = [HEAD]
    for title, group in GROUPS.items():
        lines += [f"| {title} | code | what | size | V2 | Lite | from | file |", "|---" * 8 + "|"]
        for s in group:
            book, file = notebook_of(s), file_of(s)
            size = f"`{s.size}`" if s.size else ""
            v2, lite = value(s, "v2"), value(s, "lite")
            lines.append(
                f"| ${s.latex}$ | `{s.name}` | {s.meaning} | {size} | {v2} | {lite} | "
                f"[{book.stem[:2]}]({book.name}) | [{file}](../dsv2_ref/{file}) |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

import json,sys
cells=[]
def md(s): cells.append(("markdown",s.strip("\n"),{}))
def code(s,*tags,hidden=False):
    m={}
    if tags: m["tags"]=list(tags)
    if hidden: m["jupyter"]={"source_hidden":True}
    cells.append(("code",s.strip("\n"),m))

md(r"""
# 18 · YaRN and needles

**What you will see.** A model that was trained on short texts is asked to find one sentence, a *needle*, in a long one. As it is, it finds nothing. Then the same weights, with other speeds for the positions (*YaRN*): it finds every needle in a text eight times as long as any it was trained on. You will see which speeds change and why only those; the temperature that comes with them; three mistakes and where each becomes visible; the same test through a cache of six bits; where attention looks when it finds the needle; and what 128K tokens cost.

**How long.** Half a minute on one CPU core. Nothing is downloaded and nothing is trained: the model is `data/needle`, 0.9M parameters, trained at 128 tokens. [03_rope.ipynb](03_rope.ipynb) and [05_cache.ipynb](05_cache.ipynb) come first.

**What is tested.** Every number worked out by hand is compared with `dsv2_ref/attention/rope.py`, `stretch.py` and `inference/needle.py`, by `assert`. What the trained model finds is asserted too, with bounds.
""")
code(r"""
import json
import math
import platform
from dataclasses import replace
from pathlib import Path

import torch

import dsv2_ref
from dsv2_ref import checkpoint, figures

torch.set_num_threads(1)                    # the same sums everywhere, and enough for this size
print("Python", platform.python_version(), "| torch", torch.__version__,
      "| dsv2_ref", dsv2_ref.__version__)
""","nbval-ignore-output")
md(r"""
## 1. How long is one turn?

RoPE turns pair $i$ by $\omega_i = \theta^{-2i/d_h^R}$ radians per token (notebook 03). So one whole turn takes

$$ \lambda_i = \frac{2\pi}{\omega_i} \text{ tokens,} $$

the pair's *wavelength*. **The claim:** our model has $d_h^R = 32$, so 16 pairs, and was trained on texts of 128 tokens. Pair 0 turns once in 6.3 tokens. But ten pairs never finish a turn inside 128 tokens: in a longer text they show angles that the model has never seen.
""")
code(r"""
from dsv2_ref.attention.rope import rope_frequencies, yarn_frequencies

TRAINED, S = 128, 8
omega = [10_000 ** (-2 * i / 32) for i in range(16)]
wavelength = [2 * math.pi / w for w in omega]
print("tokens for one turn:", " ".join(f"{n:.0f}" for n in wavelength))
assert torch.allclose(rope_frequencies(32), torch.tensor(omega).double(), atol=1e-12)
assert sum(n > TRAINED for n in wavelength) == 10
figures.pair_wavelengths(rope_frequencies(32),
                         yarn_frequencies(32, 1e4, S, 32, 1, TRAINED), TRAINED, S)
""")
md(r"""
## 2. Which pairs are kept, and which are slowed down

A pair that turns often tells near tokens apart, and it has shown every angle many times: leave it as it is. A pair that never turned whole must not show new angles: divide its speed by $s$, so that at position $s\cdot128$ it stands where it stood at 128. Those between are mixed. YaRN counts turns in the trained length: the pair that makes $n$ of them has the number

$$ i(n) = \frac{d_h^R \,\ln\frac{128}{2\pi n}}{2\ln\theta}. $$

The ramp begins at the floor of $i(32)$ and ends at the ceiling of $i(1)$, both kept inside 0 to $d_h^R - 1$. (32 and 1 are the paper's $\beta$ and $\alpha$.)
""")
code(r"""
from dsv2_ref.attention.rope import yarn_ramp


def pair_that_makes(turns, length):
    return 32 * math.log(length / (2 * math.pi * turns)) / (2 * math.log(10_000))


low, high = math.floor(pair_that_makes(32, TRAINED)), math.ceil(pair_that_makes(1, TRAINED))
low, high = max(low, 0), min(high, 31)
share = [min(max((i - low) / (high - low), 0), 1) for i in range(16)]
print(f"ramp from pair {low} to pair {high}")
print("share of interpolation:", [round(x, 2) for x in share])
assert torch.allclose(yarn_ramp(32, 1e4, 32, 1, TRAINED), torch.tensor(share).double())
assert (low, high) == (0, 6) and share[6:] == [1] * 10
""")
md(r"""
Only pair 0 is kept: 128 tokens are few, no pair turns 32 times in them. Five pairs are mixed, ten are divided by 8. For V2, trained at 4096 and stretched by 40, there are 32 pairs:
""")
code(r"""
ramp = yarn_ramp(64, 1e4, 32, 1, 4096)
kept, divided = int((ramp == 0).sum()), int((ramp == 1).sum())
print(f"V2: {kept} kept, {32 - kept - divided} mixed, {divided} divided by 40")
assert (kept, divided) == (11, 9)
""")
md(r"""
## 3. Why only $k^R$ and $q^R$ are touched

A score of MLA is a sum of two products: content with content, which knows no position, and $q^R\cdot k^R$, which knows nothing else. **The claim:** under YaRN the queries and the latents of the content stay the same numbers, bit for bit; only the turned parts differ. In the cache, $d_c$ of the $d_c + d_h^R$ numbers of a row do not change.
""")
code(r"""
from dsv2_ref.attention.rope import rope_tables
from dsv2_ref.stretch import stretched
from dsv2_ref.text.tokenizer import load_tokenizer

yarn = checkpoint.load("../data/needle", torch.float32)          # its config says s = 8
tokenizer = load_tokenizer("../data/needle/tokenizer.json")
attention, positions = yarn.blocks[0].attention, torch.arange(1024)
h = torch.randn(1, 1024, 128, generator=torch.Generator().manual_seed(0))
tables = [rope_tables(positions, f) for f in (rope_frequencies(32),
                                              yarn_frequencies(32, 1e4, S, 32, 1, TRAINED))]
with torch.no_grad():
    (q_c, q_r), (q_c8, q_r8) = (attention.queries(h, *t) for t in tables)
    (c_kv, k_r), (c_kv8, k_r8) = (attention.latents(h, *t) for t in tables)
print("the same bits: q_c", torch.equal(q_c, q_c8), "| c_kv", torch.equal(c_kv, c_kv8),
      "| q_r", torch.equal(q_r, q_r8), "| k_r", torch.equal(k_r, k_r8))
assert torch.equal(q_c, q_c8) and torch.equal(c_kv, c_kv8)
assert not torch.equal(q_r, q_r8) and not torch.equal(k_r, k_r8)
""")
md(r"""
## 4. The temperature

In a text that is eight times as long, eight times as many keys share the softmax. **The claim:** take one key with score 8 and all others with 0. Among 128 keys the one gets 96 % of the attention, among 1024 only 74 %. YaRN multiplies all scores by $m^2$ with $m = 0.0707\ln s + 1$ (the paper's $\sqrt t$, from `mscale_all_dim` = 0.707): for $s = 8$ by 1.32, and the one gets 97 %.
""")
code(r"""
from dsv2_ref.attention.rope import softmax_scale, yarn_mscale


def share_of_one(score, keys):
    return math.exp(score) / (math.exp(score) + keys - 1)


m = 0.0707 * math.log(S) + 1
shares = [share_of_one(8, 128), share_of_one(8, 1024), share_of_one(8 * m * m, 1024)]
print(f"m² = {m * m:.3f};", "shares:", [round(x, 2) for x in shares])
assert [round(x, 2) for x in shares] == [0.96, 0.74, 0.97]
assert math.isclose(m, yarn_mscale(8, 0.707)) and math.isclose(
    softmax_scale(64, 8, 0.707), m * m / 64**0.5)
assert all(block.attention.scale == softmax_scale(64, 8, 0.707) for block in yarn.blocks)
""")
md(r"""
## 5. A needle in a haystack

The haystack is made of `stories`; no word of a needle occurs in them. A needle names four words, and the question gives the name. All is hidden in tokens, at a *depth* from 0 % (the beginning) to 100 % (just before the question).
""")
code(r"""
import random

from dsv2_ref.text.corpora import open_corpus
from dsv2_ref.text.needles import Needles, haystack

text = haystack(open_corpus("stories").test, tokenizer, 1024)    # 1024 ids
task = Needles(tokenizer).task("one", random.Random(0))
print("needle:  ", tokenizer.decode(task.needles[0]).strip())
print("question:", tokenizer.decode(task.question).strip())
print("answer:  ", tokenizer.decode(task.answer).strip())
assert task.answer == task.needles[0][-5:-1]                     # the four words before the stop
""")
md(r"""
**The score.** *Exact* means that greedy generation writes all four words. The whole grid needs one pass per sample: with the right answer fed, greedy generation would write it just where each of its tokens is the most likely one. Here is one cell by hand, with `generate`, and the same cell from the module.
""")
code(r"""
from dsv2_ref.inference.generate import generate
from dsv2_ref.inference.needle import Grid, plans, run

cell = Grid(lengths=(1024,), depths=(40,), samples=2)
(plan,) = plans(cell, tokenizer, 1024)
found = []
for rest, one in zip(plan.rest(text), plan.tasks):
    prompt = [*text[: plan.at], *rest][: 1024 - 3]               # all but the answer
    found.append(generate(yarn, [prompt], 4, stop=())[0] == list(one.answer))
result = run(yarn, tokenizer, text, cell)
print("needle before token", plan.at, "| found:", found, "| the grid says", result["grid"])
assert result["grid"] == [[sum(found) / 2]]
""")
md(r"""
## 6. The grid, before and after

The paper's Figure 4 in small: lengths from left to right, depths from top to bottom. On the left the weights as they were trained, with plain RoPE. On the right the same weights with YaRN, $s = 8$; nothing was trained in between.
""")
code(r"""
grid = Grid(lengths=(128, 256, 512, 1024), depths=(0, 20, 40, 60, 80, 100), samples=4)
grids = {"plain RoPE": run(stretched(yarn, 1), tokenizer, text, grid),
         "YaRN, s = 8": run(yarn, tokenizer, text, grid)}


def at_8x(result):
    return sum(result["grid"][-1]) / 6


assert at_8x(grids["plain RoPE"]) <= 0.4 and at_8x(grids["YaRN, s = 8"]) >= 0.95
figures.needle_grids(grids)
""")
md(r"""
Plain RoPE still works a little beyond 128 tokens and then finds nothing at all, at any depth. It is not that far needles are lost and near ones found: new angles disturb the whole last layer. With YaRN the model finds all.

How sure is that? Three models, each trained from other random numbers, 96 needles for each length (a dated record; the command is in data/README.md). *Tuned* are 50 more steps at 1024 tokens.
""")
code(r"""
record = json.loads(sorted(Path("../data/results").glob("needle-2*.json"))[-1].read_text())
print("seeds", *(r["seed"] for r in record["runs"]), "| tokens", *record["summary"]["yarn"])
for name in ("plain", "yarn", "tuned", "yarn 16", "six_bit"):
    row = record["summary"][name].values()
    print(f"{name:8}", "  ".join(f"{v['mean']:.2f} ± {v['interval']:.2f}" for v in row))
eight = {name: of["1024"] for name, of in record["summary"].items()}
assert eight["yarn"]["least"] >= 0.95 and eight["tuned"]["least"] >= 0.95
assert eight["plain"]["most"] <= 0.4
assert eight["six_bit"]["mean"] >= eight["yarn"]["mean"] - 0.01
""")
md(r"""
## 7. Three mistakes

- **Layout.** The weights pair neighbours, $(2i, 2i+1)$; the code turns $(i, i + d_h^R/2)$.
- **No mscale.** The frequencies are stretched, but the softmax scale lacks $m^2$.
- **Index ramp.** The ramp runs over all pairs by their number, 0 to 15, not by their wavelength.

Each runs without an error. `misread` makes them from the right model, by reordering weights or by the config. First at eight times the trained length:
""")
code(r"""
from dsv2_ref.bench.needle import MISTAKES, misread

column = Grid(lengths=(1024,), depths=grid.depths, samples=2)
found = {name: run(misread(yarn, name), tokenizer, text, column)["mean"] for name in MISTAKES}
for name, share in found.items():
    print(f"{name:11}", "falls" if share <= 0.7 else "does not show at this length")
assert found["layout"] <= 0.1 and found["index ramp"] <= 0.7 and found["no mscale"] > 0.7
""")
md(r"""
And from which length and $s$ does each become visible? In the record, every model is read at $s$ times 128 tokens with this $s$:
""")
code(r"""
by_factor = [r["by_factor"] for r in record["runs"]]
mean = {s: {name: sum(of[s][name] for of in by_factor) / len(by_factor) for name in by_factor[0][s]}
        for s in by_factor[0]}
for name in MISTAKES:
    seen = [round(float(s)) for s in mean if mean[s][name] < mean[s]["yarn"] - 0.05]
    print(f"{name:11} costs more than 5 points at s =", ", ".join(map(str, seen)))
assert mean["1.001"]["yarn"] >= 0.95 and mean["8"]["layout"] <= 0.1
figures.mistakes_by_factor(by_factor, TRAINED)
""")
md(r"""@@MISTAKES@@""")
md(r"""
## 8. Through six bits

The same grid, through the cache of notebook 11: 6 bits for each cached number. A quantised row is a little off; does the model still find the word?
""")
code(r"""
six = run(yarn, tokenizer, text, replace(grid, cache="six_bit"))
per_token = [yarn.new_cache(1, 1, kind).nbytes_per_token for kind in ("latent", "six_bit")]
print("bytes per token: fp32", per_token[0], "| six bits", per_token[1])
print("needles at 1024 tokens: the same within one point",
      abs(at_8x(six) - at_8x(grids["YaRN, s = 8"])) <= 0.01)
assert abs(at_8x(six) - at_8x(grids["YaRN, s = 8"])) <= 0.01
""")
md(r"""
## 9. Where attention looks

At the last token of the question the model has to say the first of the four words. Which head looks at it? We let the model run with an `attend` of our own, that also keeps the softmax weights, at 1024 tokens.
""")
code(r"""
from dsv2_ref.attention.mla import attend_expanded

kept = []


def watching(q_c, q_r, c_kv, k_r, W_UK, W_UV, scale, positions=None):
    q_latent = torch.einsum("hd,hdc->hc", q_c[0, -1], W_UK)      # of the last token
    scores = scale * (q_latent @ c_kv[0].T + q_r[0, -1] @ k_r[0].T)
    kept.append(scores.softmax(-1))                              # (n_h, S)
    return attend_expanded(q_c, q_r, c_kv, k_r, W_UK, W_UV, scale, positions)


ids = torch.tensor([[*text[: plan.at], *plan.rest(text)[0]][: 1024 - 3]])
with torch.no_grad():
    pass_ = yarn.start(ids.shape)
    h, _, _ = yarn.through(yarn.embed(ids), replace(
        pass_, forms=replace(pass_.forms, attend=watching)))
    logits = yarn.head(yarn.finish(h))[0, -1]
weights = torch.stack(kept)                                      # (layers, heads, S)
place = range(plan.at, plan.at + len(plan.tasks[0].needles[0]))
words = [tokenizer.decode([i]).strip() or "line end" for i in plan.tasks[0].needles[0]]
on_needle = weights[:, :, place.start : place.stop].sum(-1)
assert logits.argmax() == plan.tasks[0].answer[0] and on_needle.max() > 0.5
figures.needle_attention(weights, place, words)
""")
md(r"""@@ATTENTION@@""")
md(r"""
## 10. Long texts, in pieces

A text is read 1024 tokens at a time, each piece against the cached rows of all before it, so nothing but the cache grows with the length. And the cells of a grid share their beginning: all needles hide in one text. The module reads it once, stops at each needle's place, and goes on there with a `fork` of the cache for each needle. **The claim:** for one length $L$ with needles at $a_1 \le a_2 \le \dots$ it reads $\max a + \sum_j (L - a_j)$ tokens and not $n L$.
""")
code(r"""
from dsv2_ref.inference.needle import cells

few = plans(Grid(lengths=(512,), depths=(0, 50, 100), samples=1), tokenizer, 512)
alone = [next(cells(yarn, text, [plan])) for plan in few]        # each from its beginning
together = list(cells(yarn, text, few))
at = [plan.at for plan in few]
print("needles at", at, "| tokens read: alone", 3 * 512,
      "| together", max(at) + sum(512 - a for a in at))
assert alone == together
""")
md(r"""
Reading costs a square all the same: every piece meets all rows before it. This is the small model reading 131,072 tokens on one CPU core (a dated record). Grey is what the multiplications of the passes say, scaled to the last point.
""")
code(r"""
costs = json.loads(sorted(Path("../data/results").glob("long_context-2*.json"))[-1].read_text())
points = costs["points"]
last, quarter = points[-1], points[-3]
print(f"{last['tokens']:,} tokens:", last["cache_bytes"] // 2**20, "MiB of cache,",
      costs["cache_bytes_per_token"], "bytes per token")
assert all(p["cache_bytes"] == p["tokens"] * costs["cache_bytes_per_token"] for p in points)
assert last["tokens"] == 131_072 and last["decode_ms"] > 2 * quarter["decode_ms"]
figures.length_costs(points)
""")
md(r"""@@COSTS@@

**The paper's Figure 4**: DeepSeek-V2 itself, trained at 4K, stretched by 40, trained for 1000 more steps at 32K, answers 140 of 144 cells from 1K to 128K fully. The four others: three at 35K, one at 104K. Ours is a 0.9M model at 1K. The grid to 128K with a model trained at 4K waits for a GPU: GPU numbers pending.
""")
md(r"""
## 11. Predict, then run

Replace each `...` by your answer and run the cell. An answer that is left as `...` is only reported; a wrong one raises and says what to look at.

**1.** V2 has $d_h^R = 64$ and was trained at 4096 tokens. How many of its 32 pairs have a wavelength above 4096?
""")
code(r"""
from dsv2_ref.exercises import check, check_function, check_refuses


def check_pairs(answer):
    check("1", answer, int((2 * math.pi / rope_frequencies(64) > 4096).sum()),
          "2π·θ^(2i/64) > 4096 for which i?")


def check_factor(answer):
    check("2", answer, yarn_mscale(16, 0.707) ** 2, "m = 0.0707·ln s + 1, and it is squared.",
          tolerance=1e-3)


def tokens_by_the_book(length, places):
    return max(places) + sum(length - place for place in places)


def check_tokens(answer):
    check_function("3", answer, tokens_by_the_book,
                   [(100, [10]), (100, [90, 10]), (512, [1, 256, 500]), (7, [7, 7])],
                   "The shared text once, up to the last place; then each needle's own rest.")
""", hidden=True)
code(r"""
pairs_above = ...
check_pairs(pairs_above)
""")
md(r"""
**2.** By what is the softmax scale multiplied for $s = 16$ (mscale_all_dim 0.707)?
""")
code(r"""
scale_factor = ...
check_factor(scale_factor)
""")
md(r"""
**3.** One length, needles at `places` (a list, in any order). How many tokens are read when the beginning is shared?
""")
code(r"""
def tokens_read(length, places):
    return ...


check_tokens(tokens_read)
""")
md(r"""
<details><summary>Solutions</summary>

1. 9: pairs 23 to 31.
2. `(0.0707 * math.log(16) + 1) ** 2` ≈ 1.4305.
3. ```python
   def tokens_read(length, places):
       return max(places) + sum(length - place for place in places)
   ```

</details>

**Where to go on.** The code is `dsv2_ref/inference/needle.py` and `dsv2_ref/stretch.py`; `dsv2_ref/training/long_context.py` trains such models (`train --preset needle`). On the command line: `python -m dsv2_ref needle data/needle --lengths 128 1024`, and with `--factor 1` the same with plain RoPE.
""")
code(r"""
def solved_tokens(length, places):
    return max(places) + sum(length - place for place in places)


for answer, check_one in ((9, check_pairs), ((0.0707 * math.log(16) + 1) ** 2, check_factor),
                          (solved_tokens, check_tokens)):
    check_one(answer)                 # the solutions above, tested, and wrong ones refused
check_refuses(check_pairs, [8, 10, 23, 32])
check_refuses(check_factor, [0.0707 * math.log(16) + 1, 1.0, 1.3156])
check_refuses(check_tokens, [lambda L, p: len(p) * L, lambda L, p: sum(L - x for x in p),
                             lambda L, p: min(p) + sum(L - x for x in p)])
""", hidden=True)
import nbformat
subst=json.load(open("build/subst.json"))
nb=nbformat.v4.new_notebook()
nb.metadata=json.load(open("notebooks/03_rope.ipynb"))["metadata"]; nb.metadata.pop("widgets",None)
for i,(k,s,m) in enumerate(cells):
    for a,b in subst.items(): s=s.replace(a,b)
    c=nbformat.v4.new_markdown_cell(s) if k=="markdown" else nbformat.v4.new_code_cell(s)
    c.metadata.update(m); c.id=f"yarn-{i:02d}"; nb.cells.append(c)
print(len(nb.cells), sum(k=="code" for k,_,_ in cells))
nbformat.write(nb,"notebooks/18_yarn_and_needles.ipynb")

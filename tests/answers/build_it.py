# SPDX-License-Identifier: MIT
"""Answers to 30_build_it: the notebook's own, the package's modules, and a third form of each.

The wrong ones are the notebook's, with one thing changed in their text.
"""

import ast
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from dsv2_ref.attention.mla import MultiHeadLatentAttention, attend_absorbed, attend_expanded
from dsv2_ref.attention.rope import rope_frequencies, rope_tables, rotate
from dsv2_ref.block import Block, Pass
from dsv2_ref.exercises.parts import layer_weights, norm
from dsv2_ref.files.published import published_entries
from dsv2_ref.forms import Forms
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.moe.experts import experts_loop
from dsv2_ref.moe.routing import Router, select_device_limited

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "30_build_it.ipynb"
NAMES = dict(enumerate((
    "rope_tables rotate take_apart queries latents attend_expanded attend_absorbed attention "
    "feed_forward route mixture block model generate").split(), 1))


def functions() -> dict[str, str]:
    """The text of each function that the notebook defines."""
    found = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            found |= {node.name: ast.get_source_segment(source, node)
                      for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    return found


TEXTS = functions()
ALL = compile("\n\n".join(TEXTS.values()), str(NOTEBOOK), "exec")


def made(number: int, *changes: tuple[str, str]):
    """The notebook's function of an exercise, with other ones that it calls, and changes in it."""
    text = TEXTS[NAMES[number]]
    for old, new in changes:
        assert old in text, (number, old)
        text = text.replace(old, new)
    space = {"torch": torch, "F": F, "SimpleNamespace": SimpleNamespace}
    exec(ALL, space)
    exec(text, space)
    return space[NAMES[number]]


def tables_by_hand(positions, d_r, theta):
    angles = [[p * theta ** (-2 * i / d_r) for i in range(d_r // 2)] for p in positions.tolist()]
    return [torch.tensor([[f(angle) for angle in row] for row in angles], dtype=torch.float64)
            for f in (math.cos, math.sin)]


def turned_by_complex(x, cos, sin):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos, sin)[:, None].to(pairs.dtype)
    return torch.view_as_real(pairs * turn).flatten(-2)


def apart_row_by_row(q_b, kv_a, kv_b, c):
    q, kv = q_b.split(c.d_h + c.d_r), kv_b.split(c.d_h + c.d_v)
    return [torch.stack([rows[:c.d_h] for rows in q]), torch.stack([rows[c.d_h:] for rows in q]),
            *kv_a.split((c.d_c, c.d_r)),
            torch.stack([rows[:c.d_h] for rows in kv]), torch.stack([rows[c.d_h:] for rows in kv])]


def apart_by_the_package(q_b, kv_a, kv_b, c):
    model = DeepSeekV2(c).double()
    given = {"q_b_proj": q_b, "kv_a_proj_with_mqa": kv_a, "kv_b_proj": kv_b}
    with torch.no_grad():
        for entry in published_entries(model):
            for name, tensor in given.items():
                if entry.name == f"model.layers.1.self_attn.{name}.weight":
                    entry.write(tensor)
    a = model.blocks[1].attention
    heads = [a.W_UQ, a.W_QR, a.W_UK, a.W_UV]
    W_UQ, W_QR, W_UK, W_UV = (W.weight.detach().unflatten(0, (c.n_h, -1)) for W in heads)
    return W_UQ, W_QR, a.W_DKV.weight.detach(), a.W_KR.weight.detach(), W_UK, W_UV


def module(w) -> MultiHeadLatentAttention:
    """The package's attention with the weights w."""
    (n_h, d_h, d_cq), d_r, (_, d_v, d_c) = w.W_UQ.shape, w.W_QR.shape[1], w.W_UV.shape
    mla = MultiHeadLatentAttention(w.W_DQ.shape[1], n_h, d_h, d_r, d_v, d_c, d_cq).double()
    fill(mla, w)
    return mla.requires_grad_(False)


def fill(mla, w) -> None:
    with torch.no_grad():
        for name in "W_DQ norm_q W_UQ W_QR W_DKV norm_kv W_KR W_UK W_UV W_O".split():
            weight = getattr(mla, name).weight
            weight.copy_(getattr(w, name).reshape(weight.shape))


class Joined:
    """A cache as the package's modules use one, of the old rows."""

    queries = None

    def __init__(self, old):
        self.old = old

    def write(self, layer, *new):
        self.now = (new if self.old is None else
                    tuple(torch.cat(pair, 1) for pair in zip(self.old, new, strict=True)))

    def rows(self, layer):
        return self.now


def by_package(attend):
    return lambda *inputs: attend(*inputs, (inputs[0].shape[-1] + inputs[1].shape[-1]) ** -0.5)


def fused(q_c, q_r, c_kv, k_r, W_UK, W_UV):
    q = torch.cat((q_c, q_r), -1).transpose(1, 2)
    k_c, v = (torch.einsum("bsc,hdc->bhsd", c_kv, W) for W in (W_UK, W_UV))
    k = torch.cat((k_c, k_r[:, None].expand(-1, k_c.shape[1], -1, -1)), -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def as_mqa(q_c, q_r, c_kv, k_r, W_UK, W_UV):
    """One token and one head at a time."""
    B, T, n_h, d_h = q_c.shape
    S, scale = c_kv.shape[1], (d_h + q_r.shape[-1]) ** -0.5
    o = q_c.new_zeros(B, T, n_h, W_UV.shape[1])
    for b in range(B):
        for t in range(T):
            seen = S - T + t + 1
            row = torch.cat((c_kv[b, :seen], k_r[b, :seen]), -1)
            for i in range(n_h):
                q = torch.cat((q_c[b, t, i] @ W_UK[i], q_r[b, t, i]))
                o[b, t, i] = W_UV[i] @ ((row @ q * scale).softmax(0) @ c_kv[b, :seen])
    return o


def attention_by_package(h, w, cos, sin, cache=None):
    joined = Joined(cache)
    return module(w)(h, cos, sin, attend_absorbed, joined), joined.now


def always_absorbed(h, w, cos, sin, cache=None):
    c_kv, k_r = module(w).latents(h, cos, sin)
    if cache is not None:
        c_kv = torch.cat([cache[0], c_kv], dim=1)
        k_r = torch.cat([cache[1], k_r], dim=1)
    o = as_mqa(*module(w).queries(h, cos, sin), c_kv, k_r, w.W_UK, w.W_UV)
    return torch.einsum("bthv,dhv->btd", o, w.W_O.unflatten(1, o.shape[2:])), [c_kv, k_r]


def swiglu(x, W_gate, W_up, W_down):
    gate = F.linear(x, W_gate)
    return F.linear(gate * gate.sigmoid() * F.linear(x, W_up), W_down)


def route_by_package(x, centroids, top_k, n_devices, max_devices, factor):
    router = Router(x.shape[1], len(centroids), top_k, n_devices, max_devices, factor).double()
    router.weight = torch.nn.Parameter(centroids, requires_grad=False)
    routing = router(x)
    return routing.indices, routing.gates


def route_by_hand(x, centroids, top_k, n_devices, max_devices, factor):
    experts, gates, per = [], [], len(centroids) // n_devices
    for row in x:
        s = torch.softmax(centroids @ row, 0).tolist()
        best = sorted(range(n_devices), key=lambda j: -max(s[j * per:(j + 1) * per]))[:max_devices]
        chosen = sorted((i for i in range(len(s)) if i // per in best), key=lambda i: -s[i])[:top_k]
        experts.append(chosen[::-1])                            # the worst first
        gates.append([factor * s[i] for i in chosen[::-1]])
    return torch.tensor(experts), torch.tensor(gates, dtype=x.dtype)


def mixture_by_package(u, x, w, experts, gates):
    stacked = [torch.stack(W) for W in zip(*w.experts, strict=True)]
    return experts_loop(x, experts, gates, *stacked) + swiglu(x, *w.shared) + u


def mixture_dense(u, x, w, experts, gates):
    all_gates = torch.zeros(len(u), len(w.experts), dtype=u.dtype).scatter(1, experts, gates)
    outs = torch.stack([swiglu(x, *expert) for expert in w.experts], 1)
    return u + (all_gates[..., None] * outs).sum(1) + swiglu(x, *w.shared)


def fill_block(block, w) -> None:
    fill(block.attention, w)
    pairs = [(block.norm_attention.weight, w.norm_attention), (block.norm_ffn.weight, w.norm_ffn)]
    if w.dense is not None:
        dense, given = block.ffn, w.dense
    else:
        dense, given = block.experts.shared, w.shared
        pairs.append((block.router.weight, w.router))
        for name, W in zip(("W_gate", "W_up", "W_down"), zip(*w.experts, strict=True), strict=True):
            pairs.append((getattr(block.experts, name), torch.stack(W)))
    pairs += [(getattr(dense, name).weight, W)
              for name, W in zip(("W_gate", "W_up", "W_down"), given, strict=True)]
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs)


def block_by_package(h, w, cos, sin, c, cache=None):
    block = Block(c, layer=0 if w.dense is not None else 1).double().requires_grad_(False)
    fill_block(block, w)
    joined = Joined(cache)
    run = Pass(cos, sin, Forms(attend_absorbed, select_device_limited, experts_loop), joined)
    return block(h, run)[0], joined.now


def block_token_by_token(h, w, cos, sin, c, cache=None):
    out = []
    for t in range(h.shape[1]):
        now = h[:, t:t + 1]
        u, cache = always_absorbed(norm(now, w.norm_attention), w, cos[t:t + 1], sin[t:t + 1],
                                   cache)
        u = (u + now)[:, 0]
        x = norm(u, w.norm_ffn)
        if w.dense is None:
            chosen = route_by_hand(x, w.router, c.top_k, c.n_devices, c.max_devices,
                                   c.routed_scaling_factor)
            out.append(mixture_dense(u, x, w, *chosen))
        else:
            out.append(u + swiglu(x, *w.dense))
    return torch.stack(out, 1), cache


def model_by_package(tokens, weights, c, caches=None):
    model = DeepSeekV2(c).double().requires_grad_(False).eval()
    for entry in published_entries(model):
        entry.write(weights[entry.name])
    cache = model.new_cache(len(tokens), 20)
    if caches is not None:
        for layer, rows in enumerate(caches):
            cache.write(layer, *rows)
        cache.advance()
    logits = model(tokens, cache)
    return logits, [tuple(rows.clone() for rows in cache.rows(i)) for i in range(c.n_layers)]


def model_in_pieces(tokens, weights, c, caches=None):
    old = 0 if caches is None else caches[-1][1].shape[1]
    tables = rope_tables(torch.arange(old, old + tokens.shape[1]), rope_frequencies(c.d_r))
    caches = [None] * c.n_layers if caches is None else list(caches)
    h = F.embedding(tokens, weights["model.embed_tokens.weight"])
    for i in range(c.n_layers):
        h, caches[i] = block_token_by_token(h, layer_weights(weights, i, c), *tables, c, caches[i])
    return F.linear(norm(h, weights["model.norm.weight"]),
                    weights["model.embed_tokens.weight"]), caches


def generate_with_one_call_more(model, tokens, n):
    new, caches = torch.empty(len(tokens), 0, dtype=torch.int64), None
    for _ in range(n):
        logits, caches = model(tokens, caches)
        tokens = logits[:, -1].argmax(1)[:, None]
        new = torch.cat([new, tokens], dim=1)
    model(tokens, caches)
    return new


def generate_lists(model, tokens, n):
    logits, caches = model(tokens, None)
    rows = []
    for step in range(n):
        rows.append(logits[:, -1].max(-1).indices)
        if step + 1 < n:
            logits, caches = model(rows[-1].view(-1, 1), caches)
    return torch.stack(rows).T


RIGHT = {
    1: [made(1), lambda p, d_r, theta: rope_tables(p, rope_frequencies(d_r, theta)),
        tables_by_hand],
    2: [made(2), rotate, turned_by_complex],
    3: [made(3), apart_row_by_row, apart_by_the_package],
    4: [made(4), lambda h, w, cos, sin: module(w).queries(h, cos, sin),
        lambda h, w, cos, sin: [
            (norm(h @ w.W_DQ.T, w.norm_q) @ w.W_UQ.flatten(0, 1).T).view(*h.shape[:2], 3, 6),
            rotate((norm(h @ w.W_DQ.T, w.norm_q) @ w.W_QR.flatten(0, 1).T).view(*h.shape[:2], 3, 8),
                   cos, sin)]],
    5: [made(5), lambda h, w, cos, sin: module(w).latents(h, cos, sin),
        lambda h, w, cos, sin: [norm(F.linear(h, w.W_DKV), w.norm_kv),
                                rotate(F.linear(h, w.W_KR), cos, sin)]],
    6: [made(6), by_package(attend_expanded), fused],
    7: [made(7), by_package(attend_absorbed), as_mqa],
    8: [made(8), attention_by_package, always_absorbed],
    9: [made(9), swiglu, lambda x, W_gate, W_up, W_down: torch.stack([
        W_down @ (F.silu(W_gate @ row) * (W_up @ row))
        for row in x.flatten(0, -2)]).view(x.shape)],
    10: [made(10), route_by_package, route_by_hand],
    11: [made(11), mixture_by_package, mixture_dense],
    12: [made(12), block_by_package, block_token_by_token],
    13: [made(13), model_by_package, model_in_pieces],
    14: [made(14), generate_with_one_call_more, generate_lists],
}

NO_MASK = (".masked_fill(future, -torch.inf)", "")
SCALED = ("scores / (q_c.shape[-1] + q_r.shape[-1]) ** 0.5", "scores")
ATTENDING = [
    ("scale is missing", SCALED), ("content part alone", (" + q_r.shape[-1]", "")),
    ("not by its root", (" ** 0.5", "")), ("mask is missing", NO_MASK),
    ("multiplied by the root", ("scores / (", "scores * (")),
    ("exp(0) is 1", (".masked_fill(future, -torch.inf)", ".masked_fill(future, 0.0)")),
    ("after the softmax", (".masked_fill(future, -torch.inf).softmax(-1)",
                           ".softmax(-1).masked_fill(future, 0.0)")),
    ("over heads", ("softmax(-1)", "softmax(1)")), ("over queries", ("softmax(-1)", "softmax(2)")),
    ("heads stand before tokens", ('->bthv"', '->bhtv"')),
    ("q_r and k_r do not count", ('torch.einsum("bthr,bsr->bhts", q_r, k_r)', "0")),
]
# what is said, then the changes
CHANGED = {
    1: [("minus is missing", ("(-torch", "(torch")), ("2i/d_r", ("0, d_r, 2", "0, d_r // 2")),
        ("d_r/2, not by d_r", ("/ d_r)", "/ (d_r // 2))")),
        ("swapped", ("angles.cos(), angles.sin()", "angles.sin(), angles.cos()")),
        ("too large", ("positions[:", "(positions + 1)[:")),
        ("not used", ("positions[:", "torch.arange(len(positions))[:")),
        ("expected (6, 4)", ("0, d_r, 2,", "0, d_r,")),
        ("computed in fp32", (", dtype=torch.float64", "")),
        ("too coarse", ("float64) / d_r)", "float32) / d_r)"), ("cos()", "cos().float()")),
        ("in halves", ("angles.cos(), angles.sin()",
                       "angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)"))],
    2: [("not turned", (
            "torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)", "x")),
        ("backwards", ("a * cos - b * sin, a * sin + b", "a * cos + b * sin, -a * sin + b")),
        ("signs is wrong", ("cos - b", "cos + b")), ("as in Llama", (
            "x[..., 0::2], x[..., 1::2]", "x.chunk(2, -1)"), (
            "torch.stack", "torch.cat"), (".flatten(-2)", "")),
        ("in two halves", ("torch.stack", "torch.cat"), (".flatten(-2)", "")),
        ("float64, expected float32", (".to(x.dtype)", "")),
        ("put down as neighbours", ("x[..., 0::2], x[..., 1::2]", "x.chunk(2, -1)")),
        ("only the cos part", ("a * cos - b * sin, a * sin + b * cos", "a * cos, b * cos")),
        ("raises RuntimeError", ("[:, None]", ""))],
    3: [("dealt out", ("q_b.view(c.n_h, c.d_h + c.d_r, -1)",
                       "q_b.view(c.d_h + c.d_r, c.n_h, -1).transpose(0, 1)"),
         ("kv_b.view(c.n_h, c.d_h + c.d_v, -1)",
          "kv_b.view(c.d_h + c.d_v, c.n_h, -1).transpose(0, 1)")),
        ("q_b_proj: of each head's rows", ("q[:, :c.d_h], q[:, c.d_h:]",
                                           "q[:, c.d_r:], q[:, :c.d_r]")),
        ("kv_b_proj: of each head's rows", ("kv[:, :c.d_h], kv[:, c.d_h:]",
                                            "kv[:, c.d_v:], kv[:, :c.d_v]")),
        ("the latent's rows come first", ("kv_a[:c.d_c], kv_a[c.d_c:]",
                                          "kv_a[c.d_r:], kv_a[:c.d_r]")),
        ("grouped by head", (
            "q = q_b.view(c.n_h, c.d_h + c.d_r, -1)",
            "q = torch.cat((q_b[:c.n_h * c.d_h].view(c.n_h, c.d_h, -1), "
            "q_b[c.n_h * c.d_h:].view(c.n_h, c.d_r, -1)), 1)"), (
            "kv = kv_b.view(c.n_h, c.d_h + c.d_v, -1)",
            "kv = torch.cat((kv_b[:c.n_h * c.d_h].view(c.n_h, c.d_h, -1), "
            "kv_b[c.n_h * c.d_h:].view(c.n_h, c.d_v, -1)), 1)")),
        ("no axis of their own", ("q[:, :c.d_h], q[:, c.d_h:]",
                                  "q[:, :c.d_h].flatten(0, 1), q[:, c.d_h:].flatten(0, 1)"),
         ("kv[:, :c.d_h], kv[:, c.d_h:]",
          "kv[:, :c.d_h].flatten(0, 1), kv[:, c.d_h:].flatten(0, 1)")),
        ("expected 6", ("kv[:, :c.d_h], kv[:, c.d_h:]", "kv"))],
    4: [("norm of the query latent", ("rms_norm(h @ w.W_DQ.T, w.norm_q)", "h @ w.W_DQ.T")),
        ("without its gain", (", w.norm_q)", ", 1.0)")), ("not turned", ("rotate(q_r, cos, sin)",
                                                                         "q_r")),
        ("normed once more", ("(h @", "(rms_norm(h, 1.0) @")),
        ("heads stand before tokens", ("->bthd", "->bhtd"), (
            "rotate(q_r, cos, sin)", "rotate(q_r, cos, sin).transpose(1, 2)")),
        ("swapped", ("return q_c, rotate(q_r, cos, sin)", "return rotate(q_r, cos, sin), q_c")),
        ("turned twice", ("rotate(q_r, cos, sin)", "rotate(rotate(q_r, cos, sin), cos, sin)")),
        ("belongs to (46)", ("return q_c, rotate(q_r, cos, sin)",
                             "return q_c / 14 ** 0.5, rotate(q_r, cos, sin) / 14 ** 0.5")),
        ("it gives 1 tensor(s), expected 2: q_c, q_r",
         ("q_c, rotate(q_r, cos, sin)", "torch.cat((q_c, rotate(q_r, cos, sin)), -1)"))],
    5: [("norm of the latent", ("rms_norm(h @ w.W_DKV.T, w.norm_kv)", "h @ w.W_DKV.T")),
        ("without its gain", (", w.norm_kv)", ", 1.0)")),
        ("k_r is normed", ("(h @ w.W_KR.T)", "rms_norm(h @ w.W_KR.T, 1.0)")),
        ("not turned", ("rotate(k_r, cos, sin)", "k_r")),
        ("turned twice", ("rotate(k_r, cos, sin)", "rotate(rotate(k_r, cos, sin), cos, sin)")),
        ("axis for its one head", ("sin)[:, :, 0]", "sin)")),
        ("swapped", ("return c_kv, rotate(k_r, cos, sin)[:, :, 0]",
                     "return rotate(k_r, cos, sin)[:, :, 0], c_kv")),
        ("h is normed once more", ("h @", "rms_norm(h, 1.0) @"))],
    6: [*ATTENDING, ("does not see itself", ("triu(1)", "triu(0)")),
        ("looks ahead", ("triu(1)", "triu(2)")), ("wrong way round", ("triu(1)", "tril(-1)")),
        ("W_UV is missing", ("v_c = torch.einsum(\"bsc,hvc->bshv\", c_kv, W_UV)",
                             "v_c = c_kv[:, :, None].expand(-1, -1, 3, -1)"))],
    7: [*ATTENDING, ("for the first tokens", ("triu(S - T + 1)", "triu(1)")),
        ("does not see itself", ("triu(S - T + 1)", "triu(S - T)")),
        ("looks ahead", ("triu(S - T + 1)", "triu(S - T + 2)")),
        ("W_UV is missing", ('torch.einsum("bthc,hvc->bthv", o_latent, W_UV)', "o_latent")),
        ("scale counts a query in the latent", ("q_c.shape[-1] +", "c_kv.shape[-1] +")),
        ("as many as the keys", (
            'scores = (torch.einsum("bthc,bsc->bhts", q_latent, c_kv)',
            'keys = torch.einsum("bsc,hdc->bshd", c_kv, W_UK)\n'
            '    scores = (torch.einsum("bthd,bshd->bhts", q_c, keys)'))],
    8: [("W_O is missing", (" @ w.W_O.T", "")), ("block's part", ("return o", "return h + o")),
        ("mixed up", ("o.flatten(2)", "o.transpose(2, 3).flatten(2)")),
        ("before the cached", ("(cache[0], c_kv)", "(c_kv, cache[0])"),
         ("(cache[1], k_r)", "(k_r, cache[1])")),
        ("not used", ("is not None", "== 0")),
        ("not attended to", ("o = attend(q_c, q_r, c_kv, k_r,",
                             "o = attend(q_c, q_r, *latents(h, w, cos, sin),")),
        ("new rows are neither", ("c_kv, k_r = torch.cat((cache[0], c_kv), 1), "
                                  "torch.cat((cache[1], k_r), 1)\n        attend = attend_absorbed",
                                  "o = attend_absorbed(q_c, q_r, *cache, w.W_UK, w.W_UV)\n        "
                                  "return o.flatten(2) @ w.W_O.T, (c_kv, k_r)")),
        ("only the new rows are returned", (".T, (c_kv, k_r)", ".T, latents(h, w, cos, sin)"))],
    9: [("on W_up x", ("F.silu(x @ W_gate.T) * (x @ W_up.T)",
                       "F.silu(x @ W_up.T) * (x @ W_gate.T)")),
        ("W_gate is not used", ("F.silu(x @ W_gate.T) * (x @ W_up.T)", "F.silu(x @ W_up.T)")),
        ("W_up is not used", (" * (x @ W_up.T)", "")), ("are added", (" * (", " + (")),
        ("of the product", ("F.silu(x @ W_gate.T) * (x @ W_up.T)",
                            "F.silu((x @ W_gate.T) * (x @ W_up.T))")),
        ("a sigmoid stands", ("F.silu", "torch.sigmoid")), ("relu stands", ("F.silu", "F.relu")),
        ("gelu stands", ("F.silu", "F.gelu")), ("silu is missing", ("F.silu", ""))],
    10: [("renormalised:", ("factor * s.gather(1, experts)",
                            "factor * F.normalize(s.gather(1, experts), 1)")),
         ("renormalised and the factor is missing", (
             "factor * s.gather(1, experts)", "F.normalize(s.gather(1, experts), 1)")),
         ("factor on the gates is missing", ("factor * ", "")),
         ("experts come first", ("return experts, factor * s.gather(1, experts)",
                                 "return factor * s.gather(1, experts), experts")),
         ("scaled twice", ("factor * ", "factor ** 2 * ")),
         ("device limit is missing", ("within.topk", "s.topk")),
         ("a sigmoid", ("softmax(-1)", "sigmoid()")),
         ("softmax is missing", (".softmax(-1)", "")),
         ("over tokens", ("softmax(-1)", "softmax(0)")),
         ("sum of its experts", ("amax(-1)", "sum(-1)")),
         ("two best", ("amax(-1)", "topk(min(2, devices.shape[-1])).values.sum(-1)")),
         ("the worst devices", ("amax(-1)", "amax(-1).neg()")),
         ("a device holds neighbours", (
             "within = devices.masked_fill(~allowed[..., None], -torch.inf).flatten(1)",
             "within = s.masked_fill(~allowed.repeat(1, devices.shape[-1]), -torch.inf)"))],
    11: [("stream u is not added", ("u + feed", "feed")),
         ("norm x is added", ("u + feed", "x + feed")),
         ("read u, not x", ("feed_forward(x, ", "feed_forward(u, "), ("(x[token]", "(u[token]")),
         ("the routed experts read u", ("(x[token]", "(u[token]")),
         ("gates are missing", ("gates[token, slot, None] * ", "")),
         ("applied twice", ("gates[token, slot, None] *", "gates[token, slot, None] ** 2 *")),
         ("different orders", ("gates[token, slot", "gates.flip(1)[token, slot")),
         ("only the first slot", ("(experts == e)", "(experts[:, :1] == e)")),
         ("last slot", ("(experts == e)", "(experts[:, :-1] == e)")),
         ("shared experts are missing", ("u + feed_forward(x, *w.shared)", "u")),
         ("shared experts are gated", ("u + feed", "u + gates.sum(1, keepdim=True) * feed")),
         ("added twice", ("u + feed", "2 * u + feed"))],
    12: [("attention reads h", ("attention(rms_norm(h, w.norm_attention)", "attention(h")),
         ("reads u without its norm", ("x = rms_norm(u, w.norm_ffn)", "x = u")),
         ("used twice", ("(u, w.norm_ffn)", "(u, w.norm_attention)")),
         ("h is lost", ("u = h + added", "u = added")),
         ("u is lost", ("return u + feed_forward", "return feed_forward")),
         ("the normed h", ("u = h + added", "u = rms_norm(h, w.norm_attention) + added")),
         ("reads the stream after attention", ("(u, w.norm_ffn)", "(h, w.norm_ffn)")),
         ("u is added twice", ("return mixture", "return u + mixture")),
         ("cache is not handed", ("sin, cache)", "sin)"))],
    13: [("last norm is missing", ('h = rms_norm(h, weights["model.norm.weight"])', "")),
         ("no gain", (', weights["model.norm.weight"])', ", 1.0)")),
         ("begin at 0 again", ("old, old + tokens", "0, tokens")),
         ("begin at 1", ("old, old + tokens.shape[1]", "old + 1, old + 1 + tokens.shape[1]")),
         ("Gemma", ("embedding[tokens]", "embedding[tokens] * c.d ** 0.5")),
         ("weights of layer 0", ("layer_weights(weights, layer", "layer_weights(weights, 0")),
         ("from the last to the first", ("range(c.n_layers)", "reversed(range(c.n_layers))")),
         ("last block is missing", ("range(c.n_layers)", "range(c.n_layers - 1)")),
         ("cache of layer 0", ("caches[layer]", "caches[0]")),
         ("probabilities", ("h @ embedding.T", "(h @ embedding.T).softmax(-1)")),
         ("only the last token's", ("h @ embedding.T", "h[:, -1] @ embedding.T"))],
    14: [("first token are read", ("logits[:, -1:]", "logits[:, :1]")),
         ("the worst is taken", ("argmax", "argmin")),
         ("whole text was read behind itself", ("model(new[-1], caches)",
                                                "model(torch.cat((tokens, *new), 1), caches)")),
         ("not handed on", ("model(new[-1], caches)", "model(new[-1], None)")),
         ("prompt's caches", ("logits, caches = model(new", "logits, _ = model(new")),
         ("prompt is in it", ("torch.cat(new, 1)", "torch.cat((tokens, *new), 1)")),
         ("call by call", ("model(new[-1], caches)", "model(torch.cat((tokens, *new), 1), None)")),
         ("shape (2, 7), expected (2, 6)", ("len(new) < n", "len(new) <= n"))],
}
TOLD = {n: [words for words, *_ in rows] for n, rows in CHANGED.items()}
WRONG = {n: [made(n, *changes) for _, *changes in rows] for n, rows in CHANGED.items()}

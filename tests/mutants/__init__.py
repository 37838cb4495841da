# SPDX-License-Identifier: MIT
"""Wrong variants of the implementation, and the test that must fail for each.

A mutant replaces one piece of source text, which occurs exactly once in its file. Most are
mistakes that people have made in public with this model; the others are slips of sign, factor,
order or dtype in one equation. `catches` is an equation number as in the paper, "(41)", or one of
the pitfalls below.
"""

from typing import NamedTuple

PITFALLS = {
    "expanded": "expanded keys and values cached instead of the latent",
    "merged": "absorption read as multiplying weights together",
    "wrong path": "the absorbed form for prompts, the expanded one for decoding",
    "half-split": "RoPE on halves instead of adjacent pairs",
    "k_r": "the RoPE key made from the latent",
    "mscale": "YaRN's two temperatures mixed up, lost or taken twice",
    "no factor": "a model without the softmax factor, or with a fixed one",
    "cached row": "cached before its norm or rotation; imprecise angles",
    "chunks": "reading in chunks differs from reading at once",
    "scaling": "routed_scaling_factor applied no time or twice",
    "group score": "a device scored by its two best experts",
    "mask": "forbidden experts masked with 0",
    "gates": "mixing weights renormalised",
    "router dtype": "the router in half precision, or fp64 cut to fp32",
    "lite": "V2-Lite taken for a small V2",
    "shared": "shared experts averaged",
    "idle expert": "an expert without tokens has no gradient",
    "no gradient": "a balance loss without gradient, lost, doubled, or holding on to the graph",
    "batch": "balance counted over the batch, or after dropping",
    "messages": "device and communication loss confused",
    "dropping": "capacity per expert, the wrong slots dropped, dropping at evaluation",
    "layout": "published rows or keys read as something else",
    "quantised": "packed rows read back wrongly, not attended to as stored, or not fully counted",
    "card": "a card taken for another, or what cannot run without one let through",
    "protocol": "a pass through a cache begun, written, masked or ended wrongly",
    "adapters": "a layer that others have wrapped read as its weight alone",
    "stages": "layers or experts that are here taken for all, or counted twice",
    "schedules": "work of a pipeline cut, ordered or timed otherwise than it is done",
    "once a pass": "an algorithm chosen wrongly, or described otherwise than it runs",
    "waits": "values asked of a device, or an unknown id silently taken for another",
    "scores": "log-probabilities of other tokens than those that come next",
    "sampling": "the edges of sampling, and where a sequence ends",
    "needles": "a needle test that asks, reads, scores, learns or resumes otherwise than it says",
    "ranks": "rows, sums or gradients of several ranks other than one process would have them",
    "plan": "a cluster planned with bytes, messages or waiting that a real one would not have",
    "policy": "answers, probabilities or advantages of another policy or question than said",
    "chat": "a turn, an answer's tokens, padding or what is held out taken for something else",
    "task": "an answer cut, moved or judged otherwise than its task has it",
    "serving": "a page, a name, a budget or a request of the engine taken for another's",
    "rows": "a measured row lost, judged by another's measure, or begun without room or time",
    "moments": "moments in a byte, their rounding or updates other than AdamW's",
    "muon": "Muon's momentum, its look ahead, its scale or its iteration other than they are said",
    "fp8": "codes or scales of FP8 weights taken for something else, or too much put into FP8",
}


class Mutant(NamedTuple):
    name: str
    catches: str
    file: str
    old: str
    new: str
    node: str

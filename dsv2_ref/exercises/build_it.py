# SPDX-License-Identifier: MIT
"""Exercises of 30_build_it: its parts, and what is said of the mistakes in them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from dsv2_ref.exercises import Exercises, given, parts
from dsv2_ref.exercises.stub import Stub


def known(part: Callable[..., Any], **meanings: str) -> list[tuple[Callable[..., Any], str]]:
    """Mistakes of a part by their names, _ for a space."""
    return [(partial(part, wrong=name.replace("_", " ").strip()), meaning)
            for name, meaning in meanings.items()]


ATTENDING = dict(
    no_scale="the scale is missing: scores are to be divided by a square root",
    head_alone="the scale counts the content part alone; a query also has d_r numbers",
    latent="the scale counts a query in the latent (d_c + d_r); it stays that of a head's query",
    no_root="scores are divided by d_h + d_r itself, not by its root",
    multiplied="scores are multiplied by the root, not divided",
    no_position="the position part is missing: q_r and k_r do not count",
    position_alone="the content part is missing: only q_r and k_r count",
    self="a token does not see itself",
    ahead="the mask looks ahead: a token sees the one after it",
    future="the mask is the wrong way round: a token sees itself and what comes after it",
    no_mask="the mask is missing: a token sees those after it",
    zero="hidden scores are set to 0, and exp(0) is 1: they still get a share",
    after="hidden weights are set to 0 after the softmax; those that are left do not sum to 1",
    over_heads="the softmax runs over heads, not over keys",
    over_queries="the softmax runs over queries, not over keys",
    latent_out="the output is still in the latent: W_UV is missing",
    heads="heads stand before tokens in the output",
)
ATTEND = ["o: sequence token head number"]
ROWS = ["c_kv: sequence token number", "k_r: sequence token number"]

exercises = Exercises({
    1: Stub(
        parts.rope_tables, given.table_cases,
        "Pair i turns by position * theta^(-2i/d_r), i = 0 ... d_r/2 - 1, in fp64. See notebook "
        "03, the first section on pairs.",
        gives=["cos: position pair", "sin: position pair"],
        known=known(
            parts.rope_tables, swapped="cos and sin are swapped",
            up="the speeds grow from pair to pair: the exponent's minus is missing",
            half="the exponent is i/d_r, of pair i; it is 2i/d_r",
            twice="the exponent is divided by d_r/2, not by d_r",
            none="all pairs turn at one speed",
            from_0="the positions that are given are not used; they need not begin at 0",
            from_1="each position is one too large",
            wide="one column per number, in halves; one column per pair is enough",
            interleaved="one column per number; one column per pair is enough",
            fp32="the angles are computed in fp32, too coarse for large positions: use fp64")),
    2: Stub(
        parts.rotate, given.rotate_cases,
        "Numbers 2i and 2i+1 are a pair (a, b); it becomes (a cos - b sin, a sin + b cos), in the "
        "same two places. cos and sin need an axis for heads. See notebook 03.",
        gives=["x: sequence token head number"],
        known=known(
            parts.rotate, not_="positions are not turned: x comes back as it went in",
            back="pairs are turned backwards: look at the signs",
            sign="one of the two signs is wrong, so lengths change",
            cos="only the cos part is there",
            halves="pairs are i and i + d_r/2, as in Llama; here they are neighbours, 2i and 2i+1",
            halves_back="numbers i and i + d_r/2 were turned together, then put down as neighbours",
            apart="right turns, but put down in two halves, not back in their places")),
    3: Stub(
        parts.take_apart, given.published_cases,
        "The rows of q_b_proj and kv_b_proj are grouped by head: view them as (n_h, rows per head, "
        "columns) first, and split the rows per head. kv_a_proj_with_mqa has no heads. See "
        "notebook 10, the section on the published format.",
        gives=["W_UQ: head row column", "W_QR: head row column", "W_DKV: row column",
               "W_KR: row column", "W_UK: head row column", "W_UV: head row column"],
        known=known(
            parts.take_apart,
            not_grouped="content rows of all heads were taken first; the file is grouped by head",
            heads_last="rows were dealt out to heads in turn; a head's rows stand together",
            position_first="q_b_proj: of each head's rows the content rows come first",
            value_first="kv_b_proj: of each head's rows those of the key come first",
            key_first="kv_a_proj_with_mqa: the latent's rows come first, then those of k_r",
            flat="heads have no axis of their own: expected (n_h, rows, columns)")),
    4: Stub(
        parts.queries, given.stream_cases,
        "(37): down and normed with w.norm_q. (38): up, per head. (39): the position part comes "
        "from the same normed c_q, and it alone is turned. See notebook 02.",
        gives=["q_c: sequence token head number", "q_r: sequence token head number"],
        known=known(
            parts.queries, no_norm="the norm of the query latent c_q is missing",
            no_gain="c_q is normed without its gain w.norm_q",
            again="h is normed once more; it comes normed, the latent is what has to be",
            not_turned="q_r: positions are not turned", turned_twice="q_r is turned twice",
            scaled="the softmax scale is in the queries already; it belongs to (46)",
            heads="heads stand before tokens", swapped="q_c and q_r are swapped")),
    5: Stub(
        parts.latents, given.stream_cases,
        "(41): c_kv = norm(W_DKV h) with w.norm_kv. (43): k_r = RoPE(W_KR h), made from h, one key "
        "for all heads, not normed. rotate wants an axis for heads: lend the key one. See notebook "
        "02.",
        gives=ROWS,
        known=known(
            parts.latents, no_norm="the norm of the latent c_kv is missing",
            no_gain="c_kv is normed without its gain w.norm_kv",
            again="h is normed once more; it comes normed, the latent is what has to be",
            key_normed="k_r is normed; the latent alone is", swapped="c_kv and k_r are swapped",
            not_turned="k_r: positions are not turned", turned_twice="k_r is turned twice",
            head_axis="k_r still has an axis for its one head")),
    6: Stub(
        parts.attend, given.expanded_cases,
        "Scores are (q_c k_c + q_r k_r) / sqrt(d_h + d_r); token t sees tokens 0 to t, and what it "
        "does not see is -inf before the softmax over keys. k_r has no axis for heads: all share "
        "it. See notebook 01 for the mask, 02 for (42)-(46).",
        gives=ATTEND, known=known(parts.attend, **ATTENDING)),
    7: Stub(
        parts.attend, given.absorbed_cases,
        "Carry q_c to the latent with W_UK of its head, multiply with c_kv, gather c_kv with the "
        "weights, and carry the sum up with W_UV. Query t of T stands at S - T + t. See notebook "
        "04, sections 1 to 3.",
        gives=ATTEND, known=known(
            parts.attend, **ATTENDING,
            start="the mask takes the queries for the first tokens; they are the last T of the S"),
        besides=given.makes_no_keys),
    8: Stub(
        parts.attention, given.attention_cases,
        "New rows go behind the cached ones, the queries meet all of them, (47) brings the heads "
        "together. What is returned is the next call's cache. See notebook 02 for (47), 05 for the "
        "cache.",
        gives=["u: sequence token number", *ROWS],
        known=known(
            parts.attention, bare="W_O is missing",
            residual="h is added already; that is the block's part",
            interleaved="heads are mixed up before W_O: first all of head 0, then head 1",
            alone="the cache is not used: only new rows are attended to and returned",
            ignored="the cache is not attended to: only new rows are",
            old="the new rows are not attended to: a token sees itself, too",
            old_kept="new rows are neither attended to nor joined to the cache",
            new_alone="only the new rows are returned; old ones are lost for the next call",
            in_front="new rows stand before the cached ones")),
    9: Stub(
        parts.feed_forward, given.feed_forward_cases,
        "W_down (silu(W_gate x) * W_up x), where silu(z) = z sigmoid(z). See notebook 06.",
        gives=["y: sequence token number"],
        known=known(
            parts.feed_forward, wrong_side="silu is on W_up x; it belongs to W_gate x",
            no_gate="W_gate is not used", no_up="W_up is not used",
            added="the two branches are added, not multiplied",
            after="silu is taken of the product; it belongs to W_gate x alone",
            sigmoid="a sigmoid stands where silu(z) = z sigmoid(z) belongs",
            relu="relu stands where silu belongs", gelu="gelu stands where silu belongs",
            no_silu="silu is missing")),
    10: Stub(
        parts.route, given.route_cases,
        "Softmax over all experts; each device counts as its best expert; all experts outside the "
        "best devices are -inf for the choice; the gates are the affinities themselves, times the "
        "factor. Expert i lies on device i // (E / D). See notebooks 06 and 07.",
        gives=["experts: token slot", "gates: token slot"], seen=lambda routed: tuple(
            t.gather(-1, routed[0].argsort(-1)) for t in routed),
        known=known(
            parts.route, renormalised_alone="gates are renormalised and the factor is missing",
            renormalised="gates are renormalised: each token's gates sum to one (times the factor)",
            no_factor="the factor on the gates is missing", twice="gates are scaled twice",
            greedy="the device limit is missing: experts of other devices are chosen",
            sigmoid="affinities are a sigmoid, as in V3; in V2 they are a softmax",
            logits="affinities are the bare products: the softmax is missing",
            over_tokens="the softmax runs over tokens, not over experts",
            sum="a device counts as the sum of its experts; it counts as its best one",
            two="a device counts as the sum of its two best, as in V3; here as its best one",
            swapped="experts and gates are swapped: experts come first",
            worst="the worst devices are chosen, not the best",
            strided="experts are dealt out to devices in turn; a device holds neighbours")),
    11: Stub(
        parts.mixture, given.mixture_cases,
        "(20): the stream u itself, plus the shared experts of x, plus for each slot its gate "
        "times its expert of x. The paper writes u where the networks read its norm x. See "
        "notebook 06; 10, section 2.",
        gives=["h': token number"],
        known=known(
            parts.mixture, no_stream="the stream u is not added",
            norm_added="the norm x is added in place of the stream u",
            stream_twice="the stream u is added twice", not_normed="the experts read u, not x",
            routed_not_normed="the routed experts read u, not x",
            no_gates="gates are missing: chosen experts count fully",
            reversed="gates and experts are in different orders",
            squared="gates are applied twice", first="only the first slot of each token counts",
            last_missing="the last slot of each token is left out",
            no_shared="the shared experts are missing",
            shared_gated="the shared experts are gated; every token passes them fully")),
    12: Stub(
        parts.block, given.block_cases,
        "u = h + attention(norm(h)), then x = norm(u) and u + dense(x), or (20), in which u is "
        "added already. See notebook 10, section 2.",
        gives=["h: sequence token number", *ROWS],
        known=known(
            parts.block, no_first_norm="attention reads h without its norm",
            no_second_norm="the second half reads u without its norm",
            one_norm="the attention's norm is used twice; the second half has norm_ffn",
            no_residual="what attention adds goes on alone: h is lost",
            no_second_residual="what the second half adds goes on alone: u is lost",
            normed_stream="the normed h goes on; only what attention reads is normed",
            parallel="the second half reads h; it reads the stream after attention",
            twice="u is added twice: (20) adds it already",
            cache_lost="the cache is not handed to attention")),
    13: Stub(
        parts.model, given.model_cases,
        "Embedding, blocks 0 to l - 1 each with its own cache, norm, and the embedding's matrix "
        "once more. Positions begin after what is cached. See notebook 10, section 1.",
        gives=["logits: sequence token word",
               *(f"{line.partition(':')[0]} of layer {i}: sequence token number"
                 for i in range(given.C.n_layers) for line in ROWS)],
        known=known(
            parts.model, no_norm="the last norm is missing", no_gain="the last norm has no gain",
            from_0="positions begin at 0 again; with caches they go on behind what is cached",
            from_1="positions begin at 1; the first is 0",
            scaled="the embedding is scaled by sqrt(d), as in Gemma",
            layer_0="all blocks have the weights of layer 0",
            reversed="the blocks run from the last to the first",
            last_missing="the last block is missing",
            one_cache="all layers read the cache of layer 0",
            softmax="these are probabilities; the logits are what stands before the softmax",
            last="only the last token's logits are given; expected those of every token")),
    14: Stub(
        parts.generate, given.generate_cases,
        "Read the prompt once. Then n times: the best of the last token's logits is a new id; the "
        "model reads this id alone, with the caches of the call before. See notebook 05.",
        gives=["ids: sequence step"], besides=given.reads_each_token_once,
        known=known(
            parts.generate, first="the logits of the first token are read, not those of the last",
            before="the logits of the last token but one are read", smallest="the worst is taken",
            whole="the caches hold these tokens already: the whole text was read behind itself",
            lost="the caches are not handed on: each new token is read alone",
            stale="the prompt's caches are used at every step; each call gives new ones",
            one_late="the first new id is lost", prompt="the prompt is in it; only new ids are")),
}, needs={4: (2,), 5: (2,), 8: (4, 5, 6, 7), 11: (9,), 12: (8, 9, 10, 11), 13: (1, 3, 12)})

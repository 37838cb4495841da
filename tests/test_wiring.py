# SPDX-License-Identifier: MIT
"""How the concepts are put together: one model against the loops, and what only assembly can get
wrong (factors lost or taken twice, dropping at evaluation, losses that do not arrive)."""

import gc
import math

import pytest
import torch
from oracles import loops

from dsv2_ref import checkpoint, config, forms, model
from dsv2_ref.config import Config

SMALL = Config(
    vocab=31, d=12, n_layers=3, n_h=3, d_h=5, d_r=4, d_v=6, d_c=8, d_cq=10, n_dense=1,
    dense_width=14, n_shared=2, n_routed=6, top_k=3, expert_width=7, n_devices=3, max_devices=2,
    routed_scaling_factor=2.5, alpha_expert=0.003, alpha_device=0.05, alpha_comm=0.02,
    drop_capacity=0.4, yarn_factor=4.0, yarn_original_positions=16, yarn_beta_fast=2.0,
    yarn_mscale=0.707, yarn_mscale_all_dim=0.9, max_positions=64, norm_eps=1e-4,
)
T = 9


def build(seed: int = 1, **changes) -> model.DeepSeekV2:
    return loops.randomize(model.DeepSeekV2(SMALL.with_(**changes)), seed)


def tokens(seed: int = 2, batch: int = 2, length: int = T) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL.vocab, (batch, length), generator=generator)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def linear(ffn: torch.nn.Module) -> loops.Expert:
    return tuple(w.weight.tolist() for w in (ffn.W_gate, ffn.W_up, ffn.W_down))


def oracle(m: model.DeepSeekV2, ids: list[int]) -> list[list[float]]:
    """Logits of one sequence, every constant from the configuration and the paper."""
    c = m.config
    freqs, scale, magnitude = loops.frequencies(c.d_r), 1 / math.sqrt(c.d_h + c.d_r), 1.0
    if c.yarn_factor is not None:
        freqs = loops.yarn_frequencies(c.d_r, 1e4, c.yarn_factor, 2.0, 1.0, 16)
        m_all = 0.1 * 0.9 * math.log(c.yarn_factor) + 1
        scale *= m_all**2
        magnitude = (0.1 * 0.707 * math.log(c.yarn_factor) + 1) / m_all
    h = [m.embedding.weight[i].tolist() for i in ids]
    for layer, block in enumerate(m.blocks):
        W = {name.removesuffix(".weight"): p.tolist()
             for name, p in block.attention.named_parameters()}
        x = [loops.rms_norm(v, block.norm_attention.weight.tolist(), 1e-4) for v in h]
        u, _ = loops.mla(x, W, c.n_h, freqs, scale, magnitude)
        h = [loops.add(a, b) for a, b in zip(h, u, strict=True)]
        x = [loops.rms_norm(v, block.norm_ffn.weight.tolist(), 1e-4) for v in h]
        if layer < c.n_dense:
            h = [loops.add(a, loops.expert(b, linear(block.ffn))) for a, b in zip(h, x)]
            continue
        e, centroids = block.experts, block.router.weight.tolist()
        routed = list(zip(e.W_gate.tolist(), e.W_up.tolist(), e.W_down.tolist(), strict=True))
        for t in range(len(h)):
            s = loops.affinities(x[t], centroids)
            chosen = loops.select_device_limited(s, c.top_k, c.n_devices, c.max_devices)
            gates = [s[i] * c.routed_scaling_factor for i in chosen]
            h[t] = loops.mixture(h[t], x[t], chosen, gates, [linear(e.shared)], routed)
    return [loops.matvec(m.head.weight.tolist(),
                         loops.rms_norm(v, m.norm.weight.tolist(), 1e-4)) for v in h]


@pytest.mark.parametrize("changes", [{}, dict(yarn_factor=None, d_cq=None)], ids=["yarn", "plain"])
def test_the_model_equals_the_loops(changes):
    m, ids = build(**changes).eval(), tokens()
    expected = torch.tensor([oracle(m, row) for row in ids.tolist()], dtype=torch.float64)
    with torch.no_grad():
        close(m(ids), expected)
        few = ids[:, :1]                                 # so few that another expert form runs
        close(m(few), expected[:, :1])


@pytest.mark.parametrize("chunks", [[1, 3, 2, 2, 1], [1] * 9, [8, 1]])
@torch.no_grad()
def test_cached_in_chunks_equals_full(chunks):
    m, ids = build().eval(), tokens()
    cache, out = m.new_cache(2, 10), []
    for chunk in ids.split(chunks, 1):
        out.append(m(chunk, cache))
    close(torch.cat(out, 1), m(ids))
    assert cache.lengths == [9, 9]


@torch.no_grad()
def test_padding_is_never_attended_to():
    """Prompts of 5 and 3 tokens in one batch, then two more tokens each, then one."""
    m, ids = build().eval(), tokens()
    full, cache = m.hidden(ids), m.new_cache(2, T)
    m.hidden(ids[:, :5], cache, lengths=[5, 3])
    for n in (2, 1):
        first = list(cache.lengths)
        new = torch.stack([ids[b, s : s + n] for b, s in enumerate(first)])
        expected = torch.stack([full[b, s : s + n] for b, s in enumerate(first)])
        close(m.hidden(new, cache), expected)
    assert cache.lengths == [8, 6]


@torch.no_grad()
def test_prompts_run_expanded_and_decoding_absorbed(monkeypatch):
    ran = []

    def watch(name):
        real = getattr(forms, name)
        monkeypatch.setattr(forms, name, lambda *args: ran.append(name) or real(*args))

    watch("attend_expanded")
    watch("attend_absorbed")
    m, ids = build(n_layers=1, d_c=6).eval(), tokens()
    m(ids)
    cache = m.new_cache(2, 12)
    m(ids, cache)
    m(ids[:, :1], cache)
    assert ran == ["attend_expanded", "attend_expanded", "attend_absorbed"]


def test_nothing_is_dropped_at_evaluation():
    ids, targets = tokens(), tokens(3)
    m, roomy = build(), build(drop_capacity=None)
    trained = m.losses(ids, targets, with_load=True)
    assert all(load.dropped > 0.1 for load in trained.load)
    assert trained.language.item() != pytest.approx(roomy.losses(ids, targets).language.item())
    m.eval(), roomy.eval()
    evaluated = m.losses(ids, targets, with_load=True)
    assert all(load.dropped == 0 for load in evaluated.load)
    close(evaluated.language, roomy.losses(ids, targets).language)
    logits = m(ids).flatten(0, 1)
    close(evaluated.language, torch.nn.functional.cross_entropy(logits, targets.flatten()))


def test_protected_sequences_drop_nothing():
    """The loss of one sequence, the other's targets ignored, is what it is without dropping."""
    m, roomy, ids = build(), build(drop_capacity=None), tokens()
    for b in range(2):
        targets, protected = tokens(3), torch.arange(2) == b
        targets[1 - b] = -100
        free = roomy.losses(ids, targets).language
        close(m.losses(ids, targets, protected).language, free)
        assert (m.losses(ids, targets).language - free).abs() > 1e-6
        assert (m.losses(ids, targets, ~protected).language - free).abs() > 1e-6


def test_balance_losses_are_summed_over_layers_and_counted_before_dropping():
    ids = tokens()
    losses = build().losses(ids, ids, with_load=True)
    assert [load.layer for load in losses.load] == [1, 2]
    expected = [0.0, 0.0, 0.0]
    for load in losses.load:
        s = load.routing.scores.unflatten(0, (2, T)).tolist()
        chosen = load.routing.indices.unflatten(0, (2, T)).tolist()
        for b in range(2):
            expected[0] += loops.expert_loss(s[b], chosen[b], 0.003) / 2
            expected[1] += loops.device_loss(s[b], chosen[b], 0.05, 3) / 2
            expected[2] += loops.communication_loss(s[b], chosen[b], 0.02, 3, 2) / 2
        assert load.experts.tolist() == [sum(row.count(e) for seq in chosen for row in seq)
                                         for e in range(6)]
        assert load.devices.tolist() == [
            sum(any(e // 2 == d for e in row) for seq in chosen for row in seq) for d in range(3)]
    parts = [losses.expert, losses.device, losses.communication]
    assert [p.item() for p in parts] == pytest.approx(expected, abs=1e-10)
    close(losses.total, losses.language + sum(parts))


@pytest.mark.parametrize("name", ["expert", "device", "communication"])
def test_each_balance_loss_alone_reaches_the_router(name):
    m, ids = build(), tokens()
    getattr(m.losses(ids, ids), name).backward()
    for block in m.blocks[1:]:
        assert block.router.weight.grad.abs().max() > 1e-8
    field = {"expert": "alpha_expert", "device": "alpha_device", "communication": "alpha_comm"}
    off = build(**{field[name]: 0.0}).losses(ids, ids)
    assert getattr(off, name).item() == 0.0 and off.total > off.language


def test_every_parameter_is_trained():
    """Through the total, with dropping on; an expert without tokens has zeros, not None."""
    m, ids = build(drop_capacity=1.0), tokens(batch=1, length=2)
    losses = m.losses(ids, ids, with_load=True)
    losses.total.backward()
    assert all(p.grad is not None for p in m.parameters())
    idle = losses.load[0].experts == 0
    assert idle.any() and (m.blocks[1].experts.W_up.grad[idle] == 0).all()


def test_the_gradient_is_the_slope_of_the_loss():
    """Along a random direction in all parameters, with balance losses and dropping on."""
    m, ids, targets = build(), tokens(), tokens(3)
    m.losses(ids, targets).total.backward()
    direction = [loops.normal(50 + i, *p.shape) for i, p in enumerate(m.parameters())]
    slope = sum((p.grad * v).sum() for p, v in zip(m.parameters(), direction))
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, v in zip(m.parameters(), direction):
                p += step * v
            ends.append(m.losses(ids, targets).total)
    assert abs(slope) > 0.1
    assert ((ends[0] - ends[1]) / 2e-6).item() == pytest.approx(slope.item(), rel=1e-6)


def test_statistics_keep_no_graph():
    m, ids = build(), tokens()
    kept, counts = [], []
    for step in range(50):
        losses = m.losses(ids, ids, with_load=True)
        losses.total.backward()
        kept.append(losses.load)
        for load in losses.load:
            r = load.routing
            tensors = (load.experts, load.devices, r.indices, r.gates, r.scores)
            assert not any(t.requires_grad for t in tensors)
        del losses
        if step in (9, 49):
            gc.collect()
            kept.clear()
            counts.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    assert counts[0] == counts[1]


def test_the_router_of_a_bf16_model_computes_in_fp32():
    m, ids = build().bfloat16(), tokens()
    (first, _) = m.losses(ids, ids, with_load=True).load
    assert first.routing.scores.dtype == first.routing.gates.dtype == torch.float32


@pytest.fixture(scope="module")
def published() -> dict[str, model.DeepSeekV2]:
    """The two published sizes, without memory."""
    with torch.device("meta"):
        return {name: model.DeepSeekV2(getattr(config, name)).bfloat16() for name in ("V2", "LITE")}


def test_published_totals(published):
    """Every size of both presets is in these two numbers."""
    total = {name: sum(p.numel() for p in m.parameters()) for name, m in published.items()}
    assert total == {"V2": 235_741_434_880, "LITE": 15_706_484_224}


def test_published_cache_bytes(published):
    for name, expected in (("V2", 69_120), ("LITE", 31_104)):
        cache = published[name].new_cache(3, 7)
        assert cache.nbytes_per_token == expected and cache.nbytes == 3 * 7 * expected


def test_lite_is_not_a_small_v2(published):
    lite, v2 = published["LITE"], published["V2"]
    assert lite.config.d_cq is None and v2.config.d_cq == 1536
    assert isinstance(lite.blocks[0].attention.W_DQ, torch.nn.Identity)
    for m, devices, limit, factor in ((lite, 1, None, 1.0), (v2, 8, 3, 16.0)):
        router = m.blocks[1].router
        assert (router.n_devices, router.max_devices, router.scaling_factor) == \
            (devices, limit, factor)
        scale = 1.5896 / math.sqrt(192)
        assert all(block.attention.scale == pytest.approx(scale, rel=1e-4) for block in m.blocks)
    c = lite.config
    assert (c.alpha_expert, c.alpha_device, c.alpha_comm, c.drop_capacity) == (0.001, 0, 0, None)
    c = v2.config
    assert (c.alpha_expert, c.alpha_device, c.alpha_comm, c.drop_capacity) == \
        (0.003, 0.05, 0.02, 1.0)


def test_published_configs_are_read_as_meant():
    for preset in (config.V2, config.LITE):
        assert Config.from_hf(preset.to_hf()) == preset
    hf = config.V2.to_hf()
    assert hf["topk_method"] == "group_limited_greedy"
    assert (hf["n_group"], hf["topk_group"]) == (8, 3)
    assert hf["rope_scaling"]["mscale_all_dim"] == 0.707
    # Lite's file names groups as well; `greedy` says not to use them
    hf = config.LITE.to_hf() | {"n_group": 1, "topk_group": 1}
    assert hf["topk_method"] == "greedy" and Config.from_hf(hf).max_devices is None
    # V3's ways are refused, not ignored
    for key, value in (("norm_topk_prob", True), ("scoring_func", "sigmoid"),
                       ("topk_method", "noaux_tc")):
        with pytest.raises(ValueError, match=key):
            Config.from_hf(hf | {key: value})


@torch.no_grad()
def test_published_rows_are_ours_interleaved():
    """Per head [nope; rope] for queries, [latent; rope key], per head [key; value]."""
    m, c = build(), SMALL
    entries = {e.name: e for e in checkpoint.published_entries(m)}
    a, prefix = m.blocks[1].attention, "model.layers.1.self_attn."
    for name, first, second, heads, sizes in (
        ("q_b_proj", a.W_UQ, a.W_QR, c.n_h, (c.d_h, c.d_r)),
        ("kv_a_proj_with_mqa", a.W_DKV, a.W_KR, 1, (c.d_c, c.d_r)),
        ("kv_b_proj", a.W_UK, a.W_UV, c.n_h, (c.d_h, c.d_v)),
    ):
        rows = []
        for i in range(heads):
            rows += list(first.weight[i * sizes[0] : (i + 1) * sizes[0]])
            rows += list(second.weight[i * sizes[1] : (i + 1) * sizes[1]])
        entry = entries[f"{prefix}{name}.weight"]
        assert torch.equal(entry.read(), torch.stack(rows)), name
        new = loops.normal(7, *entry.shape)
        entry.write(new)
        assert torch.equal(entry.read(), new) and torch.equal(first.weight[0], new[0])
    experts, prefix = m.blocks[2].experts, "model.layers.2.mlp.experts.4."
    for name, ours in (("gate", experts.W_gate), ("up", experts.W_up), ("down", experts.W_down)):
        assert torch.equal(entries[f"{prefix}{name}_proj.weight"].read(), ours[4]), name

# SPDX-License-Identifier: MIT
"""A block is a function of its inputs: run twice, in part, or on a share of the experts, it says
the same; and a pass waits for no device."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from alive import Alive
from oracles import loops
from refusals import refused
from torch import Tensor, nn

from dsv2_ref.attention.kv_cache import Cache
from dsv2_ref.checkpoint import save
from dsv2_ref.config import TINY, Config
from dsv2_ref.files.published import published_entries
from dsv2_ref.inference.generate import generate, sample
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.moe.experts import MixtureOfExperts, experts_loop, experts_padded, of_share

CONFIG = TINY.with_(vocab=101, d=26, n_layers=4, n_h=3, d_h=10, d_r=6, d_v=14, d_c=20, d_cq=22,
                    dense_width=30, expert_width=18, max_positions=64, init_std=0.2)


def built(**changes) -> DeepSeekV2:
    torch.manual_seed(1)
    return DeepSeekV2(CONFIG.with_(**changes)).double()


def ids(B: int = 3, T: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(101, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


# ---- run again in the backward pass

def peak(alpha: float, recompute: float) -> int:
    """The most bytes that are alive at a time in a step, weights and gradients aside."""
    model = built(n_layers=8, alpha_expert=alpha, drop_capacity=None).train()
    model.recompute = recompute
    rows = ids(2, 64)
    for W in model.parameters():
        W.grad = torch.zeros_like(W)
    with Alive() as alive:
        for W in model.parameters():
            alive.see(W), alive.see(W.grad)
        alive.clear()
        with alive.during("step"):
            model.losses(rows, rows).total.backward()
    return alive.peak - alive.at_peak["before"]


def test_blocks_run_again_are_forgotten_again_with_balance_losses_too():
    """Once a block wrote its losses to a list of the pass: its recomputed graph stayed alive."""
    without, plain = peak(0.0, 1.0), peak(0.001, 0.0)
    assert peak(0.001, 1.0) < 1.05 * without < 0.4 * plain


@pytest.mark.parametrize("recompute", [0.5, 1.0])
def test_run_again_it_has_the_same_losses_gradients_and_traffic(recompute):
    found = []
    for share in (0.0, recompute):
        m = built().train()
        m.recompute = share
        losses = m.losses(ids(), ids(seed=1), torch.tensor([True, False, False]), with_load=True)
        losses.total.backward()
        assert losses.expert > 0 and losses.load[0].dropped > 0
        found.append((losses, [p.grad for p in m.parameters()]))
    for name in ("language", "expert", "device", "communication"):
        assert torch.equal(getattr(found[0][0], name), getattr(found[1][0], name))
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found[0][0].load, found[1][0].load, strict=True):
        assert torch.equal(a.experts, b.experts) and a.dropped == b.dropped


# ---- a range of layers

def staged(config: Config, cuts: list[int], whole: DeepSeekV2) -> list[DeepSeekV2]:
    """Stages with the weights of `whole`; a tied matrix has two owners."""
    stages = []
    for start, stop in zip([0, *cuts], [*cuts, config.n_layers]):
        stage = DeepSeekV2(config, layers=range(start, stop)).double()
        stage.train(whole.training)
        for part in ("embedding", "norm", "head"):
            if hasattr(stage, part):
                getattr(stage, part).load_state_dict(getattr(whole, part).state_dict())
        for block, its in zip(stage.blocks, whole.blocks[start:stop], strict=True):
            assert block.layer == its.layer
            block.load_state_dict(its.state_dict())
        stages.append(stage)
    return stages


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cuts", [[1], [3], [1, 2], [1, 2, 3]])
def test_stages_are_the_whole_model(cuts, tied):
    whole = built(tie_embeddings=tied).train()
    stages = staged(whole.config, cuts, whole)
    assert [hasattr(s, "embedding") for s in stages] == [True, *[False] * (len(cuts) - 1), tied]
    assert [hasattr(s, "head") for s in stages] == [*[False] * len(cuts), True]
    x, y = ids(), ids(seed=1)
    expected = whole.losses(x, y)
    expected.total.backward()
    h, total = stages[0].embed(x), torch.zeros(3)
    for stage in stages:
        run = forms_of(stage, x)
        h, balance, _ = stage.through(h, run)
        total = total + balance
    logits = stages[-1].head(stages[-1].finish(h)).flatten(0, 1)
    language = nn.functional.cross_entropy(logits, y.flatten())
    (language + total.sum()).backward()
    close(language, expected.language)
    close(total, torch.stack((expected.expert, expected.device, expected.communication)))
    for stage, start in zip(stages, [0, *cuts]):
        for block, its in zip(stage.blocks, whole.blocks[start:]):
            for p, q in zip(block.parameters(), its.parameters(), strict=True):
                close(p.grad, q.grad)
    of_head = stages[-1].head.weight.grad
    of_embedding = stages[0].embedding.weight.grad
    if tied:                                   # two owners, one gradient: their sum
        close(of_head + of_embedding, whole.embedding.weight.grad)
    else:
        close(of_head, whole.head.weight.grad)
        close(of_embedding, whole.embedding.weight.grad)


def forms_of(stage: DeepSeekV2, x: Tensor):
    return replace(stage.start(x.shape), learns=True)


@torch.no_grad()
def test_stages_decode_from_caches_of_their_own_layers():
    whole = built().eval()
    stages = staged(whole.config, [1, 3], whole)
    x = ids(2, 9)
    caches = [s.new_cache(2, 16) for s in stages]
    assert [len(c.store) for c in caches] == [1, 2, 1]
    out = []
    for piece in x.split([5, 1, 3], 1):
        h = stages[0].embed(piece)
        for stage, cache in zip(stages, caches):
            h, _, _ = stage.through(h, stage.start(piece.shape, cache))
            cache.advance()
        out.append(stages[-1].head(stages[-1].finish(h)))
    close(torch.cat(out, 1), whole(x))


def test_a_stage_says_what_it_cannot_do():
    middle = DeepSeekV2(CONFIG, layers=range(1, 3))
    refused(lambda: middle(ids()), "layers: range(1, 3)", "to read tokens")
    refused(lambda: middle.finish(torch.zeros(1, 1, 26)), "layers: range(1, 3)", "the last ones")
    for layers in (range(2, 2), range(0, 5), range(-1, 2), range(0, 4, 2)):
        refused(lambda layers=layers: DeepSeekV2(CONFIG, layers=layers), "layers: range(", "0, 4")


# ---- a share of the experts

@pytest.mark.parametrize("form", [experts_loop, experts_padded])
@pytest.mark.parametrize("cuts", [[4], [1, 5], [2, 4, 6]])
def test_shares_of_the_experts_add_up_to_the_whole(form, cuts):
    whole = loops.randomize(MixtureOfExperts(13, 7, 2, 8), 1)
    N, K = 11, 3
    x, gates = loops.normal(2, N, 13), loops.normal(3, N, K).abs()
    indices = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(n))[:K]
                           for n in range(N)])
    keep = loops.normal(4, N, K) > -0.5
    weights = whole.W_gate, whole.W_up, whole.W_down
    for kept in (None, keep):
        total = torch.zeros(N, 13, dtype=torch.float64)
        for start, stop in zip([0, *cuts], [*cuts, 8]):
            held = range(start, stop)
            total += of_share(form, held)(x, indices, gates, *(W[start:stop] for W in weights),
                                          kept)
        close(total, form(x, indices, gates, *weights, kept))
        assert total.abs().max() > 0.1


def test_a_model_of_held_experts_and_a_form_across_ranks():
    """Two ranks in one process: each holds half of the experts, `across` adds both parts."""
    whole = built().train()
    ranks = []
    for held in (range(0, 5), range(5, 8)):
        torch.manual_seed(3)
        rank = DeepSeekV2(whole.config, held=held).double().train()
        state = {name: p[held.start : held.stop] if ".experts.W_" in name else p
                 for name, p in whole.state_dict().items()}
        rank.load_state_dict(state)
        assert rank.blocks[2].experts.W_up.shape[0] == len(held)
        ranks.append(rank)

    def across(local):
        """What the other rank adds, computed here from its weights."""
        def form(x, indices, gates, W_gate, W_up, W_down, keep=None):
            layer = next(i for i, b in enumerate(ranks[0].blocks) if b.layer
                         and b.experts.W_gate is W_gate)
            parts = [of_share(local, r.blocks[layer].experts.held)(
                x, indices, gates, r.blocks[layer].experts.W_gate, r.blocks[layer].experts.W_up,
                r.blocks[layer].experts.W_down, keep) for r in ranks]
            return parts[0] + parts[1]
        return form

    refused(lambda: ranks[0].losses(ids(), ids()), "indices: expert", "expected 0 to 4")
    ranks[0].across = lambda forms: replace(forms, experts=across(forms.experts))
    got, expected = ranks[0].losses(ids(), ids(seed=1)), whole.losses(ids(), ids(seed=1))
    close(got.total, expected.total)
    got.total.backward()
    expected.total.backward()
    for i in (1, 2, 3):
        of_ranks = torch.cat([r.blocks[i].experts.W_up.grad for r in ranks])
        close(of_ranks, whole.blocks[i].experts.W_up.grad)
        close(ranks[0].blocks[i].router.weight.grad, whole.blocks[i].router.weight.grad)


def test_a_share_that_is_none_is_refused():
    for held in (range(3, 3), range(0, 9), range(-1, 3), range(0, 8, 2)):
        refused(lambda held=held: MixtureOfExperts(5, 4, 1, 8, held), "held: range(", "range(0, 8)")


def test_routed_and_shared_experts_begin_alike():
    """Both as nn.Linear begins: a routed network is not born a hundred times smaller."""
    torch.manual_seed(0)
    m, x = MixtureOfExperts(96, 64, 1, 4), torch.randn(200, 96)
    indices, gates = torch.zeros(200, 1, dtype=torch.int64), torch.ones(200, 1)
    routed = experts_loop(x, indices, gates, m.W_gate, m.W_up, m.W_down)
    assert 0.5 < routed.std() / m.shared(x).std() < 2


@pytest.mark.parametrize("tied", [False, True])
def test_stages_and_shares_have_the_published_tensors_between_them(tied):
    """Names come from the layers and the experts that are here; each is somewhere, and once."""
    whole = {e.name: e.shape for e in published_entries(DeepSeekV2(CONFIG.with_(
        tie_embeddings=tied)))}
    found: list[str] = []
    for layers in (range(0, 1), range(1, 3), range(3, 4)):
        for held in (range(0, 3), range(3, 8)):
            part = DeepSeekV2(CONFIG.with_(tie_embeddings=tied), layers, held)
            entries = {e.name: e.shape for e in published_entries(part)}
            assert entries.items() <= whole.items()
            found += [name for name in entries if ".experts." in name or held.start == 0]
    assert sorted(found) == sorted(whole)
    refused(lambda: save(DeepSeekV2(CONFIG, range(1, 3)), "nowhere"), "expected")


# ---- another kind of cache

class PagedCache(Cache):
    """A toy: rows of all sequences in one pool of pages of 4 tokens, found through a table.

    It has nothing of the dense caches but what they share: lengths, the pass, its counts.
    """

    PAGE = 4

    def __init__(self, n_layers: int, batch: int, pages: int, d_c: int, d_r: int) -> None:
        self.pool = torch.full((n_layers, pages, self.PAGE, d_c + d_r), torch.nan).double()
        self.table: list[list[int]] = [[] for _ in range(batch)]
        self.used, self.d_c = [0] * pages, d_c
        # what the base counts with: room for every sequence, no memory behind it
        super().__init__(torch.empty(n_layers, batch, pages * self.PAGE, device="meta"))

    def _begin(self, T, counts):
        for b, (old, new) in enumerate(zip(self.lengths, counts)):
            while len(self.table[b]) * self.PAGE < old + new:
                page = self.used.index(0)
                self.used[page] = 1
                self.table[b].append(page)
            if new and (last := self.table[b][old // self.PAGE]) and self.used[last] > 1:
                self._own(b, old // self.PAGE)
        run = super()._begin(T, counts)
        return run._replace(positions=torch.tensor(self.lengths)[:, None] + torch.arange(T))

    def _own(self, b: int, i: int) -> None:
        """A shared page that is written to becomes one's own."""
        old, new = self.table[b][i], self.used.index(0)
        self.pool[:, new] = self.pool[:, old]
        self.used[old], self.used[new], self.table[b][i] = self.used[old] - 1, 1, new

    def write(self, layer, c_kv, k_r):
        if self._pass is None:
            self.positions(c_kv.shape[1])
        assert layer not in self._written
        rows = torch.cat((c_kv, k_r), -1).detach()
        for b, n in enumerate(self._pass.counts):
            for t in range(n):
                page, at = divmod(self.lengths[b] + t, self.PAGE)
                self.pool[layer, self.table[b][page], at] = rows[b, t]
        self._written.add(layer)

    def rows(self, layer):
        end = self._pass.end
        out = torch.zeros(self.batch, end, self.pool.shape[-1], dtype=self.pool.dtype)
        for b, pages in enumerate(self.table):
            n = min(end, self.lengths[b] + self._pass.counts[b])
            out[b, :n] = self.pool[layer, pages].flatten(0, 1)[:n]
        return out[..., : self.d_c], out[..., self.d_c :]

    def release(self, slots):
        for b in slots:
            for page in self.table[b]:
                self.used[page] -= 1
            self.table[b] = []
        super().release(slots)

    def share(self, slot: int, other: int) -> None:
        """Sequence `other` goes on from what `slot` has read; pages are shared until written."""
        self.release([other])
        self.table[other] = list(self.table[slot])
        for page in self.table[other]:
            self.used[page] += 1
        self.lengths = [self.lengths[slot] if b == other else n
                        for b, n in enumerate(self.lengths)]


def test_a_paged_cache_fits_the_seam():
    """Ragged prompts, decoding, a shared prefix, pages given back: as the dense cache does it."""
    m = built().eval()
    c, prompts = m.config, [[5, 9, 2, 7, 11], [3], [8] * 17]
    paged = PagedCache(c.n_layers, 3, 16, c.d_c, c.d_r)
    free = generate(m, prompts, 12, stop=())
    assert generate(m, prompts, 12, stop=(), cache=paged) == free
    pages = sum(paged.used)
    paged.share(2, 0)
    assert sum(used > 0 for used in paged.used) < pages
    turn = [[4], [6], [9]]
    texts = [prompts[2] + free[2][:-1] + [4], prompts[1] + free[1][:-1] + [6],
             prompts[2] + free[2][:-1] + [9]]
    assert generate(m, turn, 5, stop=(), cache=paged) == generate(m, texts, 5, stop=())
    paged.release([0, 1, 2])
    assert sum(paged.used) == 0 and paged.lengths == [0, 0, 0]


# ---- checks, and what a device is not asked

@pytest.fixture
def autocast_of_meta(monkeypatch):
    """torch has none."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def test_no_check_waits_for_a_device(autocast_of_meta):
    """Tensors on "meta" have no values, and reading one raises: only shapes and dtypes are read."""
    m = DeepSeekV2(CONFIG.with_(n_dense=CONFIG.n_layers, drop_capacity=None)).to("meta")
    x = torch.zeros(2, 7, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        x.max().item()
    m.train().losses(x, x, torch.zeros(2, dtype=torch.bool, device="meta")).total.backward()
    for kind in ("latent", "six_bit"):
        cache = m.new_cache(2, 20, kind)
        for piece in (7, 1, 1):
            logits = m(x[:, :piece], cache)
            assert logits.shape == (2, piece, 101) and logits.device.type == "meta"
        m.hidden(x[:, :3], cache, [3, 1])
        m.hidden(x[:, :3], cache, [1, 2])
        assert sample(logits[:, -1], 0.0, 1.0).device.type == "meta"
    refused(lambda: m(x.float()), "tokens: dtype torch.float32")


def test_routing_dropping_and_balance_wait_for_no_device(autocast_of_meta):
    """The naive experts do (they ask how many slots each got), the rest of a layer does not."""
    def no_experts(x, indices, gates, W_gate, W_up, W_down, keep=None):
        return x * gates.sum() * (1 if keep is None else keep.sum())

    m = DeepSeekV2(CONFIG).to("meta").train()
    m.across = lambda forms: replace(forms, experts=no_experts)
    x = torch.zeros(2, 7, dtype=torch.int64, device="meta")
    m.losses(x, x, torch.zeros(2, dtype=torch.bool, device="meta"), with_load=True).total.backward()


def test_an_unknown_id_is_refused_on_a_cpu_and_nan_elsewhere(monkeypatch):
    m = built().eval()
    x = ids()
    x[1, 3] = 101
    refused(lambda: m(x), "tokens: id 101, expected 0 to 100")
    refused(lambda: m.losses(ids(), x), "targets: id 101, expected 0 to 100")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)       # asks no values either
    logits = m(x)
    assert logits[1, 3:].isnan().all() and logits[[0, 2]].isfinite().all()
    assert m.losses(ids(), x).language.isnan() and m.losses(x, ids()).language.isnan()
    y = ids(seed=1)
    y[0, 0] = -100
    assert m.losses(ids(), y).language.isfinite()


def test_int32_ids_serve_and_other_kinds_are_refused():
    m = built().train()
    expected = m.losses(ids(), ids(seed=1)).total
    close(m.losses(ids().int(), ids(seed=1).int()).total, expected)
    refused(lambda: m.losses(ids(), ids().short()), "targets: dtype torch.int16, expected int64")
    refused(lambda: m.losses(ids(), ids(), torch.zeros(3)), "protected", "expected bool")
    refused(lambda: m(ids()[0]), "tokens: shape (12,), expected (batch, tokens)")


def test_a_failed_pass_leaves_the_cache_as_it_was():
    m = built().eval()
    cache = m.new_cache(1, 20)
    expected = m(ids(1, 5), cache)[:, -1]
    hook = m.blocks[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError()))
    cache.lengths = [4]
    with pytest.raises(KeyError):
        m(ids(1, 5)[:, 4:], cache)
    hook.remove()
    assert cache.lengths == [4]
    close(m(ids(1, 5)[:, 4:], cache)[:, -1], expected)


def test_training_through_the_cache_is_refused():
    m = built().train()
    for kind in ("latent", "six_bit"):
        logits = m(ids(), m.new_cache(3, 20, kind))
        with pytest.raises(ValueError, match="gradient: asked for through a cache"):
            logits.sum().backward()


def test_adapters_count_in_the_head_and_in_the_losses():
    m = built(tie_embeddings=False).eval()

    class Head(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.A = nn.Parameter(torch.randn(2, 26, dtype=torch.float64))
            self.B = nn.Parameter(torch.randn(101, 2, dtype=torch.float64))

        @property
        def weight(self) -> Tensor:
            return self.base.weight

        def forward(self, h: Tensor) -> Tensor:
            return self.base(h) + h @ self.A.T @ self.B.T

    before = m.losses(ids(), ids(seed=1)).language
    m.head = Head(m.head)
    language = m.losses(ids(), ids(seed=1)).language
    logits = m(ids()).flatten(0, 1)
    close(language, nn.functional.cross_entropy(logits, ids(seed=1).flatten()))
    assert (language - before).abs() > 0.1
    language.backward()
    assert m.head.A.grad.abs().max() > 0 and m.head.B.grad.abs().max() > 0


def test_a_default_device_of_none_of_the_tensors_does_not_matter():
    m, x = built().eval(), ids()
    expected = m(x)
    from dsv2_ref.model import _rope

    _rope.cache_clear()
    try:
        torch.set_default_device("meta")
        cache = m.new_cache(3, 20)
        got = m(x, cache)
    finally:
        torch.set_default_device(None)
        _rope.cache_clear()
    close(got, expected)


@pytest.mark.filterwarnings("ignore")               # of the compiler about itself
def test_a_compiled_model_is_the_model():
    """In fp32, with so many tokens that it would take grouped_mm, which it knows in bf16 alone.

    What it is made of is compiled in fp64 in test_compile.py.
    """
    torch._dynamo.reset()
    m = built(n_layers=2, expert_width=16, d=32).float().train()
    compiled = torch.compile(m.losses, backend="aot_eager")
    x, y = ids(3, 20), ids(3, 20, seed=1)
    expected, got = m.losses(x, y), compiled(x, y)
    tolerance = 1e-5
    assert (got.total - expected.total).abs() < tolerance * expected.total.abs()
    got.total.backward()
    gradient = m.blocks[1].router.weight.grad.clone()
    m.zero_grad()
    expected.total.backward()
    exact = m.blocks[1].router.weight.grad
    assert (gradient - exact).abs().max() < 1e3 * tolerance * exact.abs().max()
    with torch.no_grad():
        cache, plain = m.new_cache(3, 30), m.new_cache(3, 30)
        step = torch.compile(m, backend="aot_eager")
        m(x[:, :8], cache), m(x[:, :8], plain)
        for piece in (x[:, 8:9], x[:, 9:10]):
            a, b = step(piece, cache), m(piece, plain)
            assert (a - b).abs().max() < 10 * tolerance * b.abs().max()
    torch._dynamo.reset()


def test_second_derivatives_of_the_fused_loss_are_refused():
    m = built().eval()
    loss = m.losses(ids(), ids(seed=1)).language
    refused(lambda: torch.autograd.grad(loss, m.norm.weight, create_graph=True),
            "second derivative")

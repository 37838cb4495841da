# SPDX-License-Identifier: MIT
"""The model on the six-bit cache: the same logits however the tokens arrive and attention runs."""

import pytest
import torch
from torch import Tensor

from dsv2_ref import forms as module
from dsv2_ref.attention.cache_quant import SixBitCache, attend_packed
from dsv2_ref.attention.kv_cache import LatentCache
from dsv2_ref.attention.mla import attend_absorbed, attend_expanded
from dsv2_ref.config import TINY, V2
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2

PROMPTS = [[5, 9, 2, 7, 11], [3], [8] * 17, [1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model() -> DeepSeekV2:
    torch.manual_seed(0)
    config = TINY.with_(vocab=43, n_h=3, d_h=10, d_r=6, d_v=8, d_c=24, d=30, init_std=0.3,
                        max_positions=64)
    return DeepSeekV2(config).double().eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 43, shape, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@torch.no_grad()
def in_chunks(model: DeepSeekV2, tokens: Tensor, chunks: list[int], kind: str) -> Tensor:
    cache = model.new_cache(len(tokens), tokens.shape[1], kind)
    return torch.cat([model(piece, cache) for piece in tokens.split(chunks, 1)], 1)


@pytest.mark.parametrize("chunks", [[1, 3, 2, 5, 1, 8], [1] * 20, [19, 1], [2, 18]])
def test_in_chunks_equals_at_once(model, chunks):
    tokens = ids(3, 20)
    full = in_chunks(model, tokens, [20], "six_bit")
    close(in_chunks(model, tokens, chunks, "six_bit"), full)
    exact = in_chunks(model, tokens, [20], "latent")
    assert 1e-4 < (full - exact).abs().median() < 0.2    # quantised, but not by much


@pytest.mark.parametrize("form", ["expanded", "absorbed", "packed"])
def test_every_form_of_attention_reads_the_same_rows(model, monkeypatch, form):
    """The prompt in two pieces and then token by token, always by the same form."""
    tokens = ids(3, 20)
    expected = in_chunks(model, tokens, [20], "six_bit")
    forms = {"expanded": attend_expanded, "absorbed": attend_absorbed}
    monkeypatch.setattr(module, "absorbed_is_cheaper", lambda *_: form == "packed")
    if form in forms:
        monkeypatch.setattr(module, "attend_expanded", forms[form])
    else:
        monkeypatch.setattr(module, "attend_packed",
                            lambda *arguments: attend_packed(*arguments, tile=3))
    close(in_chunks(model, tokens, [7, 6, *[1] * 7], "six_bit"), expected)


def test_packed_equals_absorbed_on_the_dequantised_rows():
    g = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    cache = SixBitCache(1, 2, 30, 24, 6, torch.float64)
    c, r = normal(2, 30, 24), normal(2, 30, 6)
    arguments = normal(2, 4, 3, 10), normal(2, 4, 3, 6)
    weights = normal(3, 10, 24), normal(3, 8, 24), 0.4
    for positions in (None, torch.tensor([[3, 4, 5, 6], [26, 27, 28, 29]])):
        cache.write(0, c, r)
        dequantised = attend_absorbed(*arguments, *cache.dequantised(0), *weights, positions)
        for tile in (1, 7, 256):
            packed = attend_packed(*arguments, *cache.rows(0), *weights, positions, tile)
            close(packed, dequantised)
        cache.undo()


def test_decoding_reads_the_packed_rows_and_expands_nothing(model, monkeypatch):
    cache = model.new_cache(2, 20, "six_bit")
    model(ids(2, 9), cache)
    calls = []
    monkeypatch.setattr(module, "attend_packed",
                        lambda *a: calls.append(a[2].dtype) or attend_packed(*a))
    monkeypatch.setattr(module, "dequantise", lambda *_: pytest.fail("dequantised"))
    model(ids(2, 1), cache)
    assert calls == [torch.int16] * model.config.n_layers


@torch.no_grad()
def naive(model: DeepSeekV2, prompt: list[int], n: int) -> list[int]:
    """A fresh six-bit cache reads the whole text again for every token."""
    text = list(prompt)
    for _ in range(n):
        text.append(int(in_chunks(model, torch.tensor([text]), [len(text)], "six_bit")[0, -1]
                        .argmax()))
    return text[len(prompt):]


def test_a_ragged_batch_is_each_prompt_alone(model):
    cache = model.new_cache(4, 40, "six_bit")
    assert generate(model, PROMPTS, 20, stop=(), cache=cache) == [
        naive(model, p, 20) for p in PROMPTS]


def test_going_on_from_a_cache_equals_one_long_prompt(model):
    cache = model.new_cache(2, 40, "six_bit")
    first = generate(model, PROMPTS[:2], 4, stop=(), cache=cache)
    assert cache.lengths == [len(p) + 3 for p in PROMPTS[:2]]
    turn = [[row[-1], 6, 6] for row in first]
    second = generate(model, turn, 5, stop=(), cache=cache)
    whole = [p + row + [6, 6] for p, row in zip(PROMPTS, first, strict=False)]
    assert second == [naive(model, p, 5) for p in whole]


def test_a_reset_cache_is_a_new_one(model):
    cache = model.new_cache(2, 12, "six_bit")
    first = model(ids(2, 12), cache)
    cache.reset()
    assert torch.equal(model(ids(2, 12), cache), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes(model, dtype):
    cast = DeepSeekV2(model.config).to(dtype).eval()
    cast.load_state_dict(model.state_dict())
    tokens = ids(2, 12)
    got = in_chunks(cast, tokens, [8, 1, 1, 2], "six_bit")
    assert got.dtype == dtype
    exact = in_chunks(model, tokens, [12], "six_bit")
    tolerance = 1e-4 if dtype == torch.float32 else 0.5
    if dtype == torch.float32:
        assert (got - exact).abs().median() < tolerance
    else:
        assert ((got - exact).abs().mean() / exact.abs().mean()) < tolerance


def test_a_model_that_has_gone_wrong_is_told_so(model):
    """NaN weights: the first layer's latent names itself; the cache is left as it was."""
    broken = DeepSeekV2(model.config).double().eval()
    broken.blocks[0].attention.W_KR.weight.data[0, 0] = torch.nan
    cache = broken.new_cache(1, 5, "six_bit")
    with pytest.raises(ValueError, match="^k_r: NaN in a row"):
        broken(ids(1, 3), cache)
    assert cache.lengths == [0]


def test_bytes_of_the_published_model():
    """436 bytes a row; the store of 16-bit numbers it replaces has 1152."""
    with torch.device("meta"):
        v2 = DeepSeekV2(V2)
    cache = v2.new_cache(2, 3, "six_bit")
    assert isinstance(cache, SixBitCache) and cache.words.device.type == "meta"
    assert cache.nbytes_per_token == 60 * 436 and cache.nbytes == 2 * 3 * 60 * 436
    plain = v2.to(torch.bfloat16).new_cache(2, 3)
    assert isinstance(plain, LatentCache) and plain.nbytes == 2 * 3 * 60 * 1152

# SPDX-License-Identifier: MIT
"""Live caches occupy what the closed forms of `cost` say."""

import pytest
import torch

from dsv2_ref import cost
from dsv2_ref.config import LITE, TINY, V2
from dsv2_ref.inference import live_cache
from dsv2_ref.inference.live_cache import filled_cache, measured_cache_bytes

# every size different, so that no two can be exchanged unnoticed
ODD = TINY.with_(n_layers=5, n_h=8, d_h=11, d_r=6, d_v=13, d_c=17, d_cq=23)
CONFIGS = {"V2": V2, "LITE": LITE, "TINY": TINY, "ODD": ODD}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_live_caches_occupy_what_the_formula_says(name, dtype):
    config = CONFIGS[name]
    measured = measured_cache_bytes(config, dtype=dtype)
    assert list(measured) == ["MHA", "GQA", "MQA", "MLA"]
    for kind, size in measured.items():
        assert size == cost.cache_elements_per_token(kind, config) * dtype.itemsize


def test_published_sizes_are_measured_too():
    assert measured_cache_bytes(V2) == {
        "MHA": 3_932_160, "GQA": 983_040, "MQA": 30_720, "MLA": 69_120,
    }


@pytest.mark.parametrize("kind", cost.KINDS)
def test_the_measured_cache_is_really_filled(kind):
    cache = filled_cache(kind, ODD, tokens=4)
    assert cache.lengths == [4] and cache.max_tokens == 4
    rows = cache.store.flatten(3).float()                          # (l, B, tokens, ·)
    assert rows.shape[0] == ODD.n_layers
    assert rows.isfinite().all() and (rows != 0).float().mean() > 0.99


def test_a_cache_that_keeps_expanded_keys_is_found_out(monkeypatch):
    class Expanded(live_cache.LatentCache):
        def __init__(self, n_layers, batch, max_tokens, d_c, d_r, dtype):
            super().__init__(n_layers, batch, max_tokens, d_c, d_r, dtype)
            width = ODD.n_h * (ODD.d_h + ODD.d_r + ODD.d_v)
            self.wide = torch.zeros(n_layers, batch, max_tokens, width, dtype=dtype)

        @property
        def nbytes(self):
            return self.wide.untyped_storage().nbytes()

    honest = measured_cache_bytes(ODD)["MLA"]
    monkeypatch.setattr(live_cache, "LatentCache", Expanded)
    assert measured_cache_bytes(ODD)["MLA"] == 2 * cost.expanded_elements(ODD) > 10 * honest


def test_measuring_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    measured_cache_bytes(TINY)
    assert torch.equal(torch.rand(2), expected)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind: 'XQA', expected MHA, GQA, MQA or MLA"):
        measured_cache_bytes(TINY, kinds=["MHA", "XQA"])

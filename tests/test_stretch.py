# SPDX-License-Identifier: MIT
"""The same weights under YaRN: which numbers of the config change, and what that makes of them."""

import pytest
import torch

from dsv2_ref.attention.rope import rope_tables, yarn_frequencies
from dsv2_ref.config import LITE, TINY, V2
from dsv2_ref.model import DeepSeekV2, _rope
from dsv2_ref.stretch import stretched, stretched_config, trained_positions, with_config


def test_a_stretched_config_is_v2s_where_the_numbers_are():
    plain = V2.with_(yarn_factor=None, yarn_mscale=None, yarn_mscale_all_dim=None,
                     max_positions=4096)
    assert stretched_config(plain, 40) == V2
    assert stretched_config(LITE, 40) == LITE


def test_the_trained_length_is_yarns_original_one():
    assert trained_positions(V2) == 4096 and trained_positions(TINY) == 512
    short = TINY.with_(trained_positions=100)
    assert trained_positions(short) == 100 and stretched_config(short, 8).max_positions == 800
    twice = stretched_config(stretched_config(TINY, 4), 8)       # not 4 times 8
    assert (twice.yarn_factor, twice.yarn_original_positions, twice.max_positions) == (8, 512, 4096)


def test_an_own_trained_length_and_own_mscales_are_kept():
    config = stretched_config(TINY.with_(yarn_mscale=1.0, yarn_mscale_all_dim=0.5), 3.0, 100)
    assert (config.yarn_original_positions, config.max_positions) == (100, 512)
    assert (config.yarn_mscale, config.yarn_mscale_all_dim) == (1.0, 0.5)


def test_factor_one_is_plain_rope_with_the_room_there_was():
    plain = stretched_config(stretched_config(TINY, 8), 1)
    assert plain == TINY.with_(max_positions=4096, trained_positions=512,
                               yarn_original_positions=512)
    assert stretched_config(plain, 8) == stretched_config(TINY, 8)   # it still says its length
    assert stretched_config(TINY, 1) == TINY


@pytest.mark.parametrize("factor", (0.5, 0, -2, float("nan")))
def test_a_factor_below_one_is_refused(factor):
    with pytest.raises(ValueError, match="factor: .*expected a number >= 1"):
        stretched_config(TINY, factor)


def test_weights_are_shared_and_frequencies_and_softmax_scale_are_yarns():
    model = DeepSeekV2(TINY)
    longer = stretched(model, 8)
    for (name, weight), other in zip(model.named_parameters(), longer.parameters(), strict=True):
        assert weight.data_ptr() == other.data_ptr(), name
    assert longer.head.weight is longer.embedding.weight and not longer.training
    frequencies, magnitude = _rope(longer.config, torch.device("cpu"))
    assert torch.equal(frequencies, yarn_frequencies(8, 1e4, 8.0, 32, 1, 512)) and magnitude == 1
    m = 0.0707 * torch.tensor(8.0).double().log().item() + 1     # the paper's sqrt(t)
    assert longer.blocks[0].attention.scale == pytest.approx(m**2 / 24**0.5, abs=1e-15)


def test_the_model_computes_what_one_built_so_computes():
    torch.manual_seed(0)
    model = DeepSeekV2(TINY).double().eval()
    for W in model.parameters():             # larger than at init, so that positions matter
        W.data *= 5 if W.ndim > 1 else 1
    built = DeepSeekV2(stretched_config(TINY, 8)).double().eval()
    built.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 512, (1, 40))
    assert torch.equal(stretched(model, 8)(tokens), built(tokens))
    assert (stretched(model, 8)(tokens) - model(tokens)).abs().max() > 1e-3
    assert torch.equal(with_config(model, TINY)(tokens), model(tokens))


def test_positions_of_the_tables_reach_what_was_promised():
    config = stretched_config(TINY, 256)
    frequencies, _ = _rope(config, torch.device("cpu"))
    cos, _ = rope_tables(torch.tensor([config.max_positions - 1]), frequencies)
    assert config.max_positions == 131_072 and cos.dtype == torch.float64

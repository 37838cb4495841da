# SPDX-License-Identifier: MIT
"""The measurement of cache schemes: what must be zero is zero, and what is worse measures worse."""

import json

import pytest
import torch

from dsv2_ref import checkpoint
from dsv2_ref.__main__ import main
from dsv2_ref.bench import cache_quality as bench
from dsv2_ref.config import TINY
from dsv2_ref.files.whole import write_text
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.corpora import Document
from dsv2_ref.text.tokenizer import train_tokenizer

TEXTS = [Document(f"{i}", f"The {word} went to the sea and came back {i} times. " * 9)
         for i, word in enumerate(["fox", "hen", "cat", "owl", "dog", "elk"] * 3)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((d.text for d in TEXTS), 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = TINY.with_(vocab=tokenizer.vocab, d_c=32, d_r=8, init_std=0.2, max_positions=64)
    return DeepSeekV2(config).eval()


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits, group", [(6, None), (6, 64), (5, 16), (8, 4)])
def test_symmetric_errs_by_half_a_step_of_its_group(bits, group):
    x = normal(1, 7, 64)
    y = x.unflatten(-1, (-1, group or 64))
    step = y.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    error = (bench.symmetric(bits, group)(x).view_as(y) - y).abs()
    assert (error <= step * 0.5 * (1 + 2**-6) + y.abs() * 2**-8).all()
    assert len(bench.symmetric(bits)(x[:1]).unique()) <= 2**bits


def test_codes_with_a_zero_err_by_one_step_of_their_group():
    x = normal(2, 7, 64) + 3                             # far from symmetric: the zero is needed
    y = x.unflatten(-1, (-1, 32))
    step = (y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True)) / 15
    assert ((bench.with_zero(4, 32)(x) - x).view_as(y).abs() <= step * 1.02).all()
    assert (bench.symmetric(4, 32)(x) - x).square().mean() > (
        bench.with_zero(4, 32)(x) - x).square().mean()


def test_fp8_keeps_three_bits_of_every_number():
    x = normal(3, 7, 64)
    large = x.abs() > x.abs().amax(-1, keepdim=True) / 1000
    assert ((bench.fp8(x) - x).abs()[large] <= x.abs()[large] / 16 * 1.001).all()


def test_bits_are_those_of_the_published_row():
    bits = {name: scheme.bits for name, scheme in bench.SCHEMES.items()}
    assert bits["int4 g32 zero, RoPE 16"] == 6.0
    assert bits["int6, RoPE int6"] == pytest.approx(8 * 436 / 576)
    assert bits["int5, RoPE int8"] == pytest.approx(8 * 388 / 576)
    assert bits["int6, RoPE exact"] == pytest.approx(8 * 514 / 576)


@torch.no_grad()
def test_an_exact_scheme_costs_nothing_and_others_do(model, tokenizer):
    rows = bench.windows(TEXTS, tokenizer, seed=0, n=2, length=40)
    references = [bench.log_probabilities(model, row[:-1]) for row in rows]
    torch.testing.assert_close(references[0], model(rows[:1, :-1])[0].log_softmax(-1))
    same = bench.Scheme(bench.exact, bench.exact, 16)
    for x in bench.compare(model, same, rows, references):
        assert x.shape == (2, 40) and (x == 0).all()
    kl = {bits: bench.compare(model, bench.Scheme(*[bench.symmetric(bits)] * 2, bits), rows,
                              references)[0].mean() for bits in (3, 5, 8)}
    assert kl[3] > kl[5] > kl[8] > 0


@pytest.mark.parametrize("change", ["rotated", "even_pairs", "rotated even_pairs"])
@torch.no_grad()
def test_a_changed_model_is_the_same_function_with_another_cache(model, change):
    double = DeepSeekV2(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    for block in double.blocks:                          # gains that a rotation has to move
        for norm in (block.attention.norm_kv, block.norm_attention):
            norm.weight.copy_(1 + normal(4, len(norm.weight)).double().abs())
    ids = torch.arange(20)[None]
    before = double(ids)
    other = bench.changed(double, change)
    torch.testing.assert_close(other(ids), before, atol=1e-10, rtol=0)
    assert torch.equal(double(ids), before)
    caches = [m.new_cache(1, 20) for m in (double, other)]
    for m, cache in zip((double, other), caches, strict=True):
        m(ids, cache)
    assert (caches[0].store - caches[1].store).abs().max() > 0.1


def test_windows_follow_each_other_and_depend_on_the_seed(tokenizer):
    a = bench.windows(TEXTS, tokenizer, seed=0, n=3, length=20)
    assert a.shape == (3, 21) and torch.equal(a[:-1, -1], a[1:, 0])
    assert torch.equal(a, bench.windows(TEXTS, tokenizer, seed=0, n=3, length=20))
    assert not torch.equal(a, bench.windows(TEXTS, tokenizer, seed=1, n=3, length=20))
    with pytest.raises(ValueError, match="text: .* expected above 1000000"):
        bench.windows(TEXTS, tokenizer, seed=0, n=1000, length=1000)


def test_measure_reports_every_scheme(model, tokenizer):
    of_model, results = bench.measure(model, tokenizer, TEXTS, seeds=2, n=2, trained=16)
    assert of_model["tokens_a_window"] == 64 and len(of_model["bits_per_byte_by_quarter"]) == 4
    assert {"default", "default, even_pairs", "default, rotated", *bench.SCHEMES} <= set(results)
    assert results["default"]["bits"] == pytest.approx(6.06, abs=0.005)
    for r in results.values():
        assert len(r["kl_by_quarter"]) == 4
        assert r["kl"] == pytest.approx(sum(r["kl_by_quarter"]) / 4, rel=1e-4, abs=1e-9)
    assert results["default"]["kl"] < results["int4 g32 zero, RoPE 16"]["kl"]


def test_a_missing_model_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_checkout", tmp_path.joinpath)
    assert main(["bench", "cache_quality", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "data/model" in err and len(err.splitlines()) == 1


def test_the_command_line_prints_one_json_object(model, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_checkout", tmp_path.joinpath)
    checkpoint.save(model, tmp_path / "data/model")
    write_text(tmp_path / "data/model/tokenizer.json", tokenizer.to_json())
    assert main(["bench", "cache_quality", "--quick", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["quick"] is True and record["corpus"] == "stories"
    assert {"date", "torch", "python", "cpu", "schemes", "exact"} <= set(record)

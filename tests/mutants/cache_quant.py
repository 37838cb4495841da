# SPDX-License-Identifier: MIT
"""Wrong variants of attention/cache_quant.py."""

from mutants import Mutant

FILE = "attention/cache_quant.py"
_back = "test_cache_quant.py::test_packed_integers_come_back_bit_for_bit"
_bits = "test_cache_quant.py::test_every_bit_is_where_the_layout_says"
_bound = "test_cache_quant.py::test_the_error_is_at_most_half_a_step"
_nearest = "test_cache_quant.py::test_numbers_are_rounded_to_the_nearest_code"
_refused = "test_cache_quant.py::test_what_cannot_be_stored_is_refused_and_nothing_changes"
_nbytes = "test_cache_quant.py::test_nbytes_counts_everything"
_pieces = "test_cache_quant.py::test_chunks_come_back_as_they_are_stored"
_packed = "test_cache_quant.py::test_attention_on_packed_rows_equals_attention_on_the_stored_ones"

MUTANTS = [
    Mutant("offset_forgotten", "quantised", FILE,
           ".flatten(-2)[..., :d_c] - 32, rope", ".flatten(-2)[..., :d_c], rope", _back),
    Mutant("rope_offset_without_lent_bits", "quantised", FILE,
           "rope - (32 << lent)", "rope - 32", _back),
    Mutant("lenders_not_doubled", "quantised", FILE,
           "= (lenders & 31) << 1", "= lenders & 31", _back),
    Mutant("lent_bit_kept", "quantised", FILE,
           "= (lenders & 31) << 1", "= lenders << 1", _back),
    Mutant("lent_bits_swapped", "quantised", FILE,
           "rope = rope | borrowed[..., k, :] << k",
           "rope = rope | borrowed[..., k, :] << (lent - 1 - k)", _back),
    Mutant("rope_pairs_swapped", "quantised", FILE,
           "rope = rope << lent",
           "rope = rope.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) << lent", _back),
    Mutant("channels_of_a_word_are_neighbours", "quantised", FILE,
           ".unflatten(-1, (8, w))", ".unflatten(-1, (w, 8)).transpose(-1, -2)", _bits),
    Mutant("top_bits_of_v2_and_v5_swapped", "quantised", FILE,
           "(c >> 6 & 3) << 4, b >> 6 & 15 | (c >> 8 & 3) << 4",
           "(c >> 8 & 3) << 4, b >> 6 & 15 | (c >> 6 & 3) << 4", _back),
    Mutant("words_sign_extended", "quantised", FILE,
           "(words.int() & 0xFFFF)", "words.int()", _back),
    Mutant("scale_rounded_down", "quantised", FILE,
           "torch.where(scale < least, up, scale)", "torch.where(scale > least, up, scale)",
           _bound),
    Mutant("scale_of_32", "quantised", FILE,
           "(32 - step / 2)", "(32 + 0 * step)", _bound),
    Mutant("scale_of_the_batch", "quantised", FILE,
           "(32 - step / 2)).amax(-1, keepdim=True)",
           "(32 - step / 2)).amax().expand(*c_kv.shape[:-1], 1)",
           "test_cache_quant.py::test_a_row_does_not_depend_on_the_others"),
    Mutant("scales_exchanged", "quantised", FILE,
           "s_c, s_r = scales.to(wide).split(1, -1)", "s_r, s_c = scales.to(wide).split(1, -1)",
           _bound),
    Mutant("rounded_down", "quantised", FILE,
           "* step)).round()", "* step)).floor()", _nearest),
    Mutant("rounded_away", "quantised", FILE,
           "(k_r / _nonzero(s_r, wide)).round()", "(k_r / _nonzero(s_r, wide)).ceil()", _nearest),
    Mutant("largest_code_wraps", "quantised", FILE,
           ".round().clamp(-half, half - 1)", ".round().clamp(-half, half)", _nearest),
    Mutant("divided_by_zero", "quantised", FILE,
           ".masked_fill(scale == 0, 1.0)", ".masked_fill(scale < 0, 1.0)", _bound),
    Mutant("nan_stored", "quantised", FILE,
           "if not scale.isfinite().all():", "if scale.isinf().any():", _refused),
    Mutant("infinity_stored", "quantised", FILE,
           "if not scale.isfinite().all():", "if scale.isnan().any():", _refused),
    Mutant("scales_not_counted", "quantised", FILE,
           "return self.words.nbytes + self.scales.nbytes", "return self.words.nbytes", _nbytes),
    Mutant("scales_not_in_the_formula", "quantised", FILE,
           "self.words.nbytes_per_token + self.scales.nbytes_per_token",
           "self.words.nbytes_per_token", _nbytes),
    Mutant("codes_in_32_bits", "quantised", FILE,
           "3 * w, 3 * w_r, torch.int16", "3 * w, 3 * w_r, torch.int32", _nbytes),
    Mutant("scales_in_fp32", "quantised", FILE,
           "1, 1, torch.bfloat16", "1, 1, torch.float32", _nbytes),
    Mutant("fresh_rows_not_quantised", "quantised", FILE,
           "return dequantise(*unpack(words, self.d_c, self.d_r), scales, self.dtype)",
           "rows = dequantise(*unpack(words, self.d_c, self.d_r), scales, self.dtype)\n"
           "        return tuple(torch.cat((x[:, : -new.shape[1]], new), 1)\n"
           "                     for x, new in zip(rows, (c_kv, k_r)))", _pieces),
    Mutant("scales_do_not_advance", "quantised", FILE,
           "self.scales.advance(new_tokens)", "pass", _pieces),
    Mutant("scale_missing_from_scores", "quantised", FILE,
           "n_c.transpose(1, 2)) * s_c +", "n_c.transpose(1, 2)) +", _packed),
    Mutant("scale_missing_from_values", "quantised", FILE,
           "(weights * s_c[:, None])", "weights", _packed),
    Mutant("old_sum_not_shrunk", "quantised", FILE,
           "o * shrink + weighted", "o + weighted", _packed),
    Mutant("old_total_not_shrunk", "quantised", FILE,
           "total * shrink + weights", "total + weights", _packed),
    Mutant("a_tile_starts_at_zero", "quantised", FILE,
           "torch.arange(start, start + n_c.shape[1]", "torch.arange(0, n_c.shape[1]", _packed),
    Mutant("packed_sees_one_ahead", "quantised", FILE,
           "keys > positions[:, None, :, None]", "keys > positions[:, None, :, None] + 1", _packed),
    Mutant("packed_positions_from_zero", "quantised", FILE,
           "torch.arange(S - T, S, device=words.device)[None]",
           "torch.arange(T, device=words.device)[None]", _packed),
]

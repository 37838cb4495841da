# SPDX-License-Identifier: MIT
"""Wrong variants of attention/kv_cache.py."""

from mutants import Mutant

FILE = "attention/kv_cache.py"

MUTANTS = [
    Mutant("fp32_rows", "expanded", FILE,
           "d_c + d_r, dtype=dtype", "d_c + d_r, dtype=torch.float32",
           "test_kv_cache.py::test_bytes_per_token_of_the_published_models"),
    Mutant("row_per_head", "expanded", FILE,
           "max_tokens, d_c + d_r,", "max_tokens, 16 * (d_c + d_r),",
           "test_kv_cache.py::test_elements_per_token_of_tables_1_and_9"),
    Mutant("formula_of_one_layer", "expanded", FILE,
           "return n_layers * per_layer * self", "return per_layer * self",
           "test_kv_cache.py::test_elements_per_token_of_tables_1_and_9"),
    Mutant("graph_kept_in_cache", "no gradient", FILE,
           "rows.shape[1], rows.detach()", "rows.shape[1], rows",
           "test_kv_cache.py::test_no_autograd_graph_is_kept"),
    Mutant("new_rows_over_old", "chunks", FILE,
           "self.store[layer, :, start[0] : start[0] + new] = rows",
           "self.store[layer, :, :new] = rows",
           "test_kv_cache.py::test_chunks_come_back_as_they_went_in"),
    Mutant("rows_after_the_longest", "chunks", FILE,
           "self.store[layer, b, first : first + new] = rows[b]",
           "self.store[layer, b, max(start) : max(start) + new] = rows[b]",
           "test_kv_cache.py::test_sequences_of_different_lengths_share_a_batch"),
    Mutant("padding_counted", "chunks", FILE,
           "self.lengths = [old + new for old", "self.lengths = [old + max(new_tokens) for old",
           "test_kv_cache.py::test_sequences_of_different_lengths_share_a_batch"),
    Mutant("positions_restart", "chunks", FILE,
           "return start[:, None] + torch.arange", "return 0 * start[:, None] + torch.arange",
           "test_kv_cache.py::test_chunks_come_back_as_they_went_in"),
    Mutant("full_one_too_late", "chunks", FILE,
           "(fullest := max(self.lengths)) + new_tokens > self.max_tokens",
           "(fullest := max(self.lengths)) + new_tokens > self.max_tokens + 1",
           "test_kv_cache.py::test_a_full_cache_raises"),
]

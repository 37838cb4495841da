# SPDX-License-Identifier: MIT
"""Wrong variants of attention/mha.py."""

from mutants import Mutant

FILE = "attention/mha.py"
_oracle = "test_mha.py::test_equals_the_equations"

MUTANTS = [
    Mutant("q_from_W_K", "(1)", FILE, "self.W_Q(h)", "self.W_K(h)", f"{_oracle}[6-plain]"),
    Mutant("k_from_W_V", "(2)", FILE, "self.W_K(h)", "self.W_V(h)", _oracle),
    Mutant("v_from_W_K", "(3)", FILE, "self.W_V(h)", "self.W_K(h)", _oracle),
    Mutant("query_heads_interleaved", "(4)", FILE,
           "q.unflatten(-1, (self.n_h, self.d_h))",
           "q.unflatten(-1, (self.d_h, self.n_h)).transpose(-1, -2)", _oracle),
    Mutant("key_heads_interleaved", "(5)", FILE,
           "k.unflatten(-1, (self.n_kv, self.d_h))",
           "k.unflatten(-1, (self.d_h, self.n_kv)).transpose(-1, -2)", _oracle),
    Mutant("value_heads_interleaved", "(6)", FILE,
           "v.unflatten(-1, (self.n_kv, self.d_h))",
           "v.unflatten(-1, (self.d_h, self.n_kv)).transpose(-1, -2)", _oracle),
    Mutant("mha_scale_of_all_heads", "(7)", FILE,
           "self.d_h**-0.5", "(self.n_h * self.d_h) ** -0.5", _oracle),
    Mutant("mha_sees_the_future", "(7)", FILE,
           "is_causal=visible is None and bool(T == S)", "is_causal=False",
           "test_mha.py::test_no_token_sees_the_future"),
    Mutant("mha_rope_on_queries_alone", "(7)", FILE,
           "q, k = rotate(q, cos, sin), rotate(k, cos, sin)", "q = rotate(q, cos, sin)", _oracle),
    Mutant("heads_joined_interleaved", "(8)", FILE,
           "self.W_O(o.flatten(2))", "self.W_O(o.transpose(2, 3).flatten(2))", _oracle),
    Mutant("mha_chunk_mask_from_the_start", "chunks", FILE,
           ".tril(S - T)", ".tril(0)", "test_mha.py::test_cached_in_chunks_equals_full"),
    Mutant("mha_chunk_without_mask", "chunks", FILE,
           "elif 1 < T < S:", "elif False:", "test_mha.py::test_cached_in_chunks_equals_full"),
    Mutant("mha_sees_one_ahead", "chunks", FILE,
           "<= positions[:, None, :, None]", "<= positions[:, None, :, None] + 1",
           "test_mha.py::test_sequences_of_different_lengths"),
]

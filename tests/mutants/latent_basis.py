# SPDX-License-Identifier: MIT
"""Wrong variants of attention/latent_basis.py."""

from mutants import Mutant

FILE = "attention/latent_basis.py"

MUTANTS = [
    Mutant("gain_left_in_the_norm", "quantised", FILE,
           "back = gain[:, None].to(R.dtype) * R.T", "back = R.T.clone()",
           "test_latent_basis.py::test_a_rotated_latent_gives_the_same_keys_and_values"),
    Mutant("rotated_twice_the_same_way", "quantised", FILE,
           "to(R.dtype) * R.T ", "to(R.dtype) * R ",
           "test_latent_basis.py::test_a_rotated_latent_gives_the_same_keys_and_values"),
    Mutant("one_factor_a_number", "quantised", FILE,
           "W_QR * size.repeat(n_h, 1)", "W_QR / size.repeat(n_h, 1)",
           "test_latent_basis.py::test_even_pairs_give_the_same_scores"),
    Mutant("gain_not_in_the_magnitude", "quantised", FILE,
           "(W_KR * gain).double()", "W_KR.double()",
           "test_latent_basis.py::test_pairs_are_even_in_what_the_norm_with_its_gain_gives"),
]

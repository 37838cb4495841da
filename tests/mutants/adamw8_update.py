# SPDX-License-Identifier: MIT
"""Wrong variants of adamw8_update.py, and the test that must fail for each."""

from mutants import Mutant

TESTS = "test_adamw8_update.py::test_"
STEP, BITS = TESTS + "a_step_is_the_twins", TESTS + "the_random_bits_are_the_twins"


def mutant(name: str, catches: str, old: str, new: str, node: str) -> Mutant:
    return Mutant(name, catches, "kernels/adamw8_update.py", old, new, node)


KERNEL_MUTANTS = [
    mutant("bias_of_the_second_moment_lost", "a bias correction left out",
           "bias = math.sqrt(1 - beta_2**t)", "bias = 1.0", STEP),
    mutant("bias_of_the_first_moment_lost", "a bias correction left out",
           "lr / (1 - beta_1**t) * bias", "lr * bias", STEP),
    mutant("eps_not_corrected", "eps beside a moment that is not corrected", "eps * bias, WHOLE",
           "eps / bias**20, WHOLE", TESTS + "tiny_and_huge_gradients[1e-12]"),
    mutant("decay_grows", "the decay's sign", "1 - lr * weight_decay", "1 + lr * weight_decay",
           STEP),
    mutant("ascends", "the update's sign", "w = keep * w - rate *", "w = keep * w + rate *", STEP),
    mutant("signs_forgotten", "first moments of a negative sign",
           "place = _signed(place, x.to(tl.int32, bitcast=True))", "place = place * 1.0", STEP),
    mutant("old_signs_forgotten", "first moments of a negative sign",
           "M_CODES, M_STEP, PTX), code)", "M_CODES, M_STEP, PTX), tl.abs(code))", STEP),
    mutant("decades_swapped", "the first moment's range for the second's",
           "V_STEP=log_step(V_CODES, V_DECADES)", "V_STEP=log_step(V_CODES, M_DECADES)", STEP),
    mutant("range_cut_early", "the first moment's range for the second's",
           "V_LEAST=10.0**-V_DECADES", "V_LEAST=10.0**-M_DECADES", STEP),
    mutant("code_0_read_as_the_smallest", "a moment of 0",
           "tl.where(size > 0, largest * power, 0.0)", "largest * power",
           TESTS + "a_weight_that_never_had_a_gradient_only_decays"),
    mutant("nothing_stored_as_something", "a moment of 0",
           "tl.where(size > 0, CODES + log * (1.0 / LOG_STEP), 0.0)",
           "CODES + log * (1.0 / LOG_STEP)",
           TESTS + "a_weight_that_never_had_a_gradient_only_decays"),
    mutant("codes_cut", "rounding to nearest", "(place + 12582912.0)", "(place + 12582911.0)",
           STEP),
    mutant("clip_not_applied", "the factor of clipping", "g *= tl.load(clip).to(tl.float32)",
           "g *= 1.0", TESTS + "the_factor_is_multiplied_in_before_anything_is_rounded"),
    mutant("hash_constant", "another hash", "0x7FEB352D", "0x7FEB352F", BITS),
    mutant("hash_shift", "another hash", "x ^ (x >> 15)", "x ^ (x >> 16)", BITS),
    mutant("key_without_its_upper_half", "another hash", "int32(key >> 32)", "int32(key)", BITS),
    mutant("places_from_the_shares_beginning", "the expert a share begins with",
           "int32(key + first * n)", "int32(key)", BITS),
    mutant("every_expert_is_the_first", "where an expert begins",
           "(block // each).to(tl.int64)[:, None] * n + start", "start", STEP),
    mutant("reaches_into_the_next_expert", "where an expert ends",
           "inside = here & (start + lane < n)", "inside = here & (start + lane < start + BLOCK)",
           TESTS + "nothing_beyond_the_weight_is_read_or_written"),
    mutant("rounded_down", "stochastic rounding",
           "_noise(place.to(tl.uint32), low, high)", "_noise(place.to(tl.uint32), low, high) * 0",
           BITS),
    mutant("gradient_copied", "a gradient in fp32 beside that in bf16",
           "_bits(gradient.contiguous())", "gradient.float().contiguous()",
           TESTS + "a_weight_costs_ten_bytes_of_traffic[bf16]"),
]

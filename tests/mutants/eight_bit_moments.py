# SPDX-License-Identifier: MIT
"""Wrong variants of eight_bit_moments.py, and the test that must fail for each."""

from mutants import Mutant

TESTS = "test_eight_bit_moments.py::test_"
SHARE = TESTS + "a_share_of_the_experts_is_a_slice_of_the_whole[(7, 11)-torch.bfloat16]"
LOOP, EVEN = TESTS + "an_update_is_that_of_a_loop_over_weights", TESTS + "the_bits_are_even_and"
PLACE = "(first + experts.start) * n + piece.start"


def wrong(name: str, old: str, new: str, node: str) -> Mutant:
    return Mutant(name, "moments", "kernels/eight_bit_moments.py", old, new, node)


MUTANTS = [
    wrong("blocks_cross_experts",
          "return (shape[0], shape[1:].numel()) if len(shape) > 2 else (1, shape.numel())",
          "return 1, shape.numel()", SHARE),
    wrong("places_from_the_shares_beginning", PLACE, "experts.start * n + piece.start", SHARE),
    wrong("a_piece_begins_again", PLACE, "(first + experts.start) * n",
          TESTS + "pieces_do_not_change_the_result[torch.bfloat16]"),
    wrong("rounding_without_the_step", 'f"{seed} {step} {name}"', 'f"{seed} {name}"',
          EVEN + "_independent"),
    wrong("rounding_without_the_name", 'f"{seed} {step} {name}"', 'f"{seed} {step}"',
          EVEN + "_independent"),
    wrong("one_round_of_mixing", "return _mix(_mix(x).add_(int32(key >> 32))).bitwise_and_(0xFFFF)",
          "return x.bitwise_and_(0xFFFF)", EVEN + "_independent"),
    wrong("rounded_to_nearest", "noise(key, start, x.numel(), x.device).view(x.shape)", "0x8000",
          TESTS + "stochastic_rounding_is_right_on_average_and_only_to_neighbours"),
    wrong("numbers_below_the_range_are_0", "clamp(1, n_codes)", "clamp(0, n_codes)",
          TESTS + "numbers_in_range_come_back_within_half_a_code"),
    wrong("the_second_moment_corrected_as_the_first", "v.div_(1 - beta_2**t)",
          "v.div_(1 - beta_1**t)", LOOP),
    wrong("decay_with_the_gradient", "w.mul_(1 - lr * weight_decay)", "g.add_(w.mean())", LOOP),
    wrong("ranges_of_the_moments_swapped", "V_CODES, V_DECADES = 255, 7",
          "V_CODES, V_DECADES = 255, 5", "test_adamw8.py::test_it_follows_torchs_adamw"),
    wrong("clipped_after_the_moments", "g.mul_(clip)", "w.mul_(1.0)", LOOP),
]

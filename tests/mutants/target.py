# SPDX-License-Identifier: MIT
"""Wrong variants of kernels/target.py."""

from mutants import Mutant

FILE = "kernels/target.py"

MUTANTS = [
    Mutant("consumer_blackwell_taken_for_hopper", "card", FILE,
           "CARDS.get(torch.cuda.get_device_capability(device), ",
           "CARDS.get((min(torch.cuda.get_device_capability(device)[0], 9), 0), ",
           "test_target.py::test_a_card_has_one_name"),
    Mutant("large_blackwell_taken_for_a_consumer_card", "card", FILE,
           ", (10, 0): \"sm_90\"", "", "test_target.py::test_a_card_has_one_name"),
    Mutant("amd_taken_for_nvidia", "card", FILE,
           "if torch.version.hip is not None:", "if torch.version.hip == \"none\":",
           "test_target.py::test_amd_and_no_card"),
    Mutant("bfloat16_interpreted", "card", FILE,
           "if x.dtype == torch.bfloat16:", "if x.dtype == torch.float64:",
           "test_target.py::test_what_cannot_run_is_refused"),
]

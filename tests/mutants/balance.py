# SPDX-License-Identifier: MIT
"""Wrong variants of moe/balance.py."""

from mutants import Mutant

FILE = "moe/balance.py"
_oracle = "test_balance.py::test_equals_the_equations"
_uniform = "test_balance.py::test_uniform_routing_costs_alpha"
_apart = "test_balance.py::test_sequences_are_judged_one_by_one"
_alone = "test_balance.py::test_each_loss_alone_trains_the_router"

MUTANTS = [
    Mutant("summed_over_sequences", "(23)", FILE,
           "(f * P).sum(-1).mean()", "(f * P).sum()", f"{_oracle}[1-expert]"),
    Mutant("counts_not_per_slot", "(24)", FILE,
           "n_routed / (K * T)", "n_routed / T", f"{_uniform}[expert]"),
    Mutant("affinities_summed", "(25)", FILE, " P = s.mean(1)", " P = s.sum(1)",
           f"{_uniform}[expert]"),
    Mutant("device_terms_averaged", "(26)", FILE,
           "(f_dev * P_dev).sum(-1)", "(f_dev * P_dev).mean(-1)", f"{_uniform}[device]"),
    Mutant("device_f_summed", "(27)", FILE,
           "f.unflatten(-1, (n_devices, -1)).mean(-1)", "f.unflatten(-1, (n_devices, -1)).sum(-1)",
           f"{_uniform}[device]"),
    Mutant("device_P_averaged", "(28)", FILE,
           "P_dev = s.mean(1).unflatten(-1, (n_devices, -1)).sum(-1)",
           "P_dev = s.mean(1).unflatten(-1, (n_devices, -1)).mean(-1)", f"{_uniform}[device]"),
    Mutant("communication_terms_averaged", "(29)", FILE,
           "(f_comm * P_comm).sum(-1)", "(f_comm * P_comm).mean(-1)", f"{_uniform}[communication]"),
    Mutant("communication_without_m", "(30)", FILE,
           "(n_devices / max_devices)", "n_devices", f"{_uniform}[communication]"),
    Mutant("communication_P_averaged", "(31)", FILE,
           "P_comm = s.mean(1).unflatten(-1, (n_devices, -1)).sum(-1)",
           "P_comm = s.mean(1).unflatten(-1, (n_devices, -1)).mean(-1)",
           f"{_uniform}[communication]"),
    Mutant("communication_counts_slots", "messages", FILE,
           "f_comm = sent.mean(1) * (n_devices / max_devices)",
           "f_comm = expert_frequency(indices, s.shape[-1]).to(s.dtype)"
           ".unflatten(-1, (n_devices, -1)).mean(-1)",
           "test_balance.py::test_equal_computation_is_not_equal_communication"),
    Mutant("device_counts_messages", "messages", FILE,
           "f_dev = f.unflatten(-1, (n_devices, -1)).mean(-1)",
           "f_dev = device_reach(indices, s.shape[-1], n_devices).to(s.dtype).mean(1)",
           "test_balance.py::test_equal_communication_is_not_equal_computation"),
    Mutant("expert_f_of_the_batch", "batch", FILE,
           "return counts * (n_routed", "return counts.mean(0).expand(B, -1) * (n_routed",
           f"{_apart}[expert]"),
    Mutant("communication_f_of_the_batch", "batch", FILE,
           "f_comm = sent.mean(1)", "f_comm = sent.mean((0, 1))[None]", f"{_apart}[communication]"),
    Mutant("device_P_of_the_batch", "batch", FILE,
           "P_dev = s.mean(1)", "P_dev = s.mean((0, 1))[None]", f"{_apart}[device]"),
    Mutant("expert_P_detached", "no gradient", FILE,
           " P = s.mean(1)", " P = s.detach().mean(1)", f"{_alone}[expert]"),
    Mutant("device_P_detached", "no gradient", FILE,
           "P_dev = s.mean(1)", "P_dev = s.detach().mean(1)", f"{_alone}[device]"),
    Mutant("communication_P_detached", "no gradient", FILE,
           "P_comm = s.mean(1)", "P_comm = s.detach().mean(1)", f"{_alone}[communication]"),
    Mutant("f_with_gradient", "no gradient", FILE,
           "(f * P)", "((f + P - P.detach()) * P)",
           "test_balance.py::test_gradient_is_that_of_p_with_f_held_fixed[expert]"),
]

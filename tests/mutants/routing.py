# SPDX-License-Identifier: MIT
"""Wrong variants of moe/routing.py."""

from mutants import Mutant

FILE = "moe/routing.py"
_gates = "test_routing.py::test_gates_are_the_chosen_affinities_times_the_factor_once"

MUTANTS = [
    Mutant("gates_renormalised", "gates", FILE,
           "g = s.gather(-1, indices) * self.scaling_factor",
           "g = s.gather(-1, indices); g = g / g.sum(-1, keepdim=True) * self.scaling_factor",
           _gates),
    Mutant("gates_all_equal", "(21)", FILE,
           "s.gather(-1, indices) * self", "torch.full_like(s.gather(-1, indices), 1 / 3) * self",
           _gates),
    Mutant("gates_without_gradient", "(21)", FILE,
           "g = s.gather(-1, indices)", "g = s.detach().gather(-1, indices)",
           "test_routing.py::test_gates_and_affinities_carry_gradient"),
    Mutant("factor_twice", "scaling", FILE,
           "* self.scaling_factor", "* self.scaling_factor**2", _gates),
    Mutant("factor_lost", "scaling", FILE, " * self.scaling_factor", "", _gates),
    Mutant("sigmoid_scores", "(22)", FILE, ".softmax(-1)", ".sigmoid()",
           "test_routing.py::test_affinities_equal_the_equation"),
    Mutant("softmax_over_tokens", "(22)", FILE, ".softmax(-1)", ".softmax(0)",
           "test_routing.py::test_affinities_equal_the_equation"),
    Mutant("top_2_sum", "group score", FILE,
           "groups.amax(-1)", "groups.topk(2, -1).values.sum(-1)",
           "test_routing.py::test_a_device_is_worth_its_best_expert_and_not_its_two_best"),
    Mutant("group_mean", "group score", FILE, "groups.amax(-1)", "groups.mean(-1)",
           "test_routing.py::test_device_limited_takes_the_largest_on_the_best_devices"),
    Mutant("masked_with_0", "mask", FILE, "[..., None], -torch.inf)", "[..., None], 0.0)",
           "test_routing.py::test_an_underflowed_affinity_does_not_escape_its_device"),
    Mutant("limit_ignored", "group score", FILE,
           "select_greedy if self.max_devices is None else select_device_limited",
           "select_greedy",
           f"{_gates}[limited-1.0]"),
    Mutant("devices_round_robin", "group score", FILE,
           "groups = s.unflatten(-1, (n_devices, -1))",
           "groups = s.unflatten(-1, (-1, n_devices)).mT",
           "test_routing.py::test_device_limited_takes_the_largest_on_the_best_devices"),
    Mutant("router_in_bf16", "router dtype", FILE,
           "dtype = torch.promote_types(u.dtype, torch.float32)", "dtype = u.dtype",
           "test_routing.py::test_dtypes"),
    Mutant("router_always_fp32", "router dtype", FILE,
           "dtype = torch.promote_types(u.dtype, torch.float32)", "dtype = torch.float32",
           "test_routing.py::test_affinities_equal_the_equation"),
    Mutant("router_under_autocast", "router dtype", FILE,
           "enabled=False", "enabled=torch.is_autocast_enabled(u.device.type)",
           "test_routing.py::test_autocast_does_not_reach_the_router"),
]

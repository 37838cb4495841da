# SPDX-License-Identifier: MIT
"""Wrong variants of moe/dropping.py."""

from mutants import Mutant

FILE = "moe/dropping.py"
_lists = "test_dropping.py::test_equals_sorted_lists"

MUTANTS = [
    Mutant("capacity_per_expert", "dropping", FILE,
           """budget = int(capacity * indices.numel() / n_devices)
    device = indices.flatten() // (n_routed // n_devices)""",
           """budget = int(capacity * indices.numel() / n_routed)
    device, n_devices = indices.flatten(), n_routed""",
           "test_dropping.py::test_budget_is_per_device"),
    Mutant("budget_of_all_devices", "dropping", FILE,
           "indices.numel() / n_devices)", "indices.numel())",
           "test_dropping.py::test_budget_is_per_device"),
    Mutant("budget_in_tokens", "dropping", FILE,
           "indices.numel() / n_devices)", "indices.shape[0] / n_devices)", _lists),
    Mutant("capacity_ignored", "dropping", FILE,
           "capacity * indices", "indices", "test_dropping.py::test_worked_example"),
    Mutant("one_over_budget", "dropping", FILE, "rank < budget", "rank <= budget",
           "test_dropping.py::test_worked_example"),
    Mutant("highest_dropped", "dropping", FILE, "descending=True", "descending=False",
           "test_dropping.py::test_what_is_dropped_is_weaker_than_what_is_kept"),
    Mutant("latest_dropped", "dropping", FILE,
           "affinity.detach().flatten().argsort(descending=True, stable=True)",
           "torch.arange(indices.numel())",
           "test_dropping.py::test_what_is_dropped_is_weaker_than_what_is_kept"),
    Mutant("ties_to_the_later", "dropping", FILE,
           "affinity.detach().flatten().argsort(descending=True, stable=True)",
           "affinity.detach().flatten().argsort(stable=True).flip(0)",
           "test_dropping.py::test_of_equal_affinities_the_earlier_is_kept"),
    Mutant("protection_ignored", "dropping", FILE,
           "if protected is not None:", "if False:",
           "test_dropping.py::test_protected_tokens_are_never_dropped_but_counted"),
    Mutant("protected_dropped_over_budget", "dropping", FILE,
           "((rank < budget) | safe)", "(rank < budget)",
           "test_dropping.py::test_protected_tokens_are_never_dropped_but_counted"),
    Mutant("protected_not_counted", "dropping", FILE,
           "order = order[(~safe[order]).to(torch.uint8).argsort(stable=True)]",
           "order = order[safe[order].to(torch.uint8).argsort(stable=True)]",
           "test_dropping.py::test_protected_tokens_are_never_dropped_but_counted"),
    Mutant("dropped_asked_of_a_device", "waits", FILE,
           "device.new_zeros(n_devices).scatter_add_(0, device, torch.ones_like(device))",
           "torch.bincount(device, minlength=n_devices)",
           "test_block.py::test_routing_dropping_and_balance_wait_for_no_device"),
]

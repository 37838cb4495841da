# SPDX-License-Identifier: MIT
"""Wrong variants of training/optim.py's Muon, and the test that must fail for each."""

from mutants import Mutant

EQUAL = "test_optim.py::test_muon_equals_torch_on_matrices[(9, 5)]"
STACK = "test_optim.py::test_a_stack_is_its_matrices_and_company_changes_nothing"
VALUES = "test_optim.py::test_orthogonalise_maps_the_singular_values_alone[(8, 12)-fp32]"


def wrong(name: str, old: str, new: str, node: str) -> Mutant:
    return Mutant(name, "muon", "training/optim.py", old, new, node)


MUTANTS = [
    wrong("sign_of_the_cubic_term", "3.4445, -4.7750, 2.0315", "3.4445, 4.7750, 2.0315", VALUES),
    wrong("cubic_term_in_place_of_the_fifth", "torch.baddbmm(A, A, A, beta=b, alpha=c)",
          "torch.baddbmm(A, A, A, beta=c, alpha=b)", VALUES),
    wrong("bf16_where_it_is_slow", 'if fast_precision(M.device) == "bf16" else torch.float32',
          "", VALUES),
    wrong("normed_as_one_stack", "X.norm(dim=(-2, -1), keepdim=True)", "X.norm()", STACK),
    wrong("momentum_without_a_look_ahead", 'W.grad.lerp(self.state[W]["momentum"], mu)',
          'self.state[W]["momentum"]', EQUAL),
    wrong("momentum_of_the_new_alone", '.lerp_(W.grad, 1 - mu)', '.lerp_(W.grad, mu)', EQUAL),
    wrong("tall_matrices_as_wide_ones", "-lr * max(1.0, rows / columns) ** 0.5", "-lr", EQUAL),
    wrong("decay_without_the_rate", 'W.mul_(1 - lr * group["weight_decay"])',
          'W.mul_(1 - group["weight_decay"])', EQUAL),
]

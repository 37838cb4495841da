# SPDX-License-Identifier: MIT
"""Wrong variants of moe/experts.py."""

from mutants import Mutant

FILE = "moe/experts.py"
_oracle = "test_experts.py::test_equals_the_equation"

MUTANTS = [
    Mutant("shared_averaged", "shared", FILE,
           "u + self.shared(x) + routed", "u + self.shared(x) / 2 + routed", _oracle),
    Mutant("one_shared_expert", "shared", FILE,
           "FeedForward(d, n_shared * w)", "FeedForward(d, w)",
           "test_wiring.py::test_published_totals"),
    Mutant("shared_read_the_residual", "(20)", FILE, "self.shared(x)", "self.shared(u)",
           _oracle),
    Mutant("normed_residual", "(20)", FILE, "return u + self", "return x + self", _oracle),
    Mutant("no_residual", "(20)", FILE, "return u + self", "return self", _oracle),
    Mutant("silu_on_the_wrong_half", "(20)", FILE,
           "F.silu(self.W_gate(x)) * self.W_up(x)", "F.silu(self.W_up(x)) * self.W_gate(x)",
           "test_experts.py::test_feed_forward_is_swiglu"),
    Mutant("padded_silu_on_the_wrong_half", "(20)", FILE,
           "F.silu(padded @ W_gate.mT) * (padded @ W_up.mT)",
           "F.silu(padded @ W_up.mT) * (padded @ W_gate.mT)",
           "test_experts.py::test_loop_and_padded_have_equal_values_and_gradients"),
    Mutant("loop_silu_on_the_wrong_half", "(20)", FILE,
           "F.silu(F.linear(h, gate)) * F.linear(h, up)",
           "F.silu(F.linear(h, up)) * F.linear(h, gate)", _oracle),
    Mutant("without_gates", "(20)", FILE,
           " * gates.flatten()[order, None]", "", _oracle),
    Mutant("padding_overlaps", "(20)", FILE,
           "place = expert * C + torch", "place = expert * (C - 1) + torch", _oracle),
    Mutant("dropped_slots_computed", "dropping", FILE,
           "expert.masked_fill(~keep.flatten(), n_routed)", "expert",
           f"{_oracle}[7-True-experts_loop]"),
    Mutant("loop_detaches_an_expert", "idle expert", FILE,
           "* F.linear(h, up), down)", "* F.linear(h, up), down.detach())",
           "test_experts.py::test_an_expert_without_tokens_has_a_gradient_of_zeros"),
    Mutant("padded_skips_idle_experts", "idle expert", FILE,
           "out = (hidden @ W_down.mT)", "out = (hidden @ W_down.detach().mT)",
           "test_experts.py::test_an_expert_without_tokens_has_a_gradient_of_zeros"),
]

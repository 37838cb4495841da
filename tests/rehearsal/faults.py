# SPDX-License-Identifier: MIT
"""Mistakes that were made once and that a CPU did not show: put back, a promise breaks.

Those of a first reading of the kernels and their surroundings that neither memory, launches, waits
nor compilation show have tests of their own; `ELSEWHERE` says which.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    file: str          # of dsv2_ref/
    old: str           # occurs once
    new: str
    promise: str
    says: str          # what a line about it matches


FAULTS = [
    Fault("blocks run again stay alive", "block.py",
          "            return self._balance_of(s, indices)\n",
          "            self.found = [*getattr(self, 'found', []), self._balance_of(s, indices)]\n"
          "            return self.found[-1]\n",
          "run again", "GB above"),
    Fault("a plan that holds what it counted", "training/memory.py",
          "tensor, storage = tensor.detach(), tensor.untyped_storage()",
          "storage = tensor.untyped_storage()", "step", "peak"),
    Fault("dropping asks how many slots there are", "moe/dropping.py",
          "device.new_zeros(n_devices).scatter_add_(0, device, torch.ones_like(device))",
          "torch.bincount(device, minlength=n_devices)", "V2 drops", "bincount"),
    Fault("the update of a weight in 62 operations", "training/adamw8.py",
          "    if kernels_serve(W):", "    if False:", "step", "launches of the optimiser"),
    Fault("a chunk's log-probabilities outlive it", "cross_entropy.py",
          "            del log_p ", "            kept = log_p", "loss", "GB above"),
    Fault("every length compiled", "kernels/latent_decode.py",
          '@triton.jit(do_not_specialize=["S", "stride_pb", "stride_pt", "stride_tb"])',
          "@triton.jit", "lengths", "decode_kernel: compilations"),
    Fault("every number of pieces compiled", "kernels/latent_decode.py",
          "(16, 512) if splits <= 16 else (triton.next_power_of_2(max(splits, 256)), 64)",
          "triton.next_power_of_2(splits), 64", "lengths",
          "combine_kernel: compilations"),
    Fault("launched on another card", "kernels/latent_decode.py",
          "@on_its_device\ndef decode_latent", "def decode_latent", "another card",
          "the launch goes to cuda:0"),
    Fault("lengths uploaded in every pass", "attention/kv_cache.py",
          "        if name not in self._known or self._known[name][0] != numbers:",
          "        if True:", "decode ragged", "uploads"),
    Fault("places of a step asked for on the host", "inference/graph.py",
          "        self.queries += self.counts\n",
          "        self.queries += torch.tensor([[1]] * self.batch, device=self.queries.device)\n",
          "decode graph", "uploads"),
    Fault("wide latents take the tile of narrow ones", "kernels/latent_decode.py",
          "    if d_c > 512:", "    if d_c > 4096:", "wide latents", "bytes of shared"),
    Fault("all experts compared in fp32 at once", "bench/experts.py",
          "[w[e : e + 1].float() for w in W]", "[w.float()[e : e + 1] for w in W]",
          "bench experts", "GB"),
    Fault("new rows joined, then copied", "forms.py", "            cache.fused = kernel(kind)",
          "            pass", "decode", "launches"),
    Fault("losses read one by one", "training/trainer.py",
          "    values = torch.stack([t.double() for t in scalars.values()]).tolist()",
          "    values = [t.item() for t in scalars.values()]", "step", "waits"),
]

# what such a mistake was -> the test that sees it
ELSEWHERE = {
    "bench all loses rows": "test_bench_all.py::"
                            "test_a_killed_run_keeps_its_rows_and_is_gone_on_with",
    "a case that raises takes others with it": "test_bench_all.py::"
                                               "test_a_case_that_raises_costs_no_other",
    "a step that raises while it is timed takes others with it":
        "test_bench_gpu.py::test_a_step_that_raises_while_it_is_timed_loses_itself_alone",
    "a peer with rounded scores is refused, a copy is the best peer":
        "test_bench_decode.py::"
        "test_others_may_round_their_scores_and_are_told_apart_from_a_bound",
    "theirs fails and ours is lost": "test_bench.py::test_what_stops_the_peer_costs_ours_nothing",
    "peers that wait are not named": "test_bench_experts.py::test_who_waits_for_the_gpu_is_named",
    "a fifth shape of FlexAttention runs eager":
        "test_bench_attention.py::test_each_case_starts_the_compiler_anew",
    "no compiler, and every pass raises": "test_forms.py::"
        "test_where_no_kernel_can_be_launched_twins_serve_and_one_warning_says_why",
    "a model in fp32 is made to save one":
        "test_export.py::test_writing_a_model_makes_no_second_one_in_fp32",
    "every number of pieces is tried on the host in every step":
        "test_latent_decode.py::test_few_numbers_of_splits_are_tried_and_nearly_the_best_is_found",
    "one card has two names": "test_target.py::test_a_card_has_one_name",
    "theirs without an optimiser": "test_bench.py::test_the_peer_has_an_optimizer",
}

# SPDX-License-Identifier: MIT
"""Wrong variants of training on several ranks, and of what makes it equal to one process.

Those of RANK_MUTANTS are put in place in every rank by test_parallel_mesh.py; `node` is the layout
they are tried on.
"""

from mutants import Mutant

_mesh = "parallel/mesh.py"
_layouts = "test_parallel_mesh.py::test_what_cannot_be_is_one_line"

RANK_MUTANTS = [
    Mutant("gradients_times_the_group", "ranks", _mesh, "sum_over(others, self.rows) ",
           "sum_over(others, self.rows); [t.mul_(2) for t in others] ", "ep4"),
    Mutant("gradients_of_experts_summed_over_all_rows", "ranks", _mesh,
           'sum_over(experts, self.mesh.get_group("dp"))', "sum_over(experts, self.rows)",
           "ep2 dp2"),
    Mutant("gradients_of_experts_not_summed", "ranks", _mesh,
           'sum_over(experts, self.mesh.get_group("dp"))', "pass", "ep2 dp2"),
    Mutant("norm_without_the_other_ranks", "ranks", _mesh, "dist.all_reduce(total)", "pass",
           "ep4"),
    Mutant("norm_counts_replicas", "ranks", _mesh,
           "return self.dp == 0 and (", "return (", "dp4"),
    Mutant("norm_of_one_share_of_the_experts", "ranks", _mesh,
           "self.ep == 0 or layout.ep > 1 and is_share(name)", "self.ep == 0", "ep4"),
    Mutant("norm_counts_the_tied_matrix_twice", "ranks", _mesh,
           'if name == "embedding.weight" and self.pp != 0:', "if False:", "pp2 ep2 1f1b"),
    Mutant("tied_gradients_not_summed", "ranks", _mesh,
           'sum_tied_gradient(self.model, self.layout.schedule, self.mesh.get_group("pp"))', "pass",
           "pp2 ep2 1f1b"),
    Mutant("budget_per_rank", "ranks", _mesh,
           "keep=keep_across(forms.keep, self.rows)", "keep=forms.keep", "ep4"),
    Mutant("budget_of_a_group_of_experts", "ranks", _mesh,
           "keep=keep_across(forms.keep, self.rows)",
           'keep=keep_across(forms.keep, self.mesh.get_group("ep"))', "ep2 dp2"),
    Mutant("dropped_slots_sent_anyway", "ranks", "parallel/expert.py",
           "here = here & keep", "here = here", "ep4"),
    Mutant("weights_scaled_twice", "ranks", _mesh, "parts, self._around = list(parts), around",
           "parts, self._around = [(b, s / self.layout.rows) for b, s in parts], around", "ep4"),
    Mutant("every_rank_reads_the_same_rows", "ranks", _mesh,
           "slice(self.row * n // R, (self.row + 1) * n // R)", "slice(0, n // R)", "dp4"),
]

MOMENTS = Mutant("moments_of_another_rank", "ranks", _mesh,
                 "return t.chunk(self.layout.ep)[self.ep]",
                 'return t.chunk(self.layout.ep)[self.ep - (name[:6] == "moment")]', "pp2 ep2 1f1b")

MUTANTS = [
    Mutant("moments_by_place_in_the_optimiser", "ranks", "training/optim.py",
           "W.place = name, first.get(W, 0)", "W.place = str(len(first)), first.get(W, 0)",
           "test_trainer.py::test_a_state_speaks_of_everything_by_name[muon]"),
    Mutant("a_missing_moment_is_none", "ranks", "training/optim.py",
           "if key not in values:", "if False:",
           "test_trainer.py::test_a_state_that_lacks_something_is_one_line"),
    Mutant("a_signal_to_one_is_its_own", "ranks", "training/pretrain.py",
           "asked = world.asked(stop.asked)", "asked = stop.asked",
           "test_trainer.py::test_all_ranks_stop_at_the_step_after_a_signal_to_one"),
    Mutant("damage_unseen", "ranks", "training/shards.py",
           "if here != known:", "if False:",
           "test_shards.py::test_damage_is_told_and_the_state_before_it_used"),
    Mutant("files_of_others_deleted", "ranks", "training/proof.py",
           "files_of_sharded(path) == {p.name for p in path.iterdir()}", "True",
           "test_shards.py::test_what_others_put_into_it_is_not_deleted"),
    Mutant("forgets_though_another_does", "ranks", "training/run_folder.py",
           "for old in self.states if forget else []:", "for old in self.states:",
           "test_shards.py::test_the_last_two_are_kept_whatever_they_are"),
    Mutant("experts_cut_anywhere", "ranks", "parallel/split.py", "if config.n_routed % ep:",
           "if False:", _layouts),
    Mutant("rows_cut_anywhere", "ranks", _mesh, "if micro % rows:", "if False:", _layouts),
    Mutant("a_rank_without_rows", "ranks", _mesh, "elif min(last) < rows:", "elif False:",
           _layouts),
    Mutant("batches_of_several_sizes_in_a_pipeline", "ranks", _mesh,
           "if last != {micro} or len(steps) > 1:", "if False:", _layouts),
    Mutant("said_by_everyone", "ranks", "commands/ranks.py",
           'if int(os.environ.get("LOCAL_RANK", "0")):', "if False:",
           "test_commands.py::test_what_ranks_cannot_do_is_said_once"),
]

# SPDX-License-Identifier: MIT
"""Wrong variants of the GPU benches: rows lost, others judged otherwise than ours, memory."""

from mutants import Mutant

GPU, CASES, GOALS = (f"bench/harness/{name}.py" for name in ("gpu", "cases", "goals"))
ALL, CARD = "bench/all.py", "bench/harness/one_card.py"
_raises = "test_bench_all.py::test_a_case_that_raises_costs_no_other"
_minutes = "test_bench_all.py::test_no_case_begins_after_the_minutes_and_none_goes_on_for_long"
_ends = "test_bench_all.py::test_a_process_ends_with_the_first_case_that_fails"
_bound = "test_bench_gpu.py::test_a_bound_is_never_the_best"

MUTANTS = [
    Mutant("timed_loop_unguarded", "rows", GPU,
           "timed[name].append(guarded(name, _timed, step, inputs[i % len(inputs)], device))",
           "timed[name].append(_timed(step, inputs[i % len(inputs)], device))",
           "test_bench_gpu.py::test_a_step_that_raises_while_it_is_timed_loses_itself_alone[3]"),
    Mutant("copy_is_a_peer", "rows", GPU, "name not in (ours, *bounds)", "name != ours", _bound),
    Mutant("best_is_the_slowest", "rows", GPU, "best = min(speed_of", "best = max(speed_of",
           "test_bench_gpu.py::test_a_row_counts_right"),
    Mutant("all_stages_at_once", "rows", GPU, "    for stage in stages:",
           "    for stage in list(stages):",
           "test_bench_gpu.py::test_stages_grow_and_are_asked_for_one_by_one"),
    Mutant("square_of_the_error", "rows", GPU, "(sums[0] / sums[1]).sqrt()", "(sums[0] / sums[1])",
           "test_bench_gpu.py::test_errors_are_relative_and_nan_is_one"),
    Mutant("others_judged_as_ours", "rows", GPU, "PEER_TOLERANCE = 2e-2", "PEER_TOLERANCE = 5e-3",
           "test_bench_gpu.py::test_a_step_that_is_wrong_has_the_reason_in_its_place"),
    Mutant("only_runtime_errors", "rows", CASES, "except Exception as error:               # what",
           "except RuntimeError as error:            # what", _raises),
    Mutant("too_large_is_tried", "rows", CASES, "case.needs > free:", "False:", _raises),
    Mutant("rows_of_one_name_pile_up", "rows", CASES, "if row[\"case\"] in names else len(names)",
           "if False else len(names)", _raises),
    Mutant("sick_process_goes_on", "rows", CASES, 'if message.startswith(("failed", "left out")):',
           "if False:", f"{_ends}[given2-left2-failed: x]"),
    Mutant("failed_case_again", "rows", CASES, "return names[i + 1 :]", "return names[i:]",
           f"{_ends}[given2-left2-failed: x]"),
    Mutant("begun_after_the_end", "rows", CASES, "if time.monotonic() >= end:", "if False:",
           _minutes),
    Mutant("hangs_as_long_as_it_likes", "rows", CASES, "max(min(SILENCE, left), 0)", "SILENCE",
           _minutes),
    Mutant("record_overwritten", "rows", ALL, "if not file.exists():", "if True:",
           "test_bench_all.py::test_a_record_is_never_overwritten"),
    Mutant("rows_of_another_source", "rows", ALL, "same = earlier | head == earlier",
           "same = True", "test_bench_all.py::test_a_record_is_never_overwritten"),
    Mutant("measured_again", "rows", ALL,
           'not found["cases"].get(name, "").startswith(FINAL)', "True",
           "test_bench_all.py::test_a_killed_run_keeps_its_rows_and_is_gone_on_with"),
    Mutant("saved_at_the_end", "rows", ALL, "            note(found, bench, case, message, quick)\n"
           "        save()", "            note(found, bench, case, message, quick)",
           "test_bench_all.py::test_a_killed_run_keeps_its_rows_and_is_gone_on_with"),
    Mutant("more_is_better_for_times", "rows", GOALS, "sign = -1 if goal.less_is_better else 1",
           "sign = 1", "test_bench_gpu.py::test_goals_stand_beside_their_rows"),
    Mutant("peer_ends_ours", "rows", CARD,
           "        except Exception as failed:\n            error = more",
           "        except torch.OutOfMemoryError as failed:\n            error = more",
           "test_bench.py::test_what_stops_the_peer_costs_ours_nothing[_theirs]"),
    Mutant("peer_without_room", "rows", CARD, "lambda n: 8 * n", "lambda n: 6 * n",
           "test_bench.py::test_the_peer_has_an_optimizer"),
    Mutant("all_experts_in_fp32", "rows", "bench/experts.py",
           "[w[e : e + 1].float() for w in W]", "[w.double().float()[e : e + 1] for w in W]",
           "test_bench_experts.py::test_v2_fits_in_80_gb"),
]

# SPDX-License-Identifier: MIT
"""Wrong variants of parallel/expert.py."""

from mutants import Mutant

FILE = "parallel/expert.py"
_same = "test_expert.py::test_equals_one_process[True-experts_loop-4]"
_sent = "test_expert.py::test_a_row_is_sent_once_a_rank"
_budget = "test_expert.py::test_the_budget_is_that_of_all_ranks"
_overlap = "test_expert.py::test_shared_experts_are_computed_while_rows_are_under_way"
_router = "test_expert.py::test_routers_and_shared_experts_learn_what_one_process_teaches"

MUTANTS = [
    Mutant("rows_go_to_every_rank", "ranks", FILE,
           "sent = here.any(-1) ", "sent = here.any(-1) | True ", _sent),
    Mutant("dropped_slots_sent", "ranks", FILE, "here = here & keep", "here = here", _same),
    Mutant("rows_of_dropped_slots_sent", "ranks", FILE,
           "sent = here.any(-1) ", "sent = (indices // held == ranks).any(-1) ", _sent),
    Mutant("experts_numbered_as_in_the_whole", "ranks", FILE,
           "indices[token] - held * rank[:, None]", "indices[token] - 0 * rank[:, None]", _same),
    Mutant("weights_scaled_twice", "scaling", FILE,
           "back.to(y.dtype)", "back.to(y.dtype) * gates[token].sum(1, keepdim=True)", _same),
    Mutant("gradients_times_the_group", "ranks", FILE,
           "dx, dgates = ctx.exchange.arrive()",
           "dx, dgates = (d * ctx.exchange.group.size() for d in ctx.exchange.arrive())", _same),
    Mutant("gradients_of_sums_averaged", "ranks", FILE,
           '"gradients of sums", [d]', '"gradients of sums", [d / ctx.exchange.group.size()]',
           _same),
    Mutant("routers_learn_nothing", "no gradient", FILE,
           "return dx, dgates, None, None", "return dx, dgates * 0, None, None", _router),
    Mutant("sums_of_one_rank_alone", "ranks", FILE,
           "y.index_add(0, token, back.to(y.dtype))", "y.index_copy(0, token, back.to(y.dtype))",
           _same),
    Mutant("sums_of_ranks_in_half_precision", "router dtype", FILE,
           "torch.promote_types(x.dtype, gates.dtype)", "torch.bfloat16", _same),
    Mutant("rows_waited_for_at_once", "ranks", FILE,
           'exchange.leave("tokens", [x, gates, numbers])',
           'exchange.leave("tokens", [x, gates, numbers]); exchange.flights[0][1].wait()',
           _overlap),
    Mutant("gradients_waited_for_at_once", "ranks", FILE,
           "[dx, dgates], back=True)",
           "[dx, dgates], back=True); ctx.exchange.flights[0][1].wait()", _overlap),
    Mutant("idle_ranks_stay_away", "idle expert", FILE,
           'exchange.leave("sums", [sums], back=True)',
           'exchange.leave("sums", [sums], back=True) if len(sums) else None',
           "test_expert.py::test_nothing_to_send_or_to_get"),
    Mutant("empty_messages_counted", "ranks", FILE, "len(sizes) * (n > 0)",
           "len(sizes)", _sent),
    Mutant("bytes_counted_as_numbers", "ranks", FILE,
           "p.element_size() * p.shape[1]", "p.shape[1]", _sent),
    Mutant("slots_not_counted_by_rank", "ranks", FILE, "sent.sum(1), here.sum((1, 2))",
           "sent.sum(1), sent.sum(1)", _sent),
    Mutant("budget_of_each_rank", "dropping", FILE,
           "return kept[first : first + N]",
           "return keep(indices[first : first + N], affinity[first : first + N], n_routed, "
           "n_devices, None, capacity)", _budget),
    Mutant("choices_of_the_first_rank", "dropping", FILE,
           "first = sum(exchange.into[: group.rank()])", "first = 0", _budget),
    Mutant("protected_elsewhere_forgotten", "dropping", FILE,
           "rest[0][:, 0].bool() if rest else None", "None", _budget),
]

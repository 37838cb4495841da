# SPDX-License-Identifier: MIT
"""Wrong variants of serving: pages and who holds them, the engine's schedule, its passes."""

from mutants import Mutant

PAGES, ENGINE, PIECES = (f"inference/{name}.py" for name in ("paged_cache", "engine", "pieces"))
_nan = "test_paged_cache.py::test_nan_of_one_text_reaches_no_other[latent]"
_waits = "test_engine.py::test_who_does_not_fit_waits_and_nobody_is_let_in_past_it[8]"
_preempted = "test_engine.py::test_preempted_requests_draw_what_they_would_have[latent]"
_all = "test_engine.py::test_all_pages_with_a_request_each"
_groups = "test_engine.py::test_short_ones_are_not_as_long_as_the_longest"

MUTANTS = [
    Mutant("page_found_by_its_own_tokens_alone", "serving", PAGES, "return before, tuple(tokens[",
           "return None, tuple(tokens[",
           "test_paged_cache.py::test_a_page_is_found_after_the_same_pages_only"),
    Mutant("name_kept_without_a_user", "serving", PAGES,
           "            self.forget(page)\n            self.free.append(page)",
           "            self.free.append(page)",
           "test_paged_cache.py::test_a_name_is_forgotten_with_its_last_user"),
    Mutant("page_free_while_others_use_it", "serving", PAGES, "        if self.users[page] == 0:",
           "        if True:",
           "test_paged_cache.py::test_a_name_is_forgotten_with_its_last_user"),
    Mutant("written_into_a_shared_page", "serving", PAGES,
           "        if self.pages.users[old] == 1:", "        if True:",
           "test_paged_cache.py::test_setting_back_into_a_shared_page_leaves_it_to_the_others"
           "[latent]"),
    Mutant("page_taken_as_it_was_left", "serving", PAGES, "store[:, table[-1]] = 0", "pass", _nan),
    Mutant("tables_filled_up_with_page_0", "serving", PAGES, "table[-1:] * (P - len(table))",
           "[0] * (P - len(table))", _nan),
    Mutant("whole_prompt_shared", "serving", PAGES, "(len(tokens) - 1) // self.page",
           "len(tokens) // self.page", "test_paged_cache.py::test_one_token_is_left_to_read"),
    Mutant("let_in_beside_promised_pages", "serving", ENGINE,
           "            if promised + cache.pages_for(", "            if cache.pages_for(", _waits),
    Mutant("waiting_overtaken", "serving", ENGINE,
           "            if r.slot is None and not self._let_in(r):\n                break",
           "            if r.slot is None and not self._let_in(r):\n                continue",
           _waits),
    Mutant("the_oldest_is_stopped", "serving", ENGINE, "        self._stop(running[-1])",
           "        self._stop(running[0])", _preempted),
    Mutant("one_generator_for_all", "serving", ENGINE, "r.top_p, r.generator)",
           "r.top_p, requests[0].generator)",
           "test_engine.py::test_whoever_stops_reading_loses_nothing"),
    Mutant("slot_not_given_back", "serving", ENGINE, "        self._slots.append(request.slot)",
           "        pass", _all),
    Mutant("drawn_for_a_cancelled_request", "serving", ENGINE,
           "        self._out = deque(entry for entry in self._out if entry[0] != id)",
           "        pass", "test_engine.py::test_nothing_of_a_cancelled_request_is_yielded"),
    Mutant("decoding_waits_for_a_chunk", "serving", ENGINE,
           "n = 1 if missing == 1 else min(missing, budget)", "n = min(missing, budget)",
           "test_engine.py::test_a_single_token_is_read_beside_a_full_chunk"),
    Mutant("names_of_an_interrupted_pass_stay", "serving", ENGINE,
           "                self._stop(request)\n            if not isinstance(",
           "                pass\n            if not isinstance(",
           "test_engine.py::test_an_interrupted_pass_is_begun_again"),
    Mutant("one_form_for_all_pieces", "serving", PIECES,
           "model.like, T, max(group.lengths) + T, self.kind)",
           "model.like, 1, max(group.lengths) + T, self.kind)",
           "test_engine.py::test_attention_takes_the_form_of_each_piece"),
    Mutant("a_group_as_long_as_the_longest_of_all", "serving", PIECES,
           "max(cache.pages_for(cache.read(slot) + n), FEW).bit_length()", "0", _groups),
    Mutant("shorter_ones_see_behind_their_end", "serving", PIECES, "scale, group.queries)",
           "scale, None)",
           "test_engine.py::test_nothing_is_padded_and_nothing_read_twice[latent]"),
]

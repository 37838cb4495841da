# SPDX-License-Identifier: MIT
"""Wrong variants of chat and fine-tuning: the template, what is held out, the loss of answers."""

from mutants import Mutant

CHAT, SFT, BLOCK = "alignment/chat.py", "alignment/sft.py", "block.py"
KINDS, SET, FILES = "text/questions.py", "text/instructions.py", "text/conversations.py"
DATA = "text/data.py"
_template = "test_chat.py::test_the_text_is_the_templates"
_marked = "test_chat.py::test_answers_are_marked_from_their_space_to_their_end_mark"
_prompt = "test_chat.py::test_a_prompt_is_the_beginning_of_what_is_learned"
_loss = "test_sft.py::test_the_loss_and_its_gradient_are_a_loops_over_all_answer_tokens[2]"
_padding = "test_sft.py::test_padding_changes_neither_losses_nor_gradients_nor_the_load"
_batch = "test_sft.py::test_a_batch_is_conversations_padded_on_the_right"
_pairs = "test_instructions.py::test_a_pair_and_its_mirror_are_on_the_same_side"
_sides = "test_instructions.py::test_no_question_that_is_judged_by_was_trained_on[upper]"

MUTANTS = [
    Mutant("prompt_ends_with_a_space", "chat", CHAT,
           'User: {content}\\n\\nAssistant:", False', 'User: {content}\\n\\nAssistant: ", False',
           _prompt),
    Mutant("system_message_lost", "chat", CHAT, 'f"{before}User: ', 'f"User: ', _template),
    Mutant("system_message_before_every_question", "chat", CHAT,
           '            before = ""\n', "            pass\n", _template),
    Mutant("end_mark_not_learned", "chat", CHAT,
           "answers += [is_answer] * len(piece)",
           "answers += [is_answer and i != tokenizer.eos for i in piece]", _marked),
    Mutant("questions_learned", "chat", CHAT,
           "answers += [is_answer] * len(piece)", "answers += [True] * len(piece)", _marked),
    Mutant("begin_mark_twice", "chat", CHAT,
           "ids, answers = [tokenizer.bos], [False]",
           "ids, answers = [tokenizer.bos] * 2, [False] * 2",
           "test_chat.py::test_text_that_spells_a_mark_stays_text"),
    Mutant("marks_are_0_and_1", "chat", CHAT,
           "[tokenizer.eos] * is_answer", "[1] * is_answer",
           "test_chat.py::test_ids_go_by_the_marks_of_the_tokenizer"),
    Mutant("any_order_of_roles", "chat", FILES,
           'if message["role"] != expected:', "if False:",
           "test_chat.py::test_what_is_no_conversation_is_refused"),
    Mutant("mean_of_micro_batches_means", "chat", SFT,
           "found * (rows / mean[0]).to(found.dtype)", "found", _loss),
    Mutant("mean_over_rows", "chat", SFT,
           "found * (rows / mean[0]).to(found.dtype)", "found * rows.to(found.dtype)", _loss),
    Mutant("share_in_fp32", "chat", SFT,
           "(targets != IGNORED).sum().double() / len(tokens)",
           "(targets != IGNORED).sum() / len(tokens)",
           "test_sft.py::test_the_loss_and_its_gradient_are_a_loops_over_all_answer_tokens[3]"),
    Mutant("targets_not_shifted", "chat", SFT,
           "ids[1:].masked_fill(~answers[1:]", "ids[:-1].masked_fill(~answers[1:]", _batch),
    Mutant("answers_one_token_late", "chat", SFT,
           "ids[1:].masked_fill(~answers[1:]", "ids[1:].masked_fill(~answers[:-1]", _batch),
    Mutant("padding_takes_capacity", "chat", SFT,
           "protected=torch.ones_like(batch.protected)", "protected=batch.protected", _padding),
    Mutant("padding_balanced", "chat", SFT, "lengths=lengths.tolist())", "lengths=None)", _padding),
    Mutant("padding_in_one_sequences_balance", "chat", BLOCK,
           "self._balance_of(s[b : b + 1, :n], indices[b : b + 1, :n])",
           "self._balance_of(s[b : b + 1, :n], indices[b : b + 1])", _padding),
    Mutant("balance_summed_over_sequences", "chat", BLOCK,
           "for b, n in enumerate(lengths)]).mean(0)", "for b, n in enumerate(lengths)]).sum(0)",
           _loss),
    Mutant("padding_in_the_load", "chat", BLOCK,
           "torch.arange(n) + b * T for b, n", "torch.arange(T) + b * T for b, n", _padding),
    Mutant("every_epoch_in_the_same_order", "chat", DATA,
           "default_rng([self.seed, epoch]).permutation(self.n)",
           "default_rng([self.seed, 0]).permutation(self.n)",
           "test_sft.py::test_each_epoch_reads_each_conversation_once_in_an_order_of_its_own"),
    Mutant("epoch_begun_anew_on_resuming", "chat", DATA,
           'self._enter(state["epoch"], state["place"])', 'self._enter(state["epoch"], 0)',
           "test_sft.py::test_a_resumed_run_has_the_same_losses_and_weights_bit_for_bit[1]"),
    Mutant("mirrored_pair_is_another", "chat", KINDS,
           'return _same(f"{min(a, b)} {max(a, b)}", (f"What is {a} + {b}?"',
           'return _same(f"{a} {b}", (f"What is {a} + {b}?"', _pairs),
    Mutant("held_out_are_trained_on", "chat", SET,
           "if is_held_out(kind, question.key) == held_out:", "if True:", _sides),
    Mutant("held_out_by_the_seed", "chat", SET,
           "if is_held_out(kind, question.key) == held_out:",
           "if (draw.random() < 0.2) == held_out:", _sides),
    Mutant("weekdays_counted_back", "chat", KINDS, "(b - a) % 7)", "(a - b) % 7)",
           "test_instructions.py::test_the_answer_is_right[weekdays]"),
    Mutant("repeated_words_count", "chat", KINDS,
           "len(found) == len(set(found)) == len(wanted)", "len(found) == len(wanted)",
           "test_instructions.py::test_any_words_of_the_group_serve_in_their_number"),
]

# SPDX-License-Identifier: MIT
"""Wrong variants of GRPO, of the answers it learns from, of its tasks, and of rewards."""

from mutants import Mutant

LOSS, ROLLOUT, REWARD, BODIES = (
    f"alignment/{name}.py" for name in ("grpo", "rollout", "reward", "bodies"))
_loop = "test_grpo.py::test_the_loss_is_the_loop_over_tokens"
_advantages = "test_grpo.py::test_advantages_are_those_of_the_statistics_module"
_batch = "test_rollout.py::test_a_batch_holds_what_the_loss_needs"
_draws = "test_rollout.py::test_answers_are_what_generate_draws_with_the_same_generator"
_log_p = "test_rollout.py::test_log_probabilities_are_those_of_the_whole_text"
_epochs = "test_rollout.py::test_every_epoch_asks_every_question_once_in_an_order_of_its_own"
_cut = "test_rollout.py::test_what_follows_a_cut_is_as_if_it_had_not_been_written"
_spread = "test_rollout.py::test_only_groups_with_spread_are_kept"
_own = "test_bodies.py::test_a_functions_own_body_comes_back"
_micro = "test_rollout.py::test_micro_batches_give_the_gradient_of_the_whole_batch"
_values = "test_reward.py::test_an_answer_is_worth_what_its_last_token_says"

MUTANTS = [
    Mutant("std_of_the_sample", "(34)", LOSS, "correction=0", "correction=1", _advantages),
    Mutant("std_of_the_batch", "(34)", LOSS,
           "torch.std_mean(r, -1, correction=0, keepdim=True)",
           "torch.std_mean(r, correction=0)", _advantages),
    Mutant("mean_not_taken_off", "(34)", LOSS, "(r - mean) / std", "r / std", _advantages),
    Mutant("equal_judged_by_the_std", "(34)", LOSS,
           "equal = low == high", "equal = torch.zeros_like(low) > 0",
           "test_grpo.py::test_equal_rewards_teach_nothing"),
    Mutant("range_not_taken_out", "(34)", LOSS,
           "    r = (r - low) / (high - low).where(~equal, 1.0)", "    r = r",
           "test_grpo.py::test_advantages_know_neither_the_scale_nor_the_place_of_rewards"),
    Mutant("kl_reversed", "(33)", LOSS, "log_ratio = ref_logp - logp",
           "log_ratio = logp - ref_logp", _loop),
    Mutant("kl_without_its_log", "(33)", LOSS, "log_ratio.exp() - log_ratio - 1",
           "log_ratio.exp() - 1", _loop),
    Mutant("ratio_upside_down", "(32)", LOSS, "(logp - old_logp).exp()", "(old_logp - logp).exp()",
           _loop),
    Mutant("clip_takes_the_larger", "(32)", LOSS, "torch.minimum(", "torch.maximum(", _loop),
    Mutant("clip_on_one_side", "(32)", LOSS, "ratio.clamp(1 - clip, 1 + clip)",
           "ratio.clamp(max=1 + clip)", _loop),
    Mutant("loss_as_objective", "(32)", LOSS, "return -gain, penalty", "return gain, penalty",
           _loop),
    Mutant("penalty_rewarded", "(32)", LOSS, "return gain + penalty", "return gain - penalty",
           _loop),
    Mutant("padding_in_the_mean", "(32)", LOSS, ".sum(-1) / mask.sum(-1)).mean()",
           ".sum(-1) / mask.shape[1]).mean()", _loop),
    Mutant("token_mean_by_answers", "(32)", LOSS, "(values * mask).sum() / mask.sum()",
           "(values * mask).sum() / len(mask)", _loop),
    Mutant("old_policy_learns", "(32)", LOSS, "old_logp.detach()", "old_logp",
           "test_grpo.py::test_only_the_policy_gets_a_gradient"),
    Mutant("advantages_learn", "(32)", LOSS, "advantages.detach()", "advantages",
           "test_grpo.py::test_only_the_policy_gets_a_gradient"),
    Mutant("masked_numbers_reach_the_sum", "(32)", LOSS,
           "(t.where(mask, 0.0) for t in", "(t for t in",
           "test_grpo.py::test_what_is_masked_out_may_hold_anything"),
    Mutant("questions_in_the_loss", "policy", ROLLOUT, "answer = slice(len(p) - 1,",
           "answer = slice(0,", _draws),
    Mutant("end_mark_of_an_answer_lost", "policy", ROLLOUT, "lengths[i] - 1)  ",
           "lengths[i] - 2)  ", _draws),
    Mutant("answers_at_another_temperature", "policy", ROLLOUT,
           "sample(logits, 1.0, 1.0, generator)", "sample(logits, 0.7, 1.0, generator)", _draws),
    Mutant("entropy_of_the_ended_too", "policy", ROLLOUT,
           "/ sum(map(len, entropy))", "/ sum(map(len, entropy)) * 1.1", _log_p),
    Mutant("what_follows_a_cut_learns", "policy", ROLLOUT, "del row[kept:], logp", "del logp",
           _cut),
    Mutant("entropy_behind_a_cut", "policy", ROLLOUT, "logp[i][kept:], entropy[i][kept:]",
           "logp[i][kept:]", _cut),
    Mutant("cut_by_another_question", "policy", ROLLOUT, "cut(which[place], answer)",
           "cut(place, answer)", "test_rollout.py::test_a_batch_is_cut_by_its_questions"),
    Mutant("cut_at_the_limit", "policy", ROLLOUT, "running[i] &= kept == len(row)",
           "running[i] &= True", _cut),
    Mutant("groups_without_spread_are_kept", "policy", ROLLOUT, "> by_question.amin(1) ",
           ">= by_question.amin(1) ", _spread),
    Mutant("advantages_of_other_rows", "policy", ROLLOUT, "A[kept]", "A[: len(kept)]", _spread),
    Mutant("report_of_the_kept_alone", "policy", ROLLOUT, "1 - spread.double().mean()",
           "0 * spread.double().mean()", _spread),
    Mutant("dedent_counts_no_end_mark", "task", BODIES, "min(1 + bisect", "min(bisect", _own),
    Mutant("dedent_from_the_margin", "task", BODIES, "<= indent:", "<= 0:", _own),
    Mutant("dedent_to_the_head_missed", "task", BODIES, "<= indent:", "< indent:", _own),
    Mutant("the_def_is_counted", "task", BODIES, "feedback.LEAST + 1", "feedback.LEAST",
           "test_bodies.py::test_what_bodies_are_worth"),
    Mutant("what_follows_the_dedent_is_judged", "task", BODIES,
           "body = text[: dedent(text, head.indent)]", "body = text", _own),
    Mutant("the_margin_stays", "task", BODIES, 'margin = " " * head.indent', 'margin = ""', _own),
    Mutant("old_log_p_of_the_reference", "policy", ROLLOUT, "old = _log_probs(self.policy, said)",
           "old = _log_probs(self.reference, said)", _batch),
    Mutant("advantages_across_questions", "policy", ROLLOUT, "rewards.view(-1, self.group)",
           "rewards.view(self.group, -1).T.contiguous().view(-1, self.group)", _batch),
    Mutant("the_same_questions_for_ever", "policy", ROLLOUT, "self.asked += len(which)",
           "self.asked += 0", _epochs),
    Mutant("every_epoch_in_one_order", "policy", ROLLOUT, "500_009 * (epoch + 1)", "500_009",
           _epochs),
    Mutant("a_place_is_not_kept", "policy", ROLLOUT, 'self.asked = state["asked"]',
           "self.asked = 0", _epochs),
    Mutant("micro_batches_by_rows_alone", "policy", ROLLOUT,
           ' if normalise == "token" else 1.0', " * 0 + 1.0", f"{_micro}[0.2-token]"),
    Mutant("value_of_the_padding", "(35)", REWARD, "device=ids.device) - 1",
           "device=ids.device) * 0 + T - 1", _values),
    Mutant("value_before_the_last_token", "(35)", REWARD, "device=ids.device) - 1",
           "device=ids.device).clamp(min=2) - 2", _values),
    Mutant("the_worse_wins", "(35)", REWARD, "F.logsigmoid(better - worse)",
           "F.logsigmoid(worse - better)", "test_reward.py::test_the_pairwise_loss_is_the_loop"),
    Mutant("safety_by_the_rules", "(36)", REWARD, "c_safety * safety + c_rule * rule",
           "c_rule * safety + c_safety * rule",
           "test_reward.py::test_the_reward_of_stage_two_is_the_weighed_sum"),
]

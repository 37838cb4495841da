# SPDX-License-Identifier: MIT
"""Tasks of ours for lm-eval, which need no network: a dict each, as its YAML files have them.

    questions       held-out questions of text/instructions.py, answered in the chat template
    code_questions  the same of kind `code`: Pass@1, the programs run in the sandbox
    stories_colour  which of eight colours the thing had: multiple choice
    stories_moral   the moral that follows from the hero's virtue: log p of a continuation
    stories_bits    bits per byte of whole stories

The stories are of another seed than those that models are trained on. Examples for `--shots` are
of the training questions, or of a third seed.

Two tasks are lm-eval's own, judged otherwise: humaneval_sandboxed and mbpp_sandboxed have its
prompts and stops (0.4.13), and run the programs in the sandbox. They download their data.

Whoever makes a task from such a dict needs the extra `eval`; reading this file does not.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv2_ref.alignment.feedback import feedback
from dsv2_ref.inference.scoring import exact_match, token_f1
from dsv2_ref.text.instructions import TRAINED_KINDS, examples
from dsv2_ref.text.questions import KINDS
from dsv2_ref.text.stories import sample

Row = dict[str, Any]
SPLITS = {"train": 20, "test": 200}              # rows
SEEDS = {"train": 2, "test": 1}                  # of stories; models are trained on seed 0
COLOURS = "red blue green yellow white black silver purple".split()


def _dataset(rows: Callable[[str], list[Row]]) -> Callable[..., Any]:
    """What lm-eval calls for the data: rows("train") and rows("test") as its library has them."""
    def made(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(rows(split)) for split in SPLITS})

    return made


def question_rows(split: str, kinds: Sequence[str] = TRAINED_KINDS) -> list[Row]:
    """Questions with their answers; those of "test" are held out."""
    rows = []
    for example in examples(SPLITS[split], 0, kinds, held_out=split == "test"):
        system, asked = "", example.prompt[-1]["content"]
        if len(example.prompt) == 2:
            system = example.prompt[0]["content"] + "\n\n"
        rows.append({"text": f"{system}User: {asked}\n\nAssistant:", "answer": example.answer,
                     "kind": example.kind, "test": example.test})
    return rows


def code_rows(split: str) -> list[Row]:
    return question_rows(split, ("code",))


def story_rows(split: str, pattern: str) -> list[Row]:
    """English stories cut before a word or words: "text" and what follows, "answer"."""
    rows, n = [], SPLITS[split]
    for story in sample(SEEDS[split], 4 * n):        # 48 % are English and have a moral
        if match := re.match(pattern, story.text, re.S):
            rows.append({"text": match[1], "answer": match[2]})
    return rows[:n]


def colour_rows(split: str) -> list[Row]:
    return story_rows(split, r"(.* showed the) (\w+) ")


def moral_rows(split: str) -> list[Row]:
    return story_rows(split, r"(.* everybody (?:knew|said) that) (.*)")


def whole_rows(split: str) -> list[Row]:
    return [{"answer": story.text} for story in sample(SEEDS[split], SPLITS[split])]


def judge_answer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """exact_match and f1 by words, and whether it is right by the rules of its kind."""
    return {"right": float(KINDS[doc["kind"]].check(results[0].strip(), doc["answer"])),
            "exact_match": exact_match(results[0], [doc["answer"]]),
            "f1": token_f1(results[0], [doc["answer"]])}


def _passes(code: str, check: str) -> dict[str, float]:
    return {"pass@1": float(feedback(code, check, seconds=3.0).passes)}


def judge_code(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _passes(results[0].strip(), doc["test"])


def judge_humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _passes(doc["prompt"] + results[0], f"{doc['test']}\ncheck({doc['entry_point']})")


def judge_mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return _passes(results[0], "\n".join(doc["test_list"]))


def mbpp_examples(docs: Any) -> Any:
    """The three tasks that everybody shows before MBPP's questions."""
    return docs.filter(lambda doc: doc["task_id"] in (2, 3, 4))


def _metrics(*names: str) -> list[Row]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


_OURS = {"training_split": "train", "test_split": "test", "doc_to_text": "{{text}}",
         "doc_to_target": "{{answer}}", "target_delimiter": " "}
_WRITTEN = _OURS | {"output_type": "generate_until", "fewshot_delimiter": "\n\n",
                    "generation_kwargs": {"until": ["\n\nUser:"], "max_gen_toks": 48}}
LOCAL: dict[str, Row] = {name: {"task": name} | task for name, task in {
    "questions": _WRITTEN | {
        "custom_dataset": _dataset(question_rows), "process_results": judge_answer,
        "metric_list": _metrics("right", "exact_match", "f1")},
    "code_questions": _WRITTEN | {
        "custom_dataset": _dataset(code_rows), "process_results": judge_code,
        "metric_list": _metrics("pass@1")},
    "stories_colour": _OURS | {
        "output_type": "multiple_choice", "custom_dataset": _dataset(colour_rows),
        "doc_to_choice": COLOURS, "metric_list": _metrics("acc", "acc_norm")},
    "stories_moral": _OURS | {
        "output_type": "loglikelihood", "custom_dataset": _dataset(moral_rows),
        "doc_to_target": "{{' ' + answer}}", "target_delimiter": "",      # it takes no delimiter
        "metric_list": [*_metrics("acc"), {"metric": "perplexity", "aggregation": "perplexity",
                                           "higher_is_better": False}]},
    "stories_bits": _OURS | {
        "output_type": "loglikelihood_rolling", "custom_dataset": _dataset(whole_rows),
        "doc_to_text": "", "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": False}
            for name, aggregation in (("bits_per_byte", "bits_per_byte"),
                                      ("byte_perplexity", "weighted_perplexity"))]},
}.items()}
SANDBOXED: dict[str, Row] = {
    "humaneval_sandboxed": {
        "task": "humaneval_sandboxed", "dataset_path": "openai/openai_humaneval",
        "output_type": "generate_until", "test_split": "test", "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}", "process_results": judge_humaneval,
        "num_fewshot": 0, "metric_list": _metrics("pass@1"),
        "generation_kwargs": {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
                              "max_gen_toks": 1024, "do_sample": False}},
    "mbpp_sandboxed": {
        "task": "mbpp_sandboxed", "dataset_path": "google-research-datasets/mbpp",
        "dataset_name": "full", "output_type": "generate_until", "test_split": "test",
        "doc_to_text": "You are an expert Python programmer, and here is your task: {{text}} Your "
                       "code should pass these tests:\n\n{{test_list[0]}}\n{{test_list[1]}}\n"
                       "{{test_list[2]}}\n[BEGIN]\n",
        "doc_to_target": "{{code}}\n[DONE]", "target_delimiter": "", "num_fewshot": 3,
        "fewshot_config": {"sampler": "first_n", "split": "prompt", "process_docs": mbpp_examples},
        "process_results": judge_mbpp, "metric_list": _metrics("pass@1"),
        "generation_kwargs": {"until": ["[DONE]"], "do_sample": False}},
}

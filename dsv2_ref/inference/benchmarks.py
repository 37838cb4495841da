# SPDX-License-Identifier: MIT
"""The paper's benchmarks by name: how it asked them, its numbers, and their task in lm-eval.

`shots` and `paper` are Table 2's (V2, in per cent; Pile-test in bits per byte). The paper used a
framework of its own, whose prompts stand in its Appendix G: a score of lm-eval is near the paper's
only where its prompt is. Where lm-eval is known to ask otherwise, `differs` says so.

A task that is None is not in lm-eval 0.4.13. HumanEval, MBPP and CRUXEval run programs; lm-eval
runs them in its own process, where nothing contains them. For the first two alignment/tasks.py has
the same prompts with our sandbox as the judge.
"""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """A row of Table 2. way: "choice", "text", "program" or "bits"; metric: lm-eval's name."""

    name: str
    way: str
    shots: int
    measure: str             # as the paper calls it
    paper: float
    task: str | None
    metric: str = "acc"
    differs: str = ""


BENCHMARKS = (
    Benchmark("Pile-test", "bits", 0, "BPB", 0.606, None, "bits_per_byte",
              "lm-eval has its parts (pile_arxiv, ...) and no whole"),
    Benchmark("BBH", "text", 3, "EM", 78.9, "bbh", "exact_match,get-answer",
              "with a chain of thought; its 3 examples are fixed"),
    Benchmark("MMLU", "choice", 5, "Acc.", 78.5, "mmlu"),
    Benchmark("DROP", "text", 3, "F1", 80.1, "drop", "f1"),
    Benchmark("ARC-Easy", "choice", 25, "Acc.", 97.6, "arc_easy", "acc",
              "scores the texts of the choices, the paper lists them and scores letters"),
    Benchmark("ARC-Challenge", "choice", 25, "Acc.", 92.4, "arc_challenge", "acc",
              "as ARC-Easy"),
    Benchmark("HellaSwag", "choice", 10, "Acc.", 84.2, "hellaswag", "acc_norm"),
    Benchmark("PIQA", "choice", 0, "Acc.", 83.7, "piqa"),
    Benchmark("WinoGrande", "choice", 5, "Acc.", 84.9, "winogrande"),
    Benchmark("RACE-Middle", "choice", 5, "Acc.", 73.1, None, "acc",
              "lm-eval has RACE-High alone"),
    Benchmark("RACE-High", "choice", 5, "Acc.", 52.7, "race", "acc",
              "the last question of each passage, behind the others with answers"),
    Benchmark("TriviaQA", "text", 5, "EM", 79.9, "triviaqa", "exact_match,remove_whitespace"),
    Benchmark("NaturalQuestions", "text", 5, "EM", 38.7, "nq_open",
              "exact_match,remove_whitespace"),
    Benchmark("AGIEval", "text", 0, "Acc.", 51.2, "agieval", "acc",
              "compares choices, the paper generates"),
    Benchmark("HumanEval", "program", 0, "Pass@1", 48.8, "humaneval_sandboxed", "pass@1"),
    Benchmark("MBPP", "program", 3, "Pass@1", 66.6, "mbpp_sandboxed", "pass@1"),
    Benchmark("CRUXEval-I", "program", 2, "Acc.", 52.8, None, "pass@1",
              "lm-eval runs its programs without a sandbox"),
    Benchmark("CRUXEval-O", "program", 2, "Acc.", 49.8, None, "pass@1", "as CRUXEval-I"),
    Benchmark("GSM8K", "text", 8, "EM", 79.2, "gsm8k_cot", "exact_match,strict-match",
              "its 8 examples are fixed"),
    Benchmark("MATH", "text", 4, "EM", 43.6, "minerva_math", "exact_match,none",
              "its 4 examples are fixed"),
    Benchmark("CMath", "text", 3, "EM", 78.7, None),
    Benchmark("CLUEWSC", "text", 5, "EM", 82.2, None),
    Benchmark("C-Eval", "choice", 5, "Acc.", 81.7, "ceval-valid", "acc",
              "on the validation part, whose answers are public"),
    Benchmark("CMMLU", "choice", 5, "Acc.", 84.0, "cmmlu"),
    Benchmark("CMRC", "text", 1, "EM", 77.5, None),
    Benchmark("C3", "choice", 0, "Acc.", 77.4, None),
    Benchmark("CHID", "choice", 0, "Acc.", 92.7, None),
    Benchmark("CCPM", "choice", 0, "Acc.", 93.1, None),
)


def benchmark(name: str) -> Benchmark | None:
    """The paper's benchmark of that name, in small or large letters; None if it has none.

    ValueError for one that cannot be run here: it says why.
    """
    found = next((b for b in BENCHMARKS if b.name.lower() == name.lower()), None)
    if found is not None and found.task is None:
        why = found.differs or "lm-eval has no such task"
        raise ValueError(f"tasks: {found.name} is not available: {why}, expected another one")
    return found

# SPDX-License-Identifier: MIT
"""What a chat model answers, and which share of it is right.

Answers are the most likely ones, token by token (temperature 0), so that a figure has no luck of
sampling in it. An answer that does not end within its room is cut there, and judged as it is.
"""

from collections.abc import Sequence

from dsv2_ref.alignment.chat import prompt_ids
from dsv2_ref.alignment.rollout import Reward
from dsv2_ref.inference.generate import generate
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.conversations import Message
from dsv2_ref.text.instructions import Example
from dsv2_ref.text.tokenizer import TextTokenizer


def answers(
    model: DeepSeekV2, tokenizer: TextTokenizer, prompts: Sequence[Sequence[Message]],
    max_new_tokens: int = 48, batch: int = 64,
) -> list[str]:
    """The answer to each prompt, without the space before it and the end mark.

    prompts: conversations that end with the user. `batch` of them are read at once, those of about
    one length together.
    """
    ids = [prompt_ids(messages, tokenizer) for messages in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = [""] * len(ids)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        new = generate(model, [ids[i] for i in rows], max_new_tokens, stop=tokenizer.eos)
        for i, row in zip(rows, new, strict=True):
            found[i] = tokenizer.decode(row).removeprefix(" ")
    return found


def exact_match(
    model: DeepSeekV2, tokenizer: TextTokenizer, examples: Sequence[Example],
    max_new_tokens: int = 48,
) -> dict[str, float]:
    """Share of the examples whose answer passes their check, by kind, in alphabetical order."""
    found = answers(model, tokenizer, [example.prompt for example in examples], max_new_tokens)
    right: dict[str, list[bool]] = {}
    for example, answer in zip(examples, found, strict=True):
        right.setdefault(example.kind, []).append(example.check(answer))
    return {kind: sum(right[kind]) / len(right[kind]) for kind in sorted(right)}


def truth(examples: Sequence[Example], tokenizer: TextTokenizer) -> Reward:
    """The reward of what a program can check: 1 for an answer that passes, 0 for any other."""

    def reward(which: Sequence[int], answers: Sequence[list[int]]) -> list[float]:
        said = [tokenizer.decode(answer).removeprefix(" ") for answer in answers]
        return [float(examples[i].check(text)) for i, text in zip(which, said, strict=True)]

    return reward

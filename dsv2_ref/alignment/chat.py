# SPDX-License-Identifier: MIT
"""The published chat template: messages as text, and as ids with the answers marked.

    BEGIN {system}\\n\\n User: {question}\\n\\n Assistant: {answer} END User: {question} ...

without the spaces around `BEGIN`, `END`, and after \\n\\n. `TEMPLATE` is the text that the
published chat models carry in their tokenizer_config.json; transformers renders it. `render` is the
same as a function.

Three things are to be known:
  1. A prompt ends with `Assistant:` and no space: the space belongs to the answer, as the first
     thing that the model writes.
  2. Ids are made in pieces: what stands before an answer, the answer, the mark. So the ids of a
     prompt are the beginning of the ids of the whole conversation, whatever a tokenizer would make
     of the border, and what is learned is what is sampled. Our tokenizers never merge over a
     border between punctuation and a space, so transformers finds the same ids.
  3. The two marks are ids. Text that spells one stays text, so no user can end an answer or begin
     a conversation; transformers would read the mark there. `User:` and `Assistant:` are plain
     words: a question may contain them, and nothing in the template tells it from a turn.

The begin mark stands once: it is put here and nowhere else, and a tokenizer that puts one in front
of what it encodes is not asked to.
"""

import json
from collections.abc import Sequence

from dsv2_ref.text.conversations import Message, check_messages
from dsv2_ref.text.tokenizer import BEGIN, END, TextTokenizer

TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'Assistant:' }}{% endif %}"
)
CONFIG_FILE = "tokenizer_config.json"


def render(messages: Sequence[Message], prompt: bool = False) -> str:
    """The text of a conversation, or of a `prompt`, which ends with the user and is to be answered.

    ValueError for messages that are no conversation of that kind.
    """
    check_messages(messages, "user" if prompt else "assistant")
    return BEGIN + "".join(text + END * is_answer for text, is_answer in _pieces(messages))


def conversation_ids(
    messages: Sequence[Message], tokenizer: TextTokenizer
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation that ends with the assistant, and which of them are to be learned.

    True are the tokens of all answers, from the space behind `Assistant:` to the end mark.
    """
    check_messages(messages)
    return _ids(messages, tokenizer)


def prompt_ids(messages: Sequence[Message], tokenizer: TextTokenizer) -> list[int]:
    """Ids of a conversation that ends with the user, up to `Assistant:`; an answer is to follow."""
    check_messages(messages, "user")
    return _ids(messages, tokenizer)[0]


def _ids(
    messages: Sequence[Message], tokenizer: TextTokenizer
) -> tuple[list[int], list[bool]]:
    ids, answers = [tokenizer.bos], [False]
    for text, is_answer in _pieces(messages):
        piece = tokenizer.encode(text) + [tokenizer.eos] * is_answer
        ids += piece
        answers += [is_answer] * len(piece)
    return ids, answers


def _pieces(messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """What stands before an answer and what is one, in turn; without marks."""
    pieces, before = [], ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            pieces.append((" " + content, True))
        elif role == "system":
            before = f"{content}\n\n"
        else:
            pieces.append((f"{before}User: {content}\n\nAssistant:", False))
            before = ""
    return pieces


def tokenizer_config(max_positions: int) -> str:
    """The tokenizer_config.json of a chat model of ours: the template, and the marks by name.

    `checkpoint.save(model, path, files={CONFIG_FILE: ..., "tokenizer.json": ...})` writes it.
    """
    return json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END,
        "pad_token": END, "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
    }, indent=2, ensure_ascii=False) + "\n"

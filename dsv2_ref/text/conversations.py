# SPDX-License-Identifier: MIT
"""Conversations in the common form, and files of them.

A conversation is a list of messages, `{"role": "system" | "user" | "assistant", "content": text}`:
first a system message or none, then user and assistant in turn. To be learned from it ends with the
assistant, to be answered with the user. A .jsonl file has one object a line, whose "messages" are a
conversation; its other keys are anybody's.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv2_ref.text.reading import checked

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")


class Preference(NamedTuple):
    """A question, and of two answers to it the better one and the other."""

    messages: list[dict[str, str]]
    chosen: str
    rejected: str


def check_messages(messages: object, last: str = "assistant", where: str = "messages") -> None:
    """ValueError, which begins with `where`, unless it is a conversation that ends with `last`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: {messages!r:.60}, expected a list of messages, not empty")
    for i, message in enumerate(messages):
        here = f"{where}[{i}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"{here}: {message!r:.60}, expected an object with role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"{here}: role {message['role']!r:.60}, expected one of "
                             f"{', '.join(ROLES)}")
        if not checked(message["content"], here, "content").strip():
            raise ValueError(f"{here}: content {message['content']!r:.60}, expected some text")
    turns = messages[messages[0]["role"] == "system" :]
    for i, message in enumerate(turns, len(messages) - len(turns)):
        expected = ROLES[1 + (i - len(messages) + len(turns)) % 2]
        if message["role"] != expected:
            raise ValueError(f"{where}[{i}]: role {message['role']!r}, expected {expected!r}: a "
                             "system message or none, then user and assistant in turn")
    if not turns or turns[-1]["role"] != last:
        raise ValueError(f"{where}: ends with {messages[-1]['role']!r}, expected {last!r}")


def read_conversations(path: str | Path) -> list[list[dict[str, str]]]:
    """The conversations of a .jsonl file, in order; of a message role and content alone.

    Empty lines are passed over. ValueError names the file and the number of a line that is wrong.
    """
    return _read(path, _conversation, "conversations, expected one object with messages a line")


def read_preferences(path: str | Path) -> list[Preference]:
    """Two answers to a question, the better one named, from each line of a .jsonl file.

    A line is an object with "messages", which end with the user, "chosen" and "rejected", texts.
    ValueError as of `read_conversations`.
    """
    return _read(path, _preference, "preferences, expected one object with messages, chosen and "
                                    "rejected a line")


def _read(path: str | Path, line_as: Callable[[dict[str, Any], str], Any], what: str) -> list[Any]:
    found = []
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    found.append(line_as(_object(line, where), where))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not found:
        raise ValueError(f"{path}: no {what}")
    return found


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:         # a UnicodeDecodeError is a ValueError
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or "messages" not in row:
        raise ValueError(f"{where}: no field 'messages', expected an object with it")
    return row


def _conversation(row: dict[str, Any], where: str, last: str = "assistant") -> list[dict[str, str]]:
    check_messages(row["messages"], last, f"{where}: messages")
    return [{key: message[key] for key in ("role", "content")} for message in row["messages"]]


def _preference(row: dict[str, Any], where: str) -> Preference:
    answers = [checked(row.get(name), where, name) for name in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise ValueError(f"{where}: chosen and rejected are the same, expected two answers")
    return Preference(_conversation(row, where, "user"), *answers)


def conversation_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The content of a .jsonl file; each row an object with messages. ValueError if one has not."""
    lines = []
    for i, row in enumerate(rows):
        check_messages(row.get("messages"), where=f"rows[{i}]: messages")
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)

# SPDX-License-Identifier: MIT
"""`generate --prompts`: a file of prompts through the engine, a JSON line for each when it is done.

A line of the file: {"prompt": "...", "id": "a", "max_new_tokens": 20, "temperature": 0.7,
"top_p": 0.9, "seed": 0}. All but the prompt may be missing: the id is then the line's number, the
others are the command's options. So each text is what `generate --prompt` gives for it.

A line of the result: {"id": "a", "text": "..."}, in order of finishing. With a file to write to,
lines are added to it one by one, and a prompt whose id is there already is not read again: a run
that was stopped goes on where it stood.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from dsv2_ref.inference.engine import Engine, RequestFailed
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.text.tokenizer import TextTokenizer

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
         "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
KINDS = {"id": (str, int), "prompt": (str,), "max_new_tokens": (int,), "temperature": (int, float),
         "top_p": (int, float), "seed": (int,)}


def bytes_of(text: str) -> int:
    """"2GB", "512 MiB" or "1000" in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?((?:[kmgt]i?)?)b?", text.strip().lower())
    if not match:
        raise ValueError(f"memory: {text!r}, expected bytes such as 2GB, 512MiB or 100000")
    return int(float(match[1]) * UNITS[match[2]])


def read_prompts(path: str | Path, **options: Any) -> list[dict[str, Any]]:
    """The lines of a file, each with all of `options`. ValueError for the first bad line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"prompts: {str(path)!r} is not UTF-8, expected lines of JSON") from None
    found: dict[str | int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = _checked(line)
            asked = {"id": number} | options | given
            if asked["id"] in found:
                raise ValueError(f"id: {asked['id']!r} for the second time, expected one a prompt")
        except ValueError as error:
            raise ValueError(f"prompts: line {number}: {error}") from None
        found[asked["id"]] = asked | {"line": number}
    if not found:
        raise ValueError(f"prompts: {str(path)!r} has no line, expected at least one prompt")
    return list(found.values())


def _checked(line: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except ValueError:                                 # JSONDecodeError's own text has two lines
        raise ValueError(f"{line[:60]!r} is not JSON, expected {{\"prompt\": ...}}") from None
    if not isinstance(given, dict) or "prompt" not in given:
        raise ValueError(f"{line[:60]!r}, expected an object with a prompt")
    for name, value in given.items():
        if name not in KINDS:
            raise ValueError(f"{name!r}, expected only {', '.join(KINDS)}")
        if not isinstance(value, KINDS[name]) or isinstance(value, bool):
            raise ValueError(f"{name}: {value!r}, expected "
                             f"{' or '.join(kind.__name__ for kind in KINDS[name])}")
    return given


def ids_there(path: str | Path) -> set[str | int]:
    """Ids in a file of results. A last line that was cut off when a run was killed is removed."""
    if not Path(path).exists():
        return set()
    with open(path, "r+b") as file:
        whole = file.read()
        end = whole.rfind(b"\n") + 1
        file.truncate(end)
    try:
        return {json.loads(line)["id"] for line in whole[:end].splitlines()}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"out: {str(path)!r} has a line without an id, expected results of an "
                         "earlier run or a new file") from None


def answer(
    model: DeepSeekV2, tokenizer: TextTokenizer, prompts: list[dict[str, Any]], memory: int,
    cache: str = "latent", out: str | Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields {"id", "text"} of each prompt when it is done, and adds it to the file `out`.

    All are checked first: ValueError for one that cannot be read or never fits. FloatingPointError
    at the end if logits of some were no numbers.
    """
    done = ids_there(out) if out else set()
    engine, asked, new = Engine(model, memory, cache), {}, {}
    for prompt in prompts:
        if prompt["id"] in done:
            continue
        try:
            tokens = [tokenizer.bos, *tokenizer.encode(prompt["prompt"])]
            id = engine.add(tokens, prompt["max_new_tokens"], prompt["temperature"],
                            prompt["top_p"], seed=prompt["seed"])
        except UnicodeEncodeError:
            raise ValueError(f"prompts: line {prompt['line']}: prompt: {prompt['prompt']!r}, "
                             "expected text that UTF-8 can hold") from None
        except ValueError as error:
            raise ValueError(f"prompts: line {prompt['line']}: {error}") from None
        asked[id], new[id] = prompt, []
    with open(out, "a", encoding="utf-8") if out else nullcontext() as file:
        wrong = []
        while any(asked.values()):
            try:
                for id, token, finished in engine.run():
                    new[id].append(token)
                    if finished:
                        prompt, asked[id] = asked[id], None
                        text = prompt["prompt"] + tokenizer.decode(new.pop(id))
                        yield _written({"id": prompt["id"], "text": text}, file)
            except RequestFailed as error:             # the others go on
                wrong.append(f"line {asked[error.id]['line']}: {error.why}")
                asked[error.id] = None
    if wrong:
        raise FloatingPointError(f"prompts: {len(wrong)} have no text, first {wrong[0]}")


def _written(result: dict[str, Any], file: IO[str] | None) -> dict[str, Any]:
    if file is not None:
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return result

# SPDX-License-Identifier: MIT
"""Whose file is it? A run replaces and deletes only what proves, by what is in it, that a run wrote
it; under our names others keep models, logs and theses, too."""

import json
from pathlib import Path
from typing import Any

from dsv2_ref.config import Config
from dsv2_ref.files.tensors import open_file
from dsv2_ref.text.tokenizer import load_tokenizer
from dsv2_ref.training.shards import files_of_sharded, is_sharded


def is_state(path: Path) -> bool:
    """Whether a file, or a folder with all that is in it, is a state that a run wrote."""
    if path.is_dir():
        return is_sharded(path) and files_of_sharded(path) == {p.name for p in path.iterdir()}
    try:
        with open_file(path) as reader:
            return "state" in (reader.metadata() or {})
    except ValueError:
        return False


def is_config(path: Path) -> bool:
    """Whether it is a config.json, written as we write it."""
    try:
        return path.read_text(encoding="utf-8") == config_text(Config.from_hf(_json(path)))
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def config_text(config: Config) -> str:
    """What config.json of a run holds."""
    return json.dumps(config.to_hf(), indent=1)


def is_tokenizer(path: Path, config: Path) -> bool:
    """Whether it is the one of the config beside it, written as we write it."""
    try:
        tokenizer, c = load_tokenizer(path), Config.from_hf(_json(config))
        same = path.read_text(encoding="utf-8") == tokenizer.to_json()
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    return same and (tokenizer.vocab, tokenizer.bos, tokenizer.eos) == (c.vocab, c.bos, c.eos)


def is_log(path: Path) -> bool:
    """Whether every line is an entry of a run, but for a torn last one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    if lines and entry_of(lines[-1]) is None:
        torn = lines.pop()
        begin = '{"step": '
        if not lines and not (torn.startswith(begin) or begin.startswith(torn)):
            return False
    return all((entry := entry_of(line)) and "gradient_norm" in entry for line in lines)


def entry_of(line: str) -> dict[str, Any] | None:
    """What a line of log.jsonl holds; None if it is torn or no entry."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

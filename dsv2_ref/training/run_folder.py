# SPDX-License-Identifier: MIT
"""The folder of a run, which may be killed at any moment: its last states and its log.

A state is written under another name, flushed to the disk and renamed: it is there whole or not at
all, and carries a checksum of its tensors. The last `keep` are kept, so that one that the disk has
damaged is not the end: the one before it is gone back to, and the run says so.

The log is a line a step. A kill can tear its last line, and steps after the last state will be
done again: both are cut off when the run goes on.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from dsv2_ref.checkpoint import load_state

STATES = "state-*.safetensors"


class RunFolder:
    """`path` of one run; makes it. ValueError where it cannot be written."""

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path, self.keep = Path(path), keep
        self._log: TextIO | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for pattern in (".state-*.tmp", ".tmp*"):    # of a killed process; safetensors' own
                for scratch in self.path.glob(pattern):
                    scratch.unlink()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(f"{self.path}: cannot be written ({error.strerror or error})")

    @property
    def states(self) -> list[Path]:
        """Saved states, the newest first."""
        return sorted(self.path.glob(STATES), reverse=True)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """`write` the state after `step`, atomically; then forget all but the last `keep`."""
        write(self.path / f"state-{step:09}.safetensors")
        for old in self.states[self.keep :]:
            old.unlink(missing_ok=True)

    def newest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """The newest state that is whole; `say` is told of each damaged one.

        ValueError if there is none.
        """
        if not self.states:
            raise ValueError(f"{self.path}: no {STATES}, expected a saved state to resume from")
        for path in self.states:
            try:
                return path, *load_state(path)
            except ValueError as damage:
                say(f"{damage}; going back to the state before it")
        raise ValueError(f"{self.path}: every saved state is damaged, expected a whole one")

    def open_log(self, steps: int) -> "RunFolder":
        """log.jsonl for appending; lines after `steps`, and a torn one, are cut off."""
        path = self.path / "log.jsonl"
        scratch = path.with_name(".log.jsonl.tmp")
        kept = []
        try:
            if steps and path.exists():
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    if (entry := _entry(line)) and entry["step"] <= steps:
                        kept.append(line + "\n")
            scratch.write_text("".join(kept), encoding="utf-8")
            os.replace(scratch, path)                # the old log is there until the new one is
            self._log = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def log(self, entry: dict[str, Any]) -> None:
        """One line, at once."""
        try:
            self._log.write(json.dumps(entry) + "\n")
            self._log.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        if self._log is not None:
            try:
                self._log.close()
            except OSError:          # what a full disk did not take was told by `log`
                pass


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of a folder's log.jsonl; a torn line is left out. ValueError if there are none.
    """
    path = Path(folder) / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), expected the log of a run"
                         ) from None
    if not (entries := [entry for line in lines if (entry := _entry(line))]):
        raise ValueError(f"{path}: no entries, expected a line of JSON a step")
    return entries

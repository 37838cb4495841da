# SPDX-License-Identifier: MIT
"""The folder of a run, which may be killed at any moment: its last states and its log.

A state is one file, or a folder where several processes wrote it; it is there whole or not at all,
and carries a checksum. The last `keep` are kept, so that one that the disk has damaged is not the
end: the one before it is gone back to, and the run says so. The log is a line a step. A kill can
tear its last line, and steps after the last state will be done again: both are cut off when the run
goes on.

Nobody else's file is replaced or deleted. A file under one of our names has to prove by what is in
it that a run wrote it; else the run is refused before anything is touched. While a run goes on it
holds a lock on its folder, which ends with its process, however that ends.
"""

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv2_ref.files.lock import locked
from dsv2_ref.files.tensors import checksum, open_file
from dsv2_ref.files.whole import whole_file
from dsv2_ref.training import proof
from dsv2_ref.training.shards import is_sharded, load_sharded, state_of_sharded

# what a killed run leaves behind: our names, a process, and what it was
SCRATCH = re.compile(r"\.(\w+-\d{9}\.safetensors|log\.jsonl|config\.json|tokenizer\.json|model)"
                     r"\.\d+\.(tmp|safetensors|partial)"
                     r"|\.\w+-\d{9}\.[0-9a-f]{8}\.(tmp|old)")      # a state that is a folder


def save_state(path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a training state, tensors and a JSON-able dictionary, as one file, atomically.

    An interruption at any moment leaves the file that was there before.
    """
    seen: set[int] = set()
    whole = {}
    for name, t in tensors.items():            # a tied matrix is written under both its names
        t = t.detach().contiguous().cpu()
        whole[name] = t.clone() if t.data_ptr() in seen else t
        seen.add(t.data_ptr())
    metadata = {"state": json.dumps(state), "crc32": checksum(whole)}
    with whole_file(path) as scratch:
        room = scratch.with_suffix(".safetensors")    # it writes beside its file first, under a
        try:                                          # name that only here is known to be ours
            room.mkdir(exist_ok=True)
            save_file(whole, room / "state", metadata=metadata)
            os.replace(room / "state", scratch)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be written ({error})") from None
        finally:
            shutil.rmtree(room, ignore_errors=True)


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what `save_state` wrote. ValueError if a bit of its tensors has changed."""
    if is_sharded(path):
        return load_sharded(path)
    with open_file(Path(path)) as reader:
        metadata = reader.metadata() or {}
        if "state" not in metadata:
            raise ValueError(f"{path}: no training state inside, expected a file of `save_state`")
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}
    if (found := checksum(tensors)) != metadata.get("crc32"):
        raise ValueError(f"{path}: damaged, expected checksum {metadata.get('crc32')}, not {found}")
    try:
        return tensors, json.loads(metadata["state"])
    except json.JSONDecodeError:
        raise ValueError(f"{path}: damaged, expected JSON as its state") from None


def state_of(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The dictionary of a state that is whole, without tensors: each process reads its own later.

    ValueError as of `load_state`.
    """
    return {}, state_of_sharded(path) if is_sharded(path) else load_state(path)[1]


class RunFolder:
    """`path` of one run; its states are named state-STEP. Nothing is made before `held`."""

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path, self.keep = Path(path), keep
        self._log: TextIO | None = None
        self._held = False
        self._mine = self.states[::-1]        # states of this run, the oldest first

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(f"{self.path}: cannot be written ({error.strerror or error})")

    @property
    def states(self) -> list[Path]:
        """Saved states, the newest first."""
        return sorted((p for p in self.path.glob("state-*")
                       if re.fullmatch(r"state-\d{9}(\.safetensors)?", p.name)), reverse=True)

    @contextmanager
    def held(self) -> Iterator["RunFolder"]:
        """Make the folder and lock it, unless this object has already.

        ValueError where it cannot be written or another process trains into it.
        """
        if self._held:
            yield self
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(None, "no permission")
        except OSError as error:
            raise self._unwritable(error) from None
        with locked(self.path, "trains into"):
            self._held = True
            try:
                yield self
            finally:
                self._held = False

    def _remove_scratch(self) -> None:
        for path in self.path.glob(".*"):
            if SCRATCH.fullmatch(path.name):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def check_new(self) -> None:
        """ValueError if a new run here would replace what no run wrote, or a run's states."""
        if self.states:
            raise ValueError(f"{self.states[0]}: exists, expected --resume to go on with it or "
                             "another --out")
        config, tokenizer = self.path / "config.json", self.path / "tokenizer.json"
        self._check(config, proof.is_config)
        self._check(tokenizer, lambda path: proof.is_tokenizer(path, config))
        self.check_log()

    def check_log(self) -> None:
        """ValueError if there is a log.jsonl that no run wrote."""
        self._check(self.path / "log.jsonl", proof.is_log)

    def _check(self, path: Path, ours: Callable[[Path], bool]) -> None:
        if (path.exists() or path.is_symlink()) and not ours(path):
            raise ValueError(f"{path}: exists and was not written by this run, expected another "
                             "--out, or this moved away")

    def save(
        self, step: int, write: Callable[[Path], None], suffix: str = ".safetensors",
        forget: bool = True,
    ) -> None:
        """`write` the state after `step`, atomically; then forget all but the last `keep` of this
        run, and those of runs before it, unless another process does."""
        path = self.path / f"state-{step:09}{suffix}"
        write(path)
        self._mine = [p for p in self._mine if p != path] + [path]
        for old in self.states if forget else []:
            if old not in self._mine[-self.keep :]:
                _remove_state(old)

    def forget_from(self, step: int) -> None:
        """Remove the states after `step` updates and more, as long as there is one before them."""
        number = {path: int(path.stem.rpartition("-")[2]) for path in self.states}
        if any(n < step for n in number.values()):
            for path in (path for path, n in number.items() if n >= step):
                _remove_state(path)

    def newest(
        self, say: Callable[[str], None],
        load: Callable[[Path], tuple[dict[str, Tensor], dict[str, Any]]] = load_state,
    ) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """The newest state that is whole, as `load` reads it; `say` is told of each damaged one.

        ValueError if there is none.
        """
        if not self.states:
            raise ValueError(f"{self.path}: no state-*, expected a saved state to resume from")
        for path in self.states:
            try:
                return path, *load(path)
            except ValueError as damage:
                say(f"{damage}; going back to the state before it")
        raise ValueError(f"{self.path}: every saved state is damaged, expected a whole one")

    def open_log(self, steps: int) -> "RunFolder":
        """log.jsonl for appending; lines after `steps`, and a torn one, are cut off.

        What a killed run left half-written is removed.
        """
        path = self.path / "log.jsonl"
        self.check_log()
        self._remove_scratch()
        kept = []
        try:
            if steps and path.exists():
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    if (entry := proof.entry_of(line)) and entry["step"] <= steps:
                        kept.append(line + "\n")
            with whole_file(path) as scratch:        # the old log is there until the new one is
                scratch.write_text("".join(kept), encoding="utf-8")
            self._log = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from None
        last = f"state-{steps:09}.safetensors"
        self._mine = [p for p in self.states[::-1] if steps and p.name <= last]
        return self

    def log(self, entry: dict[str, Any]) -> None:
        """One line, at once; what is no number is null."""
        try:
            self._log.write(json.dumps(plain(entry), allow_nan=False) + "\n")
            self._log.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        if self._log is not None:
            try:
                self._log.close()
            except OSError:          # what a full disk did not take was told by `log`
                pass


def _remove_state(path: Path) -> None:
    """If a run wrote it, and nothing else lies in it; a folder is never seen without a part."""
    if not proof.is_state(path):
        return
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def plain(values: Any) -> Any:
    """The same with None for what is no number: JSON has no NaN."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, list):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of a folder's log.jsonl; a torn line is left out, null is NaN.

    ValueError if there are none.
    """
    path = Path(folder) / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}), expected the log of a run"
                         ) from None
    if not (entries := [entry for line in lines if (entry := proof.entry_of(line))]):
        raise ValueError(f"{path}: no entries, expected a line of JSON a step")
    return [{key: math.nan if value is None else value for key, value in entry.items()}
            for entry in entries]

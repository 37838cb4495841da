# SPDX-License-Identifier: MIT
"""Nothing that `save` did not write is replaced, whatever its name."""

from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

from dsv2_ref import checkpoint
from dsv2_ref.__main__ import main
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2

SMALL = TINY.with_(d=40, n_h=5, vocab=67, expert_width=18, dense_width=58, d_cq=22, d_c=20, d_v=14,
                   d_h=10, d_r=6)


def _model(**changes) -> DeepSeekV2:
    torch.manual_seed(0)
    return DeepSeekV2(SMALL.with_(**changes)).eval()


def _listing(path: Path) -> dict[str, bytes]:
    """Every file below `path`, hidden ones too, with its content."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def _stranger(folder: Path, name: str) -> str:
    """Put something that `save` did not write into a saved model; its name."""
    file = folder / name
    if name == "folder":
        file.mkdir()
        (file / "net.py").write_text("thesis")
    elif name == "tokenizer.json as a link":             # to the very same content
        name = "tokenizer.json"
        file = folder / name
        file.rename(folder.parent / name)
        file.symlink_to(folder.parent / name)
    elif name == "link":
        file.symlink_to(folder / "config.json")
    elif name == "model.safetensors":                    # trained further with another tool
        tensors = load_file(file)
        tensors["model.norm.weight"][3] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    elif name == "manifest.json":
        file.write_text('["a"]')
    else:
        file.write_text("thesis")
    return name


@pytest.mark.parametrize("name", [
    "net.py", ".tmpAB12", "config.json", "tokenizer.json", "model.safetensors", "manifest.json",
    "folder", "link", "tokenizer.json as a link", "model-00001-of-00002.safetensors",
])
def test_only_what_save_wrote_is_replaced(tmp_path, name: str) -> None:
    """Everything else is refused by name before anything is touched."""
    checkpoint.save(_model(), tmp_path / "m", {"tokenizer.json": "{}"})
    checkpoint.save(_model(), tmp_path / "m", {"tokenizer.json": "{}"}, overwrite=True)
    name = _stranger(tmp_path / "m", name)
    before = _listing(tmp_path)
    for act in (lambda: checkpoint.save(_model(), tmp_path / "m", overwrite=True),
                lambda: checkpoint.check_place(tmp_path / "m", overwrite=True)):
        refused(act, tmp_path / "m" / name)
        assert _listing(tmp_path) == before


def test_a_folder_of_others_is_never_replaced(tmp_path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "net.py").write_text("thesis")
    (tmp_path / ".m.1.tmp").mkdir()
    (tmp_path / ".m.1.tmp" / "a").write_text("mine")
    before = _listing(tmp_path)
    refused(lambda: checkpoint.save(_model(), tmp_path / "m", overwrite=True), "net.py")
    assert _listing(tmp_path) == before
    checkpoint.save(_model(), tmp_path / "other")
    (tmp_path / "m" / "config.json").write_bytes((tmp_path / "other/config.json").read_bytes())
    refused(lambda: checkpoint.save(_model(), tmp_path / "m", overwrite=True), "config.json")
    assert (tmp_path / ".m.1.tmp" / "a").read_text() == "mine"


@pytest.mark.parametrize("command", [["train", "--steps", "1", "--preset", "tiny"], ["run"]])
def test_a_command_refuses_before_it_begins(tmp_path, capsys, command: list[str]) -> None:
    (tmp_path / "X" / "model").mkdir(parents=True)
    (tmp_path / "X" / "model" / "net.py").write_text("thesis")
    before = _listing(tmp_path)
    assert main([*command, "--out", str(tmp_path / "X")]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "net.py" in error and len(error.splitlines()) == 1
    assert _listing(tmp_path) == before

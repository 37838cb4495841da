# SPDX-License-Identifier: MIT
"""A file is replaced whole or stays as it was."""

import os

import pytest
from refusals import refused

from dsv2_ref.files import whole
from dsv2_ref.files.whole import whole_file, write_text


def names(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_written_whole_and_nothing_left(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "中\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "中\n".encode()
    assert names(tmp_path / "new") == {"a.txt"}


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_interruption_leaves_what_was_there(tmp_path, error):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), whole_file(tmp_path / "a.txt") as scratch:
        scratch.write_text("half")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == {"a.txt"}


def test_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    real = os.replace
    monkeypatch.setattr(whole, "flush", lambda path: calls.append(("flush", path.name)))
    monkeypatch.setattr(whole.os, "replace",
                        lambda a, b: (calls.append(("rename", b.name)), real(a, b)))
    with whole_file(tmp_path / "a.txt") as scratch:
        scratch.write_text("x")
    assert calls == [("flush", scratch.name), ("rename", "a.txt"), ("flush", tmp_path.name)]


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(lambda: write_text(tmp_path / "file" / "a.txt", "x"), "a.txt", "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"

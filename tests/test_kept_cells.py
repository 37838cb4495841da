# SPDX-License-Identifier: MIT
"""Cells in a folder: what a kill leaves is gone on from, what others wrote stays as it is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import refused

from dsv2_ref.inference.kept_cells import is_of_cells, kept_cells

SETTINGS = {"lengths": [64], "depths": [0, 50], "model": "0123abcd"}
CELLS = [{"length": 64, "depth": depth, "exact": 0.5, "rank": 1.25} for depth in (0, 50)]


def fill(folder: Path, cells=CELLS, settings=SETTINGS) -> Path:
    with kept_cells(folder, settings) as (_, keep):
        for cell in cells:
            keep(cell)
    return next(folder.glob("cells-*.jsonl"))


def there(folder: Path, settings=SETTINGS) -> list:
    with kept_cells(folder, settings) as (found, _):
        return list(found.items())


def test_cells_are_there_again_under_their_settings_alone(tmp_path):
    path = fill(tmp_path / "new")
    assert is_of_cells(path)
    assert there(path.parent) == [((64, 0), CELLS[0]), ((64, 50), CELLS[1])]
    assert there(path.parent, SETTINGS | {"seed": 1}) == []
    assert len(list(path.parent.iterdir())) == 2


def test_a_cell_is_there_at_once(tmp_path):
    with kept_cells(tmp_path, SETTINGS) as (_, keep):
        keep(CELLS[0])
        (path,) = tmp_path.iterdir()
        assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("torn", ('{"length": 64, "dep', "{", "\0\0\0", '{"length": 64}'))
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    path = fill(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    assert len(there(tmp_path)) == 2 and path.read_bytes() == whole


@pytest.mark.parametrize("line", ("notes of mine\n", '{"length": 64}\n', "[1]\n", "\n"))
def test_a_whole_line_that_is_no_cell_is_refused_and_kept(tmp_path, line):
    path = fill(tmp_path)
    mine = path.read_text() + line
    path.write_text(mine)
    refused(lambda: there(tmp_path), path, "line 4 is no cell")
    assert path.read_text() == mine


@pytest.mark.parametrize("text", ("", "thesis", "thesis\n", '{"lengths": [64]}\n', "\0\0"))
def test_a_file_of_others_under_our_name_is_refused_and_kept(tmp_path, text):
    path = fill(tmp_path)
    path.write_text(text)
    assert not is_of_cells(path)
    refused(lambda: there(tmp_path), path, "was not written by this, expected another --out")
    assert path.read_text() == text


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path):
    path = fill(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    refused(lambda: there(tmp_path), path, "cannot be read")
    assert path.is_symlink() and not (tmp_path / "nowhere").exists()


def test_what_a_kill_left_half_written_goes_and_nothing_else(tmp_path):
    path = fill(tmp_path)
    left = tmp_path / f".{path.name}.123.tmp"
    others = [tmp_path / name for name in (".cells-notes", f".{path.name}.tmp", "cells-1.jsonl")]
    for file in (left, *others):
        file.write_text("x")
    there(tmp_path)
    assert not left.exists() and all(file.read_text() == "x" for file in others)


HOLD = """
import sys
from dsv2_ref.inference.kept_cells import kept_cells
with kept_cells(sys.argv[1], {"lengths": [1]}) as (_, keep):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_the_lock_dies_with_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "held\n"
        before = sorted(tmp_path.iterdir())
        refused(lambda: there(tmp_path), tmp_path, "another process writes into it")
        assert sorted(tmp_path.iterdir()) == before
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    assert there(tmp_path) == []


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(lambda: there(tmp_path / "file"), "file: cannot be written")
    refused(lambda: there(tmp_path / "file" / "x"), "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    path, real = fill(tmp_path), Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **options: real(
        Path("/dev/full") if self == path and mode == "a" else self, mode, **options))
    with kept_cells(tmp_path, SETTINGS) as (_, keep):
        refused(lambda: keep(CELLS[0]), path, os.strerror(28))
    assert re.fullmatch(r"cells-[0-9a-f]{8}\.jsonl", path.name)

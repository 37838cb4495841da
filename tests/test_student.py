# SPDX-License-Identifier: MIT
"""Copies of the notebooks without answers: no solution is left, and nothing is overwritten."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from dsv2_ref.exercises import student

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(file.name for file in NOTEBOOKS.glob("*.ipynb"))


def load(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def sources(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"]]


BLOCKS = (r"<details><summary>Solutions</summary>(.*?)</details>",
          r"# >>> solution\n(.*?)# <<< solution")


def solution_lines(notebook: dict) -> dict[str, int]:
    """Each line of a solution, folded or marked, and how often it stands elsewhere, too."""
    whole = "\n".join(sources(notebook))
    outside, lines = whole, []
    for block in BLOCKS:
        lines += [line.strip() for text in re.findall(block, whole, re.S)
                  for line in text.splitlines()]
        outside = re.sub(block, "", outside, flags=re.S)
    return {line: outside.count(line) for line in lines if line}


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("course") / "mine"
    assert student.write(folder) == NAMES
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_solution_is_left(name, copies):
    original, copied = load(NOTEBOOKS / name), load(copies / name)
    lines = solution_lines(original)
    assert len(lines) >= 3
    whole = "\n".join(sources(copied))
    printed = json.dumps([cell.get("outputs") for cell in copied["cells"]], ensure_ascii=False)
    for line, elsewhere in lines.items():
        assert whole.count(line) == elsewhere and line not in printed, line
    assert "Solutions" not in whole and "solution\n" not in whole


@pytest.mark.parametrize("name", NAMES)
def test_everything_else_is_there(name, copies):
    original, copied = load(NOTEBOOKS / name), load(copies / name)
    nbformat.validate(nbformat.reads(json.dumps(copied), 4))
    stubs = re.findall(r"^exercises\.check\(", "\n".join(sources(original)), re.M)
    opened = re.findall(r"^\w+ = \.\.\.$|^ +return \.\.\.$", "\n".join(sources(copied)), re.M)
    assert len(opened) == len(stubs) >= 3
    code = [[c for c in notebook["cells"] if c["cell_type"] == "code"]
            for notebook in (original, copied)]
    assert len(code[0]) == len(code[1])
    assert 0 <= len(original["cells"]) - len(copied["cells"]) <= 1       # one that was folded alone
    answered = False
    for before, after in zip(*code, strict=True):
        answered |= "solution" in before["metadata"].get("tags", [])
        assert after["outputs"] == ([] if answered else before["outputs"])
        if before["source"] != after["source"]:
            head, tail = ("".join(before["source"]).split(f"# {mark} solution")[i]
                          for mark, i in ((">>>", 0), ("<<<", 1)))
            assert "".join(after["source"]) == f"{head}return ...{tail}"


def test_a_folder_that_holds_anything_is_refused(tmp_path):
    (tmp_path / "mine.ipynb").write_text("my work")
    for place in (tmp_path, tmp_path / "mine.ipynb", ""):
        ended = subprocess.run([sys.executable, "-m", "dsv2_ref.exercises.student", str(place)],
                               capture_output=True, text=True)
        assert ended.returncode == 2 and ended.stdout == ""
        assert ended.stderr.count("\n") == 1 and "expected" in ended.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.ipynb"]
    assert (tmp_path / "mine.ipynb").read_text() == "my work"


def test_an_empty_folder_and_a_new_one_are_taken(tmp_path, capsys):
    for place in (tmp_path / "a" / "b", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert student.main([str(place)]) == 0
        assert sorted(p.name for p in place.iterdir()) == NAMES
        assert capsys.readouterr().out == f"{place}: {len(NAMES)} notebooks without answers\n"


CODE = "def f(x):\n    # >>> solution\n    return x\n    # <<< solution\n\n\nexercises.check(1, f)"


def notebook(*cells) -> dict:
    return {"cells": [{"cell_type": kind, "metadata": {"tags": tags}, "source": source,
                       "outputs": [], "execution_count": 1} for kind, source, tags in cells]}


@pytest.mark.parametrize("cells, told", [
    ([("code", CODE, [])], "1 solutions between marks"),
    ([("code", CODE.replace(">>>", ">"), ["solution"])], "0 solutions between marks"),
    ([("code", CODE.replace("\n    # <<< solution", ""), ["solution"])], "0 solutions"),
    ([("code", CODE + "\n" + CODE, ["solution"])], "2 solutions"),
    ([("markdown", "<details><summary>Answers</summary>1</details>", [])], "no solutions found"),
    ([("markdown", "<details><summary>Solutions</summary>1", [])], "no solutions found"),
])
def test_what_is_not_marked_is_refused(cells, told):
    with pytest.raises(ValueError, match=told):
        student.without_answers(notebook(*cells))


def test_a_refused_notebook_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "00_a.ipynb").write_text(json.dumps(notebook(("code", CODE, ["solution"]))))
    (folder / "01_b.ipynb").write_text(json.dumps(notebook(("code", "1", []))))
    monkeypatch.setattr(student, "in_checkout", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match="01_b.ipynb: no solutions found"):
        student.write(tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notebooks"]

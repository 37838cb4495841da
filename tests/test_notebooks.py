# SPDX-License-Identifier: MIT
"""What can be seen of a notebook without running it.

Running them is nbval's part (`make notebooks`). It compares what is stored with what comes out, so
a notebook without outputs would pass and test nothing: that, and more, is refused here.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
HEAD = ("**What you will see.**", "**How long.**", "**What is tested.**")
WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
CAPSTONE = "30"        # its reader builds a model: it has solutions in cells, and rules of its own
MACHINE = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|usr|work|mnt|opt|var|Users)/|[A-Z]:\\\\|/simple/")


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def tags(cell: dict[str, Any]) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def faults(notebook: dict[str, Any], size: int) -> list[str]:
    """Everything that is wrong with a notebook, a line each."""
    cells = notebook["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    run = [c for c in code if "gpu" not in tags(c)]
    capstone = text(cells[0]).startswith(f"# {CAPSTONE} ")
    found = []
    if size >= 1_000_000:
        found.append(f"{size:,} bytes, expected less than a million")
    most = 60 if capstone else 48
    if not 25 <= len(cells) <= most:
        found.append(f"{len(cells)} cells, expected 25 to {most}")
    if any(not text(c).strip() for c in cells):
        found.append("an empty cell")
    counts = [c["execution_count"] for c in run if text(c).strip()]
    if not counts or counts != sorted(set(counts) - {None}) or counts[-1] > len(code):
        found.append(f"execution counts {counts}, expected those of one run from top to bottom")
    outputs = [output for c in code for output in c["outputs"]]
    if any(output["output_type"] == "error" for output in outputs):
        found.append("an error is stored")
    if not any("image/png" in output.get("data", {}) for output in outputs):
        found.append("no picture is stored")
    shown = {output["data"][WIDGET]["model_id"] for output in outputs
             if WIDGET in output.get("data", {})}
    state = notebook["metadata"].get("widgets", {}).get(STATE, {}).get("state", {})
    if not shown <= state.keys():
        found.append("a widget is shown whose state is not stored")
    source = "\n".join(text(c) for c in cells)
    stored = source + json.dumps([{k: v for k, v in o.get("data", {}).items() if "image" not in k}
                                  | {"text": o.get("text")} for o in outputs], ensure_ascii=False)
    if match := MACHINE.search(stored):
        found.append(f"a path of some machine: {stored[match.start():][:40]!r}")
    head = text(cells[0])
    if not (re.match(r"# \d\d · ", head) and all(word in head for word in HEAD)):
        found.append("the first cell does not say what one will see, how long, what is tested")
    first = "".join("".join(output.get("text", "")) for output in code[0]["outputs"])
    if not all(name in first for name in ("Python", "torch", "dsv2_ref")):
        found.append("the first code cell does not print the versions")
    if re.search(r"^\s*[!%]pip|^\s*!(?!=)", source, re.M):
        found.append("calls the shell")
    found += solved(code) if capstone else open_ends(code, source)
    if re.search(r"def check_|check_refuses", source):
        found.append("a check shows its answer; expected it in dsv2_ref/exercises")
    if text(code[-1]) != "exercises.report()":
        found.append("the last code cell is not exercises.report()")
    if any(re.search(r"""["']\.\./""", text(c)) for c in code):
        found.append("a path from the current folder, expected in_checkout: it may be any folder")
    if "ipywidgets" in source:
        found.append("names ipywidgets, expected figures alone: it may be missing")
    if any("execution" in c["metadata"] for c in cells):
        found.append("timing metadata, which changes at every run")
    return found


def open_ends(code: list[dict[str, Any]], source: str) -> list[str]:
    """Faults of exercises that are left open, with folded solutions."""
    found = []
    if re.search(r"^\s*class \w+\(.*Module\)", source, re.M):
        found.append("defines a module; a notebook imports the truth")
    opened = [re.findall(r"^\w+ = \.\.\.$|^    return \.\.\.$", text(c), re.M) for c in code]
    if not 3 <= (n := sum(map(len, opened))) <= 5:
        found.append(f"{n} exercises, expected 3 to 5")
    if "<summary>Solutions</summary>" not in source:
        found.append("no solutions")
    if any("solution" in tags(c) for c in code):
        found.append("a cell tagged `solution`, expected them folded at the end")
    return found


def solved(code: list[dict[str, Any]]) -> list[str]:
    """Faults of the parts of the capstone: a cell holds its signature, solution and check."""
    found = []
    shape = re.compile(r'def (\w+)\(.*\):\n    """.*?"""\n    # >>> solution\n(?:    .*\n)+'
                       r"    # <<< solution\n\n\nexercises\.check\((\d+), (\w+)\)", re.S)
    parts = [(c, shape.fullmatch(text(c))) for c in code
             if "solution" in tags(c) or "solution\n" in text(c)]
    for cell, match in parts:
        if "solution" not in tags(cell) or match is None or match[1] != match[3]:
            found.append(f"not a part with its docstring, marks and check: {text(cell)[:40]!r}")
            continue
        printed = "".join("".join(o.get("text", "")) for o in cell["outputs"])
        if printed != f"{match[2]}: right\n":
            found.append(f"the solution of {match[2]} is not stored as right")
    if not 10 <= len(parts) <= 20:
        found.append(f"{len(parts)} parts, expected 10 to 20")
    if "exercises.ready(" not in "".join(map(text, code)):
        found.append("no cell asks whether the parts are there")
    return found


def load(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_nothing_is_wrong_with_it(file):
    assert faults(load(file), file.stat().st_size) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_what_is_checked_strictly_is_asserted_too(file):
    """A figure's title or a printed number is only worth something if an assert stands beside."""
    code = [c for c in load(file)["cells"] if c["cell_type"] == "code"]
    code = [text(c) for c in code if "solution" not in tags(c)]          # their check asserts
    assert sum("assert" in source for source in code) >= len(code) / 3


def test_numbers_and_names_are_unique():
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", f.stem) for f in FILES)
    assert len({f.stem[:2] for f in FILES}) == len({f.stem[3:] for f in FILES}) == len(FILES)


def broken(change, name: str = "00_tour") -> list[str]:
    notebook = copy.deepcopy(load(FOLDER / f"{name}.ipynb"))
    change(notebook)
    return faults(notebook, 1000)


def _cell(notebook: dict[str, Any], has: str) -> dict[str, Any]:
    return next(c for c in notebook["cells"] if c["cell_type"] == "code" and has in text(c))


@pytest.mark.parametrize("change, told", [
    (lambda n: _cell(n, "assert").update(execution_count=None), "execution counts"),
    (lambda n: [c.update(execution_count=c["execution_count"] + 9) for c in n["cells"]
                if c["cell_type"] == "code"], "execution counts"),
    (lambda n: [c.update(outputs=[]) for c in n["cells"] if c["cell_type"] == "code"],
     "no picture"),
    (lambda n: _cell(n, "assert")["outputs"].append({"output_type": "error", "ename": "E"}),
     "an error"),
    (lambda n: n["metadata"].pop("widgets"), "state is not stored"),
    (lambda n: n["cells"][3].update(source="open('/home/me/x')"), "path of some machine"),
    (lambda n: n["cells"][5]["outputs"].append(
        {"output_type": "stream", "text": "in /usr/lib/python3"}), "path of some machine"),
    (lambda n: _cell(n, "assert").update(source="load('../data/model')"), "in_checkout"),
    (lambda n: _cell(n, "assert").update(source="import ipywidgets"), "names ipywidgets"),
    (lambda n: n["cells"].pop(0), "what one will see"),
    (lambda n: _cell(n, "platform").update(outputs=[]), "versions"),
    (lambda n: n["cells"][3].update(source="class MLA(nn.Module):\n    pass"), "truth"),
    (lambda n: n["cells"][3].update(source="!pip install x"), "calls the shell"),
    (lambda n: _cell(n, "lite_bytes = ...").update(source="lite_bytes = 3"), "2 exercises"),
    (lambda n: _cell(n, "lite_bytes = ...").update(source="def check_bytes(answer): ..."),
     "expected it in dsv2_ref/exercises"),
    (lambda n: _cell(n, "exercises.report").update(source="print('1: right')"), "exercises.report"),
    (lambda n: n["cells"].append({"cell_type": "markdown", "metadata": {}, "source": ""}),
     "empty cell"),
    (lambda n: n["cells"].extend(n["cells"][:10]), "cells, expected 25 to 48"),
    (lambda n: n["cells"][3]["metadata"].update(execution={"iopub": "2026"}), "timing"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_faults_are_seen(change, told):
    assert any(told in fault for fault in broken(change)), broken(change)


@pytest.mark.parametrize("change, told", [
    (lambda n: _cell(n, "(2, rotate)")["metadata"].update(tags=[]), "not a part"),
    (lambda n: _cell(n, "(2, rotate)").update(source="exercises.check(2, ...)"), "not a part"),
    (lambda n: _cell(n, "(2, rotate)").update(
        source=text(_cell(n, "(2, rotate)")).replace("    # <<< solution\n", "")), "not a part"),
    (lambda n: _cell(n, "(2, rotate)").update(
        source=text(_cell(n, "(2, rotate)")).replace("(2, rotate)", "(2, rope)")), "not a part"),
    (lambda n: _cell(n, "(2, rotate)").update(outputs=[]), "2 is not stored as right"),
    (lambda n: [c.update(source="x = 1", metadata={}) for c in n["cells"]
                if "solution" in tags(c)], "0 parts, expected 10 to 20"),
    (lambda n: [c.update(source=text(c).replace("exercises.ready(", "bool("))
                for c in n["cells"]], "no cell asks"),
    (lambda n: n["cells"].extend(n["cells"][:20]), "cells, expected 25 to 60"),
    (lambda n: _cell(n, "rms_norm").update(source="!pip install x"), "calls the shell"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_faults_of_the_capstone_are_seen(change, told):
    assert any(told in fault for fault in broken(change, "30_build_it"))


def test_cells_tagged_as_solutions_are_the_capstones_alone():
    told = broken(lambda n: _cell(n, "assert")["metadata"].update(tags=["solution"]))
    assert any("tagged `solution`" in fault for fault in told)


def test_a_large_one_is_seen():
    assert "expected less" in faults(load(FOLDER / "00_tour.ipynb"), 1_000_000)[0]

# SPDX-License-Identifier: MIT
"""README: the map is as the code says, every link leads somewhere, the example runs."""

import json
import re
import subprocess
import sys
import textwrap

import pytest
from readme_map import ROOT, Concept, concepts, with_map
from test_contract import CONCEPTS, FILES, source, tags

README = (ROOT / "README.md").read_text(encoding="utf-8")
each_concept = pytest.mark.parametrize("concept", concepts(), ids=lambda c: c.file)


def test_the_map_is_up_to_date():
    assert with_map(README) == README, "run `make map`"
    with pytest.raises(ValueError, match="no lines"):
        with_map(README.replace("<!-- end of the map -->", ""))


def test_the_map_has_every_concept_file():
    """But for small steps, the list of cards and our AdamW's kernel: no notebook derives them.

    Beside them stand the files of other folders that hold equations: those of alignment.
    """
    others = [file for file in FILES if file not in CONCEPTS and tags(source(file))]
    assert others and all(file.startswith("alignment/") for file in others)
    others_of_kernels = ("adamw8_update", "between_products", "target", "write_rows")
    found = sorted([*(c.file for c in concepts()), *(f"kernels/{f}.py" for f in others_of_kernels)])
    assert found == sorted([*CONCEPTS, *others])


@each_concept
def test_the_equations_are_those_of_the_file(concept):
    assert concept.numbers == sorted(set(tags(source(concept.file))))
    assert concept.test.exists()


def cells(concept: Concept, kind: str) -> str:
    found = []
    for path in concept.notebooks:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == kind:
                found.append("".join(cell["source"]))
    return "\n".join(found)


@each_concept
def test_the_notebooks_derive_the_equations_from_the_module(concept):
    text, code = cells(concept, "markdown"), cells(concept, "code")
    module = "dsv2_ref." + concept.file.removesuffix(".py").replace("/", ".")
    package, _, name = module.rpartition(".")
    assert f"from {module} import" in code or f"from {package} import {name}" in code
    for n in concept.numbers:
        assert rf"\tag{{{n}}}" in text or f"({n})" in text, f"({n}) is not in the notebook's text"


def test_the_course_has_every_notebook_and_says_what_one_can_do_then():
    text = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d\d) [^\]]+\]\((\S+)\) \| (\S.+) \|$", text, re.M)
    listed = [file for _, file, _ in rows]
    assert len(set(listed)) == len(rows) and all(f.startswith(n + "_") for n, f, _ in rows)
    assert {f.name for f in (ROOT / "notebooks").glob("*.ipynb")} <= set(listed)
    for target in set(re.findall(r"\]\((?!http)([^)#]+)\)", text)) - set(listed):
        assert (ROOT / "notebooks" / target).exists(), target
    words = {20: "Twenty", 21: "Twenty-one", 22: "Twenty-two", 23: "Twenty-three",
             24: "Twenty-four", 25: "Twenty-five", 26: "Twenty-six"}
    assert text.startswith(f"# The course\n\n{words[len(rows)]} notebooks")
    assert f": {len(rows)} notebooks in order" in README


def test_the_example_of_own_exercises_runs(capsys):
    text = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    exec(textwrap.dedent(re.search(r"```python\n(.*?)```", text, re.S).group(1)), {})
    assert capsys.readouterr().out == "1: right\n1: right\n2: not attempted\n1 of 2 right\n"


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for file in targets:
        assert file.startswith("http") or (ROOT / file).exists(), file


def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(done.stdout) > 100

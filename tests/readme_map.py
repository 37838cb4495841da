# SPDX-License-Identifier: MIT
"""The map of README.md, made from the one in `dsv2_ref/__init__.py`.

`python tests/readme_map.py` writes it between its two marks (`make map`); a test says whether it
is as it should be.
"""

import re
from pathlib import Path
from typing import NamedTuple

import dsv2_ref

ROOT = Path(__file__).parent.parent
MARKS = ("<!-- the map: made by `make map` -->\n", "<!-- end of the map -->\n")
LINE = re.compile(
    r"^  (?P<section>\d\S*(?: \S+)*)  +(?P<file>\w+/\w+\.py) +(?P<notebooks>\d\d(?: \d\d)*) +"
    r"(?P<what>\S+(?: \S+)*?)(?: +(?P<equations>\(\d+\)(?:[- ]\(\d+\))*))?$", re.M)


class Concept(NamedTuple):
    """One line of the map."""

    section: str
    file: str
    notebooks: list[Path]
    what: str
    equations: str

    @property
    def test(self) -> Path:
        return ROOT / "tests" / f"test_{Path(self.file).stem}.py"

    @property
    def numbers(self) -> list[int]:
        """Every equation number: "(1)-(3) (7)" -> [1, 2, 3, 7]."""
        found = []
        for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", self.equations):
            found += range(int(first), int(last or first) + 1)
        return found


def concepts() -> list[Concept]:
    """The map's lines, in order."""
    found = []
    for match in LINE.finditer(dsv2_ref.__doc__ or ""):
        books = [next((ROOT / "notebooks").glob(f"{n}_*.ipynb"), Path(f"{n}: no such notebook"))
                 for n in match["notebooks"].split()]
        found.append(Concept(match["section"], match["file"], books, match["what"],
                             match["equations"] or ""))
    return found


def table() -> str:
    """The map in Markdown."""
    rows = ["| the paper | equations | file | notebook | test | what |", "|---" * 6 + "|"]
    for c in concepts():
        books = " ".join(f"[{b.stem[:2]}](notebooks/{b.name})" for b in c.notebooks)
        rows.append(
            f"| {c.section} | {c.equations} | [{c.file}](dsv2_ref/{c.file}) | {books} | "
            f"[test](tests/{c.test.name}) | {c.what} |")
    return "\n".join(rows) + "\n"


def with_map(readme: str) -> str:
    """README's text with the map as it should be; ValueError if its marks are not there."""
    head, first, rest = readme.partition(MARKS[0])
    _, last, tail = rest.partition(MARKS[1])
    if not first or not last:
        raise ValueError(f"README.md: no lines {MARKS[0].strip()!r} and {MARKS[1].strip()!r}")
    return head + first + table() + last + tail


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_map(path.read_text(encoding="utf-8")), encoding="utf-8")

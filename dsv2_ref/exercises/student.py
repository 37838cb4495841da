# SPDX-License-Identifier: MIT
"""A copy of all notebooks without their answers:  make student DIR=FOLDER

In each the folded "Solutions" go. In a notebook with cells tagged `solution` what stands between
`# >>> solution` and `# <<< solution` becomes an open `...`, and from the first such cell on all
outputs go, too, for they were made by the answers. Everything else is kept, pictures as well.

The copies run where this package is installed, in any folder. FOLDER has to be new or empty, so
that nobody's work is ever overwritten.
"""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

from dsv2_ref.checkout import in_checkout
from dsv2_ref.files.whole import whole_folder

FOLDED = re.compile(r"<details><summary>Solutions</summary>.*?</details>\s*", re.S)
MARKED = re.compile(r"^( *)# >>> solution\n.*?^ *# <<< solution$", re.M | re.S)


def without_answers(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook without solutions. ValueError where there are none, or they are not marked."""
    notebook = copy.deepcopy(notebook)
    found, made_by_answers = 0, False
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "markdown":
            source, n = FOLDED.subn("", source)
        else:
            source, n = MARKED.subn(r"\1return ...", source)
            if (n != 1) == ("solution" in tags):
                raise ValueError(f"{n} solutions between marks in a cell, expected one in a cell "
                                 f"tagged `solution`, none in others: {source[:60]!r}")
            made_by_answers |= n > 0
            if n:
                cell["metadata"]["tags"] = [tag for tag in tags if tag != "solution"]
            if made_by_answers:
                cell.update(outputs=[], execution_count=None)
        cell["source"] = source.splitlines(keepends=True)
        found += n
    notebook["cells"] = [cell for cell in notebook["cells"] if "".join(cell["source"]).strip()]
    if not found:
        raise ValueError("no solutions found, expected them folded or marked")
    return notebook


def write(folder: str | Path) -> list[str]:
    """Copies of all notebooks in `folder`, which is new or empty; their names.

    ValueError, and nothing is written, where it holds anything.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: {'not empty' if folder.is_dir() else 'a file'}, expected a "
                         "new or empty folder")
    copies = {}
    for file in sorted(in_checkout("notebooks").glob("*.ipynb")):
        try:
            copies[file.name] = without_answers(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from None
    with whole_folder(folder) as scratch:
        for name, notebook in copies.items():
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
            (scratch / name).write_text(text, encoding="utf-8", newline="\n")
    return list(copies)


def main(arguments: list[str]) -> int:
    """0, or 2 and one line of what is wrong."""
    try:
        if len(arguments) != 1 or not arguments[0]:
            raise ValueError("DIR: missing, expected make student DIR=FOLDER")
        names = write(arguments[0])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments[0]}: {len(names)} notebooks without answers")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

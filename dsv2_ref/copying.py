# SPDX-License-Identifier: MIT
"""Lift one concept file out of the package: `python -m dsv2_ref copy mla DEST`.

Copied are the file, the siblings it names under `Copy with:`, its test with what that test needs,
and the licence, all flat in one folder. Their imports work in a package and on the path alike. A
manifest keeps versions and hashes, so that `--check` can say what has changed since, and whose
change it was.
"""

import hashlib
import json
import re
from pathlib import Path

from dsv2_ref import __version__
from dsv2_ref.checkout import PACKAGE, is_checkout

MANIFEST = "copied.json"
CARRIED = PACKAGE / "carried"            # in a wheel: tests and licence, put there by setup.py
_ONE = (r"from (?:dsv2_ref\.(?:attention|moe|kernels|parallel)\.\w+|oracles(?:\.\w+)?|refusals) "
        r"import (?:\([^)]*\)|[^(\n]*)[^\n]*\n")
# consecutive statements, equally indented, that import a concept or what the tests share
IMPORTS = re.compile(rf"(?P<space>^ *){_ONE}(?:(?P=space){_ONE})*", re.M)


def concepts() -> dict[str, Path]:
    """Every concept file by its name, which is unique across the folders."""
    globs = ("attention/*.py", "moe/*.py", "kernels/*.py", "parallel/expert.py")
    files = sorted(f for glob in globs for f in PACKAGE.glob(glob))
    return {f.stem: f for f in files if f.stem != "__init__"}


def companions() -> Path:
    """The folder with tests/ and LICENSE of this very package; ValueError where it has none."""
    if CARRIED.is_dir():
        return CARRIED
    if is_checkout(PACKAGE.parent):
        return PACKAGE.parent
    raise ValueError(f"{PACKAGE}: no tests and licence, expected a checkout or an installed wheel")


def needed(name: str) -> dict[str, Path]:
    """File name -> source, of a concept, its test, the siblings that either imports, the licence.

    ValueError for an unknown name, and where one of them is not there.
    """
    known, beside = concepts(), companions()
    if name not in known:
        raise ValueError(f"name: {name!r}, expected one of {', '.join(known)}")
    helpers = {"loops": "oracles/loops.py", "refusals": "refusals.py"}
    sources = known | {helper: beside / "tests" / file for helper, file in helpers.items()}
    found = {"LICENSE": beside / "LICENSE"}
    queue = [known[name], beside / "tests" / f"test_{name}.py"]
    while queue:
        file = queue.pop()
        found[file.name] = file
        if not file.is_file():
            raise ValueError(f"{file}: not there, expected what copy hands out")
        for statements in IMPORTS.finditer(file.read_text(encoding="utf-8")):
            wanted = re.findall(r"^ *(?:from|import) (\w+)", _flat(statements[0]), re.M)
            queue += [sources[w] for w in wanted if f"{w}.py" not in found]
    return found


def _flat(statements: str) -> str:
    """The imports as they are where the folder of copies is on the path."""
    text = re.sub(r"^( *)from (?:dsv2_ref\.\w+|oracles)\.", r"\1from ", statements, flags=re.M)
    return re.sub(r"^( *)from oracles import", r"\1import", text, flags=re.M)


def _relative(statements: str) -> str:
    """The imports as they are where the folder of copies is a package."""
    text = re.sub(r"^( *)from (?!\.)", r"\1from .", _flat(statements), flags=re.M)
    return re.sub(r"^( *)import ", r"\1from . import ", text, flags=re.M)


def rewritten(text: str) -> str:
    """A source with imports that find its neighbours in a package and on the path alike."""
    def both(found: re.Match) -> str:
        space = found["space"]
        inner = [re.sub(r"^", "    ", part, flags=re.M).rstrip(" ")
                 for part in (_relative(found[0]), _flat(found[0]))]
        return f"{space}if __package__:\n{inner[0]}{space}else:\n{inner[1]}"

    text = IMPORTS.sub(both, text)
    return re.sub(r"\bdsv2_ref\.(?:attention|moe|kernels|parallel)\.(\w+)", r"\1", text)


def _hash(file: Path | str) -> str:
    """Of a file or a text; the same for either end of line."""
    data = file.encode() if isinstance(file, str) else file.read_bytes()
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()


def copy(name: str, dest: str | Path) -> list[str]:
    """Copy a concept into `dest`, new, empty or holding earlier copies; the files written."""
    dest, manifest = Path(dest), Path(dest) / MANIFEST
    sources = needed(name)
    texts = {target: rewritten(file.read_text(encoding="utf-8"))
             for target, file in sources.items()}
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{dest}: a file, expected a folder")
    if dest.is_dir() and any(dest.iterdir()) and not manifest.exists():
        raise ValueError(f"{dest}: not empty, expected a new folder or one of earlier copies")
    record = _read(manifest) if manifest.exists() else {}
    for target, text in texts.items():
        there, old = dest / target, record.get(target, {}).get("copy")
        if there.exists() and (there.is_dir() or _hash(there) not in (old, _hash(text))):
            raise ValueError(f"{there}: changed since it was copied, expected the copy or no file")
    for target, text in texts.items():
        record[target] = {"version": __version__, "source": _hash(sources[target]),
                          "copy": _hash(text)}
    try:
        dest.mkdir(parents=True, exist_ok=True)
        for target, text in texts.items():
            (dest / target).write_text(text, encoding="utf-8")
        manifest.write_text(json.dumps({"files": record}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{dest}: cannot be written ({error.strerror})") from None
    return sorted(texts)


def check(dest: str | Path) -> dict[str, str]:
    """What has become of each copied file since, and whose change it was.

    same, yours, upstream, both (changed on that side), missing here (in `dest`) or gone upstream
    (not in this version of the package).
    """
    dest = Path(dest)
    if not (dest / MANIFEST).exists():
        raise ValueError(f"{dest}: no {MANIFEST}, expected a folder of copies")
    sources = {target: file for name in concepts() for target, file in needed(name).items()}
    states = {}
    for target, kept in _read(dest / MANIFEST).items():
        there = dest / target
        if not there.is_file():
            states[target] = "missing here"
        elif target not in sources:
            states[target] = "gone upstream"
        else:
            changed = (_hash(there) != kept["copy"], _hash(sources[target]) != kept["source"])
            states[target] = {(False, False): "same", (True, False): "yours",
                              (False, True): "upstream", (True, True): "both"}[changed]
    return states


def _read(manifest: Path) -> dict[str, dict[str, str]]:
    """File name -> its version, and the hashes of its source and of the copy."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {target: {key: kept[key] for key in ("version", "source", "copy")}
                for target, kept in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: damaged or of an early version, expected a manifest of "
                         f"copies ({error})") from None

# SPDX-License-Identifier: MIT
"""Lift one concept file out of the package: `python -m dsv2_ref copy mla DEST`.

Copied are the file, the siblings it names under `Copy with:`, its test with what that test needs,
and the licence, all flat in one folder with their imports rewritten. A manifest keeps version and
hashes, so that `--check` can say what has changed since, there or here.
"""

import hashlib
import json
import re
from pathlib import Path

from dsv2_ref import __version__

PACKAGE = Path(__file__).parent
MANIFEST = "copied.json"


def concepts() -> dict[str, Path]:
    """Every concept file by its name, which is unique across the folders."""
    folders = ("attention", "moe", "kernels")
    files = sorted(f for folder in folders for f in (PACKAGE / folder).glob("*.py"))
    return {f.stem: f for f in files if f.stem != "__init__"}


def _needed(name: str) -> dict[str, Path]:
    """File name -> source, of a concept, its test, and the siblings that either imports."""
    known, tests = concepts(), PACKAGE.parent / "tests"
    if name not in known:
        raise ValueError(f"name: {name!r}, expected one of {', '.join(known)}")
    found: dict[str, Path] = {}
    queue = [known[name]]
    if (tests / f"test_{name}.py").exists():          # not in an installed wheel
        queue.append(tests / f"test_{name}.py")
    while queue:
        file = queue.pop()
        found[file.name] = file
        text = file.read_text(encoding="utf-8")
        wanted = re.findall(r"^from dsv2_ref\.\w+\.(\w+) import", text, re.M)
        queue += [known[w] for w in wanted if f"{w}.py" not in found]
        for helper in ("oracles/loops", "refusals"):
            *_, short = helper.split("/")
            if re.search(rf"^from (oracles import )?(oracles\.)?{short}\b", text, re.M):
                queue += [tests / f"{helper}.py"] * (f"{short}.py" not in found)
    if (PACKAGE.parent / "LICENSE").exists():
        found["LICENSE"] = PACKAGE.parent / "LICENSE"
    return found


def _rewritten(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"\bdsv2_ref\.(?:attention|moe|kernels)\.(\w+)", r"\1", text)
    return text.replace("from oracles import", "import").replace("from oracles.", "from ")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def copy(name: str, dest: str | Path) -> list[str]:
    """Copy a concept into `dest`, new, empty or holding earlier copies; the files written."""
    dest, manifest = Path(dest), Path(dest) / MANIFEST
    needed = {target: _rewritten(file) for target, file in _needed(name).items()}
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{dest}: a file, expected a folder")
    if dest.is_dir() and any(dest.iterdir()) and not manifest.exists():
        raise ValueError(f"{dest}: not empty, expected a new folder or one of earlier copies")
    record = _read(manifest) if manifest.exists() else {"files": {}}
    for target, text in needed.items():
        there, old = dest / target, record["files"].get(target)
        if there.exists() and _hash(there.read_text(encoding="utf-8")) not in (old, _hash(text)):
            raise ValueError(f"{there}: changed since it was copied, expected the copy or no file")
    try:
        dest.mkdir(parents=True, exist_ok=True)
        for target, text in needed.items():
            (dest / target).write_text(text, encoding="utf-8")
        record = {"version": __version__, "files": record["files"]}
        record["files"] |= {target: _hash(text) for target, text in needed.items()}
        manifest.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{dest}: cannot be written ({error.strerror})") from None
    return sorted(needed)


def check(dest: str | Path) -> dict[str, str]:
    """What has become of each copied file: same, changed there, changed here, or missing."""
    dest = Path(dest)
    if not (dest / MANIFEST).exists():
        raise ValueError(f"{dest}: no {MANIFEST}, expected a folder of copies")
    sources = {f.name: f for name in concepts() for f in _needed(name).values()}
    states = {}
    for target, copied in _read(dest / MANIFEST)["files"].items():
        there = dest / target
        if not there.exists() or target not in sources:
            states[target] = "missing"
        elif _hash(there.read_text(encoding="utf-8")) != copied:
            states[target] = "changed there"
        elif _hash(_rewritten(sources[target])) != copied:
            states[target] = "changed here"
        else:
            states[target] = "same"
    return states


def _read(manifest: Path) -> dict:
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        return {"version": record["version"], "files": dict(record["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest}: damaged, expected a manifest of copies ({error})") from None

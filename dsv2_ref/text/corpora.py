# SPDX-License-Identifier: MIT
"""Corpora behind one small interface: whole documents, some of them held out.

A corpus is a list of named documents cut in three: train, validation (for choices made while
training) and test (for the one number reported at the end). Whole documents are held out, never
parts of one: the end of a file is far easier to predict after its beginning has been trained on.
The cut comes from a hash of each document's name, so it does not depend on the order of the disk
and needs no stored list.
"""

import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv2_ref.text.reading import (
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    Document,
    checked,
    extra,
    read_paths,
    walk,
)
from dsv2_ref.text.stories import sample

# Tests are kept out because they are repetitive, bundles because they are not the library itself.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__",
    "ensurepip",
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Documents cut in three; `origin` says in one line where they come from."""

    name: str
    train: list[Document]
    validation: list[Document]
    test: list[Document]
    origin: str


def byte_count(documents: Iterable[Document]) -> int:
    """UTF-8 bytes of the texts: the denominator of every bits-per-byte figure."""
    return sum(len(document.text.encode()) for document in documents)


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def split(
    name: str, documents: Iterable[Document], origin: str, held_out_bytes: int | None = None
) -> Corpus:
    """Deal documents, by the hash of their names, to validation and test until both are full.

    held_out_bytes: size of each held-out part; None is a twentieth of all. A document larger than
    a fifth of that stays in train where there is another choice, so that no single one decides the
    held-out loss. The parts keep the given order. One or two texts are first cut into passages,
    the one case where a part of a text is held out. A text that occurs twice is never in two
    parts: it stays where it is held out. ValueError for no text, or under 3 lines.
    """
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError(f"corpus {name!r} is empty: expected some text, found none")
    if len(documents) < 3:
        documents = [passage for document in documents for passage in _passages(document)]
    if len(documents) < 3:
        raise ValueError(
            f"corpus {name!r} has {len(documents)} document(s) of one line, expected at least 3 "
            "documents or lines: some are held out for validation and test"
        )
    sizes = {i: len(document.text.encode()) for i, document in enumerate(documents)}
    budget = sum(sizes.values()) // 20 if held_out_bytes is None else held_out_bytes
    order = sorted(sizes, key=lambda i: (_name_hash(documents[i].name), i))
    candidates = [i for i in order if 5 * sizes[i] <= budget]
    if len(candidates) < 2:  # few documents: the two smallest
        candidates = sorted(order, key=sizes.__getitem__)[:2]
    part, taken = ["train"] * len(documents), {"validation": 0, "test": 0}
    for i in candidates:
        which = min(taken, key=taken.__getitem__)
        if taken[which] >= budget > 0:
            break
        part[i], taken[which] = which, taken[which] + sizes[i]
    parts, placed = {}, set()
    for which in ("test", "validation", "train"):
        mine = [d for d, where in zip(documents, part) if where == which and d.text not in placed]
        if not mine:
            raise ValueError(f"corpus {name!r} is too small for {budget} held-out bytes twice: no "
                             f"text is left for {which}, expected more that differ")
        parts[which] = mine
        placed.update(document.text for document in mine)
    return Corpus(name=name, origin=origin, **parts)


def _passages(document: Document, pieces: int = 30) -> Iterator[Document]:
    """A text in about equal passages, cut at line ends."""
    lines = document.text.splitlines(keepends=True)
    ends = [len(lines) * i // pieces for i in range(pieces + 1)]
    for i, (begin, end) in enumerate(zip(ends, ends[1:])):
        if begin < end:
            yield Document(f"{document.name}[{i + 1}/{pieces}]", "".join(lines[begin:end]))


def _sources(root: Path, skipped: set[str]) -> list[Document]:
    """The .py files below `root` that are UTF-8, by name."""
    documents = []
    for path in walk(root):
        name = path.relative_to(root).as_posix()
        if path.suffix != ".py" or skipped & set(Path(name).parts):
            continue
        if path.name.startswith("_sysconfigdata"):
            continue  # build paths of one machine, not source
        try:
            documents.append(Document(name, path.read_bytes().decode("utf-8")))
        except (UnicodeDecodeError, OSError):
            continue  # a few files are in other encodings on purpose, some links lead nowhere
    return sorted(documents, key=lambda document: document.name)


def python_corpus(held_out_bytes: int = 500_000) -> Corpus:
    """The running interpreter's own standard library, its .py files without the tests.

    Nothing to download, on every machine, real text of 10 MB or so; but it differs between Python
    releases, so a figure measured on it names the release.
    """
    documents = _sources(Path(sysconfig.get_paths()["stdlib"]), SKIPPED_FOLDERS)
    origin = "Python standard library of the running interpreter (PSF licence), tests left out"
    return split("python", documents, origin, held_out_bytes)


def packages_corpus(held_out_bytes: int = 500_000) -> Corpus:
    """The Python source of all installed packages, with their tests: hundreds of MB with torch.

    Nothing to download, and enough for millions of tokens; but every environment has another one,
    so a figure measured on it names date and versions. Each package has a licence of its own.
    """
    root = Path(sysconfig.get_paths()["purelib"])
    documents = _sources(root, {"__pycache__"})
    packages = len({document.name.partition("/")[0] for document in documents})
    origin = f"Python source of {packages} installed packages and modules (their own licences)"
    return split("packages", documents, origin, held_out_bytes)


def stories_corpus(n_stories: int = 20_000, seed: int = 0) -> Corpus:
    """Sampled stories (see `stories.py`); train, validation, test in 18 : 1 : 1."""
    if n_stories < 20:
        raise ValueError(f"n_stories is {n_stories}, expected at least 20")
    documents = [
        Document(f"story {i}", story.text) for i, story in enumerate(sample(seed, n_stories))
    ]
    held = n_stories // 20
    return Corpus(
        name="stories",
        train=documents[2 * held :],
        validation=documents[:held],
        test=documents[held : 2 * held],
        origin=f"{n_stories} stories sampled from dsv2_ref.text.stories, seed {seed} (MIT)",
    )


def local_corpus(paths: str | Path | Sequence[str | Path], field: str = "text") -> Corpus:
    """Files and folders of your own: a text file is a document, so is a row of jsonl or parquet.

    `reading.py` says what is read; `origin` says what was left out. `field` is the key or column
    with the text. ValueError says which path, line or field is wrong; ImportError if parquet is
    met without pyarrow.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    name = ", ".join(str(path) for path in paths)
    documents, left_out = read_paths(paths, field)
    if left_out and not documents:
        raise ValueError(f"corpus {name!r} is empty: found {_counted(left_out)}, expected files "
                         f"that end in {' '.join(sorted(TEXT_SUFFIXES | ROW_SUFFIXES))}")
    origin = "local: " + ", ".join(path.name for path in paths)
    if left_out:
        origin += f" (left out: {_counted(left_out)})"
    return split(name, documents, origin)


def _counted(kinds: Counter[str], most: int = 5) -> str:
    """As "12 .csv, 3 hidden", the most frequent first, no more than `most` kinds."""
    shown = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(most))
    return shown + ", ..." if len(kinds) > most else shown


def hub_corpus(
    name: str,
    subset: str | None = None,
    part: str = "train",
    field: str = "text",
    limit: int | None = None,
) -> Corpus:
    """A Hugging Face dataset: `part` ("train") of `name`, its first `limit` rows or all of them.

    The held-out documents are cut from that same part. ImportError without the `data` extra,
    ValueError if the dataset cannot be had or has no column `field`.
    """
    datasets = extra("datasets", f"hub dataset {name!r}")
    try:
        rows = datasets.load_dataset(name, subset, split=part, streaming=limit is not None)
    except Exception as error:  # network, hub, script and schema errors have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"hub dataset {name!r} cannot be loaded: {reason}") from error
    documents = []
    for i, row in enumerate(rows):
        if limit is not None and i >= limit:
            break
        where = f"hub dataset {name!r} row {i}"
        if field not in row:
            raise ValueError(f"{where}: no field {field!r}, expected one of {sorted(row)}")
        documents.append(Document(f"{part}:{i}", checked(row[field], where, field)))
    return split(f"hub:{name}", documents, f"Hugging Face dataset {name} ({part})")


def open_corpus(spec: str) -> Corpus:
    """'python', 'packages', 'stories', 'hub:NAME', or the path of a file or folder."""
    if spec == "python":
        return python_corpus()
    if spec == "packages":
        return packages_corpus()
    if spec == "stories":
        return stories_corpus()
    if spec.startswith("hub:"):
        return hub_corpus(spec.removeprefix("hub:"))
    if not spec or not Path(spec).exists():
        raise ValueError(f"corpus {spec!r}: expected python, packages, stories, hub:NAME or a path")
    return local_corpus(spec)

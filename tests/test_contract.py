# SPDX-License-Identifier: MIT
"""The promises of the layout: each equation in one place, files that can be lifted out, sizes,
and imports that run one way."""

import ast
import importlib
import io
import re
import sys
import textwrap
import tokenize
from pathlib import Path

import pytest
import torch

import dsv2_ref

PACKAGE = Path(dsv2_ref.__file__).parent
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))
CONCEPTS = [f for f in FILES if f == "parallel/expert.py"
            or f.startswith(("attention/", "moe/", "kernels/")) and not f.endswith("__init__.py")]
TAG = re.compile(r"(?:\(\d+\))+$")
# whoever stands on a line may import from the lines above it and from its own
LAYERS = [
    {"attention", "moe", "text"},
    {"kernels"},
    {"config", "config_json", "cross_entropy", "forms", "block", "model", "cost", "stretch"},
    {"files", "checkpoint"},
    {"inference"},
    {"training"},
    {"parallel"},                        # on training's seam, `World`; commands join the two
    {"alignment"},
    {"bench", "paper", "figures", "commands", "copying", "checkout", "exercises", "__init__",
     "__main__"},
]

every_file = pytest.mark.parametrize("file", FILES)
every_concept = pytest.mark.parametrize("file", CONCEPTS)


def source(file: str) -> str:
    return (PACKAGE / file).read_text(encoding="utf-8")


def tags(text: str) -> list[int]:
    """Equation numbers that end the comment of a line that holds code."""
    found, code_on = [], 0
    ignored = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            match = TAG.search(token.string.rstrip())
            if match and token.start[0] == code_on:
                found += [int(n) for n in re.findall(r"\d+", match.group())]
        elif token.type not in ignored and token.string:
            code_on = token.end[0]
    return found


def wiring(file: str) -> list[str]:
    """The code with which a concept file's essay ends, line by line."""
    essay = ast.get_docstring(ast.parse(source(file))) or ""
    return textwrap.dedent(essay.partition("\nWiring, once copied:\n")[2]).splitlines()


def length(file: str) -> int:
    """Lines of a file, without its wiring."""
    lines = wiring(file)
    return len(source(file).splitlines()) - (len(lines) + 2 if lines else 0)


def imports(file: str) -> set[str]:
    """Modules that a file imports, with full names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import, expected a full name"
            names.add(node.module or "")
            if (PACKAGE.parent / (node.module or "").replace(".", "/")).is_dir():
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_files(file: str) -> set[str]:
    """Files of this package that a file imports."""
    found = set()
    for name in imports(file):
        if name.startswith("dsv2_ref."):
            path = name.removeprefix("dsv2_ref.").replace(".", "/") + ".py"
            found |= {path} & set(FILES)
    return found


def test_tags_are_found_where_they_count():
    text = (
        'x = 1   # (B, T)  (41)\n'
        'y = "(7)"   # prose of (37)-(47)  (40)(44)\n'
        '# a line of its own (8)\n'
        'f(\n'
        '    x,   # (B, 1)  (3) and more\n'
        ')   # (46)\n'
        'z = 3   # (N, K)\n'
        '"""An essay of (1)-(6) (5)"""\n'
    )
    assert tags(text) == [41, 40, 44, 46]


def test_each_equation_is_in_exactly_one_file():
    where: dict[int, set[str]] = {}
    for file in FILES:
        for number in tags(source(file)):
            where.setdefault(number, set()).add(file)
    expected = {*range(1, 9), *range(20, 32), *range(37, 48)}
    if any(f.startswith("alignment/grpo") for f in FILES):
        expected |= set(range(32, 37))
    assert set(where) == expected
    for number, files in where.items():
        (file,) = files
        folders = ("alignment/",) if 32 <= number <= 36 else ("attention/", "moe/")
        assert file.startswith(folders), f"({number}) is in {file}"


def test_each_equation_is_in_the_file_of_its_concept():
    expected = {
        "attention/mha.py": range(1, 9), "moe/experts.py": range(20, 21),
        "moe/routing.py": range(21, 23), "moe/balance.py": range(23, 32),
        "attention/mla.py": range(37, 48),
    }
    for file, numbers in expected.items():
        found = tags(source(file))
        assert sorted(set(found)) == list(numbers) and len(found) == len(set(found)), file


@every_concept
def test_a_concept_file_opens_with_an_essay(file):
    essay = ast.get_docstring(ast.parse(source(file))) or ""
    own = essay.partition("\nWiring, once copied:\n")[0]
    assert 10 <= len(own.splitlines()) <= 45
    assert "Needs: torch" in essay and "Copy with:" in essay and "Shapes:" in essay


@every_concept
def test_a_concept_file_stands_alone(file):
    """It imports the standard library, torch (and triton in kernels/), and at most two siblings,
    those it names."""
    essay = ast.get_docstring(ast.parse(source(file))) or ""
    named = set(re.findall(r"\w+\.py", essay[essay.index("Copy with:"):].split("Needs:")[0]))
    siblings = set()
    for path in own_files(file):
        assert Path(path).parent == Path(file).parent, f"{file} imports {path}"
        siblings.add(Path(path).name)
    assert siblings == named and len(named) <= 2
    for name in imports(file):
        top = name.split(".")[0]
        known = {"torch", "dsv2_ref"} | ({"triton"} if file.startswith("kernels/") else set())
        assert top in sys.stdlib_module_names | known, f"{file} imports {name}"
    lines = sum(length(f) for f in [file, *own_files(file)])
    assert lines <= (820 if file.startswith("kernels/") else 640)


@pytest.mark.filterwarnings("ignore:Conversion of an array")     # Triton's interpreter
@pytest.mark.parametrize("file", CONCEPTS)
def test_the_wiring_of_a_concept_file_runs(file, monkeypatch):
    """At most ten lines, which need torch, the file and the siblings that it names; no more."""
    lines = wiring(file)
    assert 3 <= len(lines) <= 10
    files = {Path(f).stem: f for f in (file, *own_files(file))}
    code = "\n".join(lines)
    tree = ast.parse(code)
    needs = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    needs |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert Path(file).stem in needs and needs <= {"torch", *files}
    if "triton" in imports(file):
        pytest.importorskip("triton")
    for name, path in files.items():
        module = importlib.import_module(f"dsv2_ref.{path.removesuffix('.py').replace('/', '.')}")
        monkeypatch.setitem(sys.modules, name, module)
    made: dict[str, object] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        exec(code, made)
    results = [value for value in made.values() if isinstance(value, torch.Tensor)]
    assert results and all(value.isfinite().all() for value in results)


def literal(value: ast.expr) -> object:
    """A constant, or one that Triton's kernels may read: tl.constexpr(constant)."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "tl.constexpr":
        (value,) = value.args
    return ast.literal_eval(value)


def test_a_constant_is_literal():
    def value(text: str) -> ast.expr:
        return ast.parse(text, mode="eval").body

    assert literal(value("tl.constexpr(1.5)")) == 1.5
    for text in ("tl.constexpr(f(1))", "constexpr(1)", "torch.zeros(1)"):
        with pytest.raises(ValueError):
            literal(value(text))


@every_concept
def test_a_concept_file_is_quiet_and_takes_its_settings_as_arguments(file):
    tree = ast.parse(source(file))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"print", "Config", "environ"}
    assert not attributes & {"environ", "getenv", "set_default_dtype", "set_default_device",
                             "register_buffer", "manual_seed"}
    # nothing runs at import but imports and definitions
    kinds = (ast.Expr, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            literal(node.value)                          # a constant; ValueError if it computes
        else:
            assert isinstance(node, kinds), ast.unparse(node)


def test_names_are_unique_so_that_a_copy_is_unambiguous():
    names = [Path(f).name for f in CONCEPTS]         # a bench may be called like what it measures
    assert len(names) == len(set(names))


@every_file
def test_files_and_functions_are_short(file):
    text = source(file)
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert length(file) <= (400 if file.startswith("kernels/") else 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 50, node.name
    assert ast.get_docstring(ast.parse(text)), "no docstring"


def rank(file: str) -> int:
    part = file.split("/")[0].removesuffix(".py")
    found = [i for i, layer in enumerate(LAYERS) if part in layer]
    assert found, f"{file}: stands in no layer, expected one of LAYERS"
    return found[0]


@every_file
def test_imports_run_one_way(file):
    for other in own_files(file):
        assert rank(other) <= rank(file), f"{file} imports {other}"
        if "/" in file and rank(file) == 0:
            assert other.split("/")[0] == file.split("/")[0], f"{file} imports {other}"


def test_imports_have_no_circles():
    graph = {file: own_files(file) for file in FILES}
    while leaves := [file for file, needs in graph.items() if not needs]:
        graph = {file: needs - set(leaves) for file, needs in graph.items() if needs}
    assert not graph


FOLDERS = sorted(f.removesuffix("/__init__.py") for f in FILES if f.endswith("/__init__.py"))


def members(folder: Path) -> list[str]:
    """Modules and folders of a folder, as "name.py" and "name/"."""
    files = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
    return sorted([*files, *(f"{p.parent.name}/" for p in folder.glob("*/__init__.py"))])


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_names_its_files(folder):
    text = ast.get_docstring(ast.parse(source(f"{folder}/__init__.py")), clean=False)
    names = re.findall(r"^  (\w+)  +\S", text, re.M)
    assert sorted(names) == sorted(re.split(r"\.|/", name)[0] for name in members(PACKAGE / folder))


def test_the_package_names_its_files_and_folders():
    lines = re.findall(r"^  (\w+(?:\.py|/)) +\S", dsv2_ref.__doc__, re.M)
    concepts = {f"{file.split('/')[0]}/" for file in CONCEPTS if f" {file} " in dsv2_ref.__doc__}
    assert len(lines) == len(set(lines)) and sorted({*lines, *concepts}) == members(PACKAGE)

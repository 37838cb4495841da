# SPDX-License-Identifier: MIT
"""Every known wrong variant is put in place, and the test named for it must fail.

The variants of a concept file stand in tests/mutants/ under the file's name, those of all that is
put together from them in assembly.py, those of long contexts in needle.py, of chat models in
chat.py, of GRPO in grpo.py, of pipelines in pipeline.py, of several ranks in mesh.py, of a cluster
on paper in plan.py, of the engine and its pages in serving.py, of the GPU benches in bench.py;
those of Triton kernels are test_kernel_mutants.py's.

`make mutants` runs all of them; `make test` the first one of each file for each equation or pitfall
that it stands for.

The mutated source is compiled, and the functions of the real module get its code, so that whoever
has imported them runs the mutant too. The test then runs in a pytest inside this one.
"""

import importlib
import io
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import mutants
import pytest
from mutants import PITFALLS, Mutant

import dsv2_ref
from dsv2_ref import copying

TESTS, PACKAGE = Path(__file__).parent, Path(dsv2_ref.__file__).parent
FILES = sorted(m.name for m in pkgutil.iter_modules(mutants.__path__))
LISTS = {file: importlib.import_module(f"mutants.{file}") for file in FILES}
MUTANTS = [m for file in LISTS.values() for m in getattr(file, "MUTANTS", [])]
FIRST = {m.name for m in {(m.file, m.catches): m for m in reversed(MUTANTS)}.values()}
OPTIONS = ["-x", "-q", "--tb=line", "-o", "addopts=", f"--rootdir={TESTS.parent}"]
OPTIONS += [f"-pno:{name}" for name in ("cacheprovider", "faulthandler", "threadexception",
                                        "unraisableexception", "xdist", "nbval")]


def functions(module: ModuleType, file: Path) -> dict[str, FunctionType]:
    """Every function written in a module's file, by qualified name: methods and properties too."""
    found: dict[str, FunctionType] = {}

    def collect(value: Any) -> None:
        for f in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
            while f is not None:
                # tests that compile leave functions of the compiler's in a module
                if (isinstance(f, FunctionType) and f.__code__.co_filename == str(file)
                        and "torch_dynamo_resume" not in f.__qualname__):
                    found[f.__qualname__] = f
                f = getattr(f, "__wrapped__", None)          # of a decorator such as no_grad

    for value in vars(module).values():
        collect(value)
        if isinstance(value, type) and value.__module__ == module.__name__:
            for member in vars(value).values():
                collect(member)
    return found


@contextmanager
def in_place(mutant: Mutant) -> Iterator[None]:
    """The real module with the mutant's code and constants; restored afterwards."""
    file = PACKAGE / mutant.file
    name = "dsv2_ref." + mutant.file.removesuffix(".py").replace("/", ".")
    real, wrong = importlib.import_module(name), ModuleType(name)
    source = file.read_text(encoding="utf-8").replace(mutant.old, mutant.new)
    exec(compile(source, str(file), "exec"), vars(wrong))
    ours, theirs = functions(real, file), functions(wrong, file)
    assert ours.keys() == theirs.keys()
    codes = {f: f.__code__ for f in ours.values()}
    constants = {key: value for key, value in vars(real).items() if not key.startswith("__")
                 and not callable(value) and not isinstance(value, ModuleType)}
    try:
        for qualified_name, f in ours.items():
            f.__code__ = theirs[qualified_name].__code__
        vars(real).update({key: vars(wrong)[key] for key in constants})
        yield
    finally:
        for f, code in codes.items():
            f.__code__ = code
        vars(real).update(constants)


def run(nodes: list[str]) -> tuple[int, str]:
    """Exit code of a pytest of its own (0 passed, 1 failed, others did not run), and its output."""
    output = io.StringIO()
    with redirect_stdout(output):
        code = pytest.main([*OPTIONS, *(f"{TESTS / node}" for node in nodes)])
    return int(code), output.getvalue()


@pytest.mark.parametrize("file", sorted({m.file for m in MUTANTS}))
def test_each_mutant_changes_one_place(file):
    text = (PACKAGE / file).read_text(encoding="utf-8")
    found = {m.name: text.count(m.old) for m in MUTANTS if m.file == file}
    assert found == dict.fromkeys(found, 1)


@pytest.mark.parametrize("mutant", [
    pytest.param(m, id=m.name, marks=() if m.name in FIRST else pytest.mark.mutants)
    for m in MUTANTS])
def test_the_mutant_is_caught(mutant):
    with in_place(mutant):
        code, output = run([mutant.node])
    assert code == 1, f"{mutant.node} did not fail:\n{output}"


@pytest.mark.mutants
def test_the_same_tests_pass_without_mutants():
    """After all the mutants of this process, too: what was swapped has been put back."""
    code, output = run(sorted({m.node for m in MUTANTS}))
    assert code == 0 and "skipped" not in output, output


def test_every_equation_and_pitfall_has_a_mutant():
    equations = {f"({n})" for n in [*range(1, 9), *range(20, 48)]}
    assert {m.catches for m in MUTANTS} == equations | PITFALLS.keys()
    names = [m.name for m in MUTANTS]
    assert len(names) == len(set(names))


def test_each_concept_has_its_own_list():
    others = ["assembly", "bench", "chat", "grpo", "mesh", "needle", "optim", "pipeline",
              "plan", "serving"]
    assert FILES == sorted([*copying.concepts(), *others])
    for name, file in copying.concepts().items():
        (found,) = (vars(LISTS[name])[key] for key in ("MUTANTS", "KERNEL_MUTANTS")
                    if key in vars(LISTS[name]))
        where = file.relative_to(PACKAGE).as_posix()
        assert len(found) >= 3 and {m.file for m in found} == {where}, name
    concepts = {f"{file.parent.name}/{file.name}" for file in copying.concepts().values()}
    assert not {m.file for m in LISTS["assembly"].MUTANTS} & concepts

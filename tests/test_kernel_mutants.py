# SPDX-License-Identifier: MIT
"""Every known wrong variant of a kernel is put into a copy of it, whose test must then fail.

Triton reads a kernel's source from its file, so tests/test_mutants.py, which swaps code objects,
cannot do it. The variants are the KERNEL_MUTANTS in tests/mutants/. `make mutants` runs all of
them; by default the first one of two files stands for them, and tests/test_copying.py for the copy
without any.
"""

import importlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from mutants import Mutant

import dsv2_ref
from dsv2_ref import copying

PACKAGE = Path(dsv2_ref.__file__).parent
FILES = ["adamw8_update", "between_products", "flash_attention", "fp8_experts", "fp8_products",
         "grouped_experts", "latent_decode", "route_tokens", "six_bit_decode", "write_rows"]
MUTANTS = {f"{file}: {m.name}": m for file in FILES
           for m in importlib.import_module(f"mutants.{file}").KERNEL_MUTANTS}
FIRST = [next(key for key in MUTANTS if key.startswith(f"{file}: "))
         for file in ("latent_decode", "route_tokens")]         # for all, in `make test`

# without the package, as in tests/test_copying.py
ALONE = ("import sys; sys.modules['dsv2_ref'] = None; import pytest; "
         "sys.exit(pytest.main(['-q', '-x', '--tb=native', '-p', 'no:cacheprovider', "
         "*sys.argv[1:]]))")


def copied(node: str, folder: Path) -> None:
    """The concept that `node`, test_NAME.py::test, belongs to."""
    copying.copy(node.split(".py")[0].removeprefix("test_"), folder)


def run(nodes: list[str], folder: Path) -> tuple[int, str]:
    pytest.importorskip("triton")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, f"--rootdir={folder}", *nodes], cwd=folder, text=True,
        env=environment, capture_output=True, check=False)
    return done.returncode, done.stdout + done.stderr


def mutate(mutant: Mutant, folder: Path) -> None:
    file = folder / Path(mutant.file).name
    text = file.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.old!r} occurs {text.count(mutant.old)} times"
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def caught(mutant: Mutant, folder: Path) -> None:
    """The named test fails because an assertion in it does, not because nothing runs any more."""
    copied(mutant.node, folder)
    mutate(mutant, folder)
    code, output = run([mutant.node], folder)
    assert code == 1, f"{mutant.node} did not fail:\n{output[-3000:]}"
    assert re.search(r"^(AssertionError|Failed)\b", output, re.M), output[-3000:]


@pytest.mark.parametrize("name", FIRST)
def test_the_first_mutant_of_each_kernel_is_caught(name, tmp_path):
    caught(MUTANTS[name], tmp_path)


@pytest.mark.mutants
@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in FIRST])
def test_the_mutant_is_caught(name, tmp_path):
    caught(MUTANTS[name], tmp_path)


@pytest.mark.mutants
@pytest.mark.parametrize("file", FILES)
def test_the_same_tests_pass_without_mutants(file, tmp_path):
    nodes = sorted({m.node for name, m in MUTANTS.items() if name.startswith(f"{file}: ")})
    for node in nodes:
        copied(node, tmp_path)
    code, output = run(nodes, tmp_path)
    assert code == 0 and "skipped" not in output, output


@cache
def source(file: str) -> str:
    return (PACKAGE / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES)
def test_each_mutant_changes_one_place_of_a_kernel(file):
    mutants = importlib.import_module(f"mutants.{file}").KERNEL_MUTANTS
    assert len({m.name for m in mutants}) == len(mutants) >= 6
    for m in mutants:
        assert m.file.startswith("kernels/") and source(m.file).count(m.old) == 1, m.name
        assert m.old != m.new, m.name


SINE = "    return angles.cos() * magnitude, angles.sin() * magnitude\n"


@pytest.mark.mutants
@pytest.mark.parametrize(("new", "complaint"), [
    ("    return angles.cos() * magnitude, -angles.sin() * magnitude\n", None),
    (SINE + "\n", "did not fail"),
    ("    raise KeyError\n", "KeyError"),
])
def test_only_a_failed_assertion_counts(new, complaint, tmp_path):
    """The harness itself, on a file without Triton: wrong, harmless, and broken altogether."""
    mutant = Mutant("toy", "", "attention/rope.py", SINE, new, "test_rope.py")
    if complaint is None:
        caught(mutant, tmp_path)
    else:
        with pytest.raises(AssertionError, match=complaint):
            caught(mutant, tmp_path)

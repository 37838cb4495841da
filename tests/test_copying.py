# SPDX-License-Identifier: MIT
"""Every concept file is copied to an empty folder; its test runs there without the package.

The interpreter of Triton is slow, and what a kernel computes is tested where it stands: of its
copied tests the first one is run, which shows that the copy is whole, all by `make copies`.
"""

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from refusals import refused

from dsv2_ref import __version__, copying
from dsv2_ref.__main__ import main

# a process that has torch and pytest, and for each line forks another: to import them takes longer
# than most tests do
ALONE = """
import json, os, sys
sys.modules["dsv2_ref"] = None
import pytest, torch
class First:
    def pytest_collection_modifyitems(self, items):
        del items[1:]
for cases, root, folder in map(json.loads, sys.stdin):
    if not (child := os.fork()):
        os.chdir(root)
        out = os.open("told.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        plugins = [First()] if cases == "first one" else []
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", "error",
                            f"--rootdir={root}", folder], plugins=plugins)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def alone():
    """A function that runs the tests in a folder without the package: exit code, and its output."""
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # torch and pytest are all that a copy needs, and plugins take two seconds to import
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})

    def run(cases, root, folder):
        print(json.dumps([cases, str(root), str(folder)]), file=process.stdin, flush=True)
        code = process.stdout.readline()
        return int(code), (root / "told.txt").read_text(encoding="utf-8")

    yield run
    process.communicate()


def runs_here(name: str) -> bool:
    """Whether a concept needs nothing that is not here: triton exists on Linux alone."""
    text = copying.concepts()[name].read_text()
    return "import triton" not in text or find_spec("triton") is not None


@pytest.mark.parametrize("name", sorted(copying.concepts()))
def test_a_copy_stands_alone(tmp_path, name, alone):
    if not runs_here(name):
        pytest.skip("needs triton")
    files = copying.copy(name, tmp_path)
    assert {f"{name}.py", f"test_{name}.py", "LICENSE"} <= set(files)
    assert len([f for f in files if f in {f"{n}.py" for n in copying.concepts()}]) <= 5
    kernel = copying.concepts()[name].parent.name == "kernels"
    cases = "first one" if kernel and "DSV2_ALL_COPIES" not in os.environ else "all"
    code, told = alone(cases, tmp_path, tmp_path)
    assert code == 0 and " passed" in told, told[-2000:]


IMPORT_ALL = """
import importlib, pathlib, sys
sys.modules["dsv2_ref"] = None
folder, package = pathlib.Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(folder.parent if package else folder))
for file in folder.glob("*.py"):
    if file.stem != "__init__":
        importlib.import_module(package + file.stem)
mla, rope = (importlib.import_module(package + name) for name in ("mla", "rope"))
assert mla.rotate is rope.rotate and mla.__file__ == str(folder / "mla.py")
"""


@pytest.mark.parametrize(("package", "init"), [("dest.", True), ("dest.", False), ("", True)])
def test_copies_and_their_tests_import_as_a_package_and_from_the_path(tmp_path, package, init):
    dest = tmp_path / "dest"
    for name in filter(runs_here, copying.concepts()):
        copying.copy(name, dest)
    if init:
        (dest / "__init__.py").touch()
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT_ALL, str(dest), package],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_test_runs_in_a_package_of_copies(tmp_path, alone):
    dest = tmp_path / "dest"
    copying.copy("dropping", dest)
    (dest / "__init__.py").touch()
    code, told = alone("all", tmp_path, dest)
    assert code == 0 and " passed" in told, told[-2000:]


def test_imports_are_rewritten_and_nothing_else():
    text = ("import math\n"
            "from oracles import loops\n"
            "from torch import Tensor\n"
            "\n"
            "from dsv2_ref.attention.rope import (  # noqa: E402\n"
            "    rotate,\n"
            ")\n"
            "from dsv2_ref.moe.experts import slots\n"
            "\n"
            "from dsv2_ref import model\n"
            "def f():\n"
            "    from oracles.loops import normal\n"
            '    return "dsv2_ref.moe.experts.slots", "dsv2_ref.model"\n')
    assert copying.rewritten(text) == (
        "import math\n"
        "if __package__:\n"
        "    from . import loops\n"
        "else:\n"
        "    import loops\n"
        "from torch import Tensor\n"
        "\n"
        "if __package__:\n"
        "    from .rope import (  # noqa: E402\n"
        "        rotate,\n"
        "    )\n"
        "    from .experts import slots\n"
        "else:\n"
        "    from rope import (  # noqa: E402\n"
        "        rotate,\n"
        "    )\n"
        "    from experts import slots\n"
        "\n"
        "from dsv2_ref import model\n"
        "def f():\n"
        "    if __package__:\n"
        "        from .loops import normal\n"
        "    else:\n"
        "        from loops import normal\n"
        '    return "experts.slots", "dsv2_ref.model"\n')


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A checkout of ours with two concept files alone, to be changed; its folder."""
    root = tmp_path / "upstream"
    for folder in ("dsv2_ref/attention", "tests/oracles"):
        (root / folder).mkdir(parents=True)
    ours = copying.PACKAGE.parent
    for name in ("rope", "kv_cache"):
        for file in (f"dsv2_ref/attention/{name}.py", f"tests/test_{name}.py"):
            (root / file).write_bytes((ours / file).read_bytes())
    for file in ("LICENSE", "pyproject.toml", "tests/oracles/loops.py", "tests/refusals.py"):
        (root / file).write_bytes((ours / file).read_bytes())
    monkeypatch.setattr(copying, "PACKAGE", root / "dsv2_ref")
    monkeypatch.setattr(copying, "CARRIED", root / "dsv2_ref" / "carried")
    return root


def hashed(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def changed(file) -> None:
    file.write_text(file.read_text() + "# changed\n")


def test_check_says_what_changed_and_whose_change_it_was(tmp_path, upstream, capsys):
    dest, source = tmp_path / "dest", upstream / "dsv2_ref" / "attention"
    copying.copy("rope", dest)
    copying.copy("kv_cache", dest)                           # into a folder of earlier copies
    assert set(copying.check(dest).values()) == {"same"}
    kept = json.loads((dest / "copied.json").read_text())["files"]["rope.py"]
    assert kept["version"] == __version__ and kept["copy"] == hashed(dest / "rope.py")
    assert kept["source"] == hashed(source / "rope.py")
    assert main(["copy", "--check", str(dest)]) == 0

    changed(dest / "test_rope.py")
    changed(source / "kv_cache.py")
    changed(dest / "rope.py")
    changed(source / "rope.py")
    (dest / "loops.py").unlink()
    capsys.readouterr()
    assert main(["copy", "--check", str(dest)]) == 1
    expected = {"LICENSE": "same", "kv_cache.py": "upstream", "test_kv_cache.py": "same",
                "rope.py": "both", "test_rope.py": "yours", "loops.py": "missing here"}
    states = json.loads(capsys.readouterr().out)
    assert {name: states[name] for name in expected} == expected
    (source / "kv_cache.py").unlink()
    assert copying.check(dest)["kv_cache.py"] == "gone upstream"


def test_what_was_changed_since_is_not_copied_over(tmp_path, upstream):
    dest = tmp_path / "dest"
    copying.copy("rope", dest)
    changed(upstream / "dsv2_ref" / "attention" / "rope.py")
    copying.copy("rope", dest)                               # theirs is newer, ours untouched
    assert set(copying.check(dest).values()) == {"same"}
    changed(dest / "rope.py")
    changed(upstream / "tests" / "test_rope.py")
    before = {file.name: file.read_bytes() for file in dest.iterdir()}
    refused(lambda: copying.copy("rope", dest), "rope.py", "changed since it was copied")
    assert {file.name: file.read_bytes() for file in dest.iterdir()} == before


def test_a_strangers_licence_and_tests_are_not_taken(upstream, tmp_path):
    """Installed, the package stands in site-packages, beside other people's files."""
    (upstream / "pyproject.toml").write_text('[project]\nname = "another"\n')
    refused(lambda: copying.copy("rope", tmp_path / "dest"), "expected a checkout")
    assert not (tmp_path / "dest").exists()
    carried = upstream / "dsv2_ref" / "carried"
    (carried / "tests" / "oracles").mkdir(parents=True)
    for file in ("LICENSE", "tests/test_rope.py", "tests/oracles/loops.py"):
        (carried / file).write_bytes((upstream / file).read_bytes())
    (upstream / "LICENSE").write_text("all rights reserved")
    copying.copy("rope", tmp_path / "dest")
    assert "MIT" in (tmp_path / "dest" / "LICENSE").read_text()
    (carried / "tests" / "test_rope.py").unlink()
    refused(lambda: copying.copy("rope", tmp_path / "two"), "test_rope.py", "not there")


def test_refusals(tmp_path):
    refused(lambda: copying.copy("model", tmp_path), "name", "'model'", "mla")
    (tmp_path / "file").write_text("mine")
    refused(lambda: copying.copy("rope", tmp_path), "not empty")
    refused(lambda: copying.copy("rope", tmp_path / "file"), "a file, expected a folder")
    refused(lambda: copying.check(tmp_path), "copied.json")
    (tmp_path / "copied.json").write_text('{"version": "0.1.0", "files": {"rope.py": "0f"}}')
    refused(lambda: copying.check(tmp_path), "copied.json", "expected a manifest")
    assert (tmp_path / "file").read_text() == "mine"


def test_command_line(tmp_path, capsys):
    assert main(["copy", "rope", str(tmp_path / "out")]) == 0
    assert '"rope.py"' in capsys.readouterr().out
    assert main(["copy", "--check", str(tmp_path / "out")]) == 0
    assert '"rope.py": "same"' in capsys.readouterr().out
    assert main(["copy", "--list"]) == 0
    assert '"mla"' in capsys.readouterr().out
    assert main(["copy", "rope"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

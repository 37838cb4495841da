# SPDX-License-Identifier: MIT
"""When .ci/environment.py makes .venv anew, when it installs, and when it leaves both alone."""

import ast
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from refusals import refused

SCRIPT = Path(__file__).parents[1] / ".ci" / "environment.py"
spec = importlib.util.spec_from_file_location("environment", SCRIPT)
environment = importlib.util.module_from_spec(spec)
spec.loader.exec_module(environment)


@pytest.fixture
def root(tmp_path) -> Path:
    """A checkout with an environment, empty but for Python."""
    root = tmp_path / "a checkout"
    root.mkdir()
    (root / "constraints.txt").write_text("pytest==0.0.1   # never\n")
    (root / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch>=2", "nonesuch; sys_platform == \'none\'"]\n'
        "[project.optional-dependencies]\n"
        'good = ["numpy"]\nnone = ["dsv2-nonesuch"]\nnewer = ["torch>=99"]\npinned = ["pytest"]\n')
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)
    return root


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What `ready` does, in order; nothing is installed."""
    done: list[str] = []

    def build(venv):
        done.append("build")
        os.rename(venv, venv + ".old") if os.path.exists(venv) else None
        os.mkdir(venv)
        Path(venv, "pyvenv.cfg").write_text("version = 3.11.7\n")

    def call(command, **where):
        done.append("pip")
        return 0

    monkeypatch.setattr(environment, "build", build)
    monkeypatch.setattr(environment.subprocess, "call", call)
    monkeypatch.setattr(environment, "complete", lambda *_: done.append("look") or "pip" in done)
    return done


def test_it_can_be_read_by_a_python_that_is_too_old():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_an_old_python_is_refused_before_anything_is_made(root, tmp_path, monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 18, "final", 0))
    refused(lambda: environment.ready(str(tmp_path)), "Python 3.9", "expected 3.11 or later")
    assert not (tmp_path / ".venv").exists()
    kept = (root / ".venv" / "pyvenv.cfg").read_bytes()
    (root / ".venv" / "bin" / "python").unlink()                # to be made anew, but not by 3.9
    refused(lambda: environment.ready(str(root)), "Python 3.9")
    assert (root / ".venv" / "pyvenv.cfg").read_bytes() == kept


@pytest.mark.skipif(os.name == "nt", reason="a script in place of python")
def test_what_is_wrong_with_an_environment(root, tmp_path):
    venv = root / ".venv"
    assert environment.fault(str(venv)) is None
    python = venv / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\necho 3 9\n")
    python.chmod(0o755)
    assert environment.fault(str(venv)) == "has Python 3.9"
    python.unlink()
    assert environment.fault(str(venv)) == "does not run"
    root.rename(tmp_path / "moved")
    assert environment.fault(str(tmp_path / "moved" / ".venv")) == f"was made as {venv}"


def test_another_folder_is_not_taken_for_an_environment(tmp_path, calls):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "thesis").write_text("mine")
    refused(lambda: environment.ready(str(tmp_path)), ".venv", "expected a virtual environment")
    assert calls == [] and (tmp_path / ".venv" / "thesis").exists()


def test_a_moved_environment_is_made_anew_and_says_why(root, tmp_path, calls, capsys):
    root.rename(tmp_path / "moved")
    environment.ready(str(tmp_path / "moved"))
    assert calls == ["build", "look", "pip"]
    assert capsys.readouterr().err == f".venv was made as {root / '.venv'}: making it anew\n"


def test_it_is_looked_at_when_the_text_changes_and_installed_when_something_is_missing(
        root, calls, monkeypatch):
    environment.ready(str(root))
    assert calls == ["look", "pip"]
    later = time.time() + 60
    os.utime(root / "pyproject.toml", (later, later))            # touched
    environment.ready(str(root))
    assert calls == ["look", "pip"]
    (root / "pyproject.toml").write_text((root / "pyproject.toml").read_text() + "# more\n")
    environment.ready(str(root))                                 # all is there: no network needed
    assert calls == ["look", "pip", "look"]
    environment.ready(str(root), "notebooks,test,browser")
    assert calls == ["look", "pip", "look", "look"]
    calls.clear()
    monkeypatch.setattr(environment.subprocess, "call", lambda *_, **__: 1)
    refused(lambda: environment.ready(str(root)), "pip could not install")
    refused(lambda: environment.ready(str(root)), "pip could not install")     # again, not ready


@pytest.mark.parametrize(("extras", "expected"), [
    ("good", []), ("good,none", ["dsv2-nonesuch"]), ("newer", ["torch"]), ("pinned", ["pytest"])])
def test_what_is_missing(root, extras, expected):
    assert environment.missing(str(root), extras) == [*expected, "dsv2_ref"]     # it is elsewhere


def test_an_environment_without_the_packages_is_not_complete(root):
    assert not environment.complete(str(root / ".venv"), str(root), "good")


def test_a_python_that_was_asked_for_is_told_apart(root, calls, capsys):
    file = root / ".venv" / "pyvenv.cfg"
    environment.ready(str(root), asked=True)
    assert capsys.readouterr().err == ""
    file.write_text(file.read_text().replace(f"version = {sys.version_info[0]}", "version = 9"))
    environment.ready(str(root))
    assert capsys.readouterr().err == ""
    environment.ready(str(root), asked=True)
    assert "has Python 9." in capsys.readouterr().err

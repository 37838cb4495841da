# SPDX-License-Identifier: MIT
"""Every concept file is copied to an empty folder; its test runs there without the package."""

import os
import subprocess
import sys

import pytest
from refusals import refused

from dsv2_ref import copying
from dsv2_ref.__main__ import main

ALONE = ("import sys; sys.modules['dsv2_ref'] = None; import pytest; "
         "options = ['-q', '-x', '-p', 'no:cacheprovider', '-W', 'error']; "
         "sys.exit(pytest.main([*options, *sys.argv[1:]]))")


@pytest.mark.parametrize("name", sorted(copying.concepts()))
def test_a_copy_stands_alone(tmp_path, name):
    files = copying.copy(name, tmp_path)
    assert {f"{name}.py", f"test_{name}.py", "LICENSE"} <= set(files)
    assert len([f for f in files if f in {f"{n}.py" for n in copying.concepts()}]) <= 5
    done = subprocess.run(
        [sys.executable, "-c", ALONE, f"--rootdir={tmp_path}", str(tmp_path)], cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


def test_check_says_what_changed(tmp_path, monkeypatch):
    copying.copy("rope", tmp_path)
    copying.copy("kv_cache", tmp_path)                       # into a folder of earlier copies
    assert set(copying.check(tmp_path).values()) == {"same"}
    (tmp_path / "rope.py").write_text("mine")
    (tmp_path / "loops.py").unlink()
    states = copying.check(tmp_path)
    assert (states["rope.py"], states["loops.py"]) == ("changed there", "missing")
    assert states["kv_cache.py"] == "same"
    before = (tmp_path / "kv_cache.py").read_bytes()
    refused(lambda: copying.copy("mla", tmp_path), "rope.py", "changed since it was copied")
    assert (tmp_path / "rope.py").read_text() == "mine"
    assert (tmp_path / "kv_cache.py").read_bytes() == before and not (tmp_path / "mla.py").exists()
    rewritten = copying._rewritten
    monkeypatch.setattr(copying, "_rewritten", lambda file: rewritten(file) + "\n# newer")
    assert copying.check(tmp_path)["kv_cache.py"] == "changed here"


def test_refusals(tmp_path):
    refused(lambda: copying.copy("model", tmp_path), "name", "'model'", "mla")
    (tmp_path / "file").write_text("mine")
    refused(lambda: copying.copy("rope", tmp_path), "not empty")
    refused(lambda: copying.copy("rope", tmp_path / "file"), "a file, expected a folder")
    refused(lambda: copying.check(tmp_path), "copied.json")
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

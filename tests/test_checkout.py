# SPDX-License-Identifier: MIT
"""What lies beside the package is found from anywhere; an installed package says what is not."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from refusals import refused

from dsv2_ref import checkout, copying
from dsv2_ref.__main__ import main

ROOT = Path(checkout.__file__).parents[1]


def test_data_is_found_whatever_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkout.in_checkout("data/model") == ROOT / "data" / "model"
    assert (checkout.in_checkout("data/model") / "config.json").is_file()


def test_an_installed_package_takes_the_checkout_it_is_run_in_or_says_so(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    (site / "dsv2_ref").mkdir(parents=True)
    (site / "pyproject.toml").write_text('[project]\nname = "dsv2-reference"\n')      # a stranger's
    monkeypatch.setattr(checkout, "PACKAGE", site / "dsv2_ref")
    monkeypatch.chdir(tmp_path)
    refused(lambda: checkout.in_checkout("data/model"), "data/model", "expected a checkout")
    (tmp_path / "mine" / "notebooks").mkdir(parents=True)
    (tmp_path / "mine" / "pyproject.toml").write_text('[project]\nname = "dsv2-ref"\n')
    monkeypatch.chdir(tmp_path / "mine" / "notebooks")
    assert checkout.in_checkout("data/model") == tmp_path / "mine" / "data" / "model"


@pytest.mark.parametrize("bench", ["fp8_quality", "cache_quality"])
def test_a_bench_without_its_model_says_so_in_one_line(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkout, "PACKAGE", tmp_path / "dsv2_ref")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", bench, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "data/model: not part of" in err


BUILD = """
import sys
import tarfile
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is built from, so that no build leaves anything in the checkout."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("source")
    for name in (".ci", "dsv2_ref", "tests", "notebooks", "data"):
        shutil.copytree(ROOT / name, folder / name,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, folder / file.name)
    return folder


def built(source: Path, what: str, to: Path) -> Path:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", BUILD, what, str(to)], cwd=source, text=True,
                          env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return to / done.stdout.splitlines()[-1]


def test_a_wheel_carries_what_copy_hands_out(source, tmp_path, monkeypatch):
    with zipfile.ZipFile(built(source, "build_wheel", tmp_path)) as wheel:
        wheel.extractall(tmp_path / "site")
    package = tmp_path / "site" / "dsv2_ref"
    expected = {name: copying.needed(name) for name in copying.concepts()}
    monkeypatch.setattr(copying, "PACKAGE", package)
    monkeypatch.setattr(copying, "CARRIED", package / "carried")
    for name, files in expected.items():
        found = copying.needed(name)
        assert found.keys() == files.keys()
        for target, file in found.items():
            assert file.is_relative_to(package) and file.read_bytes() == files[target].read_bytes()


def test_an_sdist_is_the_checkout(source, tmp_path):
    with tarfile.open(built(source, "build_sdist", tmp_path)) as sdist:
        there = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {file.relative_to(source).as_posix() for file in source.rglob("*")
              if file.is_file() and ".egg-info" not in str(file) and "build" not in file.parts
              and "__pycache__" not in file.parts}
    assert len(wanted) > 150 and not wanted - there

# SPDX-License-Identifier: MIT
"""Run promises of rehearsal/ in a process of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rehearsal import VERSIONS
from rehearsal.promises import Promise

TESTS = Path(__file__).resolve().parent


def refused_versions() -> str:
    """Why there is no rehearsal here; empty where there is one."""
    for package, known in VERSIONS.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            return f"needs {package}"
        if not found.startswith(tuple(f"{v}." for v in known)):
            return f"{package} {found}: the rehearsal was made for {' and '.join(known)}"
    return ""


def run(promises: Mapping[str, Promise], package: Path = TESTS.parent) -> dict[str, dict]:
    """The numbers of each promise's part, of the package in that folder."""
    calls = [json.dumps([promise.part, promise.given]) for promise in promises.values()]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": f"{package}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    # not from where a dsv2_ref is: `python -m` would take that one
    done = subprocess.run([sys.executable, "-m", "rehearsal", *calls], env=environment, text=True,
                          cwd=TESTS, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    lines = done.stdout.splitlines()
    return dict(zip(promises, map(json.loads, lines), strict=True))

# SPDX-License-Identifier: MIT
"""The whole rehearsal, at full size: `make rehearse`, some minutes on two cores."""

import re
import shutil

import pytest
from rehearsal.faults import FAULTS
from rehearsal.promises import FAST, SLOW
from rehearsed import TESTS, refused_versions, run

ALL = FAST | SLOW
pytestmark = pytest.mark.skipif(bool(refused_versions()), reason=refused_versions())


@pytest.mark.parametrize("name", ALL)
def test_what_is_promised_holds(name):
    assert ALL[name].broken(run({name: ALL[name]})[name]) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_that_is_put_back_is_found(fault, tmp_path):
    shutil.copytree(TESTS.parent / "dsv2_ref", tmp_path / "dsv2_ref")
    shutil.copytree(TESTS.parent / "data", tmp_path / "data")
    file = tmp_path / "dsv2_ref" / fault.file
    text = file.read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, f"{fault.old!r} occurs {text.count(fault.old)} times"
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    promise = ALL[fault.promise]
    complaints = promise.broken(run({fault.promise: promise}, tmp_path)[fault.promise])
    assert any(re.search(fault.says, line) for line in complaints), complaints

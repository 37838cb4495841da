# SPDX-License-Identifier: MIT
"""The package on a card that is not there; see rehearsal/. `make rehearse` has the full sizes."""

import ast

import pytest
from rehearsal.faults import ELSEWHERE
from rehearsal.promises import FAST
from rehearsed import TESTS, refused_versions, run

here = pytest.mark.skipif(bool(refused_versions()), reason=refused_versions())


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return run(FAST)


@here
@pytest.mark.parametrize("name", FAST)
def test_what_is_promised_holds(name, found):
    assert FAST[name].broken(found[name]) == []


@pytest.mark.parametrize("test", ELSEWHERE.values())
def test_what_the_rehearsal_cannot_see_has_a_test(test):
    file, name = test.split("::")
    body = ast.parse((TESTS / file).read_text(encoding="utf-8")).body
    assert name in {node.name for node in body if isinstance(node, ast.FunctionDef)}

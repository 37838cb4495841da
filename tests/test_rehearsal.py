# SPDX-License-Identifier: MIT
"""The package on a card that is not there; see rehearsal/. `make rehearse` has the full sizes."""

import pytest
from rehearsal.promises import FAST
from rehearsed import refused_versions, run

pytestmark = pytest.mark.skipif(bool(refused_versions()), reason=refused_versions())


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return run(FAST)


@pytest.mark.parametrize("name", FAST)
def test_what_is_promised_holds(name, found):
    assert FAST[name].broken(found[name]) == []

# SPDX-License-Identifier: MIT
"""How bad input must be refused: a ValueError of one line that says what was wrong."""

from collections.abc import Callable

import pytest


def refused(act: Callable[[], object], *words: object) -> str:
    """`act` must raise a ValueError of one line that holds every one of `words`."""
    with pytest.raises(ValueError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"
    return message

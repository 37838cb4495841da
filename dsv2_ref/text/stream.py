# SPDX-License-Identifier: MIT
"""Text that is written while its ids arrive.

One id may hold half a character, and a decoder shows the half as U+FFFD until the other half comes.
So text that ends in U+FFFD waits: for the next id, which completes it or shows that it was no half
but a character of its own, or for the end, when nothing more can come. What is written is then, in
pieces, the decoded text of all ids.
"""

from collections.abc import Callable, Sequence


class TextStream:
    """A `stream` for `generate`: writes the text of its first sequence.

    `before` is written with the first id. Call `end` after the last one.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], write: Callable[[str], object], before: str = ""
    ) -> None:
        self.decode, self.write, self.before = decode, write, before
        self.ids: list[int] = []
        self.written = 0                        # characters

    def __call__(self, step: Sequence[int | None]) -> None:
        """Take the step of `generate`'s first sequence; None says that it has ended."""
        if step[0] is None:
            return
        if not self.ids:
            self.write(self.before)
        self.ids.append(step[0])
        text = self.decode(self.ids)
        if not text.endswith("\ufffd"):
            self._write_to_the_end(text)

    def end(self) -> None:
        """Write what waits: a half that was cut off, or U+FFFD itself."""
        self._write_to_the_end(self.decode(self.ids))

    def _write_to_the_end(self, text: str) -> None:
        if rest := text[self.written :]:
            self.write(rest)
        self.written = len(text)

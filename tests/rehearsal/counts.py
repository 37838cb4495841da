# SPDX-License-Identifier: MIT
"""What torch does on the pretended card: launches, uploads, bytes moved, bytes from birth to end.

Bytes moved are those of an operation's operands and results, each once; of a row picked from a
table, the row.
"""

from collections import Counter
from typing import Any

from alive import Alive
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rehearsal.card import on_card, place

# what launches nothing: other views of the same memory, and memory that nobody fills
FREE = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk",
    "detach", "device", "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as_real",
}
PICKS = {"embedding", "index", "index_select", "gather"}


def touched(x: Tensor) -> int:
    """Bytes that are there: an expanded dimension is one row."""
    n = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        n *= size if stride else 1
    return n * x.element_size()


class Counts(Alive):
    """`launches` and bytes `moved` by operation, `uploads` by place; bytes of what is on the card.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.places: Counter[str] = Counter()        # of launches
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        made = [x for x in tree_leaves(out) if on_card(x)]
        for x in made:
            self.see(x)
        if not made or name in FREE:
            return out
        source = args[1] if name == "copy_" else args[0] if args else None
        if name in ("_to_copy", "copy_") and isinstance(source, Tensor) and not on_card(source):
            if source.ndim or name == "_to_copy":            # a number of 0 dimensions goes along
                self.uploads[place()] += 1
            return out
        self.launches[name] += 1
        self.places[f"{name} {place()}"] += 1
        read = [] if name in PICKS else [x for x in tree_leaves((args, kwargs)) if on_card(x)]
        self.moved[name] += sum(map(touched, read or made)) + sum(map(touched, made))
        return out

    def clear(self) -> None:
        super().clear()
        for counter in (self.launches, self.uploads, self.places, self.moved):
            counter.clear()

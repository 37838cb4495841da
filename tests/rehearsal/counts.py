# SPDX-License-Identifier: MIT
"""What torch does on the pretended card: launches, uploads, and bytes from birth to end."""

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


class Counts(Alive):
    """`launches` by operation, `uploads` by place; bytes of what is on the card."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.places: Counter[str] = Counter()        # of launches

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
        return out

    def clear(self) -> None:
        super().clear()
        for counter in (self.launches, self.uploads, self.places):
            counter.clear()

# SPDX-License-Identifier: MIT
"""A small probabilistic grammar whose entropy can be computed exactly.

A node is a text with {slots}, a sequence, a choice, a repetition, or a binding of slots that holds
for the length of its body. `derive` turns choices into text, `tell` also adds up their
probability, `measure` computes the entropy and the mean length of all texts a node generates.
The stories file tells what it is good for, and writes a grammar.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

Slots = dict[str, str]  # what has been chosen so far: {"hero": "Lily", "he": "she", ...}


@dataclass(frozen=True, eq=False)
class Seq:
    parts: tuple["Node", ...]


@dataclass(frozen=True, eq=False)
class Choice:
    probabilities: tuple[float, ...]
    options: tuple["Node", ...]


@dataclass(frozen=True, eq=False)
class Repeat:
    """Zero or more rounds of `node`, each after the last with probability `again`."""

    again: float
    node: "Node"


@dataclass(frozen=True, eq=False)
class Bind:
    """Fill slots from one of the rows (by rank) for the length of `body`.

    `unlike`: a slot that must not equal the row's first entry (a friend is not the hero); that row
    is left out and the others keep their proportions.
    """

    rows: tuple[Slots, ...]
    body: "Node"
    unlike: str = ""

    def live(self, taken: str) -> tuple[tuple[float, ...], tuple[Slots, ...]]:
        """Probabilities and rows that are possible where the `unlike` slot holds `taken`."""
        rows = [row for row in self.rows if next(iter(row.values())) != taken]
        weights = [1 / (1 + self.rows.index(row)) for row in rows]
        return tuple(weight / sum(weights) for weight in weights), tuple(rows)


Node = str | Seq | Choice | Repeat | Bind  # a str is text with {slot}s
SLOT = r"\{(\w+)\}"


def by_rank(n: int) -> tuple[float, ...]:
    """Probabilities proportional to 1, 1/2, ... 1/n: few words are common, as in any language."""
    return tuple(1 / rank / sum(1 / r for r in range(1, n + 1)) for rank in range(1, n + 1))


def seq(*parts: Node | tuple[Slots, ...]) -> Seq:
    """Sequence; in a str (a|b|c) is a choice by rank; rows fill slots for the rest."""
    nodes: list[Node] = []
    for at, part in enumerate(parts):
        if isinstance(part, tuple):
            return Seq((*nodes, Bind(part, seq(*parts[at + 1 :]))))
        if not isinstance(part, str):
            nodes.append(part)
            continue
        for i, piece in enumerate(re.split(r"\(([^()]*)\)", part)):
            options = tuple(piece.split("|"))
            nodes.append(Choice(by_rank(len(options)), options) if i % 2 else piece)
    return Seq(tuple(nodes))


def maybe(probability: float, text: str) -> Choice:
    return Choice((probability, 1 - probability), (seq(text), ""))


def table(keys: str, rows: str) -> tuple[Slots, ...]:
    """Rows of slots; rows are divided by semicolons, their entries by slashes."""
    split = [" ".join(row.split()).split("/") for row in rows.split(";")]
    return tuple(dict(zip(keys.split(), row, strict=True)) for row in split)


def people(keys: str, names: str, girl: str, boy: str) -> tuple[Slots, ...]:
    """Rows of people, girls and boys in turn, each with the forms of the kind."""
    rows = [name + (boy if i % 2 else girl) for i, name in enumerate(names.split())]
    return table(keys, ";".join(rows))


def entropy(probabilities: tuple[float, ...]) -> float:
    return -sum(p * math.log2(p) for p in probabilities if p > 0)


def measure(node: Node) -> tuple[float, float]:
    """Exact entropy (bits) and mean length (UTF-8 bytes) of the texts that `node` generates.

    Slots never change the probabilities on the way to a place, so the mean of what is found there
    needs each slot's own distribution only, not the product of all of them.
    """

    def visit(node: Node, slots: dict[str, list[tuple[float, str]]]) -> tuple[float, float]:
        if isinstance(node, str):
            fixed, *names = re.sub(SLOT, "", node), *re.findall(SLOT, node)
            means = (sum(p * len(value.encode()) for p, value in slots[name]) for name in names)
            return 0.0, len(fixed.encode()) + sum(means)
        if isinstance(node, Seq):
            visits, inside, bits = [1.0] * len(node.parts), node.parts, 0.0
        elif isinstance(node, Choice):
            visits, inside, bits = node.probabilities, node.options, entropy(node.probabilities)
        elif isinstance(node, Repeat):
            q = node.again
            visits, inside, bits = [q / (1 - q)], [node.node], entropy((q, 1 - q)) / (1 - q)
        else:
            bits, filled = 0.0, {name: [] for name in node.rows[0]}
            for weight, taken in slots.get(node.unlike, [(1.0, "")]):
                probabilities, rows = node.live(taken)
                bits += weight * entropy(probabilities)
                for p, row in zip(probabilities, rows):
                    for name in row:
                        filled[name].append((weight * p, row[name]))
            visits, inside, slots = [1.0], [node.body], slots | filled
        each = [visit(child, slots) for child in inside]
        bits += sum(n * b for n, (b, _) in zip(visits, each))
        return bits, sum(n * size for n, (_, size) in zip(visits, each))

    return visit(node, {})


def derive(node: Node, choose: Callable[[tuple[float, ...]], int], slots: Slots) -> str:
    """Text of the derivation in which `choose(probabilities)` takes every choice."""
    if isinstance(node, str):
        return node.format_map(slots)
    if isinstance(node, Seq):
        return "".join([derive(part, choose, slots) for part in node.parts])
    if isinstance(node, Choice):
        return derive(node.options[choose(node.probabilities)], choose, slots)
    if isinstance(node, Bind):
        p, rows = node.live(slots.get(node.unlike, ""))
        return derive(node.body, choose, slots | rows[choose(p)])
    rounds = []
    while choose((1 - node.again, node.again)):
        rounds.append(derive(node.node, choose, slots))
    return "".join(rounds)


@dataclass(frozen=True)
class Story:
    text: str
    choices: tuple[int, ...]
    log2_probability: float  # of the derivation and of the text: they are one


def tell(node: Node, pick: Callable[[tuple[float, ...]], int]) -> Story:
    """The story that `pick(probabilities)` chooses, with its probability."""
    taken: list[tuple[int, float]] = []

    def choose(probabilities: tuple[float, ...]) -> int:
        i = pick(probabilities)
        taken.append((i, math.log2(probabilities[i])))
        return i

    text = derive(node, choose, {})
    return Story(text, tuple(i for i, _ in taken), sum(bits for _, bits in taken))

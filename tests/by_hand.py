# SPDX-License-Identifier: MIT
"""Pipeline schedules run operation by operation: the oracle of what closed forms say of them."""

FORWARDS_FIRST = {"1f1b": lambda p, i: p - i, "zb-h1": lambda p, i: p - i,
                  "zb-h2": lambda p, i: 2 * (p - i) - 1}
WEIGHTS_WAIT = {"1f1b": lambda i: 0, "zb-h1": lambda i: i, "zb-h2": lambda i: 2 * i}


def order(schedule, p, i, m):
    """What stage i of p does, one after the other: ("F", 0), ("B", 0), ("W", 0), ..."""
    first, wait = min(FORWARDS_FIRST[schedule](p, i), m), WEIGHTS_WAIT[schedule](i)
    todo = [("F", j) for j in range(first)]
    for j in range(m):
        todo.append(("B", j))
        if j >= wait:
            todo.append(("W", j - wait))
        if first + j < m:
            todo.append(("F", first + j))
    return todo + [("W", j) for j in range(max(m - wait, 0), m)]


def run(schedule, p, m, F, B, W):
    """When each operation ends: {(kind, stage, micro-batch): seconds}; links take no time.

    In 1F1B a stage sends its inputs' gradients on when the weights' are done too.
    """
    lasts = {"F": F, "B": B, "W": W}
    todo = [order(schedule, p, i, m) for i in range(p)]
    ended, free = {}, [0.0] * p
    while any(todo):
        for i, mine in enumerate(todo):
            while mine:
                kind, j = mine[0]
                sent = "W" if schedule == "1f1b" else "B"
                needs = {"F": ("F", i - 1, j) if i else None, "W": ("B", i, j),
                         "B": (sent, i + 1, j) if i < p - 1 else ("F", i, j)}[kind]
                if needs is not None and needs not in ended:
                    break
                start = max(free[i], ended.get(needs, 0.0))
                free[i] = ended[kind, i, j] = start + lasts[kind]
                mine.pop(0)
    return ended


def most_in_flight(schedule, p, i, m):
    """Forward passes of stage i whose weights' gradients are still to come, at the most."""
    now = most = 0
    for kind, _ in order(schedule, p, i, m):
        now += (kind == "F") - (kind == "W")
        most = max(most, now)
    return most

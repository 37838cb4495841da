# SPDX-License-Identifier: MIT
"""Answers to 20_grpo."""

import torch

RIGHT = {
    1: [[2.0, -0.5, -0.5, -0.5, -0.5], (2, -0.5, -0.5, -0.5, -0.5),
        torch.tensor([2, -0.5, -0.5, -0.5, -0.5])],
    2: [[False, True, True, False, True], (False, True, True, False, True),
        [torch.tensor(x) for x in (False, True, True, False, True)]],
    3: [[0.0, 0.6, -0.5, 0.125], (0, 3 / 5, -1 / 2, 1 / 8), torch.tensor([0, 0.6, -0.5, 0.125])],
    4: [["b", "c", "e"], ("b", "c", "e"), ["B", " c", "E"]],
}
WRONG = {
    1: [[0.8, -0.2, -0.2, -0.2, -0.2], [1, 0, 0, 0, 0], [0.8 / 0.2**0.5] + [-0.2 / 0.2**0.5] * 4,
        [2.0, -0.5], [2.0] * 5, [4.0, -1.0, -1.0, -1.0, -1.0], 2.0],
    2: [[False, False, False, False, True], [True, False, False, True, True], [True] * 5,
        [False] * 5, [False, True, True, False, False], [False, True], True],
    3: [[0, 0, -0.5, 0.125], [0, -0.6, -0.5, 0.125], [0, 0.6, 0.5, -0.125], [0, 0.6, 0, 0],
        [0, 0.6, -0.2, 0.2], [0, 0.6, -1.0, 0.25], [0.6, 0, -0.5, 0.125], 0.0],
    4: [["b", "c"], ["c", "e"], ["b", "e"], ["b", "c", "d", "e"], ["a", "b", "c", "d", "e"], [],
        ["d"], "e"],
}

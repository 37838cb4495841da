# SPDX-License-Identifier: MIT
"""Answers to 21_serving."""

import math

import torch

RIGHT = {
    1: [lambda tokens, page: math.ceil(tokens / page), lambda tokens, page: -(-tokens // page),
        lambda tokens, page: torch.tensor((tokens + page - 1) // page)],
    2: [12, 12.0, torch.tensor(12)],
    3: [[26, 20], (26, 20), torch.tensor([26, 20])],
    4: [[22, 196, 518], (22, 196, 518), torch.tensor([22, 196, 518])],
}
WRONG = {
    1: [lambda tokens, page: tokens // page, lambda tokens, page: tokens // page + 1,
        lambda tokens, page: tokens, lambda tokens, page: tokens / page, 7],
    2: [20, 8, 10, 22, [2, 10]],
    3: [[26, 17], [33, 20], [20, 26], [26], 26, [27, 20]],
    4: [[596, 5298, 13998], [22, 196], [23, 197, 519], [22, 196, 524], 22],
}

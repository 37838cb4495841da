# SPDX-License-Identifier: MIT
"""A plain GPT of sixty lines, as one has it before anything of ours is lifted into it."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, d, n_h):
        super().__init__()
        self.n_h = n_h
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, h):
        q, k, v = (x.unflatten(-1, (self.n_h, -1)).transpose(1, 2)
                   for x in self.qkv(h).chunk(3, -1))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, d, n_h):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, n_h)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, h):
        h = h + self.attention(self.norm_1(h))
        return h + self.mlp(self.norm_2(h))


class GPT(nn.Module):
    def __init__(self, vocab, d, n_h, n_layers, max_tokens):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d)
        self.position = nn.Embedding(max_tokens, d)
        self.blocks = nn.ModuleList(Block(d, n_h) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1])
        h = self.embedding(tokens) + self.position(positions)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def loss(self, tokens):
        logits = self(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, tokens[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, tokens, n):
        for _ in range(n):
            logits = self(tokens)[:, -1]
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
        return tokens

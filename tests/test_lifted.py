# SPDX-License-Identifier: MIT
"""A plain GPT gets our attention, then the cache, then the experts, from copies in a folder.

Each step is a handful of edits. A process that cannot see the package runs what comes out: it
learns, its gradients are there, and with the cache it writes what it writes without.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from dsv2_ref import copying

PLAIN = (Path(__file__).parent / "oracles" / "plain_gpt.py").read_text(encoding="utf-8")
ATTENTION = [
    ("import torch\nimport torch.nn.functional as F\nfrom torch import nn\n",
     "import torch\nimport torch.nn.functional as F\nfrom mla import MultiHeadLatentAttention\n"
     "from rope import rope_frequencies, rope_tables\nfrom torch import nn\n"),
    (PLAIN[PLAIN.index("class Attention"): PLAIN.index("class Block")], ""),
    ("self.attention = Attention(d, n_h)",
     "self.attention = MultiHeadLatentAttention(d, n_h, d_h=12, d_r=6, d_v=12, d_c=24)"),
    ("    def forward(self, h):\n        h = h + self.attention(self.norm_1(h))\n",
     "    def forward(self, h, cos, sin):\n"
     "        h = h + self.attention(self.norm_1(h), cos, sin)\n"),
    ("        self.position = nn.Embedding(max_tokens, d)\n", ""),
    ("        h = self.embedding(tokens) + self.position(positions)\n",
     "        cos, sin = rope_tables(positions, rope_frequencies(6))\n"
     "        h = self.embedding(tokens)\n"),
    ("            h = block(h)\n", "            h = block(h, cos, sin)\n"),
]
CACHE = [
    ("from mla import MultiHeadLatentAttention\n",
     "from kv_cache import LatentCache\n"
     "from mla import MultiHeadLatentAttention, attend_absorbed, attend_expanded\n"),
    ("    def forward(self, h, cos, sin):\n"
     "        h = h + self.attention(self.norm_1(h), cos, sin)\n",
     "    def forward(self, h, cos, sin, cache, layer):\n"
     "        attend = attend_expanded if h.shape[1] > 1 else attend_absorbed\n"
     "        h = h + self.attention(self.norm_1(h), cos, sin, attend, cache, layer)\n"),
    ("    def forward(self, tokens):\n        positions = torch.arange(tokens.shape[1])\n",
     "    def forward(self, tokens, cache=None):\n        T = tokens.shape[1]\n"
     "        positions = torch.arange(T) if cache is None else cache.positions(T)\n"),
    ("        for block in self.blocks:\n            h = block(h, cos, sin)\n",
     "        for layer, block in enumerate(self.blocks):\n"
     "            h = block(h, cos, sin, cache, layer)\n"
     "        if cache is not None:\n            cache.advance()\n"),
    ("        for _ in range(n):\n            logits = self(tokens)[:, -1]\n",
     "        B, T = tokens.shape\n"
     "        cache = LatentCache(len(self.blocks), B, T + n, d_c=24, d_r=6)\n"
     "        for i in range(n):\n"
     "            logits = self(tokens if i == 0 else tokens[:, -1:], cache)[:, -1]\n"),
]
EXPERTS = [
    ("from torch import nn\n",
     "from torch import nn\nfrom routing import Router\nfrom experts import MixtureOfExperts\n"),
    ("        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))\n",
     "        self.router = Router(d, n_routed=8, top_k=2, n_devices=4, max_devices=2)\n"
     "        self.experts = MixtureOfExperts(d, 16, n_shared=1, n_routed=8)\n"),
    ("        return h + self.mlp(self.norm_2(h))\n",
     "        x = self.norm_2(h).flatten(0, 1)\n        routing = self.router(x)\n"
     "        h_out = self.experts(h.flatten(0, 1), x, routing.indices, routing.gates)\n"
     "        return h_out.view_as(h)\n"),
]

PROGRAM = """
import sys
sys.modules["dsv2_ref"] = None
import torch
import gpt
torch.manual_seed(0)
model = gpt.GPT(vocab=31, d=48, n_h=4, n_layers=2, max_tokens=40)
text = (torch.arange(400) * 7 % 31).repeat(1)
batch = torch.stack([text[i : i + 17] for i in range(0, 64, 4)])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
first = model.loss(batch).item()
for _ in range(60):
    loss = model.loss(batch)
    optimizer.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
assert loss.item() < 0.1 < 2 < first, (first, loss.item())
prompt = batch[:3, :5]
written = model.generate(prompt, 9)
again = prompt
for _ in range(9):
    with torch.no_grad():
        again = torch.cat((again, model(again)[:, -1].argmax(-1, keepdim=True)), 1)
assert torch.equal(written, again) and torch.equal(written[:, 5:], batch[:3, 5:14])
print("fine")
"""


def edited(text: str, edits: list[tuple[str, str]]) -> str:
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def runs(folder: Path, gpt: str) -> None:
    (folder / "gpt.py").write_text(gpt, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True,
                          text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lifted")
    for name in ("mla", "routing", "experts"):
        copying.copy(name, folder)
    return folder


def test_the_plain_one_runs(folder):
    assert len(PLAIN.splitlines()) <= 62
    runs(folder, PLAIN)


STEPS = {"attention": ATTENTION, "cache": CACHE, "experts": EXPERTS}


@pytest.mark.parametrize("last", STEPS)
def test_a_step_takes_ten_lines_at_most_beyond_what_is_deleted(folder, last):
    text = PLAIN
    for name, edits in STEPS.items():
        before, text = text, edited(text, edits)
        assert len(text.splitlines()) - len(before.splitlines()) <= 10, name
        if name == last:
            break
    runs(folder, text)

# SPDX-License-Identifier: MIT
"""A model that the published format cannot hold is refused by the name of what it cannot hold."""

import copy
from pathlib import Path

import pytest
import torch
from refusals import refused
from torch import Tensor

from dsv2_ref import checkpoint
from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2

SMALL = TINY.with_(d=40, n_h=5, vocab=67, expert_width=18, dense_width=58, d_cq=22, d_c=20, d_v=14,
                   d_h=10, d_r=6)


def _model(**changes) -> DeepSeekV2:
    torch.manual_seed(0)
    return DeepSeekV2(SMALL.with_(**changes)).eval()


def _listing(path: Path) -> dict[str, bytes]:
    """Every file below `path`, hidden ones too, with its content."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture
def saved(tmp_path) -> Path:
    checkpoint.save(_model(), tmp_path / "m")
    return tmp_path / "m"


class Adapter(torch.nn.Module):
    """A linear layer and a low-rank change of it, as PEFT wraps one."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)


def _biased(linear: torch.nn.Linear) -> torch.nn.Linear:
    return torch.nn.Linear(linear.in_features, linear.out_features)


class Doubled(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _change(model: DeepSeekV2, what: str) -> None:
    a, block = model.blocks[1].attention, model.blocks[1]
    match what:
        case "blocks.1.attention.W_UK.bias":
            a.W_UK = _biased(a.W_UK)
        case "head.bias":
            model.head = _biased(model.head)
        case "blocks.1.attention.W_UV":
            a.W_UV = Adapter(a.W_UV)
        case "blocks.1.attention.W_O":
            a.W_O = Doubled(a.W_O.in_features, a.W_O.out_features, bias=False)
        case "head":
            model.head = torch.nn.Sequential(model.head)
        case "blocks.1.gain":
            block.gain = torch.nn.Parameter(torch.ones(3))
        case "blocks.1.offset":
            block.register_buffer("offset", torch.ones(3))
        case "blocks.3":
            model.blocks.append(copy.deepcopy(block))
        case "blocks.2":
            del model.blocks[2]
        case "embedding.weight":
            model.embedding = torch.nn.Embedding(70, SMALL.d)
        case "norm":
            model.norm = torch.nn.LayerNorm(SMALL.d)
        case "blocks.1.norm_ffn.eps":
            block.norm_ffn.eps = 1e-3
        case "blocks.1.attention.scale":
            a.scale *= 2
        case "blocks.1.attention.norm_kv":
            a.norm_kv = torch.nn.Identity()
        case "blocks.0.attention.W_UQ":
            torch.nn.utils.parametrizations.weight_norm(model.blocks[0].attention.W_UQ)
        case "head.weight":
            model.head.weight = torch.nn.Parameter(model.head.weight + 1)
        case "on the meta device":
            model.to("meta")
        case _:
            raise AssertionError(what)


@pytest.mark.parametrize("what", [
    "blocks.1.attention.W_UK.bias", "head.bias", "blocks.1.attention.W_UV",
    "blocks.1.attention.W_O", "head", "blocks.1.gain", "blocks.1.offset", "blocks.3", "blocks.2",
    "embedding.weight", "norm", "blocks.1.norm_ffn.eps", "blocks.1.attention.scale",
    "blocks.1.attention.norm_kv", "blocks.0.attention.W_UQ", "head.weight", "on the meta device",
])
def test_what_the_format_cannot_hold_is_refused_by_name(saved: Path, what: str) -> None:
    before = _listing(saved.parent)
    model = _model()
    _change(model, what)
    message = refused(lambda: checkpoint.save(model, saved, overwrite=True), what, "expected")
    assert message.startswith(f"{what}:") or what == "on the meta device"
    assert _listing(saved.parent) == before


def test_another_class_is_not_saved(tmp_path) -> None:
    class Mine(DeepSeekV2):
        pass

    refused(lambda: checkpoint.save(Mine(SMALL), tmp_path / "m"), "model: Mine", "DeepSeekV2")
    refused(lambda: checkpoint.save(torch.nn.Linear(2, 2), tmp_path / "m"), "model: Linear")
    assert not list(tmp_path.iterdir())


def test_a_head_equal_to_the_embedding_may_be_its_own_tensor(tmp_path) -> None:
    model = _model(tie_embeddings=True)
    model.head.weight = torch.nn.Parameter(model.embedding.weight.detach().clone())
    checkpoint.save(model, tmp_path / "m")
    assert torch.equal(checkpoint.load(tmp_path / "m").head.weight, model.head.weight)

# SPDX-License-Identifier: MIT
import pytest
import torch

from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training import optim
from dsv2_ref.training.optim import Muon, build_optimizers, orthogonalise, set_rate


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)], ids=str)
def test_muon_equals_torch_on_matrices(shape, monkeypatch):
    monkeypatch.setattr(optim, "fast_precision", lambda device: "bf16")           # torch's, always
    g = torch.Generator().manual_seed(0)
    theirs = torch.randn(shape, generator=g).requires_grad_()
    ours = theirs.detach().clone().requires_grad_()
    optimizers = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.3), Muon([ours], 0.02, 0.3)
    for _ in range(5):
        theirs.grad = torch.randn(shape, generator=g)
        ours.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_a_stack_is_its_matrices_and_company_changes_nothing():
    g = torch.Generator().manual_seed(1)
    stack = torch.randn(3, 6, 4, generator=g)
    grad = torch.randn(3, 6, 4, generator=g)
    together = stack.clone().requires_grad_()
    alone = [m.clone().requires_grad_() for m in stack]
    neighbour = torch.randn(6, 4, generator=g).requires_grad_()    # of the same shape
    together.grad, neighbour.grad = grad, torch.randn(6, 4, generator=g)
    Muon([together, neighbour], lr=0.1).step()
    for weight, one in zip(alone, grad, strict=True):
        weight.grad = one
        Muon([weight], lr=0.1).step()
    assert torch.allclose(together, torch.stack(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(2, 12, 8), (8, 12)], ids=str)
def test_orthogonalise_maps_the_singular_values_alone(shape, precision, monkeypatch):
    """Each of them by the odd polynomial, five times over, in the basis that it stands in."""
    monkeypatch.setattr(optim, "fast_precision", lambda device: precision)
    M = torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()
    U, s, V = torch.linalg.svd(M, full_matrices=False)
    s = s / M.norm(dim=(-2, -1), keepdim=True)[..., 0]
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected, near = U @ s.diag_embed() @ V, 1e-5 if precision == "fp32" else 0.03
    torch.testing.assert_close(orthogonalise(M).double(), expected, rtol=0, atol=near)


def test_orthogonalise_flattens_the_singular_values():
    M = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalise(M).float())
    assert ((values > 0.6) & (values < 1.3)).all()


def test_groups():
    model = DeepSeekV2(TINY)
    names = {id(p): n for n, p in model.named_parameters()}
    adamw, muon = build_optimizers(model, "muon", 6e-3, adamw_lr=4e-3)
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert "blocks.1.ffn.experts.W_up" in by_muon and "blocks.0.attention.W_UK.weight" in by_muon
    assert not any("router" in n or "embedding" in n or "norm" in n for n in by_muon)
    tables, gains = adamw.param_groups
    assert gains["weight_decay"] == 0 and tables["weight_decay"] == 0.1
    assert all("norm" in names[id(p)] for p in gains["params"])
    everything = [p for o in (adamw, muon) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, everything)) == sorted(names)
    set_rate([adamw, muon], 0.5)
    assert (tables["lr"], muon.param_groups[0]["lr"]) == (2e-3, 3e-3)
    set_rate([adamw, muon], 1.0)
    assert (tables["lr"], muon.param_groups[0]["lr"]) == (4e-3, 6e-3)


def test_adamw_takes_everything_at_one_rate():
    (adamw,) = build_optimizers(DeepSeekV2(TINY), "adamw", 1e-3, adamw_lr=9.0)
    assert {group["lr"] for group in adamw.param_groups} == {1e-3}
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="optimizer: 'sgd', expected 'adamw', 'adamw8' or 'muon'"):
        build_optimizers(DeepSeekV2(TINY), "sgd", 1e-3)

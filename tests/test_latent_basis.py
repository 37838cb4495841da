# SPDX-License-Identifier: MIT
"""A change of basis changes what is cached and nothing that is computed from it."""

import pytest
import torch
from torch import Tensor

from dsv2_ref.attention.latent_basis import even_pairs, hadamard, rotate_latent

F64 = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("n", [1, 2, 64, 512])
def test_hadamard_is_orthogonal_and_spreads_one_number_over_all(n):
    H = hadamard(n)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=F64), atol=1e-12, rtol=0)
    assert torch.allclose(H.abs(), torch.full_like(H, n**-0.5))


@pytest.mark.parametrize("n", [0, 3, 24, -4])
def test_no_hadamard_matrix_of_other_sizes(n):
    with pytest.raises(ValueError, match=f"n: {n}, expected a power of two"):
        hadamard(n)


def test_a_rotated_latent_gives_the_same_keys_and_values():
    h, W_DKV, gain = normal(27, 7, 10), normal(28, 16, 10), normal(29, 16)
    W_UK, W_UV = normal(30, 15, 16), normal(31, 18, 16)

    def keys_and_values(W_DKV, gain, W_UK, W_UV):
        c = torch.nn.functional.rms_norm(h @ W_DKV.T, (16,), gain, 1e-6)
        return c, c @ W_UK.T, c @ W_UV.T

    c, k, v = keys_and_values(W_DKV, gain, W_UK, W_UV)
    R = torch.linalg.qr(normal(34, 16, 16))[0]          # not symmetric, as Hadamard's is
    turned_c, turned_k, turned_v = keys_and_values(*rotate_latent(R, W_DKV, gain, W_UK, W_UV))
    torch.testing.assert_close(turned_k, k, atol=1e-10, rtol=0)
    torch.testing.assert_close(turned_v, v, atol=1e-10, rtol=0)
    torch.testing.assert_close(turned_c, (c / gain) @ R.T, atol=1e-10, rtol=0)


def test_a_rotation_is_what_an_outlier_channel_needs():
    """The largest number of a row, which sets the step, against the root mean square."""
    c = normal(32, 200, 64)
    c[:, 5] += 100
    turned = c @ hadamard(64).T
    torch.testing.assert_close(turned.norm(dim=1), c.norm(dim=1))
    assert (turned.abs().amax(1) < 0.2 * c.abs().amax(1)).all()


def scores(W_KR: Tensor, W_QR: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Products of two heads' queries and the keys, each turned by its position, and the keys."""
    x = torch.nn.functional.rms_norm(normal(40, 9, 10), (10,), gain)
    angles = torch.arange(9, dtype=F64)[:, None] * torch.tensor([1.0, 0.3, 0.01], dtype=F64)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rope(y: Tensor) -> Tensor:
        return torch.view_as_complex(y.unflatten(-1, (3, 2)).contiguous()) * turn

    k = rope(x @ W_KR.T)
    q = [rope(y) for y in (normal(41, 9, 7) @ W_QR.T).unflatten(-1, (2, 6)).unbind(1)]
    return torch.stack([(y @ k.mH).real for y in q]), k


def test_even_pairs_give_the_same_scores():
    W_KR, W_QR, gain = normal(42, 6, 10), normal(43, 12, 7), normal(44, 10)
    W_KR[2:4] *= 30
    expected, k = scores(W_KR, W_QR, gain)
    got, even = scores(*even_pairs(W_KR, W_QR, gain), gain)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    size = even.abs().square().mean(0).sqrt()
    before = k.abs().square().mean(0).sqrt()
    assert before.max() > 20 * before.min() and size.max() < 2 * size.min()


def test_pairs_are_even_in_what_the_norm_with_its_gain_gives():
    """A channel that the gain makes large counts as much as its gain says."""
    W_KR, W_QR, gain = normal(42, 6, 10), normal(43, 12, 7), normal(44, 10)
    gain[3] = 50
    even, _ = even_pairs(W_KR, W_QR, gain)
    size = (even * gain).unflatten(0, (3, 2)).flatten(1).norm(dim=1)          # (d_r/2,)
    torch.testing.assert_close(size, size[:1].expand(3), atol=0, rtol=1e-10)


def test_even_pairs_need_pairs():
    with pytest.raises(ValueError, match="W_KR: a pair of rows is zero"):
        even_pairs(torch.zeros(4, 5), torch.ones(8, 5), torch.ones(5))

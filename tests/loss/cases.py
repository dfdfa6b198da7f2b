"""Descriptors and points of two views for tests of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.loss import ExtraNegatives

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(
    n: int, m: int, shared: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Points in a unit cube; the first `shared` of each view coincide up to a jitter of 1e-3."""
    g = torch.Generator().manual_seed(seed)
    p0 = torch.rand(n, 3, generator=g, dtype=torch.float64) - 0.5
    p1 = torch.rand(m, 3, generator=g, dtype=torch.float64) - 0.5
    p1[:shared] = p0[:shared] + 1e-3 * torch.rand(shared, 3, generator=g, dtype=torch.float64)
    d0 = torch.randn(n, 8, generator=g, dtype=torch.float64)
    d1 = torch.randn(m, 8, generator=g, dtype=torch.float64)
    d1[:shared] += 1.5 * d0[:shared]
    d0, d1 = (F.normalize(d, dim=-1).to(dtype).requires_grad_() for d in (d0, d1))
    return d0, d1, p0.to(dtype), p1.to(dtype)


def crowded(n: int, m: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Few distinct places, so that a row has many positives."""
    d0, d1, _, _ = problem(n, m, min(n, m) // 2, dtype=dtype)
    g = torch.Generator().manual_seed(7)
    places = torch.rand(4, 3, generator=g, dtype=torch.float64)
    p0 = places[torch.randint(4, (n,), generator=g)]
    p1 = places[torch.randint(4, (m,), generator=g)]
    return d0, d1, p0.to(dtype), p1.to(dtype)


def extras(inputs: Inputs, count: int) -> ExtraNegatives:
    """Descriptors of other pairs: half of another object, half of the same one."""
    d0, _, p0, _ = inputs
    g = torch.Generator().manual_seed(11)
    d = F.normalize(torch.randn(count, 8, generator=g, dtype=torch.float64), dim=-1).to(d0.dtype)
    points = torch.rand(count, 3, generator=g, dtype=torch.float64).to(p0.dtype) - 0.5
    same = torch.arange(count) % 2 == 0
    # Every fourth lies where a point of the pair is, once on its object and once on another one.
    points[::4], points[1::4] = p0[0] + 1e-4, p0[0] + 1e-4
    return ExtraNegatives(d.requires_grad_(), points, same)


def row_of(similarities: list[float], distances: list[float]) -> Inputs:
    """One row with these similarities to columns at these distances."""
    d1 = torch.tensor(similarities, dtype=torch.float64)[:, None]
    p1 = torch.tensor([[x, 0.0, 0.0] for x in distances], dtype=torch.float64)
    return torch.ones_like(d1[:1]), d1, torch.zeros_like(p1[:1]), p1


def gradients_equal(ours: Tensor, plain: Tensor, inputs: Sequence[Tensor]) -> None:
    """Assert that two scalars and their gradients, which are not all 0, are the same."""
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
        assert a.any()

"""What holds for every loss: finite in odd cases, float32 for half types, less for better."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equifeat.loss import (
    count_positives,
    info_nce,
    multi_positive_ap,
    smooth_ap,
    soft_labels,
    transport,
)
from tests.loss.cases import Inputs, crowded, extras, problem

WITH_EXTRA: list[Callable[..., Tensor]] = [smooth_ap, info_nce, multi_positive_ap, soft_labels]
ALL: list[Callable[..., Tensor]] = [*WITH_EXTRA, transport]


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize(
    "case",
    [
        problem(12, 9, 0, dtype=torch.float32),
        problem(12, 9, 1, dtype=torch.float32),
        problem(1, 1, 1, dtype=torch.float32),
        problem(0, 5, 0, dtype=torch.float32),
        problem(5, 0, 0, dtype=torch.float32),
        crowded(9, 9, dtype=torch.float32),
    ],
)
def test_degenerate_inputs_give_finite_gradients(case: Inputs, loss: Callable[..., Tensor]) -> None:
    value = loss(*case)
    assert value.shape == ()
    assert value.isfinite()
    for grad in torch.autograd.grad(value, case[:2]):
        assert grad.isfinite().all()
    if count_positives(*case[2:]) == 0:
        assert float(value.detach()) == 0.0


@pytest.mark.parametrize("loss", ALL)
def test_half_types_and_autocast_compute_in_float32(loss: Callable[..., Tensor]) -> None:
    case = problem(40, 40, 30, dtype=torch.float32)
    full = loss(*case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(*case)
    assert inside.dtype == torch.float32
    assert torch.equal(full, inside)
    half0, half1 = (d.detach().bfloat16().requires_grad_() for d in case[:2])
    value = loss(half0, half1, *case[2:])
    assert value.dtype == torch.float32
    again = loss(half0.detach().float(), half1.detach().float(), *case[2:])
    torch.testing.assert_close(value.detach(), again)
    assert torch.autograd.grad(value, half0)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("loss", WITH_EXTRA)
def test_no_extra_negatives_and_no_positives_with_them(loss: Callable[..., Tensor]) -> None:
    case = problem(12, 9, 6)
    assert torch.equal(loss(*case, extra=extras(case, 0)), loss(*case))
    none = problem(12, 9, 0)
    extra = extras(none, 5)
    value = loss(*none, extra=extra)
    assert float(value.detach()) == 0.0
    # The graph reaches them all the same: under DDP every rank must take part.
    for grad in torch.autograd.grad(value, (*none[:2], extra.descriptors)):
        assert not grad.any()


@pytest.mark.parametrize("loss", ALL)
def test_better_descriptors_have_a_smaller_loss(loss: Callable[..., Tensor]) -> None:
    d0, d1, p0, p1 = problem(64, 64, 64)
    perfect = d0.detach()
    assert float(loss(perfect, perfect, p0, p1)) < float(loss(d0, d1, p0, p1).detach())

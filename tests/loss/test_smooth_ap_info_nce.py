"""SmoothAP and InfoNCE against loops over the formulas, in odd cases, and in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.loss import (
    count_positives,
    info_nce,
    smooth_ap,
    smooth_ap_terms,
)
from tests.eval.allocations import Allocations
from tests.loss.cases import Inputs, crowded, extras, problem

LOSSES: list[Callable[..., Tensor]] = [smooth_ap, info_nce]


def sigma(x: Tensor, tau: float) -> Tensor:
    """As published, clamp and all."""
    return 1.0 / (1.0 + torch.exp((-x / tau).clamp(-50.0, 50.0)))


def loop_smooth_ap(d0: Tensor, d1: Tensor, p0: Tensor, p1: Tensor, tau: float = 0.01) -> Tensor:
    terms = []
    for i in range(len(d0)):
        distance = (p1 - p0[i]).norm(dim=-1)
        s = d1 @ d0[i]
        negatives = s[distance > 0.1]
        for j in (distance < 5e-3).nonzero()[:, 0].tolist():
            a = 1.0 + sigma(s[j] - 1.0, tau)
            b = 1.0 + sigma(1.0 - s[j], tau)
            ap1 = a / (a + sigma(negatives - 1.0, tau).sum())
            ap2 = b / (b + sigma(negatives - s[j], tau).sum())
            terms.append(1.0 - (ap1 + ap2) / 2.0)
    return torch.stack(terms).mean()


def loop_info_nce(d0: Tensor, d1: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    terms = []
    for i in range(len(d0)):
        distance = (p1 - p0[i]).norm(dim=-1)
        s = d1 @ d0[i] / 0.05
        for j in (distance < 5e-3).nonzero()[:, 0].tolist():
            candidates = torch.cat([s[j : j + 1], s[distance > 0.1]])
            terms.append(-F.log_softmax(candidates, dim=0)[0])
    return torch.stack(terms).mean()


CASES = [problem(20, 30, 12), problem(31, 17, 17), problem(24, 24, 24), crowded(20, 26)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("loss", "loop"), [(smooth_ap, loop_smooth_ap), (info_nce, loop_info_nce)])
def test_value_and_gradients_equal_the_loop(
    case: Inputs, loss: Callable[..., Tensor], loop: Callable[..., Tensor]
) -> None:
    ours, plain = loss(*case), loop(*case)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=0.0)
    for a, b in zip(
        torch.autograd.grad(ours, case[:2]), torch.autograd.grad(plain, case[:2]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunk_does_not_matter(case: Inputs, chunk: int) -> None:
    whole, parts = smooth_ap(*case), smooth_ap(*case, chunk=chunk)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0.0)
    for a, b in zip(
        torch.autograd.grad(whole, case[:2]), torch.autograd.grad(parts, case[:2]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [problem(7, 9, 4), crowded(6, 8)])
def test_gradcheck(case: Inputs) -> None:
    d0, d1, p0, p1 = case
    assert torch.autograd.gradcheck(
        lambda a, b: smooth_ap(a, b, p0, p1, tau=0.2, chunk=3), (d0, d1)
    )
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, p0, p1, temperature=0.2), (d0, d1))


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    case = problem(7, 9, 4)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(smooth_ap(*case), case[0], create_graph=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_identical_points_everywhere_have_no_negatives(loss: Callable[..., Tensor]) -> None:
    d0, d1, _, _ = problem(6, 6, 3, dtype=torch.float32)
    value = loss(d0, d1, torch.zeros(6, 3), torch.zeros(6, 3))
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    for grad in torch.autograd.grad(value, (d0, d1)):
        assert grad.isfinite().all()


def test_extreme_similarities_do_not_overflow() -> None:
    p0 = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    d0 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    d1 = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    value = smooth_ap(d0, d1, p0, p0)
    # ap1 = 1 / (1 + σ(0)) and ap2 = 2 / (2 + 1): both rows have their negative at 1.
    assert float(value.detach()) == pytest.approx(1.0 - 0.5 * (1.0 / 1.5 + 2.0 / 3.0), abs=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (d0, d1)))


def test_terms() -> None:
    case = problem(40, 50, 30)
    terms = smooth_ap_terms(*case)
    assert terms.num_positives == count_positives(*case[2:]) == 30
    torch.testing.assert_close(terms.loss, smooth_ap(*case))
    assert float(terms.mean_ap) == pytest.approx(1.0 - float(terms.loss.detach()))
    similarity = (case[0] @ case[1].mT).detach()
    negative = torch.cdist(case[2], case[3]) > 0.1
    best = [float(similarity[i, i]) > float(similarity[i][negative[i]].max()) for i in range(30)]
    assert float(terms.top1) == pytest.approx(sum(best) / 30)
    none = smooth_ap_terms(*problem(5, 5, 0))
    assert none.num_positives == 0
    assert math.isnan(float(none.mean_ap))


@pytest.mark.parametrize(("tau", "loss"), [(0.05, smooth_ap), (0.2, info_nce)])
@pytest.mark.parametrize("case", CASES)
def test_extra_negatives_are_columns_that_are_never_positive(
    case: Inputs, loss: Callable[..., Tensor], tau: float
) -> None:
    d0, d1, p0, p1 = case
    extra = extras(case, 12)
    name = "tau" if loss is smooth_ap else "temperature"
    ours = loss(*case, extra=extra, **{name: tau})
    terms = []
    for i in range(len(d0)):
        s, others = d1 @ d0[i], extra.descriptors @ d0[i]
        distance = (p1 - p0[i]).norm(dim=-1)
        far = ((extra.points3d - p0[i]).norm(dim=-1) > 0.1) | ~extra.same_object
        negatives = torch.cat([s[distance > 0.1], others[far]])
        for j in (distance < 5e-3).nonzero()[:, 0].tolist():
            if loss is info_nce:
                logits = torch.cat([s[j : j + 1], negatives]) / tau
                terms.append(-F.log_softmax(logits, dim=0)[0])
                continue
            a, b = 1.0 + sigma(s[j] - 1.0, tau), 1.0 + sigma(1.0 - s[j], tau)
            ap1 = a / (a + sigma(negatives - 1.0, tau).sum())
            ap2 = b / (b + sigma(negatives - s[j], tau).sum())
            terms.append(1.0 - (ap1 + ap2) / 2.0)
    plain = torch.stack(terms).mean()
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=0.0)
    inputs = (d0, d1, extra.descriptors)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
        assert a.abs().sum() > 0


def test_gradient_descent_lowers_the_loss() -> None:
    d0, d1, p0, p1 = problem(48, 48, 48, dtype=torch.float32)
    raw = d1.detach().clone().requires_grad_()
    first = last = 0.0
    for step in range(30):
        value = smooth_ap(d0.detach(), F.normalize(raw, dim=-1), p0, p1, tau=0.05)
        (grad,) = torch.autograd.grad(value, raw)
        raw = (raw - 5.0 * grad).detach().requires_grad_()
        last = float(value.detach())
        first = first if step else last
    assert last < 0.7 * first


@pytest.mark.parametrize(
    "option",
    [
        {"pos_radius": 0.0},
        {"pos_radius": 0.2},
        {"tau": 0.0},
        {"tau": float("nan")},
        {"chunk": 0},
        {"variant": "other"},
    ],
)
def test_options_that_make_no_sense_are_refused(option: dict[str, Any]) -> None:
    # Called without the shape checker, which would refuse a wrong variant with its own error.
    loss = getattr(smooth_ap, "__wrapped__", smooth_ap)
    with pytest.raises((RecipeError, TypeError)):
        loss(*problem(4, 4, 2), **option)


def test_memory_does_not_grow_with_the_number_of_positives() -> None:
    n, m = 300, 280
    size = n * m * 4
    peaks: list[int] = []
    for case in (problem(n, m, 200, dtype=torch.float32), crowded(n, m, dtype=torch.float32)):
        assert count_positives(*case[2:]) > (0 if not peaks else 20_000)
        saved: list[int] = []

        def pack(x: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(x.numel() * x.element_size())
            return x

        with (
            Allocations() as seen,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        ):
            value = smooth_ap(*case, chunk=64)
            torch.autograd.grad(value, case[:2])
        # The list of positives itself (two int64 a positive) is bounded by N x M too.
        assert seen.largest_numel <= n * m
        assert sum(saved) < 2 * size
        peaks.append(seen.peak_bytes)
    # Plain: 20,000 positives x 280 x 4 bytes = 22 MB a tensor, several of them.
    assert peaks[1] < 10 * size
    assert peaks[1] < peaks[0] + 6 * size

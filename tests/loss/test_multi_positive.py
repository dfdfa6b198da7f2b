"""multi_positive_ap against average precision by hand and a loop over the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.loss import count_positives, multi_positive_ap, smooth_ap
from tests.eval.allocations import Allocations
from tests.loss.cases import Inputs, crowded, extras, gradients_equal, problem, row_of


def loop(case: Inputs, tau: float = 0.01, extra: Any = None) -> Tensor:
    d0, d1, p0, p1 = case
    rows = []
    for i in range(len(d0)):
        distance = (p1 - p0[i]).norm(dim=-1)
        s = d1 @ d0[i]
        negatives = s[distance > 0.1]
        if extra is not None:
            far = ((extra.points3d - p0[i]).norm(dim=-1) > 0.1) | ~extra.same_object
            negatives = torch.cat([negatives, (extra.descriptors @ d0[i])[far]])
        positives = (distance < 5e-3).nonzero()[:, 0].tolist()
        terms = []
        for j in positives:
            others = [k for k in positives if k != j]
            rank = 1.0 + torch.sigmoid((s[others] - s[j]) / tau).sum()
            terms.append(rank / (rank + torch.sigmoid((negatives - s[j]) / tau).sum()))
        if terms:
            rows.append(torch.stack(terms).mean())
    return 1.0 - torch.stack(rows).mean()


@pytest.mark.parametrize("case", [problem(20, 30, 12), crowded(20, 26)])
@pytest.mark.parametrize("chunk", [None, 3])
def test_value_and_gradients_equal_the_loop(case: Inputs, chunk: int | None) -> None:
    gradients_equal(multi_positive_ap(*case, tau=0.05, chunk=chunk), loop(case, 0.05), case[:2])


def test_extra_negatives_are_columns_that_are_never_positive() -> None:
    case = crowded(12, 14)
    extra = extras(case, 12)
    ours = multi_positive_ap(*case, tau=0.05, extra=extra)
    gradients_equal(ours, loop(case, 0.05, extra), (*case[:2], extra.descriptors))


def test_gradcheck() -> None:
    d0, d1, p0, p1 = crowded(5, 6)
    assert torch.autograd.gradcheck(
        lambda a, b: multi_positive_ap(a, b, p0, p1, tau=0.2, chunk=3), (d0, d1)
    )
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(multi_positive_ap(d0, d1, p0, p1), d0, create_graph=True)


def test_well_apart_similarities_give_the_usual_average_precision() -> None:
    # Ranking: positive, negative, positive, negative. AP = (1/1 + 2/3) / 2.
    case = row_of([0.9, 0.5, 0.7, 0.1], [0.0, 0.0, 1.0, 1.0])
    assert float(multi_positive_ap(*case)) == pytest.approx(1.0 - 5.0 / 6.0, abs=1e-6)
    # The second positive costs what the reference form charges for it as if it were alone.
    assert float(smooth_ap(*case)) == pytest.approx(1.0 - (1.0 + 0.5 * (1.0 + 2.0 / 3.0)) / 2.0)


def test_equal_similarities_count_one_half() -> None:
    case = row_of([0.3, 0.3, 0.3], [0.0, 0.0, 1.0])
    # 1 + σ(0) = 1.5 positives before, and half a negative.
    assert float(multi_positive_ap(*case)) == pytest.approx(1.0 - 1.5 / 2.0)


def test_what_lies_between_the_radii_counts_for_nothing() -> None:
    case = row_of([0.5, 0.9, 0.7], [0.0, 0.05, 1.0])
    assert float(multi_positive_ap(*case)) == pytest.approx(0.5, abs=1e-6)


def test_rows_count_the_same_whatever_their_positives() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.2, 0.9, 0.1, 0.5]]).double()
    p0 = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).double()
    p1 = p0[[0, 0, 0, 1]]
    value = multi_positive_ap(torch.eye(2).double(), similarity.mT.contiguous(), p0, p1)
    # Row 0: three positives before its negative. Row 1: one positive, one negative before it.
    assert float(value) == pytest.approx((0.0 + 0.5) / 2.0, abs=1e-6)


def test_memory_does_not_grow_with_the_number_of_positives() -> None:
    n, m = 120, 100
    case = crowded(n, m, dtype=torch.float32)
    assert count_positives(*case[2:]) > 2_500
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel() * x.element_size())
        return x

    with Allocations() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        torch.autograd.grad(multi_positive_ap(*case, chunk=64), case[:2])
    # Plain: one row of m a positive, 25 matrices, several times.
    assert seen.largest_numel <= n * m
    assert sum(saved) < 2 * n * m * 4
    assert seen.peak_bytes < 10 * n * m * 4


@pytest.mark.parametrize(
    "option", [{"pos_radius": 0.0}, {"pos_radius": 0.2}, {"tau": 0.0}, {"chunk": 0}]
)
def test_options_that_make_no_sense_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        multi_positive_ap(*problem(4, 4, 2), **option)

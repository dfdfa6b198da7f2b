"""soft_labels against closed forms and a loop over cross entropies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.loss import ExtraNegatives, soft_labels
from tests.loss.cases import Inputs, crowded, extras, gradients_equal, problem, row_of


def loop(case: Inputs, temperature: float, radius: float, extra: Any = None) -> Tensor:
    d0, d1, p0, p1 = case
    terms = []
    for i in range(len(d0)):
        distance = (p1 - p0[i]).norm(dim=-1)
        if distance.min() > 3 * radius:
            continue
        weights = torch.exp(-0.5 * (distance / radius) ** 2)
        logits = d1 @ d0[i]
        if extra is not None:
            keep = ((extra.points3d - p0[i]).norm(dim=-1) > 3 * radius) | ~extra.same_object
            logits = torch.cat([logits, extra.descriptors[keep] @ d0[i]])
            weights = F.pad(weights, (0, int(keep.sum())))
        terms.append(F.cross_entropy(logits / temperature, weights / weights.sum()))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("case", [problem(20, 30, 12), crowded(20, 26)])
@pytest.mark.parametrize("radius", [0.02, 0.15])
def test_value_and_gradients_equal_the_loop(case: Inputs, radius: float) -> None:
    ours = soft_labels(*case, temperature=0.1, label_radius=radius)
    gradients_equal(ours, loop(case, 0.1, radius), case[:2])


def test_extra_negatives_have_label_zero() -> None:
    case = problem(14, 16, 8)
    extra = extras(case, 12)
    ours = soft_labels(*case, temperature=0.1, label_radius=0.03, extra=extra)
    gradients_equal(ours, loop(case, 0.1, 0.03, extra), (*case[:2], extra.descriptors))


def test_extra_points_of_the_same_place_are_left_out() -> None:
    case = row_of([0.5, 0.5], [0.0, 1.0])
    for same, columns in ((True, 2), (False, 3)):
        extra = ExtraNegatives(case[1][:1].clone(), case[2] + 0.01, torch.tensor([same]))
        value = soft_labels(*case, temperature=0.1, extra=extra)
        assert float(value) == pytest.approx(math.log(columns))


def test_gradcheck() -> None:
    d0, d1, p0, p1 = problem(6, 8, 4)
    assert torch.autograd.gradcheck(
        lambda a, b: soft_labels(a, b, p0, p1, temperature=0.3, label_radius=0.1), (d0, d1)
    )


def test_labels_fall_off_as_a_gaussian() -> None:
    # Distances 0 and 0.02 with radius 0.02: weights 1 and exp(-1/2); logits 1 and 0.
    value = soft_labels(*row_of([0.1, 0.0], [0.0, 0.02]), temperature=0.1, label_radius=0.02)
    near = 1.0 / (1.0 + math.exp(-0.5))
    assert float(value) == pytest.approx(math.log(math.e + 1.0) - near)


def test_the_least_value_is_the_entropy_of_the_labels() -> None:
    distances, radius, temperature = [0.0, 0.01, 0.03, 0.06], 0.02, 0.1
    best = [-temperature * d**2 / (2 * radius**2) for d in distances]
    options: dict[str, Any] = {"temperature": temperature, "label_radius": radius}
    value = float(soft_labels(*row_of(best, distances), **options))
    labels = torch.tensor(best).double().div(temperature).softmax(0)
    assert value == pytest.approx(float(-(labels * labels.log()).sum()))
    for change in ([0.01, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.01]):
        worse = [a + b for a, b in zip(best, change, strict=True)]
        assert float(soft_labels(*row_of(worse, distances), **options)) > value


def test_a_small_radius_is_the_cross_entropy_of_the_nearest() -> None:
    case = row_of([0.4, 0.6, 0.2], [0.05, 0.0005, 0.002])
    value = soft_labels(*case, temperature=0.2, label_radius=2e-4)
    logits = torch.tensor([[2.0, 3.0, 1.0]]).double()
    assert float(value) == pytest.approx(float(F.cross_entropy(logits, torch.tensor([1]))))


def test_rows_without_a_point_within_three_radii_are_left_out() -> None:
    d0, d1, p0, p1 = problem(10, 12, 6)
    p0 = p0.clone()
    p0[2] += 5.0
    both = soft_labels(d0, d1, p0, p1)
    keep = [i for i in range(10) if i != 2]
    torch.testing.assert_close(both, soft_labels(d0[keep], d1, p0[keep], p1))
    assert not torch.autograd.grad(both, d0)[0][2].any()
    # The edge itself: 3 · 0.02 is in, a little more is out.
    assert float(soft_labels(*row_of([0.1, 0.0], [0.0599, 0.5]))) > 0.0
    assert float(soft_labels(*row_of([0.1, 0.0], [0.0601, 0.5]))) == 0.0


@pytest.mark.parametrize(
    "option", [{"label_radius": 0.0}, {"label_radius": float("nan")}, {"temperature": -1.0}]
)
def test_options_that_make_no_sense_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        soft_labels(*problem(4, 4, 2), **option)

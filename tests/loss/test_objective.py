"""Objective: which loss it takes, both directions, and what is logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equifeat.data.batch import PairBatch, collate_pairs
from equifeat.data.pairs import PairSource
from equifeat.data.views import open_views
from equifeat.errors import RecipeError
from equifeat.loss import info_nce, multi_positive_ap, smooth_ap, soft_labels, transport
from equifeat.model.feature_map import FeatureMap
from equifeat.train.objective import Objective
from tests.synthetic import write_views

RADII: dict[str, Any] = {"pos_radius": 0.01, "neg_radius": 0.12}
# Each with options of its own, so that one that is not passed on is seen.
LOSSES: dict[str, Any] = {
    "smooth_ap": lambda *x: smooth_ap(*x, tau=0.07, **RADII),
    "multi_positive_ap": lambda *x: multi_positive_ap(*x, tau=0.07, **RADII),
    "info_nce": lambda *x: info_nce(*x, temperature=0.07, **RADII),
    "soft_labels": lambda *x: soft_labels(*x, temperature=0.07, label_radius=0.04),
    "transport": lambda *x: transport(*x, temperature=0.07, **RADII),
}
WITH_AP = ("smooth_ap", "multi_positive_ap")


def objective(loss: Any, **options: Any) -> Objective:
    return Objective(loss, 0.07, **RADII, label_radius=0.04, **options)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PairBatch:
    root = tmp_path_factory.mktemp("views")
    write_views(root, "box", views=4, size=48)
    # Keypoints drawn in each view by itself: their numbers differ.
    source = PairSource(open_views(root), sampler="reference", num_keypoints=400)
    return collate_pairs([source.draw(0), source.draw(1)])


@pytest.fixture
def maps() -> FeatureMap:
    features = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    return FeatureMap(features.requires_grad_(), (48, 48))


def inputs(maps: FeatureMap, batch: PairBatch, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d0 = FeatureMap(maps.features[i : i + 1], (48, 48)).sample(batch.keypoints0[i][None])[0]
    d1 = FeatureMap(maps.features[i + 2 : i + 3], (48, 48)).sample(batch.keypoints1[i][None])[0]
    return d0, d1, batch.points3d0[i], batch.points3d1[i]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_of_pairs_in_one_and_in_both_directions(
    loss: str, batch: PairBatch, maps: FeatureMap
) -> None:
    there, back = [], []
    for i in range(2):
        d0, d1, p0, p1 = inputs(maps, batch, i)
        there.append(LOSSES[loss](d0, d1, p0, p1))
        back.append(LOSSES[loss](d1, d0, p1, p0))
    one_way = torch.stack(there).mean()
    value, totals = objective(loss)(maps, batch)
    torch.testing.assert_close(value, one_way)
    assert bool(totals.means()["ap"].isnan()) == (loss not in WITH_AP)
    both_ways = (one_way + torch.stack(back).mean()) / 2.0
    value, more = objective(loss, both_directions=True)(maps, batch)
    torch.testing.assert_close(value, both_ways)
    torch.testing.assert_close(
        torch.autograd.grad(value, maps.features)[0],
        torch.autograd.grad(both_ways, maps.features)[0],
        rtol=1e-3,
        atol=1e-6,
    )
    # A pair of keypoints counts once, whichever way it is read.
    assert torch.equal(more.positives, totals.positives)
    assert float(totals.positives) > 20.0
    if loss in WITH_AP:
        torch.testing.assert_close(more.means()["ap"], 1.0 - both_ways.detach())
    assert objective(loss).has_ap == (loss in WITH_AP)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "transport"])
def test_negatives_of_other_pairs_make_it_harder_in_both_directions(
    loss: str, batch: PairBatch, maps: FeatureMap
) -> None:
    alone, _ = objective(loss, both_directions=True)(maps, batch)
    more, _ = objective(loss, both_directions=True, negatives="batch")(maps, batch)
    assert float(more.detach()) > float(alone.detach())


@pytest.mark.parametrize("negatives", ["batch", "global"])
def test_transport_takes_no_negatives_of_other_pairs(negatives: Any) -> None:
    with pytest.raises(RecipeError, match="loss=transport"):
        objective("transport", negatives=negatives)


def test_an_unknown_loss_is_refused_with_the_nearest_name() -> None:
    # Called without the type checker, which would refuse it with its own error.
    make: Any = getattr(Objective.__init__, "__wrapped__", Objective.__init__)
    with pytest.raises(RecipeError, match=r"soft_labels, transport, not 'softlabels'.*soft_labels"):
        make(object.__new__(Objective), "softlabels", 0.01, 5e-3, 0.1)

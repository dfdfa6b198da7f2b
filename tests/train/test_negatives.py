"""Negatives of other pairs on one process; test_distributed.py has those of other ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equifeat.data.batch import PairBatch, collate_pairs
from equifeat.data.pairs import PairSource
from equifeat.data.views import open_views
from equifeat.errors import RecipeError
from equifeat.loss import ExtraNegatives, smooth_ap
from equifeat.model.feature_map import FeatureMap
from equifeat.train.negatives import NegativesKind, extra_negatives
from equifeat.train.objective import Objective
from tests.synthetic import write_views


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PairSource:
    root = tmp_path_factory.mktemp("views")
    write_views(root / "box", "box", views=5, size=64)
    write_views(root / "sphere", "sphere", views=5, size=64)
    return PairSource(open_views(root), num_keypoints=5000)


def batch_of(source: PairSource, *objects: str) -> PairBatch:
    """The first draws of the objects that are named, in their order."""
    draws = iter(range(1000))
    pairs = []
    for name in objects:
        pairs.append(next(p for i in draws if (p := source.draw(i)).object_name == name))
    return collate_pairs(pairs)


def descriptors(batch: PairBatch, dim: int = 6) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.nn.functional.normalize(torch.randn(len(xy), dim, generator=g), dim=-1)
        for xy in batch.keypoints1
    ]


def ask(
    batch: PairBatch, limit: int = 10_000, kind: NegativesKind = "batch", seed: int = 0
) -> list[ExtraNegatives]:
    found = extra_negatives(descriptors(batch), batch, kind, limit, seed)
    assert len(found) == len(batch)
    return [extra for extra in found if extra is not None]


def test_all_keypoints_of_the_other_pairs_and_which_are_of_the_same_object(
    source: PairSource,
) -> None:
    batch = batch_of(source, "box", "sphere", "box")
    d1 = descriptors(batch)
    counts = [len(d) for d in d1]
    assert len(set(counts)) == 3
    for own, extra in enumerate(ask(batch)):
        others = [i for i in range(3) if i != own]
        assert torch.equal(extra.descriptors, torch.cat([d1[i] for i in others]))
        assert torch.equal(extra.points3d, torch.cat([batch.points3d1[i] for i in others]))
        same = [batch.object_names[i] == batch.object_names[own] for i in others]
        expected = [torch.full((counts[i],), s) for i, s in zip(others, same, strict=True)]
        assert torch.equal(extra.same_object, torch.cat(expected))
    # Without ranks, "global" is "batch".
    for one, other in zip(ask(batch), ask(batch, kind="global"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_limit_holds_and_the_choice_depends_on_seed_and_draw_only(source: PairSource) -> None:
    batch = batch_of(source, "box", "sphere", "box")
    for limit, each in ((100, 50), (7, 3), (1, 1)):
        for extra in ask(batch, limit):
            assert len(extra.descriptors) == 2 * each
    first = ask(batch, 100)[0].points3d
    assert torch.equal(first, ask(batch, 100)[0].points3d)
    assert not torch.equal(first, ask(batch, 100, seed=1)[0].points3d)
    # The same draws in another order offer the same points.
    turned = collate_pairs([source.draw(i) for i in reversed(batch.draws)])
    assert torch.equal(ask(turned, 100)[2].points3d.sort(0)[0], first.sort(0)[0])
    assert len({tuple(point) for point in first.tolist()}) == 100


def test_pairs_alone_get_none(source: PairSource) -> None:
    one, two = batch_of(source, "box"), batch_of(source, "box", "sphere")
    assert extra_negatives(descriptors(one), one, "batch", 10, 0) == [None]
    assert extra_negatives(descriptors(one), one, "global", 10, 0) == [None]
    assert extra_negatives(descriptors(two), two, "pair", 10, 0) == [None, None]


@pytest.mark.parametrize("loss", ["smooth_ap", "info_nce"])
def test_objective_is_the_mean_of_pairs(source: PairSource, loss: Any) -> None:
    batch = batch_of(source, "box", "sphere")
    features = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    maps = FeatureMap(features.requires_grad_(), (64, 64))
    options: dict[str, Any] = {"tau": 0.1, "pos_radius": 5e-3, "neg_radius": 0.1}
    both, totals = Objective(loss, **options)(maps, batch)
    single = []
    for i in range(2):
        part = FeatureMap(features[[i, 2 + i]], (64, 64))
        pair = collate_pairs([source.draw(batch.draws[i])])
        single.append(Objective(loss, **options)(part, pair)[0])
    torch.testing.assert_close(both, torch.stack(single).mean())
    means = totals.means()
    torch.testing.assert_close(means["loss"], both.detach())
    assert float(means["positives"]) >= 100.0
    assert bool(means["ap"].isnan()) == (loss == "info_nce")
    doubled = totals.plus(totals).means()
    torch.testing.assert_close(doubled["loss"], means["loss"])
    more, _ = Objective(loss, **options, negatives="batch")(maps, batch)
    assert float(more.detach()) > float(both.detach())
    # Gradients of a pair reach the view 1 of the other.
    (grad,) = torch.autograd.grad(more, features)
    assert grad.isfinite().all()
    held_out, _ = Objective(loss, **options, negatives="batch")(maps, batch, training=False)
    assert torch.equal(held_out, both)


def test_a_pair_without_positives_counts_as_zero_loss_and_no_ap(source: PairSource) -> None:
    batch = batch_of(source, "box", "sphere")
    batch.points3d1[0] = batch.points3d1[0] + 5.0
    features = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    maps = FeatureMap(features, (64, 64))
    loss, totals = Objective("smooth_ap", 0.01, 5e-3, 0.1)(maps, batch)
    d0 = FeatureMap(features[1:2], (64, 64)).sample(batch.keypoints0[1][None])[0]
    d1 = FeatureMap(features[3:4], (64, 64)).sample(batch.keypoints1[1][None])[0]
    other = smooth_ap(d0, d1, batch.points3d0[1], batch.points3d1[1])
    torch.testing.assert_close(loss, other / 2)
    torch.testing.assert_close(totals.means()["ap"], 1.0 - other)


@pytest.mark.parametrize(
    "option", [{"loss": "smoothap"}, {"negatives": "all"}, {"max_negatives": 0}]
)
def test_options_that_make_no_sense_are_refused(option: dict[str, Any]) -> None:
    given = {"loss": "smooth_ap", "tau": 0.01, "pos_radius": 5e-3, "neg_radius": 0.1, **option}
    # Called without the type checker, which would refuse some with its own error.
    make = getattr(Objective.__init__, "__wrapped__", Objective.__init__)
    with pytest.raises((RecipeError, TypeError)):
        make(object.__new__(Objective), **given)

"""The tracker against one query at a time, and what its options do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.eval.tracker import TrackerOptions, track
from equifeat.model.feature_map import FeatureMap

SIZE_HW, RADIUS = (70, 98), 21.0


def drifting(noise: float, frames: int = 7) -> FeatureMap:
    """A picture that moves one cell to the left a frame, under noise."""
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(12, 10, 14 + frames, generator=generator)
    maps = torch.stack([wide[:, :, t : t + 14] for t in range(frames)])
    return FeatureMap(maps + noise * torch.randn(maps.shape, generator=generator), SIZE_HW)


def some_queries(count: int = 12, frames: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    xy = torch.rand(count, 2, generator=generator) * torch.tensor([98.0, 70.0])
    return torch.cat([xy, torch.randint(0, frames, (count, 1), generator=generator)], dim=1)


def find(maps: FeatureMap, descriptor: Tensor, t: int, options: TrackerOptions) -> Tensor:
    """Full softmax over the whole map, then the circle."""
    cells, centers = maps.features[t].flatten(1), maps.centers().reshape(-1, 2)
    cosine = F.cosine_similarity(descriptor[:, None], cells, dim=0).relu()
    heat = (cosine / options.temperature).softmax(dim=0)
    near = (centers - centers[cosine.argmax()]).norm(dim=1) <= options.radius
    place: Tensor = (heat * near) @ centers / (heat * near).sum()
    return place


def slow_track(maps: FeatureMap, query: Tensor, options: TrackerOptions) -> tuple[Tensor, Tensor]:
    """One query with all cycles, as the reference does it."""
    frames = range(len(maps.features))

    def describe(t: int, xy: Tensor) -> Tensor:
        one = FeatureMap(maps.features[t : t + 1], maps.size_hw)
        return one.sample(xy[None, None], normalize=False)[0, 0]

    start = int(query[2])
    xy = torch.stack([find(maps, describe(start, query[:2]), t, options) for t in frames])
    found = [describe(t, xy[t]) for t in frames]
    cosine = torch.stack([F.cosine_similarity(found[start], f, dim=0) for f in found])
    anchors = cosine >= options.anchor_threshold
    errors = torch.stack(
        [
            torch.stack([(find(maps, f, t, options) - xy[t]).norm() for f in found])
            for t in anchors.nonzero()[:, 0].tolist()
        ]
    )
    median = errors.median(dim=0).values
    return xy, (median > median[anchors].max()) | (cosine < options.cosine_threshold)


@pytest.mark.parametrize("noise", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_all_queries_at_once_equal_one_after_the_other(noise: float, temperature: float) -> None:
    maps, queries = drifting(noise), some_queries()
    options = TrackerOptions(radius=RADIUS, temperature=temperature)
    found = track(maps, queries, options)
    for n, query in enumerate(queries):
        xy, occluded = slow_track(maps, query, options)
        torch.testing.assert_close(found.xy[n], xy, rtol=1e-5, atol=1e-3)
        assert found.occluded[n].equal(occluded), n


def test_cycles_decide_something() -> None:
    maps, queries = drifting(0.6), some_queries(40)
    cycle = track(maps, queries, TrackerOptions(radius=RADIUS))
    cosine = track(maps, queries, TrackerOptions(radius=RADIUS, occlusion="cosine"))
    assert cycle.xy.equal(cosine.xy)
    assert cosine.occluded.equal(cosine.similarity < 0.6)
    more = cycle.occluded & ~cosine.occluded
    assert more.any()
    assert not (cosine.occluded & ~cycle.occluded).any()
    assert (cosine.similarity[more] < 0.7).all()


def test_memory_changes_nothing_and_queries_are_independent() -> None:
    maps, queries = drifting(0.6), some_queries(20)
    options = TrackerOptions(radius=RADIUS)
    whole = track(maps, queries, options)
    for memory_mb in (0, 1):
        parts = track(maps, queries, options, memory_mb)
        torch.testing.assert_close(parts.xy, whole.xy, rtol=1e-5, atol=1e-3)
        assert parts.occluded.equal(whole.occluded)
    alone = track(maps, queries[4:5], options)
    torch.testing.assert_close(alone.xy, whole.xy[4:5], rtol=1e-5, atol=1e-3)
    empty = track(maps, queries[:0], options)
    assert empty.xy.shape == (0, 7, 2)
    assert empty.occluded.shape == (0, 7)


def test_a_moving_picture_is_followed_cell_by_cell() -> None:
    maps = drifting(0.0)
    # the centre of cell (4, 9), asked in frame 0, moves one cell of 7 px to the left a frame
    options = TrackerOptions(radius=1.0)
    found = track(maps, torch.tensor([[66.5, 31.5, 0.0]]), options)
    expected = torch.tensor([[66.5 - 7 * t, 31.5] for t in range(7)])
    torch.testing.assert_close(found.xy[0], expected)
    assert not found.occluded.any()
    # half precision and upsampling stay near it
    half = FeatureMap(maps.features.half(), SIZE_HW)
    finer = track(half, torch.tensor([[66.5, 31.5, 0.0]]), replace(options, upsample=4))
    assert (finer.xy[0] - expected).abs().max() < 2.0


def test_upsampling_equals_a_finer_map_of_similarities() -> None:
    maps, options = drifting(0.3), TrackerOptions(radius=RADIUS, upsample=2, occlusion="cosine")
    found = track(maps, torch.tensor([[66.5, 31.5, 0.0]]), options)
    descriptor = maps.features[0, :, 4, 9]
    cosine = F.cosine_similarity(descriptor[:, None, None], maps.features[3], dim=0)
    fine = FeatureMap(cosine[None, None], SIZE_HW)
    y, x = torch.meshgrid(
        torch.arange(20) * 3.5 + 1.75, torch.arange(28) * 3.5 + 1.75, indexing="ij"
    )
    centers = torch.stack([x, y], dim=-1).reshape(-1, 2)
    values = fine.sample(centers[None], normalize=False)[0, :, 0].relu()
    near = (centers - centers[values.argmax()]).norm(dim=1) <= RADIUS
    heat = values.exp() * near
    torch.testing.assert_close(found.xy[0, 3], heat @ centers / heat.sum(), rtol=1e-5, atol=1e-3)


def test_nothing_alike_gives_the_first_cell_as_the_reference_does() -> None:
    features = torch.zeros(2, 3, 4, 4)
    features[0, 0], features[1, 0] = 1.0, -1.0
    found = track(
        FeatureMap(features, (8, 8)), torch.tensor([[4.0, 4.0, 0.0]]), TrackerOptions(1.0)
    )
    assert found.xy[0, 1].tolist() == [1.0, 1.0]
    assert found.occluded.tolist() == [[False, True]]

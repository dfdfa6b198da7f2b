"""Places found equal those of loops over an explicitly upsampled map, within the budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.errors import CorrespondenceError, RecipeError
from equifeat.eval.locate import Located, MatchSpec, locate
from equifeat.geometry.pixels import linear_taps, sample
from equifeat.model.feature_map import FeatureMap
from tests.eval.allocations import Allocations


def random_map(
    grid: tuple[int, int],
    size: tuple[int, int],
    d: int = 12,
    margin: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
) -> FeatureMap:
    g = torch.Generator().manual_seed(seed)
    return FeatureMap(3.0 * torch.randn(1, d, *grid, generator=g), size, margin)


def descriptors(n: int, d: int = 12, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g), dim=-1)


def axis_feature(values: list[Tensor], at: float) -> Tensor:
    at = min(max(at - 0.5, 0.0), len(values) - 1.0)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] * (1 - (at - low)) + values[high] * (at - low)


def looped(
    queries: Tensor,
    target: FeatureMap,
    spec: MatchSpec,
    grid: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> Located:
    """Feature by feature and place by place, in float64: interpolate, normalise, compare."""
    features = target.features[0].double()
    _, h, w = features.shape
    own = grid is None
    rows, columns = grid or (h, w)
    my, mx = target.margin_yx
    inner = (target.size_hw[0] - 2 * my, target.size_hw[1] - 2 * mx)
    places, found = [], []
    for i in range(rows):
        for j in range(columns):
            if mask is not None and not mask[i, j]:
                continue
            if own:
                y, x = my + (i + 0.5) * inner[0] / h, mx + (j + 0.5) * inner[1] / w
                feature = features[:, i, j]
            else:
                y, x = (i + 0.5) * target.size_hw[0] / rows, (j + 0.5) * target.size_hw[1] / columns
                v, u = (y - my) / inner[0] * h, (x - mx) / inner[1] * w
                lines = [axis_feature(list(features[:, r].unbind(1)), u) for r in range(h)]
                feature = axis_feature(lines, v)
            places.append((x, y))
            found.append(feature / feature.norm().clamp(min=1e-12))
    out_xy, out_similarity = [], []
    for query in queries.double():
        values = [float(query @ feature) for feature in found]
        best = max(range(len(values)), key=lambda k: values[k])
        out_similarity.append(values[best])
        if spec.method == "nearest":
            out_xy.append(places[best])
            continue
        near = [
            k
            for k in range(len(values))
            if not spec.window or math.dist(places[k], places[best]) <= spec.window
        ]
        shares = [math.exp(values[k] / spec.temperature) for k in near]
        mean = [
            sum(s * places[k][axis] for s, k in zip(shares, near, strict=True)) / sum(shares)
            for axis in (0, 1)
        ]
        out_xy.append((mean[0], mean[1]))
    return Located(torch.tensor(out_xy), torch.tensor(out_similarity))


SPECS = [
    MatchSpec(),
    MatchSpec("soft_argmax", 0.1),
    MatchSpec("soft_argmax", 1.0, window=9.0),
    MatchSpec("soft_argmax", 0.02, window=4.0),
]
TARGETS = [
    ((5, 7), (40, 70), None, (0.0, 0.0)),
    ((5, 7), (40, 70), (20, 28), (0.0, 0.0)),
    ((5, 7), (40, 70), (17, 23), (2.0, 3.5)),
    ((5, 7), (40, 70), None, (2.0, 3.5)),
    ((6, 4), (33, 21), (33, 21), (0.0, 0.0)),
    ((9, 8), (30, 30), (4, 3), (0.0, 0.0)),
    ((1, 1), (9, 9), (3, 3), (0.0, 0.0)),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.method}-{s.temperature:g}-{s.window:g}")
@pytest.mark.parametrize(("cells", "size", "grid", "margin"), TARGETS)
def test_equals_loops_over_the_upsampled_map(
    spec: MatchSpec,
    cells: tuple[int, int],
    size: tuple[int, int],
    grid: tuple[int, int] | None,
    margin: tuple[float, float],
) -> None:
    target, queries = random_map(cells, size, margin=margin), descriptors(6)
    rows, columns = grid or cells
    g = torch.Generator().manual_seed(5)
    some = torch.rand(rows, columns, generator=g) < 0.4
    some[0, 0] = True
    for mask in (None, some):
        expected = looped(queries, target, spec, grid, mask)
        for budget in (2**26, 16 * columns, 16 * 40 * columns):
            found = locate(queries, target, spec, grid, mask, budget)
            torch.testing.assert_close(found.xy, expected.xy, rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(found.similarity, expected.similarity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("margin", [(0.0, 0.0), (2.5, 4.0)])
def test_own_descriptors_are_found_where_they_were_taken(margin: tuple[float, float]) -> None:
    target = random_map((9, 11), (90, 110), 32, margin)
    xy = target.centers().reshape(-1, 2)
    found = locate(target.sample(xy[None])[0], target)
    assert torch.equal(found.xy, xy)
    assert torch.allclose(found.similarity, torch.ones(len(xy)), atol=1e-5)
    # Descriptors of places between the features, on the finer grid.
    finer = FeatureMap(torch.empty(1, 1, 45, 55), (90, 110)).centers().reshape(-1, 2)[::7]
    taken = target.sample(finer[None])[0]
    back = locate(taken, target, grid_hw=(45, 55))
    assert torch.allclose(back.similarity, torch.ones(len(finer)), atol=1e-5)
    inner = ((finer - 55.0).abs() < torch.tensor([45.0, 35.0]))[:, 0]
    inner &= (finer[:, 1] > 10) & (finer[:, 1] < 80)
    assert torch.equal(back.xy[inner], finer[inner])
    soft = locate(taken, target, MatchSpec("soft_argmax", 1e-4, window=5.0), (45, 55))
    assert torch.allclose(soft.xy[inner], finer[inner], atol=0.05)


@pytest.mark.parametrize("margin", [(0.0, 0.0), (3.0, 1.25)])
def test_taps_are_what_sampling_does(margin: tuple[float, float]) -> None:
    target = random_map((6, 5), (31, 47), margin=margin)
    points = torch.rand(40, 2, generator=torch.Generator().manual_seed(3))
    points = points * torch.tensor([60.0, 45.0]) - 5.0  # some outside
    y0, y1, v = linear_taps(points[:, 1], 6, 31, margin[0])
    x0, x1, u = linear_taps(points[:, 0], 5, 47, margin[1])
    f = target.features[0]
    mixed = (f[:, y0, x0] * (1 - u) + f[:, y0, x1] * u) * (1 - v)
    mixed = mixed + (f[:, y1, x0] * (1 - u) + f[:, y1, x1] * u) * v
    expected = sample(target.features, points[None], (31, 47), margin_yx=margin)[0]
    assert torch.allclose(mixed.T, expected, atol=1e-4)


def test_equal_places_give_the_first_and_cancelled_features_none() -> None:
    same = FeatureMap(torch.ones(1, 3, 40, 50), (40, 50))
    query = F.normalize(torch.ones(2, 3), dim=-1)
    for budget in (2**26, 16 * 60):
        assert locate(query, same, budget_bytes=budget).xy.tolist() == [[0.5, 0.5]] * 2
    middle = locate(query, same, MatchSpec("soft_argmax"))
    assert torch.allclose(middle.xy, torch.tensor([25.0, 20.0]).expand(2, 2), atol=1e-3)
    opposite = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2) / 3
    found = locate(-query, FeatureMap(opposite, (3, 6)), grid_hw=(3, 3))
    assert found.xy.tolist() == [[5.0, 0.5]] * 2
    assert torch.allclose(found.similarity, torch.ones(2), atol=1e-5)
    only = torch.tensor([[False, True, False]] * 3)
    none = locate(query, FeatureMap(opposite, (3, 6)), grid_hw=(3, 3), mask=only)
    assert none.similarity.tolist() == [0.0, 0.0]
    zero = locate(query, FeatureMap(torch.zeros(1, 3, 4, 4), (4, 4)), grid_hw=(8, 8))
    assert zero.similarity.tolist() == [0.0, 0.0]


def test_the_upsampled_map_is_never_built() -> None:
    """420² places with 64 channels would be 45 MB; similarities alone of 20 queries 14 MB."""
    budget, places = 2**20, 420 * 420
    target, queries = random_map((30, 30), (420, 420), 64), descriptors(20, 64)
    for spec in (MatchSpec(), MatchSpec("soft_argmax", 0.1, 20.0), MatchSpec(dtype="bfloat16")):
        with Allocations() as seen:
            locate(queries, target, spec, (420, 420), budget_bytes=budget)
        assert seen.largest_bytes <= 8 * places  # lengths, in float64 at first
        assert seen.peak_bytes < budget + 8 * 8 * places
    # A map finer than the grid, of many queries, whose own similarities would be 144 MB.
    fine = random_map((300, 300), (300, 300), 8)
    with Allocations() as seen:
        locate(descriptors(400, 8), fine, grid_hw=(30, 30), budget_bytes=budget)
    assert seen.peak_bytes < 2.5 * budget + 8 * 5 * 300 * 300
    half = FeatureMap(random_map((200, 200), (200, 200), 64).features.half(), (200, 200))
    with Allocations() as seen:
        locate(descriptors(5, 64), half, budget_bytes=budget)
    assert seen.largest_bytes <= budget  # 10 MB in float32


def test_bfloat16_finds_nearly_the_same_and_gives_unrounded_similarities() -> None:
    target = random_map((12, 12), (96, 96), 48)
    queries = descriptors(200, 48)
    for grid in (None, (48, 48)):
        exact = locate(queries, target, grid_hw=grid)
        rough = locate(queries, target, MatchSpec(dtype="bfloat16"), grid)
        same = (exact.xy == rough.xy).all(-1)
        assert float(same.float().mean()) > 0.9
        assert torch.allclose(exact.similarity[same], rough.similarity[same], atol=1e-5)
        assert bool((rough.similarity <= exact.similarity + 1e-5).all())
        assert bool((rough.similarity > exact.similarity - 0.02).all())


def test_types_devices_and_gradients() -> None:
    target, queries = random_map((5, 7), (40, 70)), descriptors(4)
    wide = FeatureMap(target.features.double(), target.size_hw)
    assert locate(queries, wide, grid_hw=(9, 9)).similarity.dtype == torch.float64
    narrow = FeatureMap(target.features.bfloat16(), target.size_hw)
    assert locate(queries.half(), narrow, grid_hw=(9, 9)).similarity.dtype == torch.float32
    grad = locate(queries.requires_grad_(), target, grid_hw=(9, 9))
    assert not grad.similarity.requires_grad
    none = locate(descriptors(0), target, MatchSpec("soft_argmax"), (9, 9))
    assert none.xy.shape == (0, 2)
    assert none.similarity.shape == (0,)
    expected = locate(queries, target)
    again = locate(queries, target, grid_hw=(5, 7))
    assert torch.equal(again.xy, expected.xy)
    with torch.autocast("cpu", torch.bfloat16):
        inside = locate(queries, target, grid_hw=(9, 9))
    assert torch.equal(inside.similarity, grad.similarity)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": torch.ones(4, 4) > 0}, r"the grid's size \(5, 7\), not \(4, 4\)"),
        ({"mask": torch.zeros(5, 7) > 0}, "leaves no place"),
        ({"grid_hw": (0, 4)}, r"grid_hw=\(0, 4\)"),
    ],
)
def test_impossible_searches_are_named(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CorrespondenceError, match=reason):
        locate(descriptors(3), random_map((5, 7), (40, 70)), **options)


def test_shapes_that_do_not_fit_are_named() -> None:
    target = random_map((5, 7), (40, 70))
    with pytest.raises(CorrespondenceError, match=r"shape \(N, 12\).*not \(3, 8\)"):
        locate(descriptors(3, 8), target)
    two = FeatureMap(torch.zeros(2, 12, 5, 7), (40, 70))
    with pytest.raises(CorrespondenceError, match="not a batch of 2"):
        locate(descriptors(3), two)
    with pytest.raises(RecipeError, match=r"budget_bytes=100 is too small.* one row of 7"):
        locate(descriptors(3), target, budget_bytes=100)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "argmin"}, "method must be one of nearest, soft_argmax"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0"),
        ({"window": -1.0}, "window must be 0"),
    ],
)
def test_impossible_methods_are_named(options: dict[str, Any], reason: str) -> None:
    spec = MatchSpec()
    for name, value in options.items():  # the types would refuse some of them before
        object.__setattr__(spec, name, value)
    with pytest.raises(RecipeError, match=reason):
        spec.__post_init__()

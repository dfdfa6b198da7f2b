"""Semantic correspondence: painted fixtures with the oracle, chance, options, bad folders."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.fixtures import semantic as fixtures
from equifeat.errors import CorrespondenceError, EvalDataError, RecipeError
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from equifeat.eval.data_hash import write_sums
from equifeat.eval.features import FeatureSource
from equifeat.eval.locate_dot import corner_places, locate_dot
from equifeat.eval.protocol import Protocol
from equifeat.eval.semantic import SEMANTIC
from equifeat.eval.semantic_data import SemanticData
from equifeat.eval.semantic_frame import frame_of, show
from equifeat.eval.semantic_protocols import averages_of
from equifeat.eval.task import Prediction, Row
from equifeat.geometry.pixels import pixel_centers
from equifeat.metrics.keypoints import mean_pck
from equifeat.model.feature_map import FeatureMap

SIDE = 112
IDS = [protocol.id for protocol in SEMANTIC.protocols]


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three families, two categories each."""
    root = tmp_path_factory.mktemp("semantic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixtures, "_DEFAULT", 2)
        drawn = fixtures._draw([], True, 3)
        # all families draw the same pictures of one seed
        patch.setattr(fixtures, "_draw", lambda *_, **__: drawn)
        for family, write in fixtures.FAMILIES.items():
            write(root / family, [], True, 3)
    return root


def small(name: str, **changes: Any) -> Protocol:
    """A protocol at a size that tests can afford."""
    protocol = next(p for p in SEMANTIC.protocols if p.id == name)
    sizes = {"side": str(SIDE), **({"grid": str(SIDE)} if protocol.options.grid else {})}
    return protocol.changed({**sizes, **{k: str(v) for k, v in changes.items()}})


def opened(painted: Path, protocol: Protocol) -> SemanticData:
    data = SEMANTIC.open(painted / protocol.id.split("/")[0], protocol)
    assert isinstance(data, SemanticData)
    return data


def run(
    data: SemanticData, model: Any, indices: Iterable[int] | None = None
) -> tuple[list[Prediction], list[Row]]:
    source = FeatureSource(model, data.protocol.features)
    predictions = [data.predict(i, source) for i in indices or range(len(data.items))]
    return predictions, [r for i, p in enumerate(predictions) for r in data.score(i, p)]


def average(rows: list[Row], protocol: Protocol) -> dict[str, float]:
    """The harness's own averages, written again."""
    out = {}
    for metric in protocol.metrics:
        weights = [r.weights[metric.name] if metric.mean == "weighted" else 1.0 for r in rows]
        values = [r.values[metric.name] for r in rows]
        out[metric.name] = float(np.average(values, weights=weights))
    return out


@pytest.mark.parametrize("name", IDS)
def test_oracle_finds_every_keypoint(painted: Path, name: str) -> None:
    protocol = small(name)
    data = opened(painted, protocol)
    assert len(data.items) == len(set(data.items)) >= 6
    predictions, rows = run(data, CoordinateOracle())
    assert min(average(rows, protocol).values()) >= 99.0
    for pair, prediction, row in zip(data.pairs, predictions, rows, strict=True):
        assert prediction["xy"].shape == pair.xy1.shape
        assert row.unit == row.item == pair.name
        assert row.labels["category"] == pair.category
        # in pixels of the target: as near as the frame and the colours allow
        error = (prediction["xy"] - pair.xy1).norm(dim=-1)
        assert float(error.median()) < 3.0
    assert sum(v.numel() * v.itemsize for v in predictions[0].values()) < 2000
    assert "pictures recur" in data.caption()


@pytest.mark.parametrize("name", ["pf-pascal/mef-840-same", "pf-willow/box-kp", "spair/box"])
def test_random_features_score_at_chance(painted: Path, name: str) -> None:
    """Chance: the share of the square's pixels within α times the length of the true place."""
    protocol = small(name)
    data = opened(painted, protocol)
    draws = [run(data, RandomFeatures(seed=seed))[1] for seed in range(6)]
    heading, (alpha, _) = max(averages_of(protocol).items(), key=lambda item: item[1][0])
    centers = pixel_centers((SIDE, SIDE)).reshape(-1, 2).double()
    hits = mean = variance = 0.0
    for index, pair in enumerate(data.pairs):
        size_hw = run_sizes(pair.target)
        frame = frame_of(size_hw, protocol.options.fit, SIDE)
        true = frame.carry(pair.xy1)
        if protocol.options.basis == "image":
            length = float(SIDE)
        elif protocol.options.basis == "box":
            assert pair.box1 is not None
            length = SIDE / max(size_hw) * float((pair.box1[2:] - pair.box1[:2]).max())
        else:
            length = float((true.amax(dim=0) - true.amin(dim=0)).max())
        share = (torch.cdist(true, centers) <= alpha * length).double().mean(dim=1)
        hits += sum(rows[index].values[heading] for rows in draws) / 100 * len(true)
        mean += len(draws) * float(share.sum())
        variance += len(draws) * float((share * (1 - share)).sum())
    # neighbours share a patch and are not independent: five deviations
    assert mean > 5
    assert abs(hits - mean) <= 5 * variance**0.5


def run_sizes(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.height, image.width


@pytest.mark.parametrize("name", IDS)
def test_averages_are_those_of_the_metrics(painted: Path, name: str) -> None:
    """Rows and weights, averaged as the harness does, against mean_pck and a loop by class."""
    protocol = small(name)
    data = opened(painted, protocol)
    generator = torch.Generator().manual_seed(1)
    correct: dict[float, list[torch.Tensor]] = defaultdict(list)
    rows = []
    for i, pair in enumerate(data.pairs):
        noise = 9 * torch.randn(len(pair.xy1), 2, generator=generator, dtype=torch.float64)
        h, w = run_sizes(pair.target)
        prediction = {
            "xy": pair.xy1 + noise,
            "similarity": torch.zeros(len(pair.xy1)),
            "sizes_hw": torch.tensor([[h, w], [h, w]]),
        }
        rows += data.score(i, prediction)
        # distances and lengths by hand, relative to the picture
        stretch = protocol.options.fit == "stretch"
        unit = np.array([w, h], float) if stretch else np.array([max(h, w)] * 2, float)
        true = pair.xy1.numpy() / unit
        length = {
            "image": 1.0,
            "box": 0.0
            if pair.box1 is None
            else max((pair.box1[2:] - pair.box1[:2]).numpy() / unit),
            "box-kp": max(true.max(axis=0) - true.min(axis=0)),
        }[protocol.options.basis]
        distance = np.linalg.norm(noise.numpy() / unit, axis=1)
        for alpha in (0.05, 0.1, 0.15):
            correct[alpha].append(torch.from_numpy(distance <= alpha * length))
    got, names = average(rows, protocol), [p.category for p in data.pairs]
    means = {"per image": "images", "per point": "points", "by class": "categories"}
    for heading, (alpha, kind) in averages_of(protocol).items():
        expected = mean_pck(correct[alpha], names, means.get(kind, "pairs"))  # type: ignore[arg-type]
        assert got[heading] == pytest.approx(expected, abs=1e-6)
        assert 0 < expected < 100
    if name == "pf-pascal/mef-840":
        # evaluate.py: points pooled by class, classes weighted by their pairs
        total = 0.0
        for category in set(names):
            mine = [c for c, n in zip(correct[0.1], names, strict=True) if n == category]
            total += len(mine) * float(torch.cat(mine).double().mean())
        assert got["PCK@.10"] == pytest.approx(100 * total / len(names), abs=1e-6)


def test_published_numbers_name_metrics() -> None:
    assert SEMANTIC.protocols[0].id == "pf-pascal/mef-840"
    for protocol in SEMANTIC.protocols:
        headings = {metric.name for metric in protocol.metrics}
        for values in protocol.published.values():
            assert set(values) <= headings
    published = SEMANTIC.protocols[0].published
    assert published["vit_base_patch14_dinov2.lvd142m"]["PCK@.10"] == 56.90
    assert published["vit_base_patch14_dinov2.lvd142m + 3DCorrEnhance"]["PCK@.10"] == 60.76


@pytest.mark.parametrize("family", sorted(fixtures.FAMILIES))
def test_wrong_folders_get_the_sentence(tmp_path: Path, family: str) -> None:
    protocol = next(p for p in SEMANTIC.protocols if p.id.startswith(family))
    with pytest.raises(EvalDataError) as error:
        SEMANTIC.open(tmp_path, protocol)
    assert SEMANTIC.where[family] in str(error.value)
    assert ".." not in str(error.value)


def test_check_names_what_is_missing(painted: Path, tmp_path: Path) -> None:
    root = tmp_path / "spair"
    shutil.copytree(painted / "spair", root)
    protocol = small("spair/box")
    whole = SEMANTIC.check(root, protocol)
    assert whole.counts["pictures"] == 8
    assert whole.counts["categories"] == 2
    assert whole.problems == [
        f"the published list has 12234 pairs, this one {whole.counts['pairs']}"
    ]
    assert "data hash" in whole.notes[0]
    write_sums(root)
    summed = SEMANTIC.check(root, protocol)
    assert not summed.problems
    assert summed.counts["files compared"] > 20
    gone = sorted((root / "JPEGImages").rglob("*.png"))[0]
    gone.unlink()
    problems = SEMANTIC.check(root, protocol).problems
    assert any("listed in SHA256SUMS but missing" in p for p in problems)
    assert f"{gone} is missing" in problems
    data = SemanticData(root, protocol)
    assert data.data_hash != opened(painted, protocol).data_hash
    source = FeatureSource(RandomFeatures(), protocol.features)
    index = next(i for i, p in enumerate(data.list.pairs) if gone in (p.source, p.target))
    with pytest.raises(EvalDataError, match="no such image file"):
        data.predict(index, source)


def test_padding_can_be_left_out(painted: Path) -> None:
    for name in ("pf-pascal/mef-840", "spair/probe3d"):
        outside = 0
        for search in ("true", "false"):
            data = opened(painted, small(name, search_padding=search))
            predictions, _ = run(data, RandomFeatures())
            for pair, prediction in zip(data.pairs, predictions, strict=True):
                h, w = run_sizes(pair.target)
                xy = prediction["xy"]
                # the shorter side is rounded to whole pixels of the frame
                slack = max(h, w) / SIDE
                off = (xy < -slack).any() or (xy > torch.tensor([w + slack, h + slack])).any()
                assert search == "true" or not off
                outside += int(off)
        assert outside > 0


def test_soft_argmax_and_patch_centres(painted: Path) -> None:
    soft = opened(painted, small("spair/box", method="soft_argmax", temperature=0.01, window=5))
    _, rows = run(soft, CoordinateOracle(), range(3))
    assert min(r.values["PCK@.10 per image"] for r in rows) >= 99.0
    coarse = opened(painted, small("spair/box", grid=14))
    predictions, _ = run(coarse, CoordinateOracle(), range(2))
    h, w = run_sizes(coarse.pairs[0].target)
    frame = frame_of((h, w), "pad", SIDE)
    cells = frame.carry(predictions[0]["xy"]) / (SIDE / 14) - 0.5
    assert torch.allclose(cells, cells.round(), atol=1e-3)


def test_dot_prefers_long_features(painted: Path) -> None:
    """The reference's PF-PASCAL code does not normalise the target."""

    class Loud(CoordinateOracle):
        def dense(self, images: torch.Tensor, *rest: Any, **options: Any) -> Any:
            out = super().dense(images, *rest, **options)
            seen = out.features.abs().sum(dim=1, keepdim=True) > 0
            mean = out.features.sum(dim=(2, 3), keepdim=True) / seen.sum()
            out.features[..., :4, :4] = 10 * mean
            return out

    found = {}
    for similarity in ("dot", "cosine"):
        data = opened(painted, small("pf-pascal/mef-840", similarity=similarity))
        prediction = run(data, Loud(width=1.0), range(1))[0][0]
        pair = data.pairs[0]
        frame = frame_of(run_sizes(pair.target), "pad", SIDE)
        found[similarity] = (frame.carry(prediction["xy"]) < 5).all(dim=1).double().mean()
    assert found["dot"] > 0.5
    assert found["cosine"] < 0.1


def test_dot_is_that_of_interpolated_features() -> None:
    """All features interpolated first; blocks of descriptors and masks change nothing."""
    generator = torch.Generator().manual_seed(0)
    target = FeatureMap(torch.randn(1, 5, 4, 6, generator=generator), (48, 72))
    descriptors = torch.randn(7, 5, generator=generator)
    places = corner_places((24, 36), (48, 72))
    assert places[0, :2].tolist() == [[0.0, 0.0], [2.0, 0.0]]
    products = descriptors @ target.sample(places.reshape(1, -1, 2), normalize=False)[0].mT
    found = locate_dot(descriptors, target, places, budget_bytes=10_000)
    assert torch.allclose(found.xy, places.reshape(-1, 2)[products.argmax(dim=1)])
    assert torch.allclose(found.similarity, products.amax(dim=1), atol=1e-5)
    mask = torch.zeros(24, 36, dtype=torch.bool)
    with pytest.raises(CorrespondenceError, match="no place"):
        locate_dot(descriptors, target, places, mask)
    mask[3:9, 4:11] = True
    inner = products.reshape(7, 24, 36)[:, 3:9, 4:11].flatten(1)
    masked = locate_dot(descriptors, target, places, mask)
    assert torch.allclose(masked.similarity, inner.amax(dim=1), atol=1e-5)
    assert locate_dot(descriptors[:0], target, places).xy.shape == (0, 2)


def test_drawn_pairs_and_boxes(painted: Path) -> None:
    full = opened(painted, small("spair/box"))
    few = opened(painted, small("spair/box", per_category=2))
    other = opened(painted, small("spair/box", per_category=2, seed=5))
    assert len(few.items) == 4
    assert [i for i in full.items if i in few.items] == list(few.items)
    assert few.items != other.items
    assert few.items == opened(painted, small("spair/box", per_category=2)).items
    with pytest.raises(EvalDataError, match="only annotations=mat has"):
        opened(painted, small("pf-pascal/image", annotations="csv", basis="box"))
    with pytest.raises(RecipeError, match="needs similarity=cosine"):
        opened(painted, small("pf-pascal/mef-840", method="soft_argmax"))
    with pytest.raises(RecipeError, match="side=0"):
        run(opened(painted, small("spair/box").changed({"side": "0"})), RandomFeatures(), range(1))


def test_pairs_without_common_keypoints_are_left_out(painted: Path, tmp_path: Path) -> None:
    root = tmp_path / "spair"
    shutil.copytree(painted / "spair", root)
    name = (root / "Layout/large/test.txt").read_text().split()[2]
    file = root / "PairAnnotation/test" / f"{name}.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "src_kps": [], "trg_kps": []}))
    data = opened(painted, small("spair/box"))
    fewer = SemanticData(root, small("spair/box"))
    assert set(data.items) - set(fewer.items) == {name}
    assert "1 pairs without a keypoint" in fewer.caption()
    said = SEMANTIC.check(root, small("spair/box")).problems
    assert f"{name}: no keypoint is visible in both pictures" in said


def test_features_of_the_last_source_are_held(painted: Path) -> None:
    """Lists have all pairs of a source in a row; another model must not see them."""
    data = opened(painted, small("spair/box"))
    asked = []

    class Counting(RandomFeatures):
        def dense(self, images: torch.Tensor, *rest: Any, **options: Any) -> Any:
            asked.append(1)
            return super().dense(images, *rest, **options)

    pair = data.pairs[0]
    data.pairs[1] = pair._replace(target=pair.source)
    first = FeatureSource(Counting(), data.protocol.features)
    data.predict(0, first)
    same = data.predict(1, first)
    assert len(asked) == 2
    other = data.predict(1, FeatureSource(Counting(seed=1), data.protocol.features))
    assert len(asked) == 3
    # a picture looked for in itself is found, whatever the features
    for prediction in (same, other):
        assert float((prediction["xy"] - pair.xy0).norm(dim=1).max()) < 3.0


def test_mat_and_csv_agree(painted: Path) -> None:
    """Both hold the same keypoints; the list stops at twenty."""
    mat = opened(painted, small("pf-pascal/image"))
    listed = opened(painted, small("pf-pascal/image", annotations="csv"))
    for a, b in zip(mat.pairs, listed.pairs, strict=True):
        assert torch.equal(a.xy0[:20], b.xy0)
        assert torch.equal(a.xy1[:20], b.xy1)
        assert (a.source, a.target, a.category) == (b.source, b.target, b.category)


def test_picture(painted: Path) -> None:
    data = opened(painted, small("spair/box"))
    predictions, _ = run(data, RandomFeatures(), range(1))
    picture = data.picture(0, predictions[0])
    assert picture is not None
    assert picture.width <= 1300
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 500


@pytest.mark.parametrize("fit", ["pad", "corner", "stretch", "own"])
def test_a_dot_stays_under_its_keypoint(fit: Any) -> None:
    image = torch.zeros(3, 40, 64)
    image[:, 28:32, 16:20] = 1.0
    frame = frame_of((40, 64), fit, 128)
    shown = show(image, frame, fill=0)
    assert tuple(shown.shape[-2:]) == frame.size_hw
    xy = pixel_centers(frame.size_hw)
    weight = shown.mean(dim=0)
    center = (xy * weight[..., None]).sum(dim=(0, 1)) / weight.sum()
    expected = frame.carry(torch.tensor([[18.0, 30.0]]))[0]
    assert torch.allclose(center, expected, atol=0.05)
    assert torch.allclose(frame.back(expected[None])[0], torch.tensor([18.0, 30.0]), atol=1e-4)
    if fit == "corner":
        white = show(image, frame, fill=255)
        assert float(white[:, -1, -1].min()) == 1.0
    with pytest.raises(RecipeError, match="fill=256"):
        show(image, frame, fill=256)

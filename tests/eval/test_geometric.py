"""The geometric task end to end on fixtures: the oracle is right, random features are at chance."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.fixtures.geometric import FAMILIES
from equifeat.data.image_pairs import read_picture
from equifeat.errors import EvalDataError, RecipeError
from equifeat.eval import geometric_homography, geometric_pose
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from equifeat.eval.data_hash import write_sums
from equifeat.eval.features import FeatureSource
from equifeat.eval.geometric import GEOMETRIC
from equifeat.eval.geometric_depth import DepthPairs
from equifeat.eval.geometric_homography import HomographyOptions
from equifeat.eval.geometric_pose import PoseOptions, PosePairs
from equifeat.eval.matching import nearest
from equifeat.eval.posed_grid import PosedGrid, navi_grid, scannet_grid
from equifeat.eval.protocol import FeatureSpec, Protocol
from equifeat.eval.ratio import best_matches, two_nearest
from equifeat.eval.task import Prediction, Row
from equifeat.metrics.curves import auc

PROTOCOLS = {protocol.id: protocol for protocol in GEOMETRIC.protocols}
Model = CoordinateOracle | RandomFeatures


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, done = tmp_path_factory.mktemp("geometric"), set()

    def folder(family: str) -> Path:
        if family not in done:
            done.add(family)
            FAMILIES[family](root / family, [], True, 0)
        return root / family

    return folder


def run(
    folder: Path, protocol: Protocol, model: Model, items: int = 100
) -> tuple[list[Row], list[Prediction]]:
    data = GEOMETRIC.open(folder, protocol)
    source = FeatureSource(model, protocol.features)
    predictions = [data.predict(i, source) for i in range(min(items, len(data.items)))]
    rows = [row for i, one in enumerate(predictions) for row in data.score(i, one)]
    assert {name for row in rows for name in row.values} == {m.name for m in protocol.metrics}
    return rows, predictions


def mean(rows: list[Row], name: str) -> float:
    values = [row.values[name] for row in rows if not math.isnan(row.values[name])]
    return sum(values) / len(values)


def grids(data: DepthPairs, index: int) -> list[PosedGrid]:
    pair = data.pairs[index]
    if data.protocol.id.startswith("navi"):
        return [navi_grid(view, 512, True, 4) for view in (pair.view0, pair.view1)]
    files = zip(pair.images, pair.depths, pair.K, strict=True)
    return [scannet_grid(i, d, K, pair.K_hw, (480, 640), 4) for i, d, K in files]


@pytest.mark.parametrize(("name", "items"), [("navi/probe3d", 1), ("scannet/probe3d-10px", 1)])
def test_depth_oracle_and_chance(painted: Callable[[str], Path], name: str, items: int) -> None:
    folder, protocol = painted(name.split("/")[0]), PROTOCOLS[name]
    lead = protocol.metrics[0].name
    rows, predictions = run(folder, protocol, CoordinateOracle(), items)
    assert mean(rows, lead) >= 99.0
    assert all(len(one["xy0"]) == 1000 for one in predictions)
    data = GEOMETRIC.open(folder, protocol)
    assert isinstance(data, DepthPairs)
    chance, found, limit = 0.0, 0.0, 0.02 if "cm" in lead else 10.0
    random_rows, random = run(folder, protocol, RandomFeatures(), items)
    for i in range(items):
        # an independent count: every point of view 0 against every one of view 1
        one, two = grids(data, i)
        pose = data._pose(i)
        carried = one.points[one.seen][::23] @ pose[:3, :3].T + pose[:3, 3]
        other = two.points[two.seen][::23]
        hits = distances(data, two, carried, other) < limit
        chance += 100.0 * float(hits.double().mean()) / items
        # and the score of predictions by a loop
        sent = random[i]["points0"].double() @ pose[:3, :3].T + pose[:3, 3]
        good = 0
        for a, b in zip(sent, random[i]["points1"].double(), strict=True):
            good += bool(distances(data, two, a[None], b[None])[0, 0] < limit)
        assert random_rows[i].values[lead] == pytest.approx(100.0 * good / 1000)
        found += random_rows[i].values[lead] / items
    # patches of equal features make matches come in clumps
    assert found == pytest.approx(chance, abs=2.5)
    assert chance < 10.0
    if name == "scannet/probe3d-10px":
        # the other unit of pixels, from the same predictions
        strict = GEOMETRIC.open(folder, PROTOCOLS["scannet/image-10px"])
        assert strict.score(0, predictions[0])[0].values[lead] >= 99.0
        fine, coarse = strict.score(0, random[0])[0].values, random_rows[0].values
        assert fine["recall@20px"] == coarse["recall@5px"]
    image = data.picture(0, predictions[0])
    assert image is not None
    assert image.width <= 1300
    assert f"{len(data.items)} pairs" in data.caption()


def distances(data: DepthPairs, grid: PosedGrid, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, M) errors in metres or in the protocol's pixels."""
    if data.protocol.id.startswith("navi"):
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    fx, fy = float(grid.K[0, 0]), float(grid.K[1, 1])
    xy = [torch.stack([p[:, 0] / p[:, 2] * fx, p[:, 1] / p[:, 2] * fy], 1) for p in (a, b)]
    return torch.cdist(xy[0], xy[1], compute_mode="donot_use_mm_for_euclid_dist") / 4.0


def test_navi_bins_hold_the_pairs_of_their_view_change(painted: Callable[[str], Path]) -> None:
    protocol = PROTOCOLS["navi/probe3d"].changed({"every": "2", "side": "128", "shrink": "2"})
    rows, _ = run(painted("navi"), protocol, CoordinateOracle())
    assert len(rows) == 8
    assert len({row.labels["view change"] for row in rows}) >= 3
    for row in rows:
        low, high = (int(x) for x in row.labels["view change"].rstrip("°").split("-"))
        for metric in protocol.metrics[3:]:
            inside = metric.name == f"recall@2cm {low}-{high}°"
            assert math.isnan(row.values[metric.name]) is not inside
    assert mean(rows, "recall@2cm") >= 99.0
    # the middle of the image, bilinear features, all matches by similarity
    other = protocol.changed(
        {"box": "false", "upsampling": "bilinear", "ratio": "false", "matches": "0"}
    )
    assert other.id.endswith("+box=false,matches=0,ratio=false,upsampling=bilinear")
    rows, _ = run(painted("navi"), other, CoordinateOracle(), 2)
    # also points that view 1 does not see are matched now
    assert 30.0 < mean(rows, "recall@2cm") < 100.0


@pytest.mark.parametrize("name", ["hpatches/mma", "graf/mma"])
def test_planes_oracle_and_chance(painted: Callable[[str], Path], name: str) -> None:
    folder, protocol = painted(name.split("/")[0]), PROTOCOLS[name]
    rows, predictions = run(folder, protocol, CoordinateOracle())
    assert len(rows) == (15 if name == "hpatches/mma" else 5)
    assert mean(rows, "MMA@3px") >= 99.0
    assert mean(rows, "MMA@10px") == 100.0
    errors = [row.values["homography AUC@10px"] for row in rows]
    assert auc(errors, 10.0) >= 97.0
    assert auc(errors, 3.0) >= 85.0
    # matching accuracy by a loop over matches
    data = GEOMETRIC.open(folder, protocol)
    pair = data.pairs[0]  # type: ignore[attr-defined]
    one, good = predictions[0], 0
    for (x, y), (u, v) in zip(one["xy0"].tolist(), one["xy1"].tolist(), strict=True):
        a, b, c = (pair.H @ torch.tensor([x, y, 1.0], dtype=torch.float64)).tolist()
        good += math.hypot(a / c - u, b / c - v) <= 2.0
    assert rows[0].values["MMA@2px"] == pytest.approx(100.0 * good / len(one["xy0"]), abs=1e-6)
    # a match hits a disc of 10 px in 160x120 with 1.6 %
    rows, _ = run(folder, protocol, RandomFeatures())
    assert mean(rows, "MMA@10px") < 6.0
    assert auc([row.values["homography AUC@10px"] for row in rows], 10.0) == 0.0
    assert data.picture(0, one) is not None
    assert "sequences" in data.caption()


def test_homographies_of_both_estimators_and_shrunk_pictures(
    painted: Callable[[str], Path],
) -> None:
    protocol = PROTOCOLS["hpatches/mma"].changed({"side": "60", "stride": "2"})
    data = GEOMETRIC.open(painted("hpatches"), protocol)
    source = FeatureSource(CoordinateOracle(), FeatureSpec())
    index = data.items.index("v_fixture0 1-6")
    found = data.predict(index, source)
    assert found["sizes_hw"].tolist()[2:] == [[60, 80], [60, 80]]
    row = data.score(index, found)[0]
    assert row.labels == {"change": "viewpoint"}
    assert row.values["MMA@2px"] >= 99.0
    assert row.values["homography AUC@3px"] < 1.0
    poselib = GEOMETRIC.open(painted("hpatches"), protocol.changed({"estimator": "poselib"})).score(
        index, found
    )
    assert poselib[0].values["homography AUC@3px"] < 1.0
    # nothing to estimate from
    options = HomographyOptions()
    few = torch.zeros(3, 2, dtype=torch.float64)
    assert geometric_homography.find_homography(few, few, options, 0) is None
    same = torch.zeros(30, 2, dtype=torch.float64)
    for estimator in ("opencv", "poselib"):
        changed = replace(options, estimator=estimator)
        assert geometric_homography.find_homography(same, same, changed, 0) is None


def test_pose_oracle_and_chance(painted: Callable[[str], Path]) -> None:
    folder, protocol = painted("image-pairs"), PROTOCOLS["image-pairs/pose-auc"]
    rows, predictions = run(folder, protocol, CoordinateOracle(), 3)
    assert {row.unit for row in rows} == {"room0"}
    errors = [row.values["pose AUC@20°"] for row in rows]
    assert auc(errors, 20.0) >= 99.0
    assert auc(errors, 5.0) >= 95.0
    data = GEOMETRIC.open(folder, protocol.changed({"estimator": "opencv"}))
    again = [data.score(i, one)[0] for i, one in enumerate(predictions)]
    assert auc([row.values["pose AUC@20°"] for row in again], 20.0) >= 95.0
    assert data.picture(0, predictions[0]) is not None
    assert "pose by opencv" in data.caption()
    # a random direction is within 20 degrees of +t or -t with 6 %, a rotation with under 1 %
    rows, _ = run(folder, protocol.changed({"stride": "16"}), RandomFeatures())
    assert {row.unit for row in rows} == {"room0", "room1"}
    assert auc([row.values["pose AUC@20°"] for row in rows], 20.0) < 5.0


def test_turned_pictures_have_the_pose_of_the_others(painted: Callable[[str], Path]) -> None:
    protocol = PROTOCOLS["image-pairs/pose-auc"].changed({"stride": "8"})
    data = GEOMETRIC.open(painted("image-pairs"), protocol)
    assert isinstance(data, PosePairs)
    assert {pair.turns for pair in data.pairs} == {(0, 0), (2, 0), (3, 0)}
    source = FeatureSource(CoordinateOracle(), FeatureSpec())
    index = next(i for i, pair in enumerate(data.pairs) if pair.turns[0] == 3)
    turned = data.predict(index, source)
    pair = data.pairs[index]
    K0, K1, pose, sizes = data._cameras(index, turned)
    # the true epipolar lines go through the matches
    line = geometric_pose._epipolar(turned["xy0"].double(), turned["xy1"].double(), K0, K1, pose)
    assert float(line.median()) < 3.0
    assert sizes[0] == tuple(read_picture(pair.image0, pair.turns[0]).shape[1:])


def test_estimators_give_up() -> None:
    K, size = torch.eye(3, dtype=torch.float64), (10, 10)
    K[0, 0] = K[1, 1] = 100.0
    for estimator in ("poselib", "opencv"):
        options = replace(PoseOptions(), estimator=estimator, iterations=100)
        few = torch.rand(4, 2, dtype=torch.float64)
        assert geometric_pose.find_pose(few, few, (K, K), (size, size), options, 0) is None


@pytest.mark.parametrize("budget", [64 * 2**20, 4000, 4])
def test_two_nearest_against_sorting(budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(37, 8, generator=generator), dim=1)
    b = torch.nn.functional.normalize(torch.randn(53, 8, generator=generator), dim=1)
    similarity, index = two_nearest(a, b, budget)
    values, order = (a @ b.T).sort(dim=1, descending=True)
    torch.testing.assert_close(similarity, values[:, :2])
    assert torch.equal(index, order[:, 0])
    assert torch.equal(index, nearest(a, b).matches0)
    best = best_matches(a, b, 10, budget_bytes=budget)
    ratio = [(1 - (1 - v[0]) / (1 - v[1]), i) for i, v in enumerate(values.tolist())]
    expected = sorted(ratio, reverse=True)[:10]
    assert best.rows0.tolist() == [i for _, i in expected]
    assert best.score.tolist() == pytest.approx([s for s, _ in expected], abs=1e-5)
    assert best.rows1.tolist() == order[best.rows0, 0].tolist()
    assert two_nearest(a, b[:1])[0][:, 1].tolist() == [-1.0] * 37
    assert len(best_matches(a, b, 0, ratio=False).score) == 37


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_missing_data_says_where_to_get_it(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(EvalDataError) as caught:
            GEOMETRIC.open(folder, PROTOCOLS[name])
        assert GEOMETRIC.where[name.split("/")[0]] in str(caught.value)


def test_check_counts_and_names_what_is_missing(tmp_path: Path) -> None:
    folder, protocol = tmp_path / "planes", PROTOCOLS["hpatches/mma"]
    FAMILIES["hpatches"](folder, [], True, 0)
    check = GEOMETRIC.check(folder, protocol)
    assert check.counts == {"pairs": 15, "sequences": 3, "files": 18, "files compared": 0}
    assert any("HPatches has 116 such sequences, here are 3" in p for p in check.problems)
    write_sums(folder)
    check = GEOMETRIC.check(folder, protocol)
    assert not check.problems
    assert check.counts["files compared"] == 33
    (folder / "v_fixture0" / "3.ppm").unlink()
    assert any("3.ppm is missing" in p for p in GEOMETRIC.check(folder, protocol).problems)
    with pytest.raises(RecipeError, match="stride=-1"):
        GEOMETRIC.open(folder, protocol.changed({"stride": "-1"}))


def test_check_of_depth_and_pose(painted: Callable[[str], Path]) -> None:
    check = GEOMETRIC.check(painted("navi"), PROTOCOLS["navi/probe3d"])
    assert not check.problems
    assert check.counts["objects"] == 1
    assert any("36 objects" in note for note in check.notes)
    check = GEOMETRIC.check(painted("scannet"), PROTOCOLS["scannet/probe3d-10px"])
    assert check.counts["pairs"] == 6
    assert any("1500" in problem for problem in check.problems)
    check = GEOMETRIC.check(painted("image-pairs"), PROTOCOLS["image-pairs/pose-auc"])
    assert (check.counts["pairs"], check.counts["scenes"], len(check.problems)) == (6, 2, 0)


def test_damaged_depth_is_named(painted: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(painted("navi"), tmp_path / "navi")
    file = next((tmp_path / "navi").glob("*/wild_set/annotations.json"))
    annotations = json.loads(file.read_text())
    del annotations[3]["camera"]["q"]
    file.write_text(json.dumps(annotations))
    with pytest.raises(EvalDataError, match=r"photograph 3 lacks or misspells 'q'"):
        GEOMETRIC.open(tmp_path / "navi", PROTOCOLS["navi/probe3d"])

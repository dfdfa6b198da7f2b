"""OnePose poses: the painted fixture with the oracle, chance, options, bad folders."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.fixtures import onepose as fixtures
from equifeat.data.onepose import OnePoseFrame
from equifeat.errors import EvalDataError, RecipeError
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from equifeat.eval.data_hash import write_sums
from equifeat.eval.features import FeatureSource
from equifeat.eval.onepose_templates import build_bank, chosen_frames
from equifeat.eval.pose import POSE
from equifeat.eval.pose_onepose import OnePoseData
from equifeat.eval.protocol import Protocol
from equifeat.eval.task import Prediction, Row
from equifeat.metrics.pose import rotation_error_deg, translation_error_cm
from equifeat.model.feature_map import FeatureMap

OURS, MEF = (p for p in POSE.protocols if p.id.startswith("onepose/"))
SECOND = "9002-object2-others"


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onepose") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixtures, "_SIZE", 128)
        patch.setattr(fixtures, "_FRAMES", (10, 21))
        fixtures.write_onepose(root, [], True, 0)
    return root


@pytest.fixture
def own(painted: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(painted, tmp_path / "own"))


def opened(root: Path, protocol: Protocol = OURS) -> OnePoseData:
    data = POSE.open(root, protocol)
    assert isinstance(data, OnePoseData)
    return data


def run(data: OnePoseData, model: Any) -> tuple[list[Prediction], list[Row]]:
    source = FeatureSource(model, data.protocol.features)
    predictions = [data.predict(i, source) for i in range(len(data.items))]
    return predictions, [data.score(i, p)[0] for i, p in enumerate(predictions)]


def means(rows: list[Row]) -> dict[str, float]:
    """Mean over objects of the mean over frames."""
    by_unit = defaultdict(list)
    for row in rows:
        by_unit[row.unit].append(row.values)
    names = [metric.name for metric in OURS.metrics]
    return {
        name: float(np.mean([np.mean([v[name] for v in one]) for one in by_unit.values()]))
        for name in names
    }


@pytest.fixture(scope="module")
def oracle(painted: Path) -> tuple[list[Prediction], list[Row]]:
    return run(opened(painted), CoordinateOracle())


def test_oracle_finds_every_pose(painted: Path, oracle: tuple[list[Prediction], list[Row]]) -> None:
    predictions, rows = oracle
    data = opened(painted)
    assert len(data.items) == len(set(data.items)) == 6
    # every 10th of names sorted as text: 0, 1, 10, …, 19, 2, 20, 3, …
    assert [item.split("/")[1] for item in data.items[:3]] == ["0", "18", "9"]
    assert set(means(rows)) == {"1cm-1deg", "3cm-3deg", "5cm-5deg", "ADD-0.1d"}
    assert min(means(rows).values()) >= 99.0
    for row, prediction in zip(rows, predictions, strict=True):
        assert row.unit == row.labels["category"] == row.item.split("/")[0]
        assert bool(prediction["ok"])
        assert int(prediction["inliers"]) > 100
        assert sum(t.numel() for t in prediction.values()) < 50


def test_scores_match_a_plain_computation(painted: Path) -> None:
    """With poses that are off by a known turn and shift."""
    data = opened(painted)
    thing, frame = data.frames[4]
    folder = painted / "lowtexture_test_data" / thing.name / f"{thing.name.split('-')[1]}-2"
    true = np.loadtxt(folder / "poses_ba" / f"{frame.name}.txt")
    vertices = data._surface(thing)
    assert vertices is not None
    for degrees, cm in ((0.5, 0.5), (2.0, 0.5), (0.5, 2.0), (4.5, 4.5), (4.0, 6.0), (90.0, 0.0)):
        a = math.radians(degrees)
        turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
        estimate = true.copy()
        estimate[:3, :3] = turn @ true[:3, :3]
        estimate[:3, 3] += [0.0, cm / 100.0, 0.0]
        prediction = {"cam_from_object": torch.from_numpy(estimate)}
        values = data.score(4, prediction)[0].values
        for k in (1, 3, 5):
            assert values[f"{k}cm-{k}deg"] == 100.0 * (degrees < k and cm < k)
        moved = [estimate[:3, :3] @ v + estimate[:3, 3] for v in vertices[0].numpy()]
        still = [true[:3, :3] @ v + true[:3, 3] for v in vertices[0].numpy()]
        distance = np.mean(np.linalg.norm(np.array(moved) - np.array(still), axis=1))
        said = float((folder.parent / "diameter.txt").read_text())
        assert values["ADD-0.1d"] == 100.0 * (distance < 0.1 * said)


def test_random_features_are_at_chance(painted: Path) -> None:
    """A random rotation is within 5 degrees with (x - sin x) / pi = 3.5e-5 at x = 5 degrees."""
    data = opened(painted, OURS.changed({"iterations": "100"}))
    _, rows = run(data, RandomFeatures())
    assert max(means(rows).values()) == 0.0


def test_options_change_what_they_say(
    painted: Path, oracle: tuple[list[Prediction], list[Row]]
) -> None:
    source = FeatureSource(CoordinateOracle(), OURS.features)

    def first(**changes: str) -> Prediction:
        return opened(painted, OURS.changed(changes)).predict(0, source)

    plain = oracle[0][0]
    other = first(method="poselib", dtype="bfloat16")
    true = opened(painted).frames[0][1].cam_from_object()
    assert rotation_error_deg(other["cam_from_object"], true) < 1.0
    assert translation_error_cm(other["cam_from_object"], true) < 1.0
    coarse = first(query_stride="8", templates="3")
    assert bool(coarse["ok"])
    assert int(coarse["matches"]) < 0.5 * int(plain["matches"])
    few = first(descriptors="5")
    assert not bool(few["ok"])
    assert torch.equal(few["cam_from_object"], torch.eye(4, dtype=torch.float64))
    assert int(few["inliers"]) == 0
    every = opened(painted, OURS.changed({"frame_step": "1"}))
    assert len(every.items) == 42
    for bad in ({"query_stride": "0"}, {"threshold_px": "0"}, {"templates": "-1"}):
        with pytest.raises(RecipeError, match="must be"):
            opened(painted, OURS.changed(bad))


class Shapes(RandomFeatures):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int | None] = []

    def dense(
        self, images: torch.Tensor, resolution: int | None = None, **options: Any
    ) -> FeatureMap:
        self.asked.append(resolution)
        return super().dense(images, resolution, **options)


def test_pictures_get_an_eighth_of_their_pixels_as_patches(painted: Path) -> None:
    for changes, patches in (({}, 16), ({"cell": "4"}, 32), ({"resolution": "20"}, 20)):
        protocol = OURS.changed({"iterations": "1", "templates": "2", **changes})
        model = Shapes()
        opened(painted, protocol).predict(0, FeatureSource(model, protocol.features))
        assert model.asked == [patches] * 3


def test_templates_are_described_once_for_an_object(painted: Path) -> None:
    """And frames in another order, as after an interruption, give the same poses."""
    model = Shapes()
    data = opened(painted, OURS.changed({"iterations": "10"}))
    source = FeatureSource(model, data.protocol.features)
    for i in range(6):
        data.predict(i, source)
    assert len(model.asked) == 2 * 10 + 6
    again = opened(painted).predict(4, FeatureSource(CoordinateOracle(), OURS.features))
    data = opened(painted)
    source = FeatureSource(CoordinateOracle(), OURS.features)
    data.predict(0, source)
    after = data.predict(4, source)
    assert all(torch.equal(again[key], after[key]) for key in again)


def test_template_draw_is_seeded_and_its_own(painted: Path, own: Path) -> None:
    options = OURS.changed({"descriptors": "50"}).options
    source = FeatureSource(RandomFeatures(), OURS.features)
    thing = opened(painted).objects[1]
    first, same, other = (build_bank(thing, options, seed, source).points for seed in (0, 0, 1))
    assert first.shape == (50, 3)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    shutil.rmtree(own / "lowtexture_test_data" / "9001-object1-others")
    alone = opened(own).objects[0]
    assert alone.name == SECOND
    assert torch.equal(build_bank(alone, options, 0, source).points, first)
    whole = build_bank(thing, OURS.options, 0, source)
    assert len(whole.points) == len(whole.descriptors) > 1000


def test_frames_are_spread_evenly() -> None:
    frames = [OnePoseFrame(Path(), str(i)) for i in range(10)]
    assert chosen_frames(frames, 0) == chosen_frames(frames, 12) == frames
    assert [frame.name for frame in chosen_frames(frames, 3)] == ["0", "3", "6"]
    assert chosen_frames(frames, 1) == frames[:1]


def test_half_a_pixel_is_seen(painted: Path, oracle: tuple[list[Prediction], list[Row]]) -> None:
    """Keypoints taken for corner pixels, as the released code does, put poses off."""
    data = opened(painted, OURS.changed({"keypoint_pixels": "corner"}))
    predictions, _ = run(data, CoordinateOracle())

    def error(found: list[Prediction]) -> float:
        true = [frame.cam_from_object() for _, frame in data.frames]
        return float(
            np.mean(
                [
                    rotation_error_deg(p["cam_from_object"], t)
                    for p, t in zip(found, true, strict=True)
                ]
            )
        )

    assert error(predictions) > 1.5 * error(oracle[0])


def test_objects_without_a_scan_have_no_add(own: Path) -> None:
    folder = own / "lowtexture_test_data" / SECOND
    (folder / "model_eval.ply").unlink()
    (folder / "box3d_corners.txt").unlink()
    data = opened(own)
    prediction = {
        "cam_from_object": data.frames[3][1].cam_from_object(),
        "ok": torch.tensor([True]),
        "matches": torch.tensor([9]),
        "inliers": torch.tensor([9]),
    }
    values = data.score(3, prediction)[0].values
    assert values["1cm-1deg"] == 100.0
    assert math.isnan(values["ADD-0.1d"])
    assert data.picture(3, prediction) is not None


def test_diameter_of_a_scan_is_that_of_its_box_where_no_file_says(own: Path) -> None:
    thing = opened(own).objects[0]
    (thing.folder / "diameter.txt").unlink()
    found = opened(own)._surface(thing)
    assert found is not None
    side = np.ptp(np.loadtxt(thing.folder / "box3d_corners.txt"), axis=0)
    assert found[1] == pytest.approx(float(np.linalg.norm(side)), rel=1e-6)


def test_picture_shows_truth_and_estimate(
    painted: Path, oracle: tuple[list[Prediction], list[Row]]
) -> None:
    data = opened(painted)
    moved = dict(oracle[0][0])
    moved["cam_from_object"] = moved["cam_from_object"].clone()
    moved["cam_from_object"][0, 3] += 0.02
    none = {**moved, "ok": torch.tensor([False])}
    counts = []
    for prediction in (moved, none):
        picture = data.picture(0, prediction)
        assert isinstance(picture, Image.Image)
        assert picture.size == (860, 888)
        colors = np.asarray(picture).reshape(-1, 3)
        counts.append(
            [int((colors == c).all(axis=1).sum()) for c in ((40, 220, 70), (255, 60, 40))]
        )
    assert min(counts[0]) > 100
    assert counts[1][0] > 100
    assert counts[1][1] == 0


def test_check_counts_and_names_damage(own: Path) -> None:
    check = POSE.check(own, OURS)
    assert check.counts["objects"] == 2
    assert check.counts["sequences"] == 4
    assert check.counts["template frames"] == 20
    assert check.counts["query frames"] == 6
    assert check.counts["template matches"] > 1000
    assert not check.problems
    assert any("data hash" in note for note in check.notes)
    assert any("40 objects, 80 sequences" in note for note in check.notes)
    write_sums(own)
    assert any("compared" in note for note in POSE.check(own, OURS).notes)

    before = opened(own).data_hash
    sequence = own / "lowtexture_test_data" / SECOND / "object2-2"
    (sequence / "poses_ba" / "0.txt").write_text("1 0\n")
    (sequence.with_name("object2-1") / "anno_loftr" / "3.json").write_text("{}")
    problems = " ".join(POSE.check(own, OURS).problems)
    assert "poses_ba/0.txt: not 4 rows of 4" in problems
    assert "anno_loftr/3.json: not a 2D annotation" in problems
    assert "its hash differs" in problems
    assert opened(own).data_hash != before


@pytest.mark.parametrize(
    "gone",
    [
        "lowtexture_test_data",
        "sfm_output",
        f"lowtexture_test_data/{SECOND}/object2-1/anno_loftr",
        f"lowtexture_test_data/{SECOND}/object2-1/color/4.png",
        f"lowtexture_test_data/{SECOND}/object2-2",
        f"lowtexture_test_data/{SECOND}/object2-2/intrin_ba/0.txt",
        f"lowtexture_test_data/{SECOND}/object2-2/poses_ba",
    ],
)
def test_missing_data_says_where_to_get_it(own: Path, gone: str) -> None:
    path = own / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(EvalDataError) as error:
        POSE.open(own, OURS)
    assert POSE.where["onepose"] in str(error.value)


def test_objects_without_annotated_points_are_named(own: Path) -> None:
    folder = own / "lowtexture_test_data" / "9001-object1-others" / "object1-1" / "anno_loftr"
    for file in folder.iterdir():
        file.write_text('{"keypoints2d": [], "assign_matrix": []}')
    with pytest.raises(EvalDataError, match=r"anno_loftr: no frame has a point"):
        opened(own).predict(0, FeatureSource(RandomFeatures(), OURS.features))


def test_protocols_of_the_task() -> None:
    ids = [protocol.id for protocol in POSE.protocols]
    assert len(ids) == len(set(ids))
    assert ids[0] == OURS.id
    families = {one.partition("/")[0] for one in ids}
    assert families == set(POSE.where) == {"onepose", "bop"}
    assert all(protocol.task == POSE.name == "pose" for protocol in POSE.protocols)
    finetuned = MEF.published["vit_base_patch14_dinov2.lvd142m + 3DCorrEnhance"]
    assert finetuned == {"1cm-1deg": 13.58, "3cm-3deg": 58.03, "5cm-5deg": 77.35}


@pytest.mark.parametrize("family", ["onepose", "bop"])
def test_empty_folders_say_where_the_data_is(tmp_path: Path, family: str) -> None:
    protocol = next(p for p in POSE.protocols if p.id.startswith(f"{family}/"))
    for function in (POSE.open, POSE.check):
        with pytest.raises(EvalDataError) as error:
            function(tmp_path, protocol)
        assert POSE.where[family] in str(error.value)

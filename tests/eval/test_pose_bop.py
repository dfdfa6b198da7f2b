"""6D localisation end to end on a made-up BOP data set, and its scores against plain loops."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.fixtures.bop import write_bop
from equifeat.errors import EvalDataError, RecipeError
from equifeat.eval.bop_score import valid_instances
from equifeat.eval.bop_templates import choose_templates, corner_K
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from equifeat.eval.features import Dense, FeatureSource
from equifeat.eval.object_crop import box_of, crop_object
from equifeat.eval.pose_bop import PROTOCOLS, WHERE, BopData, check_bop, open_bop, write_bop_csv
from equifeat.eval.protocol import Protocol
from equifeat.eval.task import Prediction, Row
from equifeat.geometry.pixels import pixel_centers

# small crops and few iterations: what is proven does not depend on them
SMALL = {
    "crop": "168", "stride": "6", "threshold_px": "4", "iterations": "1000", "templates": "12"
}  # fmt: skip
YCBV, LM = (protocol.changed(SMALL) for protocol in PROTOCOLS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bop") / "data"
    write_bop(out, [], True, 0)
    return out


@pytest.fixture(scope="module")
def oracle(root: Path) -> tuple[BopData, list[Prediction]]:
    return run(root, YCBV, CoordinateOracle())


def run(
    root: Path, protocol: Protocol, model: Dense, limit: int = 5
) -> tuple[BopData, list[Prediction]]:
    data = open_bop(root, protocol)
    source = FeatureSource(model, protocol.features)
    return data, [data.predict(i, source) for i in range(limit)]


def rows_of(data: BopData, predictions: list[Prediction]) -> list[Row]:
    return [row for i, p in enumerate(predictions) for row in data.score(i, p)]


def means(rows: list[Row]) -> dict[str, float]:
    return {name: float(np.mean([row.values[name] for row in rows])) for name in rows[0].values}


def truth(root: Path) -> list[Prediction]:
    content = json.loads((root / "test/000001/scene_gt.json").read_text())
    out = []
    for gts in content.values():
        poses = torch.eye(4).double().repeat(len(gts), 1, 1)
        for pose, gt in zip(poses, gts, strict=True):
            pose[:3, :3] = torch.tensor(gt["cam_R_m2c"]).double().reshape(3, 3)
            pose[:3, 3] = torch.tensor(gt["cam_t_m2c"]).double()
        out.append(
            {
                "obj_id": torch.tensor([gt["obj_id"] for gt in gts]),
                "cam_from_object": poses,
                "score": torch.ones(len(gts)),
                "ok": torch.ones(len(gts), dtype=torch.bool),
            }
        )
    return out


def test_the_truth_scores_100(root: Path) -> None:
    data = open_bop(root, YCBV)
    assert set(means(rows_of(data, truth(root))).values()) == {100.0}


def test_the_oracle_localises_everything(oracle: tuple[BopData, list[Prediction]]) -> None:
    data, predictions = oracle
    rows = rows_of(data, predictions)
    assert len(rows) == 15
    assert min(means(rows).values()) >= 99.0
    assert {row.unit for row in rows} == {"000001"}
    assert {row.labels["object"] for row in rows} == {"000001", "000002", "000003"}
    assert {"075-100%", "050-075%"} <= {row.labels["visible"] for row in rows}
    assert "oracle detector" in data.caption()
    picture = data.picture(0, predictions[0])
    assert picture is not None
    assert picture.size == (1000, 750)


def test_templates_with_the_other_pixel_convention_and_boxes(root: Path) -> None:
    protocol = LM.changed({"detections": "bbox_visib", "background": "black"})
    data, predictions = run(root, protocol, CoordinateOracle(), limit=3)
    rows = rows_of(data, predictions)
    assert min(means(rows).values()) >= 99.0
    assert len({row.unit for row in rows}) == 3


def test_random_features_find_nothing(root: Path) -> None:
    # AR counts a pose as right within at most half the diameter and 50 px at a width of 640: of
    # poses drawn at random some in a hundred
    data, predictions = run(root, YCBV, RandomFeatures(), limit=3)
    assert means(rows_of(data, predictions))["AR"] < 10.0


def test_detections_from_a_file(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    info = json.loads((root / "test/000001/scene_gt_info.json").read_text())["0"]
    gt = json.loads((root / "test/000001/scene_gt.json").read_text())["0"]
    rows = []
    for one, seen in zip(gt, info, strict=True):
        row = {"scene_id": 1, "image_id": 0, "category_id": one["obj_id"], "score": 0.9}
        rows.append({**row, "bbox": [float(v) for v in seen["bbox_visib"]], "time": 0.1})
        # a worse one beside it, which is one too many
        rows.append({**row, "bbox": [0, 0, 20, 20], "score": 0.2})
    (copy / "detections.json").write_text(json.dumps(rows))
    protocol = YCBV.changed({"detections": "detections.json", "vsd": "false"})
    data = open_bop(copy, protocol)
    source = FeatureSource(CoordinateOracle(), protocol.features)
    prediction = data.predict(0, source)
    assert prediction["obj_id"].tolist() == [1, 2, 3]
    values = means(data.score(0, prediction))
    assert values["AR_MSSD"] == values["AR_MSPD"] == 100.0
    assert math.isnan(values["AR"])
    assert math.isnan(values["AR_VSD"])
    # a box far beyond the image is cut to it, one beside it is no estimate
    rows[0]["bbox"], rows[2]["bbox"] = [-1e9, -1e9, 2e9, 2e9], [500, 500, 20, 20]
    (copy / "detections.json").write_text(json.dumps(rows))
    found = open_bop(copy, protocol).predict(0, source)
    assert found["ok"].tolist() == [True, False, True]
    # nothing was detected elsewhere
    empty = data.predict(1, source)
    assert len(empty["obj_id"]) == 0
    assert means(data.score(1, empty))["AR_MSSD"] == 0.0
    with pytest.raises(EvalDataError, match="JSON file in"):
        open_bop(copy, YCBV.changed({"detections": "../x.json"}))


def loop_recalls(root: Path, prediction: Prediction, image: str) -> dict[int, tuple[float, float]]:
    """AR_MSSD and AR_MSPD of one image, each estimate against its only true pose."""
    folder = root / "test/000001"
    gts = json.loads((folder / "scene_gt.json").read_text())[image]
    K = np.array(json.loads((folder / "scene_camera.json").read_text())[image]["cam_K"])
    infos = json.loads((root / "models_eval/models_info.json").read_text())
    out = {}
    for gt in gts:
        text = (root / f"models_eval/obj_{gt['obj_id']:06d}.ply").read_text()
        head, _, body = text.partition("end_header\n")
        count = int(head.split("element vertex ")[1].split()[0])
        points = np.array([line.split()[:3] for line in body.splitlines()[:count]], float)
        e = prediction["obj_id"].tolist().index(gt["obj_id"])
        estimate = prediction["cam_from_object"][e].numpy()
        a = points @ estimate[:3, :3].T + estimate[:3, 3]
        R = np.array(gt["cam_R_m2c"]).reshape(3, 3)
        b = points @ R.T + np.array(gt["cam_t_m2c"])
        surface = np.linalg.norm(a - b, axis=1).max() / infos[str(gt["obj_id"])]["diameter"]
        pa, pb = (p @ K.reshape(3, 3).T for p in (a, b))
        pixels = np.linalg.norm(pa[:, :2] / pa[:, 2:] - pb[:, :2] / pb[:, 2:], axis=1).max()
        # 5 px at a width of 640 are 2.5 px of these 320
        out[gt["obj_id"]] = (
            10.0 * sum(surface < th for th in np.arange(0.05, 0.51, 0.05)),
            10.0 * sum(pixels < th / 2 for th in np.arange(5, 51, 5)),
        )
    return out


def test_recalls_by_loops(root: Path) -> None:
    data, seen = open_bop(root, YCBV), set()
    for index, prediction in enumerate(truth(root)):
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(len(prediction["ok"]), 3, generator=generator).double()
        prediction["cam_from_object"][:, :3, 3] += 12.0 * noise
        expected = loop_recalls(root, prediction, str(index))
        for row in data.score(index, prediction):
            surface, pixels = expected[int(row.labels["object"])]
            assert row.values["AR_MSSD"] == surface
            assert row.values["AR_MSPD"] == pixels
            total = row.values["AR_VSD"] + surface + pixels
            assert row.values["AR"] == pytest.approx(total / 3)
            seen |= {surface, pixels}
    assert len(seen) > 5


def test_the_most_visible_instances_count(root: Path) -> None:
    image = open_bop(root, YCBV).images[0].image
    one = image.objects[0]
    several = image._replace(
        objects=tuple(
            one._replace(obj_id=obj, visib_fract=seen)
            for obj, seen in ((1, 0.3), (2, 0.9), (1, 0.8), (1, 0.5), (3, 1.0))
        )
    )
    assert valid_instances(several, {1: 2, 2: 1}) == [1, 2, 3]
    assert valid_instances(several, {1: 9}) == [0, 2, 3]


def test_without_targets_what_is_a_tenth_visible_counts(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    (copy / "test_targets_bop19.json").unlink()
    file = copy / "test/000001/scene_gt_info.json"
    infos = json.loads(file.read_text())
    infos["0"][1]["visib_fract"] = 0.09
    file.write_text(json.dumps(infos))
    data = open_bop(copy, YCBV)
    assert [len(item.instances) for item in data.images] == [2, 3, 3, 3, 3]
    assert data.data_hash != open_bop(root, YCBV).data_hash


def test_templates_lie_apart(root: Path) -> None:
    chosen = choose_templates(root / "train_real", [1, 2], 4, 0.8, seed=0)
    assert [len(v) for v in chosen.values()] == [4, 4]

    def least_angle(rotations: list[Tensor]) -> float:
        return min(
            math.acos(min(1.0, (float((a * b).sum()) - 1) / 2))
            for i, a in enumerate(rotations)
            for b in rotations[:i]
        )

    def rotations(count: int) -> list[Tensor]:
        found = choose_templates(root / "train_real", [1], count, 0.8, seed=0)[1]
        return [t.image.objects[t.instance].cam_from_object[:3, :3] for t in found]

    assert least_angle(rotations(4)) > 1.5 * least_angle(rotations(16))
    again = choose_templates(root / "train_real", [1, 2], 4, 0.8, seed=0)
    ids = [[(t.image.im_id, t.instance) for t in c[1]] for c in (chosen, again)]
    assert ids[0] == ids[1]
    with pytest.raises(EvalDataError, match="no image of object 9"):
        choose_templates(root / "train_real", [1, 9], 4, 0.8, seed=0)


def test_a_crop_keeps_pixels_where_they_are() -> None:
    image = pixel_centers((30, 40)).permute(2, 0, 1) / 40.0
    mask = torch.zeros(30, 40, dtype=torch.bool)
    mask[2:9, 30:40] = True
    box = box_of(mask)
    assert box == (30.0, 2.0, 40.0, 9.0)
    crop = crop_object(torch.cat([image, image[:1]]), box, 1.6, 64)
    assert (crop.side, crop.corner_xy) == (16, (27, -2))
    xy = crop.grid(4)
    assert xy[0].tolist() == [2.0, 2.0]
    assert torch.allclose(crop.from_image(crop.to_image(xy)), xy, atol=1e-5)
    # the colour of a point of the crop is its place in the image; away from the black border
    whole = crop.to_image(xy)
    good = (whole[:, 0] < 38.5) & (whole[:, 1] > 1.5)
    x, y = xy[good].long().unbind(1)
    near = crop.image[0, :2, y, x].T * 40.0
    assert float((near - whole[good]).abs().max()) < 0.2
    K = torch.tensor([[100.0, 0, 20], [0, 100, 15], [0, 0, 1]])
    point = torch.tensor([[0.12, -0.1, 1.0]])
    camera = crop.camera(K)
    assert torch.allclose(camera.project(point), crop.from_image(torch.tensor([[32.0, 5.0]])))
    assert corner_K(K, "integer")[:2, 2].tolist() == [20.5, 15.5]


def test_results_in_the_official_csv(
    oracle: tuple[BopData, list[Prediction]], tmp_path: Path
) -> None:
    data, predictions = oracle
    predictions = [dict(p) for p in predictions]
    predictions[0]["ok"] = torch.tensor([True, False, True])
    file = tmp_path / "oracle_ycbv-test.csv"
    assert write_bop_csv(file, zip(data.items, predictions, strict=True)) == 14
    header, *lines = file.read_text().splitlines()
    # read as the toolkit's load_bop_results does
    assert header == "scene_id,im_id,obj_id,score,R,t,time"
    for line in lines:
        scene, im_id, obj, score, R, t, time = line.split(",")
        pose = predictions[int(im_id)]["cam_from_object"][int(obj) - 1]
        assert (int(scene), float(time)) == (1, -1.0)
        assert float(score) > 6
        assert [float(v) for v in R.split()] == pose[:3, :3].flatten().tolist()
        assert [float(v) for v in t.split()] == pose[:3, 3].tolist()
    with pytest.raises(EvalDataError, match="not an image of a BOP protocol"):
        write_bop_csv(file, [("chair/1", predictions[0])])


def test_the_data_is_checked(root: Path, tmp_path: Path) -> None:
    check = check_bop(root, YCBV)
    assert check.counts == {
        "test images": 5, "instances": 15, "objects": 3, "templates": 36
    }  # fmt: skip
    assert not check.problems
    assert any("YCB-V 900 images with 4123 instances" in note for note in check.notes)
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    (copy / "test/000001/depth/000002.png").unlink()
    (copy / "test/000001/mask_visib/000001_000002.png").unlink()
    problems = check_bop(copy, YCBV).problems
    assert len(problems) == 2
    assert "image 1 has no visible mask of instance 2" in problems[0]
    assert "image 2 has no depth" in problems[1]


@pytest.mark.parametrize(
    "missing",
    [
        "",
        "models_eval/models_info.json models",
        "test",
        "train_real",
        "models_eval/obj_000002.ply",
    ],
)
def test_missing_data_says_where_to_get_it(root: Path, tmp_path: Path, missing: str) -> None:
    copy = tmp_path / "data"
    if missing:
        shutil.copytree(root, copy)
    for name in missing.split():
        path = copy / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    with pytest.raises(EvalDataError) as raised:
        open_bop(copy, YCBV)
    assert WHERE["bop"] in str(raised.value)


def test_other_missing_parts_are_named(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    data = open_bop(copy, YCBV)
    source = FeatureSource(CoordinateOracle(), YCBV.features)
    Image.new("L", (9, 9), 255).save(copy / "test/000001/mask_visib/000000_000000.png")
    with pytest.raises(EvalDataError, match="differ in size"):
        data.predict(0, source)
    shutil.rmtree(copy / "test/000001/mask_visib")
    with pytest.raises(EvalDataError, match="detections=bbox_visib"):
        data.predict(0, source)
    shutil.rmtree(copy / "test/000001/depth")
    with pytest.raises(EvalDataError, match="vsd=false"):
        data.score(0, truth(root)[0])
    (copy / "test/000001/rgb/000003.png").unlink()
    with pytest.raises(EvalDataError, match=r"no rgb/000003\.png"):
        open_bop(copy, YCBV)
    targets = json.loads((copy / "test_targets_bop19.json").read_text())
    targets.append({"im_id": 77, "inst_count": 1, "obj_id": 1, "scene_id": 1})
    shutil.copy(root / "test/000001/rgb/000003.png", copy / "test/000001/rgb")
    (copy / "test_targets_bop19.json").write_text(json.dumps(targets))
    with pytest.raises(EvalDataError, match="image 77 of scene 1"):
        open_bop(copy, YCBV)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stride": "0"}, "stride=0"),
        ({"threshold_px": "-1"}, "threshold_px"),
        ({"test_split": "../test"}, "name of a folder"),
        ({"template_split": ".."}, "name of a folder"),
    ],
)
def test_senseless_options_are_refused(root: Path, changes: Mapping[str, str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        open_bop(root, YCBV.changed(changes))

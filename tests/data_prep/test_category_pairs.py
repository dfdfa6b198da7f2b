"""Category pairs of analytic boxes: where keypoints lie, which are dropped, limits, bad files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep.category_keypoints import read_keypoints
from data_prep.category_pairs import category_pairs_command
from equifeat.data.spair import read_spair
from equifeat.errors import EvalDataError
from equifeat.eval.semantic import SEMANTIC
from equifeat.geometry.camera import invert, rotation_angle_deg
from tests.helpers import ROOT
from tests.synthetic import HALF, poses, write_views

VIEWS, SIZE = 9, 128
# The middles of a box's faces but the lower one, which no view shows; two points of the upper one.
POINTS = {
    "plus_x": [0.5, 0.0, 0.0],
    "minus_x": [-0.5, 0.0, 0.0],
    "plus_y": [0.0, 0.35, 0.0],
    "minus_y": [0.0, -0.35, 0.0],
    "plus_z": [0.0, 0.0, 0.25],
    "near_plus_x": [0.1, 0.05, 0.25],
    "near_minus_x": [-0.1, 0.05, 0.25],
}


def half_turn(point: list[float]) -> list[float]:
    return [-point[0], -point[1], point[2]]


# box_b is the same box with its front where box_a's rear is.
OBJECTS = {"box_a": POINTS, "box_b": {name: half_turn(point) for name, point in POINTS.items()}}
GOOD: dict[str, Any] = {
    "up": [0, 0, 1],
    "categories": {"box": {"keypoints": list(POINTS), "objects": OBJECTS}},
}


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("views")
    for name in OBJECTS:
        write_views(root / name, "box", VIEWS, SIZE, name)
    return root


def build(views: Path, out: Path, content: Any = GOOD, **options: Any) -> list[dict[str, Any]]:
    file = out.with_suffix(".json")
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    category_pairs_command([views], file, out, **options)
    names = (out / "Layout" / "large" / "test.txt").read_text().split()
    return [json.loads((out / "PairAnnotation/test" / f"{n}.json").read_text()) for n in names]


def sides(pair: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Object and view of both pictures, and how their keys begin."""
    out = []
    for side in ("src", "trg"):
        name, _, view = Path(pair[f"{side}_imname"]).stem.rpartition("_")
        out.append((name, int(view), side))
    return out


def faces_camera(point: list[float], view: int) -> float:
    """Cosine between the face that holds a point of the box and the ray to the camera."""
    p = torch.tensor(point, dtype=torch.float64)
    axis = int((p.abs() - HALF).abs().argmin())
    ray = invert(poses(VIEWS)[view])[:3, 3] - p
    return float(ray[axis] * p[axis].sign() / ray.norm())


def projected(point: list[float], view: int, turns: int) -> tuple[float, float]:
    """Where a picture turned counter-clockwise shows a point."""
    p = poses(VIEWS)[view] @ torch.tensor([*point, 1.0], dtype=torch.float64)
    x, y = (1.1 * SIZE * p[:2] / p[2] + SIZE / 2).tolist()
    for _ in range(turns):
        x, y = y, SIZE - x
    return x, y


@pytest.mark.parametrize("up", [[0, 0, 1], [1, 0, 0]], ids=["upright", "turned"])
def test_keypoints_lie_on_their_parts_and_hidden_ones_are_dropped(
    up: list[int], views: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pairs = build(views, out, {**GOOD, "up": up}, pairs=12, view_change=(0.0, 180.0))
    assert len(pairs) == 12
    turned = set()
    for pair in pairs:
        sure, perhaps = set(POINTS), set(POINTS)
        for name, view, side in sides(pair):
            picture = np.asarray(Image.open(out / "JPEGImages/box" / pair[f"{side}_imname"]))
            whole = np.asarray(Image.open(views / name / f"color_{view:06d}.png"))
            turns = next(k for k in range(4) if np.array_equal(np.rot90(whole, k), picture))
            turned.add(turns)
            own = OBJECTS[name]
            sure &= {n for n, point in own.items() if faces_camera(point, view) > 0.4}
            perhaps &= {n for n, point in own.items() if faces_camera(point, view) > 0.0}
            at = dict(zip(pair["kps_ids"], pair[f"{side}_kps"], strict=True))
            for key, xy in at.items():
                assert xy == pytest.approx(projected(own[key], view, turns), abs=0.01)
            rows, columns = (np.flatnonzero(picture.any(axis=(a, 2))) for a in (1, 0))
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert pair[f"{side}_bndbox"] == box
            if up == [1, 0, 0] and {"near_plus_x", "near_minus_x"} <= at.keys():
                # upwards is +x of both objects, where box_b has its near_minus_x
                upper = "near_plus_x" if name == "box_a" else "near_minus_x"
                assert min(at, key=lambda key: at[key][1] if "near" in key else np.inf) == upper
        # faces seen at a slant may pass the depth test or not
        assert sure <= set(pair["kps_ids"]) <= perhaps
        assert len(pair["kps_ids"]) >= 3
    assert turned == {0} if up == [0, 0, 1] else len(turned) > 1


def test_view_changes_are_of_the_objects_fronts_and_within_limits(
    views: Path, tmp_path: Path
) -> None:
    pairs = build(views, tmp_path / "out", pairs=9, view_change=(30.0, 150.0))
    turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    R = poses(VIEWS)[:, :3, :3]
    for pair in pairs:
        (a, i, _), (b, j, _) = sides(pair)
        assert {a, b} == set(OBJECTS)
        angle = float(rotation_angle_deg(R[j] @ turn @ R[i].T))
        assert pair["view_change_deg"] == pytest.approx(angle, abs=0.01)
        assert 30.0 <= angle <= 150.0
        assert pair["viewpoint_variation"] == int((angle - 30.0) / 40.0)
    bands = [pair["viewpoint_variation"] for pair in pairs]
    assert [bands.count(band) for band in range(3)] == [3, 3, 3]
    assert len({pair["src_imname"].rpartition("_")[0] for pair in pairs}) == 2


def test_the_harness_reads_what_is_written_and_the_seed_decides(
    views: Path, tmp_path: Path
) -> None:
    first = build(views, tmp_path / "a", pairs=6, seed=3)
    assert build(views, tmp_path / "b", pairs=6, seed=3) == first
    assert build(views, tmp_path / "c", pairs=6, seed=4) != first
    read = read_spair(tmp_path / "a").pairs
    for pair, content in zip(read, first, strict=True):
        assert torch.equal(pair.xy0, torch.tensor(content["src_kps"], dtype=torch.float64))
        assert torch.equal(pair.xy1, torch.tensor(content["trg_kps"], dtype=torch.float64))
        assert pair.box1 is not None
        assert pair.box1.tolist() == content["trg_bndbox"]
        assert pair.labels["viewpoint"][0] == str(content["viewpoint_variation"])
        assert pair.source.is_file()
        assert pair.target.is_file()
    protocol = next(p for p in SEMANTIC.protocols if p.id == "spair/box")
    assert len(SEMANTIC.open(tmp_path / "a", protocol).items) == 6


def changed(change: Callable[[Any], object]) -> Any:
    content = json.loads(json.dumps(GOOD))
    change(content)
    return content


def box(content: Any) -> Any:
    return content["categories"]["box"]


BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not readable JSON"),
    "a list": ("[]", "not a JSON object"),
    "no up": (changed(lambda c: c.pop("up")), "up is None, not three numbers"),
    "up of no length": (changed(lambda c: c.update(up=[0, 0, 0])), "up is .0, 0, 0."),
    "no names": (changed(lambda c: box(c).pop("keypoints")), "keypoints of box are None"),
    "a name twice": (changed(lambda c: box(c)["keypoints"].append("plus_x")), "'plus_x' twice"),
    "a typing error": (
        changed(lambda c: box(c)["objects"]["box_a"].update(plus_w=[0, 0, 0])),
        "box/box_a has 'plus_w', .* Did you mean plus_",
    ),
    "a path": (
        changed(lambda c: box(c)["objects"].update({"../x": {}})),
        r"has the name '\.\./x'; use letters",
    ),
    "two numbers": (
        changed(lambda c: box(c)["objects"]["box_a"].update(plus_x=[0.5, 0])),
        r"box/box_a/plus_x is \[0.5, 0\], not three numbers",
    ),
    "not finite": (
        changed(lambda c: box(c)["objects"]["box_a"].update(plus_x=[float("nan"), 0, 0])),
        "not three numbers",
    ),
    "inside the object": (
        changed(lambda c: box(c)["objects"]["box_a"].update(plus_x=[0.1, 0, 0])),
        "plus_x of box_a at .0.1, 0.0, 0.0. is seen in no view",
    ),
    "two points in common": (
        changed(
            lambda c: box(c)["objects"].update(
                box_a={k: POINTS[k] for k in ("plus_x", "plus_y", "plus_z", "minus_x")},
                box_b={
                    k: OBJECTS["box_b"][k] for k in ("plus_x", "plus_y", "near_plus_x", "minus_y")
                },
            )
        ),
        "box_a and box_b have 2 keypoints in common; pick at least 3",
    ),
    "one object": (changed(lambda c: box(c)["objects"].pop("box_b")), "no two objects"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_keypoints_are_one_sentence_and_write_nothing(
    name: str, views: Path, tmp_path: Path
) -> None:
    content, sentence = BAD[name]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(EvalDataError, match=sentence) as caught:
        build(views, tmp_path / "out", content)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.json"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]


def test_options_and_folders_that_make_no_sense(views: Path, tmp_path: Path) -> None:
    for options in ({"pairs": 0}, {"view_change": (90.0, 30.0)}, {"view_change": (0.0, 190.0)}):
        with pytest.raises(EvalDataError, match="give at least 1 pair"):
            build(views, tmp_path / "out", **options)
    with pytest.raises(EvalDataError, match="'box_a' is also at"):
        category_pairs_command([views, views], tmp_path / "out.json", tmp_path / "out")


def test_the_file_of_the_project_is_sound() -> None:
    known = read_keypoints(ROOT / "recipes" / "ablations" / "category_keypoints.json")
    assert len(known.categories) >= 3
    for category in known.categories.values():
        assert len(category.objects) >= 2
        assert 6 <= len(category.names) <= 12
        for points in category.objects.values():
            assert all(abs(v) <= 0.5 for point in points.values() for v in point)
            # where left and right were exchanged, the object would be its mirror image
            assert handedness(points) == -1.0


def handedness(points: Any) -> float:
    """Sign of (right to left) x (rear to front) along z, which is up."""

    def mean(word: str) -> Tensor:
        return torch.tensor([p for n, p in points.items() if word in n]).mean(dim=0)

    ahead = mean("front") - mean("rear")
    across = mean("left") - mean("right")
    return float(torch.sign(torch.linalg.cross(across, ahead)[2]))

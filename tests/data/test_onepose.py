"""The reader of OnePose's layout: written by hand, and damaged in every way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from equifeat.data import onepose
from equifeat.data.onepose import OnePoseObject, find_objects, read_matches
from equifeat.errors import EvalDataError

NAME = "0700-toyrobot-others"
POINTS = np.array([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5], [-0.1, 0.0, 0.1]])
ANNOTATION = {
    "keypoints2d": [[1.5, 2.0], [3.0, 4.25], [5.0, 6.0], [7.0, 8.0]],
    "scores2d": [[1.0]] * 4,
    "assign_matrix": [[3, 1], [0, 2]],
    "num_matches": 2,
}


@pytest.fixture
def thing(tmp_path: Path) -> OnePoseObject:
    folder = tmp_path / "lowtexture_test_data" / NAME
    for sequence, names in (("toyrobot-1", ("0",)), ("toyrobot-2", ("0", "1", "2", "10", "11"))):
        for part in ("color", "intrin_ba", "poses_ba"):
            (folder / sequence / part).mkdir(parents=True)
        for name in names:
            (folder / sequence / "color" / f"{name}.png").write_bytes(b"")
            (folder / sequence / "intrin_ba" / f"{name}.txt").write_text(
                "5e2 0 250.5\n0 510.0 260\n0 0 1\n"
            )
            (folder / sequence / "poses_ba" / f"{name}.txt").write_text(
                "0 -1 0 0.1\n1 0 0 0.2\n0 0 1 0.6\n0 0 0 1\n"
            )
    (folder / "toyrobot-1" / "anno_loftr").mkdir()
    (folder / "toyrobot-1" / "anno_loftr" / "0.json").write_text(json.dumps(ANNOTATION))
    anno = tmp_path / "sfm_output" / "outputs_softmax_loftr_loftr" / NAME / "anno"
    anno.mkdir(parents=True)
    np.savez(anno / "anno_3d_average.npz", keypoints3d=POINTS, descriptors3d=np.zeros((256, 3)))
    return find_objects(tmp_path)[0]


def test_reads_what_was_written(thing: OnePoseObject, tmp_path: Path) -> None:
    assert thing.name == NAME
    (tmp_path / "lowtexture_test_data" / "notes").mkdir()
    (tmp_path / "lowtexture_test_data" / ".hidden-folder").mkdir()
    assert find_objects(tmp_path) == [thing]
    assert find_objects(tmp_path / "elsewhere") == []
    assert torch.equal(thing.points(), torch.from_numpy(POINTS))
    frame = thing.templates()[0]
    matches = read_matches(frame, 3)
    assert matches.keypoints.tolist() == [[7.0, 8.0], [3.0, 4.25]]
    assert matches.points.tolist() == [0, 2]
    assert frame.camera_matrix().tolist() == [[500, 0, 250.5], [0, 510, 260], [0, 0, 1]]
    assert frame.cam_from_object()[:, 3].tolist() == [0.1, 0.2, 0.6, 1.0]
    # as the reference sorts: "10" comes before "2"
    assert [frame.name for frame in thing.queries()] == ["0", "1", "10", "11", "2"]
    assert thing.box() is None
    assert thing.diameter() is None
    assert thing.model_file is None


def test_what_only_some_objects_have(thing: OnePoseObject) -> None:
    np.savetxt(thing.folder / "box3d_corners.txt", np.arange(24.0).reshape(8, 3))
    (thing.folder / "diameter.txt").write_text("0.21\n")
    (thing.folder / "model.ply").write_text("")
    box = thing.box()
    assert box is not None
    assert box[7].tolist() == [21.0, 22.0, 23.0]
    assert thing.diameter() == 0.21
    assert thing.model_file == thing.folder / "model.ply"
    (thing.folder / "model_eval.ply").write_text("")
    assert thing.model_file == thing.folder / "model_eval.ply"


def test_a_frame_may_have_no_matches(thing: OnePoseObject) -> None:
    frame = thing.templates()[0]
    frame.annotation.write_text(json.dumps({**ANNOTATION, "assign_matrix": []}))
    assert read_matches(frame, 3).points.shape == (0,)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        json.dumps({"keypoints2d": []}),
        json.dumps({**ANNOTATION, "assign_matrix": [[0, 1]]}),
        json.dumps({**ANNOTATION, "assign_matrix": [[0, 1], [0]]}),
        json.dumps({**ANNOTATION, "assign_matrix": [[0.5], [0.0]]}),
        json.dumps({**ANNOTATION, "assign_matrix": [[4], [0]]}),
        json.dumps({**ANNOTATION, "assign_matrix": [[-1], [0]]}),
        json.dumps({**ANNOTATION, "assign_matrix": [[0], [3]]}),
        json.dumps({**ANNOTATION, "keypoints2d": [[1, 2, 3]]}),
        json.dumps({**ANNOTATION, "keypoints2d": [["a", "b"]]}),
        json.dumps({**ANNOTATION, "keypoints2d": [[float("nan"), 0.0]] * 4}),
        b"\xff\xfe\x00",
    ],
)
def test_damaged_annotations_are_named(thing: OnePoseObject, content: str | bytes) -> None:
    frame = thing.templates()[0]
    frame.annotation.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(EvalDataError, match=r"toyrobot-1.anno_loftr.0\.json: .*again"):
        read_matches(frame, 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 0 0\n0 1 0\n",
        "a b c\n0 1 0\n0 0 1\n",
        "500 0 nan\n0 500 1\n0 0 1\n",
        "500 0 1\n0 500\n0 0 1\n",
        "0 0 1\n0 500 1\n0 0 1\n",
        "500 0 1\n0 -500 1\n0 0 1\n",
        "500 0 1\n0 500 1\n0 0 2\n",
        "1 " * 100_000,
    ],
)
def test_damaged_intrinsics_are_named(thing: OnePoseObject, text: str) -> None:
    frame = thing.queries()[0]
    frame.intrinsics.write_text(text)
    with pytest.raises(EvalDataError, match=r"toyrobot-2.intrin_ba.0\.txt: "):
        frame.camera_matrix()


@pytest.mark.parametrize(
    "text",
    [
        "1 0 0\n0 1 0\n0 0 1\n",
        "2 0 0 0\n0 2 0 0\n0 0 2 0\n0 0 0 1\n",
        "1 0 0 0\n0 1 0 0\n0 0 -1 0\n0 0 0 1\n",
        "1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 0\n",
    ],
)
def test_what_is_no_rigid_pose_is_named(thing: OnePoseObject, text: str) -> None:
    frame = thing.queries()[0]
    frame.pose.write_text(text)
    with pytest.raises(EvalDataError, match=r"toyrobot-2.poses_ba.0\.txt: "):
        frame.cam_from_object()


def _lines(file: Path) -> None:
    np.savez(file, keypoints3d=np.zeros((4, 2)))


def _infinite(file: Path) -> None:
    np.savez(file, keypoints3d=np.full((4, 3), np.inf))


def _other(file: Path) -> None:
    np.savez(file, points=POINTS)


def _pickled(file: Path) -> None:
    np.savez(file, keypoints3d=np.array([{"a": 1}], dtype=object))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def _words(file: Path) -> None:
    file.write_text("no archive")


@pytest.mark.parametrize("damage", [_lines, _infinite, _other, _pickled, _cut, _words])
def test_damaged_points_are_named(thing: OnePoseObject, damage: Callable[[Path], None]) -> None:
    damage(thing.points_file)
    with pytest.raises(EvalDataError, match=r"anno_3d_average\.npz: .*again"):
        thing.points()


def test_sizes_are_bounded(thing: OnePoseObject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onepose, "_MAX_JSON", 10)
    monkeypatch.setattr(onepose, "_MAX_POINTS_BYTES", 10)
    with pytest.raises(EvalDataError, match="bytes are more than 10"):
        read_matches(thing.templates()[0], 3)
    with pytest.raises(EvalDataError, match="more than 10 bytes"):
        thing.points()


@pytest.mark.parametrize("text", ["", "a", "0", "-1", "inf", "nan"])
def test_what_is_no_diameter_is_named(thing: OnePoseObject, text: str) -> None:
    (thing.folder / "diameter.txt").write_text(text)
    with pytest.raises(EvalDataError, match=r"diameter\.txt: "):
        thing.diameter()


def test_missing_files_are_named(thing: OnePoseObject) -> None:
    frame = thing.templates()[0]
    for file, read in (
        (frame.annotation, lambda: read_matches(frame, 3)),
        (frame.intrinsics, frame.camera_matrix),
        (frame.pose, frame.cam_from_object),
        (thing.points_file, thing.points),
    ):
        file.unlink()
        with pytest.raises(EvalDataError, match=f"{file.name} is missing"):
            read()

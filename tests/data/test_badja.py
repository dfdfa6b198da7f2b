"""BADJA's joints are read as they are defined; damaged files are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from equifeat.data.badja import JOINTS, BadjaVideos
from equifeat.errors import EvalDataError


def annotation(t: int, seen: tuple[int, ...]) -> dict[str, Any]:
    joints, visibility = np.zeros((37, 2), int), np.zeros(37, bool)
    joints[:, 0], joints[:, 1] = np.arange(37), 2 * np.arange(37) + t
    visibility[list(seen)] = True
    return {
        "image_path": f"DAVIS/JPEGImages/Full-Resolution/cow/{t:05d}.jpg",
        "segmentation_path": f"DAVIS/Annotations/Full-Resolution/cow/{t:05d}.png",
        "joints": joints.tolist(),
        "visibility": visibility.tolist(),
    }


def write(root: Path, entries: Any) -> None:
    file = root / "joint_annotations/cow.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    entries = [annotation(0, (8, 9, 36, 11)), annotation(5, (8, 36, 10))]
    write(tmp_path, entries)
    for entry, size in zip(entries, ((40, 90), (20, 45)), strict=True):
        for key in ("image_path", "segmentation_path"):
            (tmp_path / entry[key]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 40), (9, 9, 9)).save(tmp_path / entry["image_path"])
        mask = np.zeros(size, np.uint8)
        mask[:10, :10] = 2
        Image.fromarray(mask).save(tmp_path / entry["segmentation_path"])
    return tmp_path


def test_joints_are_rows_and_columns_of_pixels(root: Path) -> None:
    videos = BadjaVideos(root)
    assert videos.names == ("cow",)
    found = videos.video("cow")
    # joint 11 is not annotated, joint 10 not seen in the first frame
    assert len(JOINTS) == 20
    assert found.video.queries.xy.tolist() == [[16.5, 8.5], [18.5, 9.5], [72.5, 36.5]]
    assert found.video.queries.tracks[0].tolist() == [[16.5, 8.5], [21.5, 8.5]]
    assert found.visible.tolist() == [[True, True], [True, False], [True, True]]
    assert found.video.size_hw == (40, 90)
    # a mask of half the size counts in the frame's pixels
    assert found.mask_px().tolist() == [100, 400]
    assert len(videos.frame_files()) == 4
    assert found.video.read(1).shape == (3, 40, 90)


def test_videos_without_frames_are_left_out(root: Path) -> None:
    entries = [annotation(0, (8,))]
    entries[0]["image_path"] = "extra_videos/cat_jump/0.jpg"
    (root / "joint_annotations/cat_jump.json").write_text(json.dumps(entries))
    videos = BadjaVideos(root)
    assert videos.names == ("cow",)
    assert videos.missing == ("cat_jump",)


@pytest.mark.parametrize("change", ["leaves", "shape", "empty", "text", "no joints"])
def test_damaged_annotations_are_named(root: Path, change: str) -> None:
    entries: Any = [annotation(0, (8,))]
    if change == "leaves":
        entries[0]["image_path"] = "../../secret.jpg"
    elif change == "shape":
        entries[0]["joints"] = entries[0]["joints"][:20]
    elif change == "empty":
        entries = []
    elif change == "text":
        entries = ["a"]
    else:
        del entries[0]["joints"]
    write(root, entries)
    with pytest.raises(EvalDataError, match=r"cow\.json: not an annotation"):
        BadjaVideos(root)


def test_missing_files_are_named(root: Path, tmp_path: Path) -> None:
    videos = BadjaVideos(root)
    mask = videos.frame_files()[3]
    mask.write_bytes(b"no picture")
    with pytest.raises(EvalDataError, match="not a mask"):
        videos.video("cow").mask_px()
    mask.unlink()
    with pytest.raises(EvalDataError, match="1 files of cow"):
        videos.video("cow")
    write(root, [annotation(0, ())])
    with pytest.raises(EvalDataError, match="no joint is seen"):
        BadjaVideos(root).video("cow")
    with pytest.raises(EvalDataError, match="joint_annotations"):
        BadjaVideos(tmp_path / "none")

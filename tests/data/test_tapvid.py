"""TAP-Vid's pickles are read as they are defined; damaged ones are named."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from equifeat.data.tapvid import TapVideos
from equifeat.data.tracked_video import first_queries, strided_queries
from equifeat.errors import EvalDataError

POINTS = np.array([[[0.5, 0.25], [0.75, 0.5]], [[0.0, 0.0], [1.0, 1.0]]], np.float32)
OCCLUDED = np.array([[False, False], [True, False]])


def entry(frames: Any = None) -> dict[str, Any]:
    video = np.zeros((2, 8, 16, 3), np.uint8) if frames is None else frames
    return {"video": video, "points": POINTS, "occluded": OCCLUDED}


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content))
    return file


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_davis_points_are_fractions_from_corner_to_corner(tmp_path: Path) -> None:
    entry_ = entry()
    entry_["video"][1, 3, 5] = (255, 0, 51)
    # archives unpack into a folder
    write(tmp_path / "tapvid_davis/tapvid_davis.pkl", {"goat": entry_, "cow": entry()})
    videos = TapVideos(tmp_path, "davis", "first")
    assert videos.names == ("goat", "cow")
    video = videos.video("goat")
    assert video.size_hw == (8, 16)
    assert len(video) == 2
    assert video.read(1)[:, 3, 5].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert video.queries.frame.tolist() == [0, 1]
    assert video.queries.xy.tolist() == [[8, 2], [16, 8]]
    assert video.queries.xyt[1].tolist() == [16, 8, 1]
    assert videos.frame_files() == []


def test_kinetics_is_jpeg_and_half_a_pixel_off(tmp_path: Path) -> None:
    files = [jpeg(10), jpeg(200)]
    content = [entry(np.array(files)), entry(files)]
    write(tmp_path / "0000_of_0010.pkl", content)
    write(tmp_path / "0001_of_0010.pkl", content[:1])
    videos = TapVideos(tmp_path, "kinetics")
    assert videos.names == ("0000_of_0010-0000", "0000_of_0010-0001", "0001_of_0010-0000")
    for name in videos.names:
        video = videos.video(name)
        assert video.size_hw == (8, 16)
        assert float(video.read(1)[0].mean()) == pytest.approx(200 / 255, abs=0.02)
        # generate_tapvid.py writes (x - 0.5) / width
        assert video.queries.xy.tolist() == [[8.5, 2.5]]


def test_rgb_stacking_is_a_list(tmp_path: Path) -> None:
    write(tmp_path / "tapvid_rgb_stacking.pkl", [entry()] * 2)
    assert TapVideos(tmp_path, "rgb-stacking").names == ("video-0000", "video-0001")


def strided(points: Any = None, occluded: Any = None) -> dict[str, Any]:
    return {
        "videos": [
            {
                "video_idx": 7,
                "h": 4,
                "w": 8,
                "query_points": {0: [[4.0, 1.0]], 1: [[6.0, 2.0], [8.0, 4.0]]},
                "target_points": {
                    0: POINTS[:1] * (8, 4) if points is None else points,
                    1: POINTS * (8, 4),
                },
                "occluded": {0: OCCLUDED[:1] if occluded is None else occluded, 1: OCCLUDED},
            }
        ]
    }


@pytest.mark.parametrize("folder", ["tapvid-davis/7", "davis_480/7", "7"])
def test_strided_points_are_pixels_of_the_size_it_names(tmp_path: Path, folder: str) -> None:
    write(tmp_path / "tapvid_davis_data_strided.pkl", strided())
    for t in range(2):
        path = tmp_path / folder / f"video/{t:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(100 * t))
    videos = TapVideos(tmp_path, "strided")
    video = videos.video("7")
    # the frames are twice as large
    assert video.queries.xy.tolist() == [[8, 2], [12, 4], [16, 8]]
    assert video.queries.frame.tolist() == [0, 1, 1]
    assert video.queries.tracks.shape == (3, 2, 2)
    assert video.queries.occluded.tolist() == [[False, False], [False, False], [True, False]]
    assert len(videos.frame_files()) == 2
    assert float(video.read(1)[0].mean()) == pytest.approx(100 / 255, abs=0.02)


def test_queries_are_drawn_as_tapnet_does() -> None:
    generator = torch.Generator().manual_seed(0)
    tracks = torch.rand(5, 11, 2, generator=generator)
    hidden = torch.rand(5, 11, generator=generator) < 0.5
    hidden[3] = True
    drawn = strided_queries(tracks, hidden, 5)
    expected = [(t, p) for t in (0, 5, 10) for p in range(5) if not hidden[p, t]]
    assert drawn.frame.tolist() == [t for t, _ in expected]
    for k, (t, p) in enumerate(expected):
        assert drawn.xy[k].equal(tracks[p, t])
        assert drawn.tracks[k].equal(tracks[p])
        assert drawn.occluded[k].equal(hidden[p])
    first = first_queries(tracks, hidden)
    kept = [p for p in range(5) if not hidden[p].all()]
    assert 3 not in kept
    assert first.frame.tolist() == [hidden[p].tolist().index(False) for p in kept]


BAD: dict[str, Any] = {
    "a number": 3,
    "no points": {"goat": {"video": np.zeros((2, 8, 16, 3), np.uint8)}},
    "grey frames": {"goat": entry(np.zeros((2, 8, 16), np.uint8))},
    "fewer frames than points": {"goat": entry(np.zeros((1, 8, 16, 3), np.uint8))},
    "no JPEG": {"goat": entry([b"abc", b"def"])},
    "text for frames": {"goat": entry(["abc", "def"])},
    "a seen point nowhere": {"goat": entry() | {"points": POINTS * np.nan}},
    "points of another shape": {"goat": entry() | {"points": POINTS[0]}},
    "occluded of another shape": {"goat": entry() | {"occluded": OCCLUDED[:1]}},
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_entries_are_named(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "tapvid_davis.pkl", BAD[name])
    with pytest.raises(EvalDataError, match=str(file)):
        TapVideos(tmp_path, "davis").video("goat")


def test_damaged_strided_pickles_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a_strided.pkl", strided())
    with pytest.raises(EvalDataError, match="video 7 has no frames"):
        TapVideos(tmp_path, "strided").video("7")
    with pytest.raises(EvalDataError, match="strided queries"):
        TapVideos(tmp_path, "strided", "first")
    for t in range(2):
        path = tmp_path / f"7/video/{t:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(0))
    write(file, strided(points=POINTS))
    with pytest.raises(EvalDataError, match="format of strided"):
        TapVideos(tmp_path, "strided").video("7")
    write(file, {"videos": [{"video_idx": "../7"}]})
    with pytest.raises(EvalDataError, match="video_idx"):
        TapVideos(tmp_path, "strided")


def test_missing_pickles_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvalDataError, match="holds no tapvid_davis"):
        TapVideos(tmp_path, "davis")

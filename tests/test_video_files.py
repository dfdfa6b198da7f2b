"""Against videos written here, whose frames tell their own numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from equifeat.errors import ImageError, MissingExtraError
from equifeat.video_files import VideoFrames

TIMES = [k / 10 for k in range(12)]
UNEVEN = [0.0, 0.1, 0.5, 0.6, 1.7, 1.8]
H, W = 48, 64


def frame(index: int) -> NDArray[np.uint8]:
    """A bright top left quarter, and blue that counts."""
    pixels = np.full((H, W, 3), 40, np.uint8)
    pixels[: H // 2, : W // 2] = 200
    pixels[..., 2] = 20 * index
    return pixels


def write(
    path: Path,
    times: Sequence[float] = tuple(TIMES),
    codec: str = "mpeg4",
    rotation: int | None = None,
    flip: bool = False,
    first_s: float = 0.0,
) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = (
            W,
            H,
            "yuvj420p" if codec == "mjpeg" else "yuv420p",
        )
        # An AVI's rate is its clock.
        clock = Fraction(1, 10 if path.suffix == ".avi" else 1000)
        stream.codec_context.time_base = clock
        stream.codec_context.gop_size = 5
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=flip)
        for index, time_s in enumerate(times):
            new = av.VideoFrame.from_ndarray(frame(index), format="rgb24")
            new.pts, new.time_base = round((first_s + time_s) / clock), clock
            container.mux(stream.encode(new))
        container.mux(stream.encode())
    return path


def number(image: NDArray[np.uint8]) -> int:
    return round(float(image[..., 2].mean()) / 20)


@pytest.mark.parametrize(
    ("name", "codec", "times"),
    [
        ("a.mp4", "mpeg4", TIMES),
        ("a.mp4", "libx264", TIMES),  # with frames that refer to later ones
        ("a.mkv", "libx264", UNEVEN),
        ("a.avi", "mpeg4", TIMES),
        ("a.mov", "mjpeg", TIMES),
    ],
)
def test_every_frame_comes_once_at_its_time(
    tmp_path: Path, name: str, codec: str, times: list[float]
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    video = VideoFrames(write(tmp_path / name, times, codec))
    assert video.size_hw == (H, W)
    for _ in range(2):  # a second time from the start
        found = list(video)
        assert [f.time_s for f in found] == pytest.approx(times, abs=2e-3)
        assert [number(f.image) for f in found] == list(range(len(times)))
        assert {(f.image.shape, f.image.dtype) for f in found} == {((H, W, 3), np.dtype("u1"))}
    assert abs(int(found[3].image[2, 2, 0]) - 200) < 8
    assert abs(int(found[3].image[-3, -3, 0]) - 40) < 8
    assert video.average_fps == pytest.approx(10)
    assert video.duration_s == pytest.approx(times[-1] + 0.1, abs=0.15)


def test_time_counts_from_the_first_frame(tmp_path: Path) -> None:
    video = VideoFrames(write(tmp_path / "a.mkv", first_s=3.0), start=0.5, stop=0.8)
    assert [number(f.image) for f in video] == [5, 6, 7]
    assert [f.time_s for f in video] == pytest.approx([0.5, 0.6, 0.7])


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"start": 0.35}, [4, 5, 6, 7, 8, 9, 10, 11]),
        ({"stop": 0.3}, [0, 1, 2]),
        ({"start": 0.7, "stop": 1.0}, [7, 8, 9]),
        ({"step": 5}, [0, 5, 10]),
        ({"start": 0.2, "step": 4}, [2, 6, 10]),
        ({"fps": 5}, [0, 2, 4, 6, 8, 10]),
        ({"fps": 4}, [0, 3, 5, 8, 10]),
        ({"fps": 100}, list(range(12))),
        ({"start": 0.1, "fps": 2}, [1, 6, 11]),
        ({"start": 5.0}, []),
    ],
)
def test_parts_of_a_video(tmp_path: Path, options: dict[str, Any], numbers: list[int]) -> None:
    path = write(tmp_path / "a.mp4")
    found = list(VideoFrames(path, **options))
    assert [number(f.image) for f in found] == numbers
    assert [f.time_s for f in found] == pytest.approx([k / 10 for k in numbers])


def test_fps_of_uneven_frames_repeats_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", UNEVEN)
    assert [number(f.image) for f in VideoFrames(path, fps=2)] == [0, 2, 4]
    assert [number(f.image) for f in VideoFrames(path, fps=1)] == [0, 4]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_frame_at_a_time(tmp_path: Path, name: str) -> None:
    video = VideoFrames(write(tmp_path / name, codec="libx264"), start=0.9, step=7)
    for time_s, expected in ((0.0, 0), (0.55, 5), (0.6, 6), (-3.0, 0), (60.0, 11)):
        found = video.at(time_s)
        assert number(found.image) == expected
        assert found.time_s == pytest.approx(expected / 10)


def test_a_bare_stream_has_no_clock_but_a_rate(tmp_path: Path) -> None:
    video = VideoFrames(write(tmp_path / "bare.h264", codec="libx264"), start=3 / 25)
    assert video.average_fps == 25  # FFmpeg's own guess
    assert [number(f.image) for f in video] == list(range(3, 12))
    assert [f.time_s for f in video] == pytest.approx([k / 25 for k in range(3, 12)])
    assert number(video.at(0.25).image) == 6


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_frames_are_turned_upright(tmp_path: Path, turn: int, flip: bool) -> None:
    """As numpy turns the frame that was written: counterclockwise, then mirrored."""
    video = VideoFrames(write(tmp_path / "a.mp4", TIMES[:2], rotation=turn, flip=flip))
    expected = np.rot90(frame(0), turn // 90)
    expected = expected[:, ::-1] if flip else expected
    for found in (next(iter(video)), video.at(0.0)):
        assert found.image.shape == expected.shape == (*video.size_hw, 3)
        assert np.abs(found.image.astype(int) - expected).mean() < 6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"step": 2, "fps": 5}, "give one of them"),
        ({"step": 0}, "step must be 1 or more frames, not 0"),
        ({"fps": 0}, "fps must be above 0"),
        ({"start": -1}, "start must be 0 s or later, not -1"),
        ({"start": 2, "stop": 2}, "stop=2 s must lie after start=2 s"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        VideoFrames(tmp_path / "a.mp4", **options)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "cut", "playlist", "sound", "huge"])
def test_files_that_cannot_be_used(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, good = tmp_path / "bad.mp4", write(tmp_path / "good.mp4")
    reason = "not a video that FFmpeg can read, or damaged"
    if kind == "missing":
        reason = "no such video file; check the path"
    elif kind == "text":
        path.write_text("no video " * 200)
    elif kind == "empty":
        path.touch()
    elif kind == "cut":
        path.write_bytes(good.read_bytes()[:-300])
    elif kind == "playlist":  # FFmpeg would open the files that it names
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{good}\n")
    elif kind == "sound":
        reason = "a file without video"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.sample_rate = 44100
            container.mux([*stream.encode(sound), *stream.encode()])
    else:
        good.rename(path)
        monkeypatch.setattr("equifeat.video_files._MAX_PIXELS", 1000)
        reason = "frames of 64x48 px are more than 1000 pixels"
    with pytest.raises(ImageError, match=rf"bad\.mp4: {reason}") as caught:
        VideoFrames(path)
    assert "\n" not in str(caught.value)


def test_damage_is_found_where_it_is(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.mp4").read_bytes())
    third = bytes.fromhex("000001b6")  # the start of an mpeg4 frame
    at = -1
    for _ in range(8):
        at = data.index(third, at + 1)
    data[at : at + 40] = bytes(40)
    (tmp_path / "bad.mp4").write_bytes(data)
    seen: list[int] = []
    frames = iter(VideoFrames(tmp_path / "bad.mp4"))
    with pytest.raises(ImageError, match=r"bad\.mp4: .*damaged after 0\.[0-9]{3} s"):
        seen.extend(number(found.image) for found in frames)
    assert seen == list(range(len(seen)))
    assert 3 <= len(seen) <= 7


def test_a_frame_larger_than_the_container_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder itself refuses before it makes room for the frame."""
    path = write(tmp_path / "a.mp4")
    video = VideoFrames(path)
    monkeypatch.setattr("equifeat.video_files._MAX_PIXELS", 1000)
    monkeypatch.setattr(VideoFrames, "_check_size", lambda *_: None)
    with pytest.raises(ImageError, match=r"a\.mp4: not a video that FFmpeg can read"):
        list(video)


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r'pip install "equifeat\[video\]"'):
        VideoFrames(tmp_path / "a.mp4")

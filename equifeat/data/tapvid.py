"""TAP-Vid's pickles, and the "strided" pickle of DINO-Tracker that published evaluations read.

Official (github.com/google-deepmind/tapnet, tapvid): DAVIS is a dict {name: {video (T, H, W, 3)
uint8, points (P, T, 2), occluded (P, T)}}, RGB-Stacking a list of such, Kinetics shards
0000_of_0010.pkl of lists whose videos are JPEG files. Points are fractions of width and height.

Convention: tapnet only ever multiplies points by a size, so the fraction 0 is the image's corner:
x = fraction · W is the project's own pixel. Its script for Kinetics subtracts half a pixel before
it divides, so that half is added again here.

Strided (github.com/AssafSinger94/dino-tracker): {videos: [{video_idx, h, w, query_points: {frame:
(n, 2)}, target_points: {frame: (n, T, 2)}, occluded: {frame: (n, T)}}]}, in pixels of an h × w
video, and frames as files video_idx/video/00000.jpg.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from equifeat.data.safe_pickle import load_safely
from equifeat.data.tracked_video import (
    Queries,
    QueryMode,
    TrackedVideo,
    first_queries,
    strided_queries,
)
from equifeat.errors import EvalDataError
from equifeat.geometry.pixels import from_integer_centers, scale_xy
from equifeat.image_files import read_image

TapLayout = Literal["davis", "rgb-stacking", "kinetics", "strided"]
PATTERNS: dict[str, str] = {
    "davis": "tapvid_davis.pkl",
    "rgb-stacking": "tapvid_rgb_stacking.pkl",
    "kinetics": "*_of_*.pkl",
    "strided": "*_strided.pkl",
}
_MAX_PIXELS = 50_000_000


class _Place(NamedTuple):
    """Where a video is: a file, and a key or an index in it."""

    file: Path
    key: Any


class TapVideos:
    """The videos of a folder.

    Args:
        root: The folder.
        layout: Which of the formats.
        queries: How queries are drawn; a strided pickle brings its own.
        stride: Frames between queries of a point.

    Raises:
        EvalDataError: There is no such pickle, or it is damaged.
    """

    def __init__(
        self, root: Path, layout: TapLayout, queries: QueryMode = "strided", stride: int = 5
    ) -> None:
        self.root, self.layout, self.queries, self.stride = root, layout, queries, stride
        self.files = find_pickles(root, layout)
        if not self.files:
            raise EvalDataError(f"{root} holds no {PATTERNS[layout]}.")
        if layout == "strided" and (len(self.files) > 1 or queries != "strided"):
            raise EvalDataError(
                f"{root} holds {len(self.files)} strided pickles and {queries} queries are asked "
                "for: keep one file, and use strided queries."
            )
        self._held: tuple[Path, Any] | None = None
        self._places: dict[str, _Place] = {}
        for file in self.files:
            self._places.update(self._names(file))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the videos, in order."""
        return tuple(self._places)

    def frame_files(self) -> list[Path]:
        """Return the frames that are files of their own.

        Returns:
            Those of a strided pickle; empty for the others.
        """
        if self.layout != "strided":
            return []
        return [f for place in self._places.values() for f in self._frames(place)]

    def video(self, name: str) -> TrackedVideo:
        """Read one video; the pickle it is in stays in memory until another one is asked for.

        Args:
            name: One of `names`.

        Returns:
            The video.

        Raises:
            EvalDataError: Its entry is not in the format.
        """
        place = self._places[name]
        entry = self._load(place.file)
        entry = entry["videos"][place.key] if self.layout == "strided" else entry[place.key]
        try:
            if self.layout == "strided":
                return self._strided(name, place, entry)
            return self._official(name, entry)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EvalDataError(
                f"{place.file}: video {name} is not in the format of {self.layout} "
                f"({type(error).__name__}: {error}); get the official file."
            ) from error

    def _load(self, file: Path) -> Any:
        if self._held is None or self._held[0] != file:
            self._held = None
            self._held = (file, load_safely(file))
        return self._held[1]

    def _names(self, file: Path) -> dict[str, _Place]:
        content = self._load(file)
        if self.layout == "strided":
            videos = content.get("videos") if isinstance(content, dict) else None
            if not isinstance(videos, list) or not all(
                isinstance(v, dict) and isinstance(v.get("video_idx"), int) for v in videos
            ):
                raise EvalDataError(f"{file}: not {{videos: [{{video_idx, …}}]}}; get it again.")
            return {str(v["video_idx"]): _Place(file, i) for i, v in enumerate(videos)}
        if isinstance(content, dict):
            return {str(key): _Place(file, key) for key in content}
        if isinstance(content, list):
            stem = file.stem if self.layout == "kinetics" else "video"
            return {f"{stem}-{i:04d}": _Place(file, i) for i in range(len(content))}
        raise EvalDataError(f"{file}: neither a dict nor a list of videos; get it again.")

    def _official(self, name: str, entry: Mapping[str, Any]) -> TrackedVideo:
        frames = entry["video"]
        read, size_hw = _reader(frames)
        points = torch.from_numpy(np.array(entry["points"], np.float64))
        occluded = torch.from_numpy(np.array(entry["occluded"]).astype(bool))
        _check_tracks(points, occluded, len(frames))
        tracks = points * points.new_tensor([size_hw[1], size_hw[0]])
        if self.layout == "kinetics":
            tracks = from_integer_centers(tracks)
        drawn = (
            strided_queries(tracks, occluded, self.stride)
            if self.queries == "strided"
            else first_queries(tracks, occluded)
        )
        return TrackedVideo(name, size_hw, read, drawn)

    def _strided(self, name: str, place: _Place, entry: Mapping[str, Any]) -> TrackedVideo:
        files = self._frames(place)
        if not files:
            raise EvalDataError(
                f"{self.root}: video {name} has no frames; put them into {name}/video/00000.jpg, …"
            )
        with Image.open(files[0]) as first:
            size_hw = (first.height, first.width)
        parts = []
        for frame in sorted(entry["query_points"]):
            xy = torch.from_numpy(np.array(entry["query_points"][frame], np.float64))
            tracks = torch.from_numpy(np.array(entry["target_points"][frame], np.float64))
            hidden = torch.from_numpy(np.array(entry["occluded"][frame]).astype(bool))
            xy = xy.reshape(-1, 2)
            _check_tracks(tracks, hidden, len(files), len(xy))
            if not 0 <= int(frame) < tracks.shape[1]:
                raise ValueError(f"a query in frame {frame} of {tracks.shape[1]}")
            at = torch.full((len(xy),), int(frame))
            from_hw = (entry["h"], entry["w"])
            xy, tracks = scale_xy(xy, from_hw, size_hw), scale_xy(tracks, from_hw, size_hw)
            parts.append(Queries(at, xy, tracks, hidden))
        queries = Queries(*map(torch.cat, zip(*parts, strict=True)))
        return TrackedVideo(name, size_hw, lambda t: read_image(files[t]), queries)

    def _frames(self, place: _Place) -> list[Path]:
        index = str(self._load(place.file)["videos"][place.key]["video_idx"])
        for folder in ("tapvid-davis", "davis_480", "."):
            video = self.root / folder / index / "video"
            if video.is_dir():
                return sorted(p for p in video.iterdir() if p.suffix in (".jpg", ".png"))
        return []


def find_pickles(root: Path, layout: TapLayout) -> list[Path]:
    """Find the pickles of a layout.

    Args:
        root: The data folder; files may also lie one folder below, as archives unpack.
        layout: Which of the formats.

    Returns:
        The files, sorted.
    """
    found = sorted(root.glob(PATTERNS[layout]))
    return found or sorted(root.glob(f"*/{PATTERNS[layout]}"))


def _reader(frames: Any) -> tuple[Callable[[int], Tensor], tuple[int, int]]:
    """Return what reads a frame, and the frames' size."""
    if isinstance(frames, np.ndarray) and frames.dtype == np.uint8:
        if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise ValueError(f"a video of shape {frames.shape}, not (T, H, W, 3)")
        height, width = int(frames.shape[1]), int(frames.shape[2])
        return lambda t: _to_tensor(frames[t]), (height, width)
    # NumPy keeps a list of JPEG files as fixed-width bytes.
    encoded: Sequence[bytes] = frames
    first = _decode(encoded[0])
    return lambda t: _to_tensor(_decode(encoded[t])), (first.shape[0], first.shape[1])


def _decode(data: bytes) -> NDArray[Any]:
    if not isinstance(data, bytes):
        raise TypeError(f"a frame of type {type(data).__name__}, not JPEG")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"a frame of {image.width}x{image.height} pixels")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a damaged frame: {error}") from error


def _to_tensor(pixels: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float().div_(255.0)


def _check_tracks(tracks: Tensor, occluded: Tensor, frames: int, points: int | None = None) -> None:
    """Shapes must agree; where a point is hidden, its place may be anything."""
    if tracks.ndim != 3 or tracks.shape[2] != 2 or occluded.shape != tracks.shape[:2]:
        raise ValueError(
            f"points of shape {tuple(tracks.shape)} with occluded of {tuple(occluded.shape)}"
        )
    if not 0 < tracks.shape[1] <= frames or (points is not None and points != tracks.shape[0]):
        raise ValueError(
            f"points of shape {tuple(tracks.shape)} for {frames} frames and {points} queries"
        )
    if not tracks[~occluded].isfinite().all():
        raise ValueError("a visible point without a place")

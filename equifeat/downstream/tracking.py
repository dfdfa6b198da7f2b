"""Track points through a video, long ones too: features that do not fit wait in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equifeat.downstream.posed_views import checked_image
from equifeat.draw import sheet, to_bytes
from equifeat.errors import ImageError, KeypointError, RecipeError
from equifeat.eval.features import Dense, FeatureSource
from equifeat.eval.protocol import FeatureSpec
from equifeat.eval.tracker import TrackerOptions
from equifeat.eval.tracker import track as track_in_maps
from equifeat.eval.tracking_picture import draw_points
from equifeat.eval.tracking_protocols import REFERENCE_WIDTH
from equifeat.geometry.pixels import SizeHW, inside, resize, scale_xy
from equifeat.model.feature_map import FeatureMap
from equifeat.model.inputs import OneImage
from equifeat.video_files import Frame, VideoFrames

Video = Tensor | Iterable[OneImage | Frame] | str | Path
_CELL_WIDTH, _MOST_SHOWN = 240, 40
_TRACKER = TrackerOptions(temperature=0.05)


@dataclass(frozen=True)
class TrackOptions:
    """How frames are looked at, and how points are found in them.

    Args:
        resolution: Patches on the longer side of a frame; None for its own size.
        overlap: Patches start every patch_size / overlap pixels; 1 is several times faster.
        tracker: Temperature, thresholds and so on. Its radius is in pixels of a video whose longer
            side is 854, and scaled to yours.
        memory_mb: Memory for the features of all frames, and as much again for matching. Features
            that need more wait in a temporary file.
        folder: Where that file is made; the system's folder for such files when None.
    """

    resolution: int | None = None
    overlap: int = 2
    tracker: TrackerOptions = _TRACKER
    memory_mb: int = 1024
    folder: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.memory_mb < 1 or self.overlap < 1:
            raise RecipeError(
                f"memory_mb={self.memory_mb} and overlap={self.overlap} must be at least 1."
            )


class TrackedPoints(NamedTuple):
    """Where points are in every frame.

    Attributes:
        tracks: (N, T, 2) xy in pixels of the video, also where a point is hidden (a guess then).
        visible: (N, T) whether the point is seen.
        similarity: (N, T) cosine with the point in its query's frame.
    """

    tracks: Tensor
    visible: Tensor
    similarity: Tensor


@torch.no_grad()
def track(
    model: Dense, frames: Video, queries_xyt: Tensor, options: TrackOptions | None = None
) -> TrackedPoints:
    """Track points through a video.

    Every frame is matched alone, see `equifeat.eval.tracker`; no query depends on another one.

    Args:
        model: Anything with ``dense(images, resolution)``, such as `equifeat.load` gives.
        frames: A (T, 3, H, W) tensor, anything that gives images of one size when iterated
            (tensors, arrays, PIL images, files, `equifeat.VideoFrames`), or a video file.
        queries_xyt: (N, 3) x and y in pixels (the first centre is 0.5) and the frame, from 0.
        options: How.

    Returns:
        Tracks on the CPU.

    Raises:
        ImageError: A frame is no image or of another size, or there is none.
        KeypointError: A query lies outside the image or the video.
    """
    options = options or TrackOptions()
    queries = torch.as_tensor(queries_xyt).detach().cpu().float()
    if queries.ndim != 2 or queries.shape[1] != 3:
        raise KeypointError(
            f"queries must have the shape (N, 3), x, y and frame, not {tuple(queries.shape)}."
        )
    source = FeatureSource(model, FeatureSpec(options.resolution, overlap=options.overlap))
    with tempfile.TemporaryDirectory(prefix="equifeat-track-", dir=options.folder) as folder:
        store = _Features(Path(folder) / "features", options.memory_mb * 2**20)
        size_hw: SizeHW | None = None
        last: FeatureMap | None = None
        for t, frame in enumerate(_frames(frames)):
            image = checked_image(frame, f"frame {t}")
            size = (int(image.shape[-2]), int(image.shape[-1]))
            if size_hw is None:
                size_hw = size
                _check_inside(queries, size)
            if size != size_hw:
                raise ImageError(f"frame {t} has the size {size}, the first one {size_hw}.")
            last = source(image)
            store.add(last.features[0])
        if last is None or size_hw is None:
            raise ImageError("the video has no frame: give at least one.")
        _check_frames(queries, store.count)
        maps = replace(last, features=store.all())
        radius = options.tracker.radius * max(size_hw) / REFERENCE_WIDTH
        found = track_in_maps(
            maps,
            queries,
            replace(options.tracker, radius=radius),
            options.memory_mb,
            last.features.device,
        )
        # the file may only go when nothing looks into it any more
        del maps, store
    return TrackedPoints(found.xy, ~found.occluded, found.similarity)


def draw_tracks(
    frames: Sequence[Tensor] | Tensor,
    found: TrackedPoints,
    shown: Sequence[int],
    title: str = "Tracked points",
) -> Image.Image:
    """Draw tracked points into some frames, each point in a colour of its own.

    Args:
        frames: (3, H, W) frames, RGB in [0, 1].
        found: What `track` gave.
        shown: Which frames.
        title: Heading.

    Returns:
        The frames side by side; filled points are seen, hollow ones hidden.
    """
    count = len(found.tracks)
    some = torch.linspace(0, count - 1, min(count, _MOST_SHOWN)).round().long()
    cells = []
    for t in shown:
        frame = frames[t].detach().float().cpu()
        size_hw = (int(frame.shape[-2]), int(frame.shape[-1]))
        small = (max(1, round(size_hw[0] * _CELL_WIDTH / size_hw[1])), _CELL_WIDTH)
        xy = scale_xy(found.tracks[some, t].double(), size_hw, small)
        photo = to_bytes(resize(frame[None], small)[0].permute(1, 2, 0))
        unknown = torch.zeros(len(some), dtype=torch.bool)
        cells.append(draw_points(photo, xy, ~found.visible[some, t], xy, unknown))
    footer = f"{len(some)} of {count} points. Filled: seen; hollow: taken for hidden."
    return sheet(title, [f"frame {t}" for t in shown], [""], [cells], [[""] * len(cells)], footer)


class _Features:
    """Half-precision features of frames, in memory or, beyond a budget, in a file.

    Args:
        file: Made when needed.
        budget: Bytes kept in memory.
    """

    def __init__(self, file: Path, budget: int) -> None:
        self.file, self.budget = file, budget
        self.count = 0
        self._kept: list[Tensor] = []
        self._shape: tuple[int, ...] = ()

    def add(self, features: Tensor) -> None:
        """Append the (D, h, w) features of a frame."""
        # on a GPU they stay there while they fit
        half = features.half().contiguous()
        self.count += 1
        self._shape = tuple(half.shape)
        self._kept.append(half)
        # joining them takes their size once more
        if 2 * len(self._kept) * half.numel() * half.element_size() > self.budget:
            with self.file.open("ab") as out:
                for one in self._kept:
                    out.write(one.cpu().numpy().tobytes())
            self._kept.clear()

    def all(self) -> Tensor:
        """Return (T, D, h, w) features; those of a file are read when looked at."""
        if not self.file.exists():
            return torch.stack(self._kept)
        with self.file.open("ab") as out:
            for one in self._kept:
                out.write(one.cpu().numpy().tobytes())
        self._kept.clear()
        values = int(np.prod((self.count, *self._shape)))
        flat = torch.from_file(str(self.file), size=values, dtype=torch.float16)
        return flat.view(self.count, *self._shape)


def _frames(frames: Video) -> Iterator[OneImage]:
    items = VideoFrames(frames) if isinstance(frames, str | Path) else frames
    for item in items:
        yield item.image if isinstance(item, Frame) else item


def _check_inside(queries: Tensor, size_hw: SizeHW) -> None:
    outside = (~inside(queries[:, :2], size_hw)).nonzero()
    if len(outside):
        x, y, _ = queries[outside[0, 0]].tolist()
        raise KeypointError(
            f"query {int(outside[0, 0])} at ({x:g}, {y:g}) lies outside frames of width "
            f"{size_hw[1]} and height {size_hw[0]}."
        )


def _check_frames(queries: Tensor, count: int) -> None:
    t = queries[:, 2]
    wrong = ((t < 0) | (t >= count) | (t != t.round())).nonzero()
    if len(wrong):
        raise KeypointError(
            f"query {int(wrong[0, 0])} asks for frame {float(t[wrong[0, 0]]):g}, but the video has "
            f"the frames 0 to {count - 1}."
        )

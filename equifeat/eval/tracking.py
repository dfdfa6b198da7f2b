"""Video tracking as a task of the harness: videos are items."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equifeat.data.badja import BadjaVideos
from equifeat.data.tapvid import TapVideos
from equifeat.data.tracked_video import TrackedVideo
from equifeat.draw import to_bytes
from equifeat.errors import EvalDataError
from equifeat.eval.data_hash import check_sums, data_hash
from equifeat.eval.features import FeatureSource
from equifeat.eval.protocol import Protocol
from equifeat.eval.task import Check, Prediction, Row, Task, TaskData
from equifeat.eval.tracker import track
from equifeat.eval.tracking_picture import track_picture
from equifeat.eval.tracking_protocols import (
    OFFICIAL,
    PROTOCOLS,
    REFERENCE_WIDTH,
    WHERE,
    TrackingOptions,
)
from equifeat.geometry.pixels import SizeHW, scale_xy
from equifeat.metrics.badja import joint_accuracy
from equifeat.metrics.tapvid import tapvid_metrics
from equifeat.model.feature_map import FeatureMap


class TrackingData(TaskData):
    """Videos with queries, under a protocol."""

    def __init__(self, root: Path, protocol: Protocol) -> None:
        self.options: TrackingOptions = protocol.options
        options = self.options
        self.videos: TapVideos | BadjaVideos
        try:
            if options.layout == "badja":
                self.videos = BadjaVideos(root)
            else:
                self.videos = TapVideos(root, options.layout, options.queries, options.query_stride)
        except EvalDataError as error:
            raise EvalDataError(f"{error} {WHERE[protocol.id.split('/')[0]]}") from error
        digest = data_hash(root, self.videos.files, self.videos.frame_files())
        super().__init__(root, protocol, self.videos.names, digest)

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Return tracks in pixels of the video; see TaskData."""
        video = self._video(index)
        size_hw = self.options.frame_hw if all(self.options.frame_hw) else video.size_hw
        maps = self._features(video, size_hw, source)
        queries = video.queries.xyt.clone()
        queries[:, :2] = scale_xy(queries[:, :2], video.size_hw, size_hw)
        radius = self.options.radius * max(size_hw) / REFERENCE_WIDTH
        tracks = track(maps, queries, replace(self.options, radius=radius))
        return {
            "tracks": scale_xy(tracks.xy, size_hw, video.size_hw),
            "occluded": tracks.occluded,
            "similarity": tracks.similarity,
        }

    def _features(self, video: TrackedVideo, size_hw: SizeHW, source: FeatureSource) -> FeatureMap:
        """Return the features of all frames, as (T, D, h, w)."""
        first = source(_frame(video, 0, size_hw))
        shape, dtype = first.features.shape[1:], getattr(torch, self.options.keep)
        kept = first.features.new_empty((len(video), *shape), dtype=dtype)
        kept[0] = first.features[0]
        for t in range(1, len(video)):
            kept[t] = source(_frame(video, t, size_hw)).features[0]
        return replace(first, features=kept)

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Return one row a video; see TaskData."""
        name, video = self.items[index], self._video(index)
        truth, tracks = video.queries, prediction["tracks"]
        if isinstance(self.videos, BadjaVideos):
            joints = self.videos.video(name)
            accuracy = joint_accuracy(
                truth.tracks,
                joints.visible,
                tracks,
                joints.mask_px(),
                video.size_hw,
                self.options.height,
            )
            values = {"δ^seg": accuracy.seg, "δ^3px": accuracy.px3}
        else:
            values = tapvid_metrics(
                truth.frame,
                truth.tracks,
                truth.occluded,
                tracks,
                prediction["occluded"],
                self.options.queries,
                video.size_hw,
            )
        return [Row(name, name, values)]

    def picture(self, index: int, prediction: Prediction) -> Image.Image | None:
        """Draw a few frames with the queries of the first frame asked; see TaskData."""
        leading = self.protocol.metrics[0].name
        value = self.score(index, prediction)[0].values[leading]
        title = f"{self.items[index]}, {leading} {value:.1f} %"
        return track_picture(
            self._video(index), prediction["tracks"], prediction["occluded"], title
        )

    def caption(self) -> str:
        """See TaskData."""
        options = self.options
        if options.layout == "badja":
            return (
                f"{len(self.items)} videos; joints seen in the first annotated frame, scored where "
                "they are seen in the others: share within 0.2 of the square root of the mask's "
                f"area, and within 3 px at a height of {options.height} px; means over the joints "
                "of a video, then videos; intervals over videos."
            )
        which = {
            "strided": f"queries every {options.query_stride} frames, all other frames count",
            "first": "one query a point, where it is first seen; later frames count",
        }[options.queries]
        return (
            f"{len(self.items)} videos; {which}; distances in videos resized to 256 x 256; AJ and "
            "δ_avg are means over 1, 2, 4, 8, 16 px, OA counts hidden or seen; means over the "
            "points of a video, then videos; intervals over videos."
        )

    def _video(self, index: int) -> TrackedVideo:
        found = self.videos.video(self.items[index])
        return found if isinstance(found, TrackedVideo) else found.video


def _frame(video: TrackedVideo, t: int, size_hw: SizeHW) -> Tensor:
    """Return a frame; another size is made of bytes by Pillow's Lanczos, as the reference does."""
    frame = video.read(t)
    if frame.shape[-2:] != video.size_hw:
        raise EvalDataError(
            f"video {video.name}: frame {t} has the size {tuple(frame.shape[-2:])}, the first one "
            f"{video.size_hw}; get the video again."
        )
    if size_hw == video.size_hw:
        return frame
    image = Image.fromarray(to_bytes(frame.permute(1, 2, 0)))
    small = np.array(image.resize((size_hw[1], size_hw[0]), Image.Resampling.LANCZOS))
    return torch.from_numpy(small).permute(2, 0, 1).float().div_(255.0)


def open_tracking(root: Path, protocol: Protocol) -> TrackingData:
    """Open videos under a protocol.

    Args:
        root: The data folder.
        protocol: One of `TRACKING`'s.

    Returns:
        The data.

    Raises:
        EvalDataError: The folder does not hold the data.
    """
    return TrackingData(root, protocol)


def check_tracking(root: Path, protocol: Protocol) -> Check:
    """Read every video's annotations, count them, and compare hashes.

    Args:
        root: The data folder.
        protocol: One of `TRACKING`'s.

    Returns:
        What was found.
    """
    data = open_tracking(root, protocol)
    compared, problems = check_sums(root)
    frames = queries = 0
    for index, name in enumerate(data.items):
        try:
            video = data._video(index)
            frames, queries = frames + len(video), queries + len(video.queries.frame)
        except EvalDataError as error:
            problems.append(f"video {name}: {error}")
    notes = [] if compared else [f"no SHA256SUMS; data hash {data.data_hash}"]
    official = OFFICIAL.get(protocol.id.split("/")[0])
    if official is not None and len(data.items) != official:
        said = f"{len(data.items)} videos, the official set has {official}"
        # with a list of hashes the folder says itself what it should hold
        (notes if compared else problems).append(said)
    if isinstance(data.videos, BadjaVideos) and data.videos.missing:
        notes.append(f"without frames, left out: {', '.join(data.videos.missing)}")
    counts = {"videos": len(data.items), "frames": frames, "queries": queries}
    return Check({**counts, "files compared": compared}, problems, notes)


TRACKING = Task("tracking", PROTOCOLS, open_tracking, check_tracking, WHERE)

"""BADJA: joints of animals in videos (github.com/benjiebob/BADJA, arXiv 1811.05804).

joint_annotations/NAME.json is a list of annotated frames: {image_path, segmentation_path, joints
[[row, column], …], visibility}, with paths relative to the folder. Joints are whole numbers of
pixels, used as indices by BADJA's own viewer, so the first pixel's centre is (0, 0).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from equifeat.data.tracked_video import Queries, TrackedVideo
from equifeat.errors import EvalDataError
from equifeat.geometry.pixels import from_integer_centers
from equifeat.image_files import read_image

# The joints that are annotated (code/joint_catalog.py of BADJA), of the 37 that files list.
JOINTS = (8, 9, 10, 12, 13, 14, 15, 18, 19, 20, 22, 23, 24, 25, 28, 31, 32, 33, 35, 36)
_LISTED = 37
_MAX_JSON = 64 * 2**20
_MAX_PIXELS = 50_000_000


class JointVideo(NamedTuple):
    """The annotated frames of a video.

    Attributes:
        video: The frames; queries are the joints seen in the first one.
        visible: (N, T) where joints are annotated and seen.
        masks: T files with the animal's mask.
    """

    video: TrackedVideo
    visible: Bool[Tensor, "n t"]
    masks: tuple[Path, ...]

    def mask_px(self) -> Float[Tensor, "t"]:
        """Return how many pixels of each frame are animal.

        Returns:
            (T,) numbers, in pixels of the frames.

        Raises:
            EvalDataError: A mask cannot be read.
        """
        h, w = self.video.size_hw
        return torch.tensor([_area(path, h * w) for path in self.masks], dtype=torch.float64)


class BadjaVideos:
    """The videos of a folder whose frames are there.

    Args:
        root: The folder.

    Raises:
        EvalDataError: There are no annotations, or they are damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = sorted((root / "joint_annotations").glob("*.json"))
        if not self.files:
            raise EvalDataError(f"{root} holds no joint_annotations/*.json.")
        entries = {file.stem: self._read(file) for file in self.files}
        self.missing = tuple(name for name, e in entries.items() if not e[0][0].is_file())
        self._entries = {n: e for n, e in entries.items() if n not in self.missing}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the videos whose first frame is there, in order."""
        return tuple(self._entries)

    def frame_files(self) -> list[Path]:
        """Return all frames and masks."""
        return [p for entries in self._entries.values() for e in entries for p in e[:2]]

    def video(self, name: str) -> JointVideo:
        """Return one video.

        Args:
            name: One of `names`.

        Returns:
            Its annotated frames.

        Raises:
            EvalDataError: Frames are missing, or no joint is seen in the first one.
        """
        entries = self._entries[name]
        absent = [p for e in entries for p in e[:2] if not p.is_file()]
        if absent:
            raise EvalDataError(
                f"{absent[0]}: missing, {len(absent)} files of {name} in all; unpack the videos "
                "anew."
            )
        rows = torch.stack([e[2] for e in entries], dim=1)
        visible = torch.stack([e[3] for e in entries], dim=1)
        tracks, visible = rows[visible[:, 0]], visible[visible[:, 0]]
        if not len(tracks):
            raise EvalDataError(f"{name}: no joint is seen in its first frame.")
        with Image.open(entries[0][0]) as first:
            size_hw = (first.height, first.width)
        frame = torch.zeros(len(tracks), dtype=torch.int64)
        queries = Queries(frame, tracks[:, 0], tracks, ~visible)
        images = [e[0] for e in entries]
        video = TrackedVideo(name, size_hw, lambda t: read_image(images[t]), queries)
        return JointVideo(video, visible, tuple(e[1] for e in entries))

    def _read(self, file: Path) -> list[tuple[Path, Path, Tensor, Tensor]]:
        try:
            if file.stat().st_size > _MAX_JSON:
                raise ValueError(f"more than {_MAX_JSON} bytes")
            entries = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(entries, list) or not entries:
                raise ValueError("no list of frames")
            return [self._entry(entry) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EvalDataError(
                f"{file}: not an annotation of BADJA ({type(error).__name__}: {error}); get it "
                "again."
            ) from error

    def _entry(self, entry: dict[str, Any]) -> tuple[Path, Path, Tensor, Tensor]:
        joints = torch.tensor(entry["joints"], dtype=torch.float64)
        visible = torch.tensor(entry["visibility"], dtype=torch.bool)
        if joints.shape != (_LISTED, 2) or visible.shape != (_LISTED,):
            raise ValueError(f"joints of shape {tuple(joints.shape)}, not ({_LISTED}, 2)")
        chosen = torch.tensor(JOINTS)
        xy = from_integer_centers(joints[chosen].flip(-1))
        paths = []
        for key in ("image_path", "segmentation_path"):
            path = self.root / str(entry[key])
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise ValueError(f"{key} {entry[key]!r} leaves the folder")
            paths.append(path)
        return paths[0], paths[1], xy, visible[chosen]


def _area(path: Path, frame_px: int) -> float:
    """Count what is not 0; a mask of another size than its frame counts in the frame's pixels."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels")
            values = np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EvalDataError(f"{path}: not a mask ({error}); unpack it anew.") from error
    solid = values.any(axis=-1) if values.ndim == 3 else np.asarray(values > 0)
    return float(solid.sum()) * frame_px / solid.size

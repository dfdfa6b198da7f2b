"""Descriptors of the points of an object, from the frames that show it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equifeat.data.onepose import OnePoseFrame, OnePoseObject, read_matches
from equifeat.errors import EvalDataError
from equifeat.eval.features import FeatureSource
from equifeat.eval.onepose_protocols import OnePoseOptions
from equifeat.geometry.pixels import from_integer_centers
from equifeat.image_files import read_image
from equifeat.model.feature_map import FeatureMap
from equifeat.seeding import torch_generator


class TemplateBank(NamedTuple):
    """What query points are matched to.

    Attributes:
        descriptors: (N, D) unit descriptors on the model's device.
        points: (N, 3) float64 points on the CPU, metres, in the object's axes.
    """

    descriptors: Tensor
    points: Tensor


def chosen_frames(frames: Sequence[OnePoseFrame], count: int) -> list[OnePoseFrame]:
    """Return frames evenly spread over a sequence.

    Args:
        frames: All of them.
        count: How many; 0 for all.

    Returns:
        At most so many.
    """
    if not count or count >= len(frames):
        return list(frames)
    return [frames[i * len(frames) // count] for i in range(count)]


def features_of(image: Tensor, source: FeatureSource, cell: int) -> FeatureMap:
    """Return the feature map of a picture, one patch for so many of its pixels.

    Args:
        image: (3, H, W) RGB in [0, 1].
        source: The model; its own resolution goes before.
        cell: Pixels a patch stands for.

    Returns:
        The map.
    """
    if source.spec.resolution is not None:
        return source(image)
    return source(image, max(1, max(image.shape[-2:]) // cell))


def build_bank(
    thing: OnePoseObject, options: OnePoseOptions, seed: int, source: FeatureSource
) -> TemplateBank:
    """Describe the annotated points of an object's first sequence.

    Args:
        thing: The object.
        options: Of the protocol.
        seed: Of the draw, where there are too many.
        source: The model.

    Returns:
        One row for each observation of a point.

    Raises:
        EvalDataError: A file is damaged, or nothing is annotated.
    """
    cloud = thing.points()
    frames = chosen_frames(thing.templates(), options.templates)
    matches = [read_matches(frame, len(cloud)) for frame in frames]
    counts = [len(one.points) for one in matches]
    if not sum(counts):
        raise EvalDataError(
            f"{thing.sequence(1) / 'anno_loftr'}: no frame has a point of the reconstruction; run "
            "the reconstruction of OnePose++ again."
        )
    kept = torch.split(_drawn(sum(counts), options.descriptors, seed, thing.name), counts)
    descriptors, points = [], []
    for frame, one, keep in zip(frames, matches, kept, strict=True):
        if not keep.any():
            continue
        xy = one.keypoints[keep]
        if options.keypoint_pixels == "integer":
            xy = from_integer_centers(xy)
        features = features_of(read_image(frame.picture), source, options.cell)
        descriptors.append(features.sample(xy.float()[None].to(features.features.device))[0])
        points.append(cloud[one.points[keep]])
    return TemplateBank(torch.cat(descriptors), torch.cat(points))


def _drawn(total: int, most: int, seed: int, name: str) -> Tensor:
    """Which of all observations are kept."""
    keep = torch.ones(total, dtype=torch.bool)
    if total > most:
        # by name, so that an object's draw does not depend on which others are there
        generator = torch_generator(seed, 62, zlib.crc32(name.encode()))
        keep[torch.randperm(total, generator=generator)[most:]] = False
    return keep

"""Features of many images, one after the other: lists, folders, generators, videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equifeat.errors import ImageError, RecipeError
from equifeat.image_files import IMAGE_SUFFIXES, find_images
from equifeat.model.extractor import FeatureExtractor
from equifeat.model.inputs import ImageFeatures, ManyImages, gather, size_of, unit_floats
from equifeat.model.tiling import dense_tiled
from equifeat.video_files import VIDEO_SUFFIXES, Frame, VideoFrames


class _Item(NamedTuple):
    name: str
    pixels: Tensor
    time_s: float | None


def dense_many(
    extractor: FeatureExtractor,
    images: ManyImages,
    resolution: int | None = None,
    *,
    batch_size: int = 8,
    tile: int | None = None,
    tile_overlap: int | None = None,
    out_device: torch.device | str | None = None,
    overlap: int = 1,
    layers: Sequence[int] = (-1,),
    norm: bool = True,
) -> Iterator[ImageFeatures]:
    """Yield the features of many images, one after the other, without gradients.

    Args:
        extractor: The model.
        images: A file, folder, glob pattern or video, or anything that gives images, paths or
            videos when iterated; sizes may differ. Nothing is read before its turn.
        resolution: Patches on the longer side.
        batch_size: Neighbouring images of one size that run together.
        tile: Side of a window in patches, see `equifeat.model.tiling.dense_tiled`.
        tile_overlap: Patches that windows share; a quarter of tile when None.
        out_device: Where the maps go; they stay on the model's device when None.
        overlap: Patches start every patch_size / overlap pixels.
        layers: Blocks whose tokens are taken.
        norm: Apply the ViT's final norm.

    Yields:
        The features of each image, in the order of the images.

    Raises:
        ImageError: An image cannot be read or is none; those before it have been given.
        RecipeError: batch_size is below 1, or as for dense().
    """
    if batch_size < 1:
        raise RecipeError(f"batch_size must be at least 1, not {batch_size}")
    for items in _batches(_items(images), batch_size):
        batch = torch.cat([item.pixels for item in items])
        # Not around the yield: the caller's own gradients would be switched off with ours.
        with torch.no_grad():
            if tile is None:
                floats = unit_floats(batch, extractor.backbone.device)
                found = extractor.dense(
                    floats, resolution, overlap=overlap, layers=layers, norm=norm
                )
            else:
                found = dense_tiled(
                    extractor,
                    batch,
                    resolution,
                    tile=tile,
                    tile_overlap=tile_overlap,
                    out_device=out_device,
                    overlap=overlap,
                    layers=layers,
                    norm=norm,
                )
            features = found.features.to(out_device or found.features.device)
        for item, one in zip(items, torch.split(features, 1), strict=True):
            yield ImageFeatures(item.name, replace(found, features=one), item.time_s)


def _batches(items: Iterable[_Item], batch_size: int) -> Iterator[list[_Item]]:
    """Join neighbours of one size, which keeps the order and holds one batch at a time."""
    held: list[_Item] = []
    for item in items:
        same = held and _kind(held[0].pixels) == _kind(item.pixels)
        if held and (not same or len(held) >= batch_size):
            yield held
            held = []
        held.append(item)
    if held:
        yield held


def _kind(pixels: Tensor) -> tuple[Any, ...]:
    return size_of(pixels), pixels.dtype, pixels.device


def _items(images: Any) -> Iterator[_Item]:
    """Read images one by one."""
    number = count()
    one = isinstance(images, Tensor | np.ndarray | Image.Image | str | Path | VideoFrames)
    for thing in [images] if one or not isinstance(images, Iterable) else images:
        if isinstance(thing, str | Path):
            yield from _from_files(thing)
        elif isinstance(thing, VideoFrames):
            yield from _from_video(thing)
        else:
            time_s, image = thing if isinstance(thing, Frame) else (None, thing)
            index = next(number)
            try:
                batch = gather(image)
            except ImageError as error:
                raise ImageError(f"image {index}: {error}") from error
            for row, pixels in enumerate(torch.split(batch, 1)):
                yield _Item(str(index if row == 0 else next(number)), pixels, time_s)


def _from_files(source: str | Path) -> Iterator[_Item]:
    files = find_images(source, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    if files is None:
        raise ImageError(f"{source}: no such file, folder or pattern; check the path")
    for file in files:
        if file.suffix.lower() in VIDEO_SUFFIXES:
            yield from _from_video(VideoFrames(file))
        else:
            yield _Item(str(file), gather(file), None)


def _from_video(video: VideoFrames) -> Iterator[_Item]:
    for index, frame in enumerate(video):
        yield _Item(f"{video.path}#{index:06d}", gather(frame.image), frame.time_s)

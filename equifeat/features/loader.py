"""Images and frames, decoded and resized to whole patches in loader processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from equifeat.data.workers import shield_worker
from equifeat.errors import EquifeatError
from equifeat.features.options import source_hash
from equifeat.features.record import About
from equifeat.features.sources import Source
from equifeat.geometry.pixels import SizeHW, resize
from equifeat.image_files import read_pixels
from equifeat.model.extractor import FeatureExtractor
from equifeat.video_files import VideoFrames

_CHUNK_BYTES = 2**27  # Huge images are handed over one by one.


class Facts(NamedTuple):
    """What is known of an image before its features.

    Attributes:
        name: Its name in the output.
        size_hw: Height and width of the image itself.
        fingerprint: See `equifeat.features.options.source_hash`.
        time: Seconds from the start of its video, or None.
    """

    name: str
    size_hw: SizeHW
    fingerprint: str
    time: float | None = None


class Group(NamedTuple):
    """Images that were resized to one size.

    Attributes:
        pixels: (B, 3, H, W) uint8 RGB.
        facts: One an image.
    """

    pixels: Tensor
    facts: list[Facts]


@dataclass(frozen=True)
class Chunk:
    """What a loader process hands over at once.

    Args:
        groups: Images to compute.
        done: Images whose features are there already.
        failed: Name and reason of what cannot be read.
    """

    groups: list[Group]
    done: list[About]
    failed: list[tuple[str, str]]

    def pin_memory(self, device: object = None) -> Chunk:
        """Return the chunk with pixels in page-locked memory; the DataLoader's thread calls it."""
        groups = [Group(group.pixels.pin_memory(), group.facts) for group in self.groups]
        return Chunk(groups, self.done, self.failed)


@dataclass(frozen=True)
class GridRule:
    """How an image is resized to whole patches, as the extractor does it but without its weights.

    Args:
        patch_size: Side of a patch.
        position: The backbone's `position`.
        sampling: The extractor's `sampling`.
        resolution: Patches on the longer side, or None.
    """

    patch_size: int
    position: str
    sampling: str
    resolution: int | None

    @staticmethod
    def of(extractor: FeatureExtractor, resolution: int | None) -> GridRule:
        """Return the rule of an extractor."""
        position = extractor.backbone.position
        return GridRule(extractor.patch_size, position, extractor.sampling, resolution)

    def whole(self, size_hw: SizeHW) -> SizeHW:
        """Return the height and width in pixels that an image is resized to."""
        facts = SimpleNamespace(
            patch_size=self.patch_size,
            sampling=self.sampling,
            backbone=SimpleNamespace(position=self.position),
        )
        # All that grid_hw looks at: a loader process must not hold the model.
        stand_in = cast(FeatureExtractor, facts)
        h, w = FeatureExtractor.grid_hw(stand_in, size_hw, self.resolution)
        return h * self.patch_size, w * self.patch_size


class ImageChunks(IterableDataset[Chunk]):
    """Decoded images in chunks; several loader processes share the files.

    Args:
        files: Images and videos.
        rule: How they are resized; None leaves them as they are.
        run: Identity of model and options.
        header: Returns what is stored under a name, or None.
        chunk: Images a chunk.
        every: Take each n-th frame of a video.
    """

    def __init__(
        self,
        files: tuple[Source, ...],
        rule: GridRule | None,
        run: str,
        header: Callable[[str], About | None],
        chunk: int,
        every: int = 1,
    ) -> None:
        super().__init__()
        self.files = files
        self.rule = rule
        self.run = run
        self.header = header
        self.chunk = chunk
        self.every = every

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks of this process: a run of images each, a whole video at a time."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        images = [file for file in self.files if not file.video]
        parts = [images[i : i + self.chunk] for i in range(0, len(images), self.chunk)]
        for part in parts[worker::workers]:
            yield from self._images(part)
        for video in [file for file in self.files if file.video][worker::workers]:
            yield from self._video(video)

    def _images(self, images: Iterable[Source]) -> Iterator[Chunk]:
        collected = _Collector()
        for source in images:
            try:
                stat = Path(source.path).stat()
                key = source_hash(self.run, stat.st_size, stat.st_mtime_ns)
                found = self.header(source.name)
                if found is not None and found.fingerprint == key:
                    collected.done.append(found)
                    continue
                pixels, size_hw = self._resized(read_pixels(source.path))
            except (EquifeatError, OSError, MemoryError) as error:
                collected.failed.append((source.name, _reason(error)))
                continue
            collected.add(pixels, Facts(source.name, size_hw, key))
            if collected.bytes > _CHUNK_BYTES:
                yield collected.chunk()
                collected = _Collector()
        yield collected.chunk()

    def _video(self, source: Source) -> Iterator[Chunk]:
        collected = _Collector()
        try:
            stat = Path(source.path).stat()
            frames = VideoFrames(source.path, step=self.every)
            for number, frame in enumerate(frames):
                index = number * self.every
                name = f"{source.name}/{index:06d}"
                key = source_hash(self.run, stat.st_size, stat.st_mtime_ns, index)
                found = self.header(name)
                if found is not None and found.fingerprint == key:
                    collected.done.append(found)
                else:
                    pixels, size_hw = self._resized(torch.from_numpy(frame.image).permute(2, 0, 1))
                    collected.add(pixels, Facts(name, size_hw, key, frame.time_s))
                if collected.count >= self.chunk or collected.bytes > _CHUNK_BYTES:
                    yield collected.chunk()
                    collected = _Collector()
        except (EquifeatError, OSError, MemoryError) as error:
            collected.failed.append((source.name, _reason(error)))
        yield collected.chunk()

    def _resized(self, pixels: Tensor) -> tuple[Tensor, SizeHW]:
        """Resize as the extractor does; 8-bit images stay in 8 bits, which is ten times faster."""
        size_hw = (int(pixels.shape[1]), int(pixels.shape[2]))
        if self.rule is not None:
            pixels = resize(pixels[None], self.rule.whole(size_hw))[0]
        if pixels.is_floating_point():
            pixels = (pixels * 255.0).round().clamp(0, 255).to(torch.uint8)
        return pixels, size_hw


class _Collector:
    """A chunk while it grows."""

    def __init__(self) -> None:
        self.sizes: dict[SizeHW, tuple[list[Tensor], list[Facts]]] = {}
        self.done: list[About] = []
        self.failed: list[tuple[str, str]] = []
        self.count = 0
        self.bytes = 0

    def add(self, pixels: Tensor, facts: Facts) -> None:
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        images, known = self.sizes.setdefault(size, ([], []))
        images.append(pixels)
        known.append(facts)
        self.count += 1
        self.bytes += pixels.nbytes

    def chunk(self) -> Chunk:
        groups = [Group(torch.stack(images), facts) for images, facts in self.sizes.values()]
        return Chunk(groups, self.done, self.failed)


def load_chunks(chunks: Iterable[Chunk], workers: int, pin: bool) -> Iterable[Chunk]:
    """Run the decoding in processes.

    Args:
        chunks: What to decode, an `ImageChunks`.
        workers: Loader processes; 0 decodes in this one.
        pin: Put pixels in page-locked memory, for a GPU.

    Returns:
        The chunks of all processes, at most two waiting for each.
    """
    options: dict[str, Any] = {}
    if workers:
        # A slow video must not hold up the images of other processes.
        options = {"prefetch_factor": 2, "in_order": False, "worker_init_fn": shield_worker}
    # beartype cannot check an argument that is a Dataset.
    dataset = cast("ImageChunks", chunks)
    loader: DataLoader[Chunk] = DataLoader(
        dataset, batch_size=None, collate_fn=_same, num_workers=workers, pin_memory=pin, **options
    )
    return loader


def _same(chunk: Any) -> Any:
    return chunk


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{error.filename}: no such image file; check the path"
    words = " ".join(str(error).split()) or type(error).__name__
    return words if isinstance(error, EquifeatError) else f"{type(error).__name__}: {words}"

"""Chunks of decoded images in, written features out, without the model ever waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.errors import FeaturesError, RecipeError
from equifeat.features.background import Background
from equifeat.features.formats import Store
from equifeat.features.loader import Chunk, Facts, Group
from equifeat.features.options import FeatureOptions
from equifeat.features.record import About
from equifeat.geometry.pixels import SizeHW
from equifeat.model.extractor import FeatureExtractor
from equifeat.model.feature_map import FeatureMap

_WAITING_BATCHES = 8  # Images that may wait for others of their size, in batches …
_WAITING_BYTES = 2**29  # … and in bytes.
_THREADS = 4
_LIMIT = 2**30  # Bytes of features that may wait to be written.


class Tally:
    """What became of every image.

    Attributes:
        written: Lines of the list of items, by name: computed in this run.
        done: The same for what was there before.
        failed: Reasons by name.
    """

    def __init__(self) -> None:
        self.written: dict[str, str] = {}
        self.done: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.lock = threading.Lock()

    @property
    def lines(self) -> dict[str, str]:
        """Lines of all images that have features."""
        return {**self.done, **self.written}


class Buckets:
    """Images of one size wait here until they fill a batch.

    Args:
        batch: Images a batch.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self._parts: dict[SizeHW, list[Group]] = {}

    def add(self, group: Group) -> Iterator[list[Group]]:
        """Take images in and give full batches out, or a part of one when too many wait.

        Args:
            group: Images of one size.

        Yields:
            Groups of one size that make a batch together.
        """
        size = (int(group.pixels.shape[-2]), int(group.pixels.shape[-1]))
        while len(group.facts):
            parts = self._parts.setdefault(size, [])
            room = self.batch - sum(len(part.facts) for part in parts)
            parts.append(Group(group.pixels[:room], group.facts[:room]))
            group = Group(group.pixels[room:], group.facts[room:])
            if self._count(size) == self.batch:
                yield self._parts.pop(size)
        while self._crowded():
            yield self._parts.pop(max(self._parts, key=self._count))

    def rest(self) -> Iterator[list[Group]]:
        """Yield what still waits."""
        while self._parts:
            yield self._parts.pop(next(iter(self._parts)))

    def _crowded(self) -> bool:
        waiting = sum(h * w * 3 * self._count((h, w)) for h, w in self._parts)
        images = sum(map(self._count, self._parts))
        return images > _WAITING_BATCHES * self.batch or waiting > _WAITING_BYTES

    def _count(self, size: SizeHW) -> int:
        return sum(len(part.facts) for part in self._parts[size])


class Pipeline:
    """Computes features of images of one size at a time and has them written.

    Args:
        extractor: The model.
        options: What to ask it for.
        store: Where features go.
        run: Model's name and identity of the run, for the records.
        tally: Where the outcome is noted.
        batch: Images a batch.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        options: FeatureOptions,
        store: Store,
        model: str,
        tally: Tally,
        batch: int,
    ) -> None:
        self.extractor = extractor
        self.options = options
        self.store = store
        self.model = model
        self.tally = tally
        self.buckets = Buckets(batch)
        self.device = extractor.backbone.device

    def run(self, chunks: Iterable[Chunk]) -> Iterator[str]:
        """Compute and write everything.

        Args:
            chunks: Decoded images.

        Yields:
            The name of each image when it is on its way to the disk, done before, or failed.

        Raises:
            FeaturesError: Features cannot be written.
            RecipeError: The device has too little memory for a batch.
        """
        try:
            with Background(_THREADS, _LIMIT) as background:
                for chunk in chunks:
                    for about in chunk.done:
                        self.tally.done[about.name] = about.as_json()
                        yield about.name
                    for name, reason in chunk.failed:
                        self.tally.failed[name] = reason
                        yield name
                    for group in chunk.groups:
                        for parts in self.buckets.add(group):
                            yield from self._compute(parts, background)
                for parts in self.buckets.rest():
                    yield from self._compute(parts, background)
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"{self.device} has too little memory for {self.buckets.batch} images at once: "
                "give a smaller --batch, a smaller --resolution, or --tile"
            ) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise FeaturesError(
                "a loader process was ended from outside, often for lack of memory: give fewer "
                "--workers or a smaller --batch; the same command goes on"
            ) from error
        except OSError as error:
            raise FeaturesError(
                f"features cannot be written to {self.store.out} ({error}); what was written "
                "before is kept, and the same command goes on from there"
            ) from error

    # Not around the loop of run(): the mode would reach whoever iterates.
    @torch.inference_mode()
    def _compute(self, parts: list[Group], background: Background) -> list[str]:
        facts = [fact for part in parts for fact in part.facts]
        moved = [part.pixels.to(self.device, non_blocking=True) for part in parts]
        images = torch.cat(moved) if len(moved) > 1 else moved[0]
        maps = self._dense(images)
        placed = [_placed(maps, index, images, fact) for index, fact in enumerate(facts)]
        if self.options.at == "patch":
            self._send(maps.features, facts, placed, background)
        else:
            for fact, one in zip(facts, placed, strict=True):  # one at a time: these are large
                fine = one.at_image()
                self._send(fine.features, [fact], [fine], background)
        return [fact.name for fact in facts]

    def _dense(self, images: Tensor) -> FeatureMap:
        options = self.options
        if options.tile is None:
            return self.extractor.dense(
                images, overlap=options.overlap, layers=options.layers, norm=options.norm
            )
        return self.extractor.dense_tiled(
            images,
            tile=options.tile,
            tile_overlap=options.tile_overlap,
            batch_size=self.buckets.batch,
            overlap=options.overlap,
            layers=options.layers,
            norm=options.norm,
        )

    def _send(
        self, features: Tensor, facts: list[Facts], maps: list[FeatureMap], background: Background
    ) -> None:
        """Start the way of a batch to the disk; nothing here waits for the device."""
        if self.options.normalize:
            features = F.normalize(features.float(), dim=1)
        features = features.to(self.options.torch_dtype)
        finite = features.isfinite().flatten(1).all(dim=1)
        ready: torch.cuda.Event | None = None
        if features.is_cuda:
            features, finite = _to_host(features), _to_host(finite)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        for index, (fact, one) in enumerate(zip(facts, maps, strict=True)):
            about = About(
                name=fact.name,
                size_hw=fact.size_hw,
                grid_hw=one.grid_hw,
                margin_yx=one.margin_yx,
                point_scale=one.point_scale,
                model=self.model,
                fingerprint=fact.fingerprint,
                time=fact.time,
            )
            work = partial(self._write, about, features[index], finite[index], ready)
            background.submit(features[index].nbytes, work)

    def _write(
        self, about: About, features: Tensor, finite: Tensor, ready: torch.cuda.Event | None
    ) -> None:
        if ready is not None:
            ready.synchronize()
        if not bool(finite):
            with self.tally.lock:
                self.tally.failed[about.name] = (
                    f"features are not finite in {self.options.dtype} (computed in "
                    f"{self.options.precision}): use --dtype float32 --precision float32"
                )
            return
        self.store.write(about, features.numpy())
        with self.tally.lock:
            self.tally.written[about.name] = about.as_json()


def _placed(maps: FeatureMap, index: int, images: Tensor, fact: Facts) -> FeatureMap:
    """Return the map of one image in pixels of the image before it was resized."""
    resized = images.shape[-2:]
    y, x = (maps.margin_yx[i] * fact.size_hw[i] / int(resized[i]) for i in (0, 1))
    return FeatureMap(maps.features[index : index + 1], fact.size_hw, (y, x), maps.point_scale)


def _to_host(tensor: Tensor) -> Tensor:
    """Start copying to page-locked memory, which does not hold up the device."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

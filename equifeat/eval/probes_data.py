"""Views of training and of validation objects, for probes: what is opened, chosen and hashed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from equifeat.data.object_views import ObjectViews, View
from equifeat.data.views import Layout, open_views
from equifeat.errors import EvalDataError, RecipeError, ViewsError
from equifeat.eval.data_hash import data_hash
from equifeat.eval.features import FeatureSource
from equifeat.eval.probes_truth import object_points
from equifeat.eval.protocol import Protocol
from equifeat.eval.task import TaskData
from equifeat.seeding import torch_generator

SPLITS = ("train", "val")
BACKGROUNDS = "backgrounds"
WHERE = (
    "The folder must hold train/ and val/, each with views of other objects: "
    "equifeat render MESHES --out DIR/train, and other meshes to DIR/val."
)
_OBJECT_STREAM, _VIEW_STREAM = 71, 72


@dataclass(frozen=True)
class ViewOptions:
    """Which views are looked at.

    Args:
        layout: How the folders are read, see equifeat.data.views.open_views.
        val_objects: At most so many objects of val/, drawn by the seed, or "all".
        val_views: At most so many views of each, drawn by the seed.
    """

    layout: Layout = "auto"
    val_objects: int | Literal["all"] = "all"
    val_views: int = 12


@dataclass(frozen=True)
class ProbeOptions(ViewOptions):
    """Which views a probe is fitted to, and which it is tested on.

    Args:
        train_objects: At most so many objects of train/, drawn by the seed.
        train_views: At most so many views of each.
    """

    train_objects: int = 24
    train_views: int = 6


class ProbeObject:
    """An object and those of its views that count.

    Args:
        views: All views of the object.
        numbers: Which of them count.
    """

    def __init__(self, views: ObjectViews, numbers: Sequence[int]) -> None:
        self.views = views
        self.name = views.name
        self.numbers = tuple(numbers)

    def view(self, number: int) -> View:
        """Read a view.

        Args:
            number: One of ``numbers``.

        Returns:
            The view.
        """
        return self.views.view(number)

    @cached_property
    def box(self) -> Tensor:
        """(2, 3) lower and upper corner of all surface points seen, object coordinates."""
        corners = []
        for number in self.numbers:
            view = self.view(number)
            points = object_points(view)[view.mask & (view.depth > 0)]
            if len(points):
                corners += [points.amin(0), points.amax(0)]
        if not corners:
            raise EvalDataError(
                f"{self.views.where}: none of the {len(self.numbers)} views taken shows the object "
                "with depth; render it again."
            )
        both = torch.stack(corners)
        return torch.stack([both.amin(0), both.amax(0)])

    @property
    def size(self) -> float:
        """Longest side of `box`, in object units."""
        return float((self.box[1] - self.box[0]).max())


class PatchRows(NamedTuple):
    """The patches of one view that a probe is about.

    Attributes:
        features: (N, D) in float64 on the CPU.
        targets: (N, T) what is true of them.
    """

    features: Tensor
    targets: Tensor


class ProbeData(TaskData):
    """Views of training objects and of other objects; the others are the items.

    Args:
        root: Folder with train/ and val/.
        protocol: One of the task's, perhaps changed.
    """

    def __init__(self, root: Path, protocol: Protocol) -> None:
        options: ViewOptions = protocol.options
        counts = {k: v for k, v in vars(options).items() if isinstance(v, int)}
        for name, count in counts.items():
            if count < 1:
                raise RecipeError(f"{name}={count} must be at least 1.")
        opened = {split: _open(root / split, options.layout) for split in SPLITS}
        common = sorted({o.name for o in opened["train"]} & {o.name for o in opened["val"]})
        if common:
            raise EvalDataError(
                f"{root}: {common[0]} is in train/ and in val/ ({len(common)} such objects), but a "
                "probe must be tested on other objects: move it out of one of them."
            )
        seed = protocol.seed
        self.train: list[ProbeObject] = []
        if isinstance(options, ProbeOptions):
            self.train = _choose(opened["train"], options.train_objects, options.train_views, seed)
        self.val = _choose(opened["val"], options.val_objects, options.val_views, seed)
        super().__init__(root, protocol, [o.name for o in self.val], _hash(root))


def patch_grid(source: FeatureSource, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of an image and where they lie.

    Args:
        source: The model.
        image: (3, H, W) RGB in [0, 1].

    Returns:
        (N, D) features as the model gives them, in float64 on the CPU, and (N, 2) centres of the
        patches in pixels.
    """
    found = source(image)
    features = found.features[0].flatten(1).mT.cpu().double()
    return features, found.centers().reshape(-1, 2).cpu()


def _open(folder: Path, layout: Layout) -> list[ObjectViews]:
    try:
        objects = open_views(folder, layout)
    except ViewsError as error:
        raise EvalDataError(f"{error}. {WHERE}") from error
    for obj in objects:
        if obj.tracks is not None:
            raise EvalDataError(
                f"{obj.where} has no depth: probes need rendered views or views with depth."
            )
    return objects


def _choose(
    objects: Sequence[ObjectViews], count: int | Literal["all"], views: int, seed: int
) -> list[ProbeObject]:
    """Draw objects and views; each draw depends on the seed and the object's name only."""

    def key(obj: ObjectViews, stream: int) -> torch.Generator:
        return torch_generator(seed, stream, zlib.crc32(obj.name.encode()))

    drawn = sorted(objects, key=lambda o: float(torch.rand((), generator=key(o, _OBJECT_STREAM))))
    kept = {obj.name for obj in drawn[: None if count == "all" else count]}
    out = []
    for obj in objects:
        if obj.name in kept:
            order = torch.randperm(len(obj), generator=key(obj, _VIEW_STREAM))
            out.append(ProbeObject(obj, sorted(order[:views].tolist())))
    return out


def _hash(root: Path) -> str:
    """Hash the three folders; links to folders of views are followed."""
    files = []
    for part in (*SPLITS, BACKGROUNDS):
        for folder, _, names in os.walk(root / part, followlinks=True):
            files += [Path(folder, name) for name in names if name[0] != "."]
    texts = [file for file in files if file.suffix in (".json", ".txt", ".npy")]
    return data_hash(root, texts, set(files) - set(texts))

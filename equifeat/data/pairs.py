"""Draw i → (object, two views, keypoints, 3D points): a pure function of (seed, i)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from equifeat.data.augment import Augment, AugmentedView, augment_view, check_background
from equifeat.data.tracks import DrawnKeypoints, draw_keypoints
from equifeat.data.view_pairs import Curriculum, pairs_in_range, sharing
from equifeat.data.views import ObjectViews, View
from equifeat.errors import CorrespondenceError, RecipeError, ViewsError, suggest
from equifeat.geometry.camera import Camera, invert, relative, rotation_angle_deg, transform
from equifeat.geometry.covisibility import correspond, limits_of_steps
from equifeat.geometry.pixels import SizeHW, pixel_centers
from equifeat.seeding import numpy_generator

Sampler = Literal["covisible", "reference", "hard"]
_ATTEMPTS = 20  # view pairs tried within one draw
_CENTERS = 2  # of the clusters of sampler "hard"


@dataclass
class Pair:
    """One training sample: two views of an object and keypoints with their 3D points.

    Attributes:
        object_name: Name of the object.
        image0: (3, H, W) RGB in [0, 1] of view 0; image1 of view 1.
        image1: See image0.
        mask0: (H, W) where the object is in view 0; mask1 in view 1.
        mask1: See mask0.
        depth0: (H, W) z-depth in object units, 0 = background; depth1 of view 1.
        depth1: See depth0.
        camera0: Intrinsics of image0, after augmentation; camera1 of image1.
        camera1: See camera0.
        cam1_from_cam0: (4, 4) transform from camera 0 to camera 1.
        keypoints0: (N, 2) xy pixels of image0.
        keypoints1: (M, 2) xy pixels of image1. Samplers "covisible" and "hard": M = N and row n is
            the true match of keypoints0[n].
        points3d0: (N, 3) object coordinates of keypoints0.
        points3d1: (M, 3) object coordinates of keypoints1.
        draw: Index of the draw.
        view_change_deg: Rotation angle of cam1_from_cam0.
        key0: Identity of the view before augmentation: object and index; key1 of view 1.
        key1: See key0.
        version0: Tells pictures of one key apart: 0 as it was rendered, n ≥ 1 one of its fixed
            augmentations, None an augmentation of this draw alone; version1 of view 1.
        version1: See version0.
    """

    object_name: str
    image0: Tensor
    image1: Tensor
    mask0: Tensor
    mask1: Tensor
    depth0: Tensor
    depth1: Tensor
    camera0: Camera
    camera1: Camera
    cam1_from_cam0: Tensor
    keypoints0: Tensor
    keypoints1: Tensor
    points3d0: Tensor
    points3d1: Tensor
    draw: int
    view_change_deg: float
    key0: tuple[str, int]
    key1: tuple[str, int]
    version0: int | None
    version1: int | None


class PairSource(Dataset[Pair]):
    """Draws pairs of views with keypoints.

    Every draw starts its own random streams from (seed, stream, draw), so it is the same in any
    process, on any rank, in any order. A pair of views with too few keypoints is replaced within
    the same draw, a bounded number of times.

    Args:
        objects: Objects to choose from, each equally often.
        seed: Seed of the run.
        sampler: "covisible": pixel centres of view 0 and where the same surface points lie in
            view 1, tested for visibility; "hard": the same, but half of them from a few clusters,
            so that more negatives are near; or "reference": mask pixels drawn independently in
            each view.
        num_keypoints: Keypoints a view; "covisible" gives fewer where fewer pixels are covisible.
        min_angle_deg: Smallest view change (rotation angle between the cameras).
        max_angle_deg: Largest view change; the reference skips pairs above 120.
        augment: What may happen to each view, or None.
        background: "black", "noise", "gradient" or a folder of images.
        length: Draws of one epoch: len() of this dataset. Any draw ≥ 0 may be asked for.
        min_keypoints: Fewer keypoints than this in a view make another pair be tried.
        stream: Further number of the random streams; training is 0, validation 1.
        hard_radius: Radius of the clusters of "hard", in object units.
        curriculum_draws: Draws over which the largest view change grows linearly to
            `max_angle_deg`; 0 for all of it from the start.
        curriculum_start_deg: Where it begins. An object without a pair that near gives its
            narrowest pairs.

    Raises:
        ViewsError: No objects, or one of them without a pair of views in the range of angles.
        RecipeError: An argument out of range.
    """

    def __init__(
        self,
        objects: Sequence[ObjectViews],
        seed: int = 0,
        sampler: Sampler = "covisible",
        num_keypoints: int = 1024,
        min_angle_deg: float = 0.0,
        max_angle_deg: float = 120.0,
        augment: Augment | None = None,
        length: int = 10_000,
        background: str = "black",
        min_keypoints: int = 32,
        stream: int = 0,
        hard_radius: float = 0.15,
        curriculum_draws: int = 0,
        curriculum_start_deg: float = 30.0,
    ) -> None:
        if not objects:
            raise ViewsError("no objects to draw pairs from: give a folder with rendered views")
        samplers = get_args(Sampler)
        if sampler not in samplers:
            raise RecipeError(
                f"sampler must be one of {', '.join(samplers)}, not {sampler!r}."
                f"{suggest(str(sampler), samplers)}"
            )
        if seed < 0:
            raise RecipeError(f"seed is {seed}: use 0 or more")
        if min(num_keypoints, min_keypoints, length) < 1:
            raise RecipeError(
                f"num_keypoints, min_keypoints and length are {num_keypoints}, {min_keypoints} and "
                f"{length}: each must be at least 1"
            )
        if not 0 <= min_angle_deg <= max_angle_deg:
            raise RecipeError(
                f"view change from {min_angle_deg} to {max_angle_deg} degrees is no range: "
                "use 0 ≤ min_angle_deg ≤ max_angle_deg"
            )
        if not 0.0 < hard_radius < math.inf:
            raise RecipeError(f"hard_radius is {hard_radius}: use more than 0, in object units")
        check_background(background)
        self.objects = list(objects)
        self.seed = seed
        self.stream = stream
        self.sampler = sampler
        self.num_keypoints = num_keypoints
        self.min_keypoints = min(min_keypoints, num_keypoints)
        self.augment = augment
        self.background = background
        self.length = length
        self.hard_radius = hard_radius
        # Row n of both views is one point of the surface.
        self.matched = sampler != "reference"
        self._curriculum = Curriculum(curriculum_draws, curriculum_start_deg, max_angle_deg)
        self._pairs = pairs_in_range(self.objects, min_angle_deg, max_angle_deg)
        if self.matched:
            each = zip(self.objects, self._pairs, strict=True)
            self._pairs = [sharing(views, pairs, self.min_keypoints) for views, pairs in each]

    def __len__(self) -> int:
        return self.length

    @property
    def num_view_pairs(self) -> int:
        """Number of pairs of views that draws choose from, over all objects."""
        return sum(len(pairs) for pairs in self._pairs)

    def __getitem__(self, draw: int) -> Pair:
        return self.draw(draw)

    def draw(self, i: int) -> Pair:
        """Return draw i.

        Args:
            i: Index of the draw, ≥ 0; not limited by the length.

        Returns:
            The pair; it depends on (seed, i) and this source's arguments only.

        Raises:
            CorrespondenceError: No pair of views with enough keypoints was found.
            ImageError: A picture cannot be read.
        """
        if i < 0:
            raise IndexError(f"draw {i}: draws count from 0")
        which = int(numpy_generator(self.seed, self.stream, i, 0).integers(len(self.objects)))
        views, pairs = self.objects[which], self._pairs[which]
        if i < self._curriculum.draws:
            pairs = pairs.up_to(self._curriculum.limit_deg(i))
        tried: list[tuple[int, int, int]] = []
        for attempt in range(_ATTEMPTS):
            rng = numpy_generator(self.seed, self.stream, i, 1, attempt)
            index0, index1 = (int(v) for v in pairs.indices[int(rng.integers(len(pairs)))])
            view0, view1 = views.view(index0), views.view(index1)
            if views.tracks is None:
                found = self._sample(view0, view1, views.depth_step, rng)
            else:
                at, masks = (index0, index1), (view0.mask, view1.mask)
                every = len(views.tracks.points3d)
                count = every if self.sampler == "hard" else self.num_keypoints
                found = draw_keypoints(views.tracks, at, masks, count, self.matched, rng)
            if self.sampler == "hard":
                rows = self._clustered(found.points3d0, rng)
                found = DrawnKeypoints(*(values[rows] for values in found))
            pair = self._augmented(views.name, (index0, index1), (view0, view1), found, i, attempt)
            count = min(len(pair.keypoints0), len(pair.keypoints1))
            if count >= self.min_keypoints:
                return pair
            tried.append((index0, index1, count))
        shown = "; ".join(f"{a}→{b}: {n}" for a, b, n in tried[:4])
        raise CorrespondenceError(
            f"{views.name}: draw {i} found no two views with {self.min_keypoints} keypoints in "
            f"{_ATTEMPTS} attempts (views → keypoints {shown}, …): lower max_angle_deg or "
            "min_keypoints, or render more or larger views"
        )

    def _sample(
        self, view0: View, view1: View, depth_step: float, rng: np.random.Generator
    ) -> DrawnKeypoints:
        xy0, z0 = self._mask_pixels(view0, rng, all_of_them=self.matched)
        if self.sampler == "reference":
            xy1, z1 = self._mask_pixels(view1, rng, all_of_them=False)
            points0, points1 = _lift(view0, xy0, z0), _lift(view1, xy1, z1)
            return DrawnKeypoints(*(t.contiguous() for t in (xy0, xy1, points0, points1)))
        nearest = float(z0.min()) if len(z0) else 1.0
        found = correspond(
            xy0,
            z0,
            view1.depth,
            view0.camera,
            view1.camera,
            relative(view0.cam_from_world, view1.cam_from_world),
            *limits_of_steps(depth_step, view0.camera, nearest),
        )
        rows = found.covisible.nonzero()[:, 0]
        # Of "hard" all are given, to choose clusters from.
        if self.sampler != "hard" and len(rows) > self.num_keypoints:
            chosen = rng.choice(len(rows), self.num_keypoints, replace=False)
            rows = rows[torch.from_numpy(np.sort(chosen))]
        points = _lift(view0, xy0[rows], z0[rows]).contiguous()
        return DrawnKeypoints(xy0[rows].contiguous(), found.xy[rows].contiguous(), points, points)

    def _clustered(self, points: Tensor, rng: np.random.Generator) -> Tensor:
        """Rows of sampler "hard": half of all points, then of those near a few of them.

        Where the clusters hold too few points, the rest is of all again.
        """
        if len(points) <= self.num_keypoints:
            return torch.arange(len(points))
        order = torch.from_numpy(rng.permutation(len(points)))
        half = self.num_keypoints - self.num_keypoints // 2
        distance = torch.cdist(points[order], points[order[:_CENTERS]])
        near = (distance < self.hard_radius).any(dim=1)
        near[:half] = True  # taken anyway
        chosen = torch.cat([order[near], order[~near]])[: self.num_keypoints]
        return chosen.sort().values

    def _mask_pixels(
        self, view: View, rng: np.random.Generator, all_of_them: bool
    ) -> tuple[Tensor, Tensor]:
        """Pixel centres of the object and their depth: all of them, or num_keypoints drawn.

        A pixel is drawn twice only where the object has too few.
        """
        # NumPy looks through a whole picture four times faster than torch.
        there = torch.from_numpy(np.flatnonzero(view.mask.numpy() & (view.depth.numpy() > 0)))
        if not all_of_them and len(there):
            few = len(there) < self.num_keypoints
            there = there[torch.from_numpy(rng.choice(len(there), self.num_keypoints, replace=few))]
        return _center_columns(view.camera.size_hw)[:, there].mT, view.depth.reshape(-1)[there]

    def _augmented(
        self,
        name: str,
        indices: tuple[int, int],
        views: tuple[View, View],
        found: DrawnKeypoints,
        draw: int,
        attempt: int,
    ) -> Pair:
        out: list[AugmentedView] = []
        versions: list[int | None] = []
        both = zip(views, indices, (found.keypoints0, found.keypoints1), strict=True)
        for side, (view, index, keypoints) in enumerate(both):
            rng = numpy_generator(self.seed, self.stream, draw, 2, attempt, side)
            version = None
            if self.augment is not None and self.augment.versions:
                version = 1 + int(rng.integers(self.augment.versions))
                which = (zlib.crc32(name.encode()), index, version)
                rng = numpy_generator(self.seed, self.stream, *which, 0, 3)
            made = augment_view(
                view.image,
                view.mask,
                view.depth,
                view.camera,
                keypoints,
                self.augment,
                self.background,
                rng,
            )
            out.append(made)
            versions.append(version if made.changed else 0)
        kept0, kept1 = out[0].kept, out[1].kept
        if self.matched:
            # A true match needs both of its ends.
            kept0 = kept1 = kept0 & kept1
        cam1_from_cam0 = relative(views[0].cam_from_world, views[1].cam_from_world)
        return Pair(
            object_name=name,
            image0=out[0].image,
            image1=out[1].image,
            mask0=out[0].mask,
            mask1=out[1].mask,
            depth0=out[0].depth,
            depth1=out[1].depth,
            camera0=out[0].camera,
            camera1=out[1].camera,
            cam1_from_cam0=cam1_from_cam0,
            keypoints0=out[0].keypoints[kept0],
            keypoints1=out[1].keypoints[kept1],
            points3d0=found.points3d0[kept0],
            points3d1=found.points3d1[kept1],
            draw=draw,
            view_change_deg=float(rotation_angle_deg(cam1_from_cam0[:3, :3])),
            key0=(name, indices[0]),
            key1=(name, indices[1]),
            version0=versions[0],
            version1=versions[1],
        )


@lru_cache(maxsize=16)
def _center_columns(size_hw: SizeHW) -> Tensor:
    """(2, H*W) pixel centres, x and y side by side: what follows runs along them."""
    return pixel_centers(size_hw).reshape(-1, 2).mT.contiguous()


def _lift(view: View, xy: Tensor, z: Tensor) -> Tensor:
    """Lift pixels to object coordinates."""
    return transform(invert(view.cam_from_world), view.camera.unproject(xy, z))

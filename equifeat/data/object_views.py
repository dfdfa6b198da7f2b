"""The interface every kind of views has; readers inherit from it, users open_views.

Modules that read a layout import this one, `equifeat.data.views` imports them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import ViewsError
from equifeat.geometry.camera import Camera
from equifeat.geometry.pixels import SizeHW

if TYPE_CHECKING:
    from equifeat.data.tracks import Tracks

CACHED_VIEWS = 64  # decoded views kept by a process: 64 of 512 px are 96 MB
MAX_SIDE = 16384


class View(NamedTuple):
    """One posed view.

    Attributes:
        image: (3, H, W) RGB in [0, 1].
        depth: (H, W) z-depth in object units, 0 = background.
        mask: (H, W) whether the object is there.
        camera: Intrinsics.
        cam_from_world: (4, 4); world = object coordinates.
    """

    image: Tensor
    depth: Tensor
    mask: Tensor
    camera: Camera
    cam_from_world: Tensor


class ObjectViews(ABC):
    """The posed views of one object; pictures are read when asked for.

    A subclass reads the pictures of view i in `_pictures`. Objects travel to the workers of
    a DataLoader, so they hold no open file and no picture.

    Args:
        name: Identity of the object.
        where: What messages call the place it is read from: a folder, a file and its row.
        K: (V, 3, 3) intrinsics, corner pixel convention.
        cam_from_world: (V, 4, 4) poses.
        sizes_hw: Height and width of every view, or one size for all of them.
        depth_step: Object units of one step of the depth, 0 where depth is exact or absent.
        tracks: Points of a real capture seen in several views, where they stand in for depth.
    """

    def __init__(
        self,
        name: str,
        where: str,
        K: Float[Tensor, "v 3 3"],
        cam_from_world: Float[Tensor, "v 4 4"],
        sizes_hw: SizeHW | Sequence[SizeHW],
        depth_step: float,
        tracks: Tracks | None = None,
    ) -> None:
        self.name = name
        self.where = where
        self.K = K
        self.cam_from_world = cam_from_world
        self.depth_step = depth_step
        self.tracks = tracks
        self._sizes_hw = sizes_hw

    def __len__(self) -> int:
        return len(self.cam_from_world)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} views, {self.where})"

    def camera(self, i: int) -> Camera:
        """Return the intrinsics of view i without reading its pictures.

        Args:
            i: Index of the view.

        Returns:
            The camera; its size_hw is the size of this view.
        """
        size: Any = self._sizes_hw
        return Camera(self.K[i], size if isinstance(size[0], int) else size[i])

    def view(self, i: int) -> View:
        """Read view i.

        Args:
            i: Index of the view, 0 ≤ i < len(self).

        Returns:
            The view; its tensors are the caller's own.

        Raises:
            IndexError: No such view.
            ImageError: A picture is not a picture or has another size.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} views, there is no view {i}")
        image, depth, mask = self._pictures(i)
        return View(image, depth, mask, self.camera(i), self.cam_from_world[i].clone())

    @abstractmethod
    def _pictures(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image (3, H, W) in [0, 1], depth (H, W) float32 and mask (H, W) bool of view i, new."""


def check_intrinsics(K: Tensor, file: Path | str) -> None:
    """Refuse what is no (V, 3, 3) stack of intrinsics.

    Args:
        K: The matrices.
        file: What the message names.

    Raises:
        ViewsError: A matrix has another shape or a focal length that is not positive.
    """
    bottom = torch.tensor([0.0, 0.0, 1.0], dtype=K.dtype)
    usable = K.shape[1:] == (3, 3) and bool(K.isfinite().all())
    usable = usable and bool((K[:, [0, 1], [0, 1]] > 0).all())
    if not usable or not torch.equal(K[:, 2], bottom.expand(len(K), 3)):
        raise ViewsError(f"{file}: a K is not a 3x3 matrix of intrinsics; render again")


def check_poses(poses: Tensor, file: Path | str) -> None:
    """Refuse what is no (V, 4, 4) stack of rotations with translations.

    Args:
        poses: The matrices.
        file: What the message names.

    Raises:
        ViewsError: A matrix has another shape, a scale, a mirror or a number that is not finite.
    """
    if poses.ndim != 3 or poses.shape[0] == 0 or poses.shape[1:] != (4, 4):
        shape = tuple(poses.shape)
        raise ViewsError(f"{file}: poses of shape {shape}, expected (views, 4, 4), views > 0")
    R = poses[:, :3, :3]
    eye = torch.eye(3, dtype=poses.dtype)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=poses.dtype)
    rigid = bool(poses.isfinite().all()) and bool(((R @ R.mT - eye).abs() < 1e-3).all())
    rigid = rigid and bool((torch.linalg.det(R) > 0).all())
    if not rigid or bool(((poses[:, 3] - bottom).abs() > 1e-6).any()):
        raise ViewsError(f"{file}: a pose is not a rotation with a translation; render again")

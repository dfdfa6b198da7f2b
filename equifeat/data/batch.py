"""Batches of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from equifeat.data.pairs import Pair
from equifeat.errors import ViewsError
from equifeat.geometry.camera import Camera


@dataclass
class PairBatch:
    """Pairs of one batch; keypoints stay lists because their number varies.

    Attributes:
        object_names: B names.
        images0: (B, 3, H, W) RGB in [0, 1] of view 0; images1 of view 1.
        images1: See images0.
        masks0: (B, H, W); masks1 of view 1.
        masks1: See masks0.
        depths0: (B, H, W) z-depth in object units, 0 = background; depths1 of view 1.
        depths1: See depths0.
        K0: (B, 3, 3) intrinsics of images0; K1 of images1.
        K1: See K0.
        cam1_from_cam0: (B, 4, 4).
        keypoints0: B tensors (N, 2) of xy pixels of images0; keypoints1 of images1.
        keypoints1: See keypoints0.
        points3d0: B tensors (N, 3) in object coordinates; points3d1 of keypoints1.
        points3d1: See points3d0.
        draws: B indices of draws.
        view_change_deg: B angles between the cameras.
        keys0: B identities (object, view) before augmentation; keys1 of view 1.
        keys1: See keys0.
        versions0: B numbers that tell pictures of one key apart, None for one that no other draw
            has (see `Pair`); versions1 of view 1.
        versions1: See versions0.
    """

    object_names: list[str]
    images0: Tensor
    images1: Tensor
    masks0: Tensor
    masks1: Tensor
    depths0: Tensor
    depths1: Tensor
    K0: Tensor
    K1: Tensor
    cam1_from_cam0: Tensor
    keypoints0: list[Tensor]
    keypoints1: list[Tensor]
    points3d0: list[Tensor]
    points3d1: list[Tensor]
    draws: list[int]
    view_change_deg: list[float]
    keys0: list[tuple[str, int]]
    keys1: list[tuple[str, int]]
    versions0: list[int | None]
    versions1: list[int | None]

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def augmented(self) -> list[bool]:
        """B times whether either view of the pair differs from the rendered one."""
        return [both != (0, 0) for both in zip(self.versions0, self.versions1, strict=True)]

    def camera0(self, i: int) -> Camera:
        """Return the camera of image 0 of pair i.

        Args:
            i: Index in the batch.

        Returns:
            The camera.
        """
        return Camera(self.K0[i], (self.images0.shape[-2], self.images0.shape[-1]))

    def camera1(self, i: int) -> Camera:
        """Return the camera of image 1 of pair i.

        Args:
            i: Index in the batch.

        Returns:
            The camera.
        """
        return Camera(self.K1[i], (self.images1.shape[-2], self.images1.shape[-1]))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """Return the batch on a device.

        Args:
            device: Where to.
            non_blocking: Do not wait for copies from pinned memory.

        Returns:
            A new batch.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PairBatch:
        """Return the batch in pinned memory; the DataLoader calls this.

        Returns:
            A new batch.
        """
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> PairBatch:
        changes: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = function(value)
            elif value and isinstance(value[0], Tensor):
                changes[field.name] = [function(tensor) for tensor in value]
        return replace(self, **changes)


def collate_pairs(pairs: Sequence[Pair]) -> PairBatch:
    """Join pairs to a batch.

    Args:
        pairs: Pairs whose views have one size.

    Returns:
        The batch.

    Raises:
        ViewsError: Views of different sizes.
    """
    for pair in pairs:
        for image in (pair.image0, pair.image1):
            if image.shape != pairs[0].image0.shape:
                raise ViewsError(
                    f"{pairs[0].object_name} has views of {tuple(pairs[0].image0.shape[1:])} and "
                    f"{pair.object_name} of {tuple(image.shape[1:])} pixels: render both alike, "
                    "set data.captures.pad=true for photographs, or use batch_size=1"
                )
    return PairBatch(
        object_names=[p.object_name for p in pairs],
        images0=torch.stack([p.image0 for p in pairs]),
        images1=torch.stack([p.image1 for p in pairs]),
        masks0=torch.stack([p.mask0 for p in pairs]),
        masks1=torch.stack([p.mask1 for p in pairs]),
        depths0=torch.stack([p.depth0 for p in pairs]),
        depths1=torch.stack([p.depth1 for p in pairs]),
        K0=torch.stack([p.camera0.K for p in pairs]),
        K1=torch.stack([p.camera1.K for p in pairs]),
        cam1_from_cam0=torch.stack([p.cam1_from_cam0 for p in pairs]),
        keypoints0=[p.keypoints0 for p in pairs],
        keypoints1=[p.keypoints1 for p in pairs],
        points3d0=[p.points3d0 for p in pairs],
        points3d1=[p.points3d1 for p in pairs],
        draws=[p.draw for p in pairs],
        view_change_deg=[p.view_change_deg for p in pairs],
        keys0=[p.key0 for p in pairs],
        keys1=[p.key1 for p in pairs],
        versions0=[p.version0 for p in pairs],
        versions1=[p.version1 for p in pairs],
    )

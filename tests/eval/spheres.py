"""Spheres rendered in closed form: objects for the evaluation and the pictures."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.geometry.camera import Camera, invert, look_at, transform
from equifeat.geometry.pixels import pixel_centers, sample

RADIUS = 0.5


class SphereView(NamedTuple):
    image: Tensor
    depth: Tensor
    mask: Tensor
    camera: Camera
    cam_from_world: Tensor


class Sphere:
    """A sphere with a smooth texture, seen from a ring of cameras.

    Args:
        name: Name of the object.
        angles_deg: Azimuth of each view.
        size: Side of the images.
    """

    def __init__(
        self, name: str = "sphere", angles_deg: tuple[float, ...] = (0, 20, 50), size: int = 64
    ) -> None:
        self.name = name
        self.size_hw = (size, size)
        eyes = [
            (2.0 * math.cos(math.radians(a)), 2.0 * math.sin(math.radians(a)), 0.5)
            for a in angles_deg
        ]
        up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        target = torch.zeros(3, dtype=torch.float64)
        self.cam_from_world = look_at(torch.tensor(eyes, dtype=torch.float64), target, up)

    def __len__(self) -> int:
        return len(self.cam_from_world)

    def view(self, i: int) -> SphereView:
        K = Camera.from_focal(1.4 * self.size_hw[0], self.size_hw).K.double()
        camera = Camera(K, self.size_hw)
        pose = self.cam_from_world[i]
        xy = pixel_centers(self.size_hw, dtype=torch.float64).reshape(-1, 2)
        local = camera.unproject(xy, torch.ones(len(xy), dtype=torch.float64))
        R, t = pose[:3, :3], pose[:3, 3]
        eye, d = -(R.T @ t), local @ R
        a, b, c = (d * d).sum(-1), d @ eye, eye @ eye - RADIUS**2
        disc = b * b - a * c
        z = torch.where(disc > 0, (-b - disc.clamp_min(0).sqrt()) / a, torch.zeros_like(b))
        points = transform(invert(pose), camera.unproject(xy, z))
        mask = (z > 0).reshape(self.size_hw)
        color = 0.5 + 0.5 * torch.sin(9.0 * points + torch.tensor([0.0, 2.0, 4.0]).double())
        image = (color.reshape(*self.size_hw, 3) * mask[..., None]).permute(2, 0, 1).float()
        return SphereView(image, z.reshape(self.size_hw), mask, camera, pose)


class PointMap(NamedTuple):
    features: Tensor
    size_hw: tuple[int, int]

    def sample(self, keypoints: Tensor) -> Tensor:
        return sample(self.features, keypoints, self.size_hw)


class Oracle:
    """Paints object coordinates as features: it recognises a view by its image."""

    def __init__(self, *objects: Sphere) -> None:
        self.calls = 0
        self.known: list[tuple[Tensor, Tensor]] = []
        for obj in objects:
            for i in range(len(obj)):
                view = obj.view(i)
                xy = pixel_centers(obj.size_hw, dtype=torch.float64).reshape(-1, 2)
                local = view.camera.unproject(xy, view.depth.reshape(-1))
                points = transform(invert(view.cam_from_world), local).float()
                # A constant beside them keeps the direction of the descriptor unique.
                both = F.pad(points, (0, 1), value=0.5) * view.mask.reshape(-1, 1)
                self.known.append((view.image, both.T.reshape(1, 4, *obj.size_hw)))

    def dense(self, images: Tensor, resolution: int | None = None) -> PointMap:
        assert images.shape[0] == 1
        self.calls += 1
        for image, features in self.known:
            if image.shape == images.shape[1:] and torch.equal(image, images[0]):
                return PointMap(features, (int(images.shape[-2]), int(images.shape[-1])))
        raise AssertionError("the oracle has not seen this image")


class RandomFeatures:
    """Features that have nothing to do with the image."""

    def __init__(self, seed: int = 0, dim: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dim = dim

    def dense(self, images: Tensor, resolution: int | None = None) -> PointMap:
        h, w = int(images.shape[-2]), int(images.shape[-1])
        features = torch.randn(1, self.dim, h, w, generator=self.generator)
        return PointMap(features, (h, w))

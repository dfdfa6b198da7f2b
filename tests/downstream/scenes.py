"""Views of procedural objects, textured or painted with their own coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from data_prep.fixtures.scene import Scene
from data_prep.mesh import Mesh
from data_prep.procedural import make_object
from equifeat.data.object_views import View
from equifeat.geometry.camera import Camera, invert, look_at, transform
from equifeat.geometry.covisibility import surface_depth
from equifeat.model.extractor import FeatureExtractor, build_extractor


def ring(azimuths_deg: Sequence[float], elevation_deg: float, distance: float = 1.9) -> Tensor:
    """(V, 4, 4) cam_from_world of cameras around the origin; up is +y."""
    turn, rise = torch.deg2rad(torch.tensor(azimuths_deg).double()), math.radians(elevation_deg)
    height = torch.full_like(turn, math.sin(rise))
    eyes = torch.stack([turn.sin() * math.cos(rise), height, turn.cos() * math.cos(rise)], dim=-1)
    up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    return look_at(distance * eyes, torch.zeros(3, dtype=torch.float64), up)


def render(mesh: Mesh, poses: Tensor, painted: bool = False, size: int = 224) -> list[View]:
    """Views of a mesh from poses (V, 4, 4)."""
    camera = Camera.from_focal(1.25 * size, (size, size))
    camera = Camera(camera.K.double(), camera.size_hw)
    scene = Scene([mesh])
    out = []
    for pose in poses:
        shot = scene.shot(camera.K.numpy(), [pose.numpy()], (size, size), painted)
        image = torch.from_numpy(shot.color.astype(np.float32) / 255).permute(2, 0, 1)
        depth, mask = torch.from_numpy(shot.depth).double(), torch.from_numpy(shot.mask)
        out.append(View(image, depth, mask, camera, pose))
    scene.close()
    return out


@cache
def templates(seed: int = 3, painted: bool = False) -> list[View]:
    """Four views of a procedural object, every 30 degrees."""
    return render(make_object(seed), ring(range(0, 120, 30), 30.0), painted)


@cache
def queries(seed: int = 3, painted: bool = False) -> list[View]:
    """Views between those, from a little higher."""
    return render(make_object(seed), ring([15.0, 75.0], 38.0), painted)


def stretched(mesh: Mesh, factors: Sequence[float]) -> Mesh:
    """Another object of the same family: stretched along the axes, its colours exchanged."""
    by = np.asarray(factors, dtype=np.float32)
    parts = []
    for part in mesh.primitives:
        texture = part.texture
        if texture is not None:
            texture = np.ascontiguousarray(texture[..., [1, 2, 0, 3]])
        normals = part.normals / by
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        parts.append(replace(part, vertices=part.vertices * by, normals=normals, texture=texture))
    return replace(mesh, primitives=parts, name=f"{mesh.name}_stretched")


@cache
def dinov2() -> FeatureExtractor:
    """The packaged DINOv2 ViT-S/14, raw."""
    name = "vit_small_patch14_dinov2.lvd142m"
    return build_extractor(name, "packaged", lora_blocks=0).eval()


def surface_points(view: View, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random pixel centres (N, 2) of the object in a view, and the points (N, 3) there."""
    order = torch.randperm(int(view.mask.sum()), generator=torch.Generator().manual_seed(seed))
    row, column = view.mask.nonzero()[order[:count]].unbind(1)
    xy = torch.stack([column, row], dim=1) + 0.5
    local = view.camera.unproject(xy.double(), view.depth[row, column])
    return xy, transform(invert(view.cam_from_world), local)


def seen_at(points: Tensor, view: View, tolerance: float = 0.01) -> tuple[Tensor, Tensor]:
    """Where points (N, 3) are in a view, (N, 2), and whether they are seen there, (N,)."""
    local = transform(view.cam_from_world, points)
    xy = view.camera.project(local)
    depth, solid = surface_depth(view.depth, xy)
    return xy, solid & ((depth - local[:, 2]).abs() <= tolerance)

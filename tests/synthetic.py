"""View folders of shapes that are known in closed form, written without any renderer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equifeat.geometry.camera import Camera, look_at
from equifeat.geometry.pixels import pixel_centers

RADIUS = 0.5
HALF = torch.tensor([0.5, 0.35, 0.25], dtype=torch.float64)


def rays(camera: Camera, cam_from_world: Tensor) -> tuple[Tensor, Tensor]:
    """Origin (3,) and directions (H*W, 3) with z = 1 in the camera: ray parameter = z-depth."""
    xy = pixel_centers(camera.size_hw, dtype=torch.float64).reshape(-1, 2)
    return rays_at(camera, cam_from_world, xy)


def rays_at(camera: Camera, cam_from_world: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    pixels = xy.double()
    camera = Camera(camera.K.double(), camera.size_hw)
    pose = cam_from_world.double()
    local = camera.unproject(pixels, torch.ones(len(pixels), dtype=torch.float64))
    R, t = pose[:3, :3], pose[:3, 3]
    return -(R.T @ t), local @ R


def shape_depth(name: str, eye: Tensor, d: Tensor) -> Tensor:
    """Exact ray parameter of the first hit, 0 for a miss."""
    if name == "sphere":
        a, b, c = (d * d).sum(-1), d @ eye, eye @ eye - RADIUS**2
        disc = b * b - a * c
        return torch.where(disc > 0, (-b - disc.clamp_min(0).sqrt()) / a, torch.zeros_like(b))
    if name == "box":
        near, far = (-HALF - eye) / d, (HALF - eye) / d
        enter = torch.minimum(near, far).amax(-1)
        leave = torch.maximum(near, far).amin(-1)
        return torch.where(enter < leave, enter, torch.zeros_like(enter))
    raise ValueError(name)


def texture(points: Tensor) -> Tensor:
    """(N, 3) colours in [0.1, 0.9]: smooth, without symmetry, different on every face."""
    x, y, z = points.unbind(-1)
    waves = [
        torch.sin(9 * x + 5 * y + 1.0) * torch.cos(7 * z),
        torch.sin(11 * y - 6 * z + 0.3) * torch.cos(5 * x + 0.7),
        torch.sin(13 * z + 4 * x + 2.0),
    ]
    return 0.5 + 0.4 * torch.stack(waves, dim=-1)


def poses(views: int, distance: float = 2.0) -> Tensor:
    """(V, 4, 4) cam_from_world on a rising ring, neighbours 40 degrees apart in azimuth."""
    turn = torch.arange(views, dtype=torch.float64) * math.radians(40.0)
    rise = 0.35 * torch.sin(torch.arange(views, dtype=torch.float64)) + 0.3
    eye = distance * torch.stack(
        [turn.cos() * rise.cos(), turn.sin() * rise.cos(), rise.sin()], dim=-1
    )
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return look_at(eye, torch.zeros(3, dtype=torch.float64), up)


def render(name: str, camera: Camera, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Image (H, W, 3) in [0, 1] and exact z-depth (H, W), both float64."""
    eye, d = rays(camera, pose)
    depth = shape_depth(name, eye, d)
    color = texture(eye + d * depth[:, None]) * (depth > 0)[:, None]
    return color.reshape(*camera.size_hw, 3), depth.reshape(camera.size_hw)


def write_views(
    folder: Path,
    name: str = "sphere",
    views: int = 6,
    size: int = 96,
    object_name: str | None = None,
) -> Path:
    """Write an equifeat view folder of a textured sphere or box and return it.

    Args:
        folder: Folder that will hold views.json itself (made here).
        name: "sphere" or "box".
        views: Number of views.
        size: Height and width in pixels.
        object_name: Name in views.json; the shape's when None.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    K = Camera.from_focal(1.1 * size, (size, size)).K.double()
    camera = Camera(K, (size, size))
    shots = [render(name, camera, pose) for pose in poses(views)]
    step = max(float(depth.max()) for _, depth in shots) / 65535
    for i, (color, depth) in enumerate(shots):
        rgb = (color * 255).round().to(torch.uint8).numpy()
        Image.fromarray(rgb).save(folder / f"color_{i:06d}.png")
        raw = (depth / step).round().numpy().astype(np.uint16)
        Image.fromarray(raw).save(folder / f"depth_{i:06d}.png")
        mask = ((depth > 0) * 255).to(torch.uint8).numpy()
        Image.fromarray(mask).save(folder / f"mask_{i:06d}.png")
    meta = {
        "format": "equifeat-views",
        "version": 1,
        "object": object_name or name,
        "size_hw": [size, size],
        "depth_step": step,
        "object_scale": 1.0,
        "object_center": [0.0, 0.0, 0.0],
        "renderer": {"name": "analytic", "version": "1", "device": "CPU"},
        "source": {"file": f"{name}.analytic", "sha256": "0" * 64},
        "options": {},
        "views": [{"K": K.tolist(), "cam_from_world": p.tolist()} for p in poses(views)],
    }
    (folder / "views.json").write_text(json.dumps(meta, indent=1))
    return folder


def write_reference_views(folder: Path, name: str = "box", views: int = 3) -> Path:
    """Write the reference's BlenderProc layout (512 px, depth in millimetres) of a shape.

    The first poses of the 42 icosphere views are used when the layout is read, so the shape is
    rendered from those.
    """
    from equifeat.data.views import reference_poses

    folder.mkdir(parents=True, exist_ok=True)
    # BlenderProc's principal point 256 is integer-centred: 256.5 in corner pixels.
    K = torch.tensor([[560.0, 0, 256.5], [0, 560.0, 256.5], [0, 0, 1]], dtype=torch.float64)
    camera = Camera(K, (512, 512))
    for i, pose in enumerate(reference_poses()[:views]):
        color, depth = render(name, camera, pose.double())
        rgb = (color * 255).round().to(torch.uint8).numpy()
        Image.fromarray(rgb).save(folder / f"color_{i:06d}.png")
        Image.fromarray((depth * 1000).round().numpy().astype(np.uint16)).save(
            folder / f"depth_{i:06d}.png"
        )
        Image.fromarray(((depth > 0) * 255).to(torch.uint8).numpy()).save(
            folder / f"mask_{i:06d}.png"
        )
    return folder

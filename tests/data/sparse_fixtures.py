"""Small captures of shapes known in closed form, in the exact files of COLMAP, MVImgNet and CO3D.

Nothing here uses the readers: cameras, lenses and conversions are written from the formats'
documents, so that a shared mistake cannot hide.
"""

from __future__ import annotations

import gzip
import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equifeat.geometry.camera import Camera
from tests.synthetic import HALF, poses, rays_at, shape_depth, texture

# The capture's own, arbitrary coordinates: world = SCALE * TURN @ object + SHIFT.
SCALE = 3.7
SHIFT = torch.tensor([5.0, -2.0, 1.5], dtype=torch.float64)
TURN = torch.linalg.qr(
    torch.tensor([[0.2, -0.7, 0.4], [0.9, 0.1, 0.3], [-0.1, 0.5, 0.8]], dtype=torch.float64)
)[0]
TURN = TURN * torch.sign(torch.linalg.det(TURN))


@dataclass
class Truth:
    """What a capture shows.

    Attributes:
        folder: The object's folder.
        points: (P, 3) points on the surface, object coordinates.
        poses: (V, 4, 4) cam_from_object.
        cameras: Pinhole part of every photograph, in its own pixels.
        ks: First radial coefficient of every photograph, 0 for a pinhole.
        seen: For every view the rows of points that it sees.
        xy: For every view their pixels in the photograph as it is stored.
    """

    folder: Path
    points: Tensor
    poses: Tensor
    cameras: list[Camera] = field(default_factory=list)
    ks: list[float] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    xy: list[Tensor] = field(default_factory=list)

    def object_points(self, i: int, camera: Camera) -> Tensor:
        """(H, W, 3) surface points at the pixels of a pinhole view, NaN beside the box."""
        h, w = camera.size_hw
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        xy = torch.stack([x, y], -1).reshape(-1, 2)
        eye, d = rays_at(camera, self.poses[i], xy)
        depth = shape_depth("box", eye, d)
        points = torch.where(depth[:, None] > 0, eye + d * depth[:, None], torch.nan)
        return points.reshape(h, w, 3)


def bend(xy: Tensor, camera: Camera, k: float) -> Tensor:
    """Pinhole pixels to pixels of COLMAP's SIMPLE_RADIAL: u (1 + k |u|^2)."""
    f, c = camera.K[0, 0], camera.K[:2, 2]
    u = (xy - c) / f
    return u * (1 + k * (u * u).sum(-1, keepdim=True)) * f + c


def unbend(xy: Tensor, camera: Camera, k: float) -> Tensor:
    """Its inverse, by fixed points."""
    f, c = camera.K[0, 0], camera.K[:2, 2]
    target = (xy - c) / f
    u = target.clone()
    for _ in range(60):
        u = target / (1 + k * (u * u).sum(-1, keepdim=True))
    return u * f + c


def surface_points(count: int, seed: int = 0) -> Tensor:
    """(N, 3) points on the box of tests.synthetic, a little inside of its edges."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-0.96, 0.96, (count, 3))
    axis = rng.integers(3, size=count)
    points[np.arange(count), axis] = rng.choice([-1.0, 1.0], count)
    return torch.from_numpy(points) * HALF


def shoot(truth: Truth, i: int) -> tuple[Tensor, Tensor]:
    """Image (H, W, 3) and z-depth (H, W) of photograph i as the bent lens sees it."""
    camera, (h, w) = truth.cameras[i], truth.cameras[i].size_hw
    y, x = torch.meshgrid(
        torch.arange(h, dtype=torch.float64) + 0.5,
        torch.arange(w, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    xy = unbend(torch.stack([x, y], -1).reshape(-1, 2), camera, truth.ks[i])
    eye, d = rays_at(camera, truth.poses[i], xy)
    depth = shape_depth("box", eye, d)
    # A background that is not black, as photographs have it.
    wall = torch.stack([xy[:, 0] / w, xy[:, 1] / h, torch.full_like(xy[:, 0], 0.6)], -1).clamp(0, 1)
    color = torch.where(depth[:, None] > 0, texture(eye + d * depth[:, None]), wall)
    return color.reshape(h, w, 3), depth.reshape(h, w)


def observe(truth: Truth) -> None:
    """Fill in what every view sees of the points."""
    for i, camera in enumerate(truth.cameras):
        R, t = truth.poses[i, :3, :3], truth.poses[i, :3, 3]
        p = truth.points @ R.T + t
        pinhole = (p @ camera.K.T)[:, :2] / p[:, 2:]
        eye, d = rays_at(camera, truth.poses[i], pinhole)
        hit = shape_depth("box", eye, d)
        xy = bend(pinhole, camera, truth.ks[i])
        h, w = camera.size_hw
        inside = (xy > 0.5).all(-1) & (xy < torch.tensor([w, h]) - 0.5).all(-1)
        # Also inside after the lens is undone.
        inside &= (pinhole > 0.5).all(-1) & (pinhole < torch.tensor([w, h]) - 0.5).all(-1)
        rows = (((hit - p[:, 2]).abs() < 1e-9) & inside).nonzero()[:, 0]
        truth.seen.append(rows)
        truth.xy.append(xy[rows])


def world_pose(pose: Tensor) -> tuple[Tensor, Tensor]:
    """R, t of cam_from_world in the capture's coordinates (camera units are the capture's too)."""
    R = pose[:3, :3] @ TURN.T
    return R, SCALE * pose[:3, 3] - R @ SHIFT


def write_colmap(
    folder: Path,
    *,
    views: int = 5,
    size_hw: tuple[int, int] = (120, 160),
    lens: str = "SIMPLE_RADIAL",
    k: float = -0.12,
    mixed: bool = False,
    points: int = 500,
    noise: float = 0.0,
    masks: Path | None = None,
) -> Truth:
    """Write images/001.jpg ... and sparse/0/*.bin as COLMAP 3.x does, and return the truth.

    Beside the points on the box there are 40 of the background, 10 more of it that two views saw,
    and 10 with a large error; every image has a keypoint without a point.

    Args:
        folder: The object's folder.
        views: Number of photographs.
        size_hw: Their size.
        lens: COLMAP's lens model: SIMPLE_RADIAL, RADIAL, OPENCV or PINHOLE.
        k: First radial coefficient (0 for PINHOLE).
        mixed: Whether every other photograph is a pinhole's in portrait format.
        points: Points on the surface.
        noise: Standard deviation of the observations in pixels.
        masks: Folder for 001.jpg.png, or None.
    """
    (folder / "images").mkdir(parents=True)
    (folder / "sparse/0").mkdir(parents=True)
    truth = Truth(folder, surface_points(points), poses(views))
    k = 0.0 if lens == "PINHOLE" else k
    h, w = size_hw
    for i in range(views):
        turned = mixed and i % 2 == 1
        hw = (w, h) if turned else (h, w)
        f = 1.15 * min(hw)
        K = torch.tensor(
            [[f, 0, hw[1] / 2 + 1.7], [0, f, hw[0] / 2 - 2.3], [0, 0, 1]], dtype=torch.float64
        )
        truth.cameras.append(Camera(K, hw))
        truth.ks.append(0.0 if turned else k)
    observe(truth)
    for i in range(views):
        color, depth = shoot(truth, i)
        rgb = (color * 255).round().to(torch.uint8).numpy()
        Image.fromarray(rgb).save(folder / f"images/{i + 1:03d}.jpg", quality=97, subsampling=0)
        if masks is not None:
            masks.mkdir(parents=True, exist_ok=True)
            white = ((depth > 0) * 255).to(torch.uint8).numpy()
            Image.fromarray(white).save(masks / f"{i + 1:03d}.jpg.png")
    _write_model(folder / "sparse/0", truth, lens, mixed, noise)
    return truth


def _background(truth: Truth, count: int) -> tuple[Tensor, Tensor]:
    """(N, 3) points around the box that three views or more see, and where (V, N, 2), else NaN."""
    rng = np.random.default_rng(5)
    points = torch.from_numpy(rng.uniform(-1.6, 1.6, (20_000, 3)))
    where = torch.full((len(truth.cameras), len(points), 2), torch.nan, dtype=torch.float64)
    for i, camera in enumerate(truth.cameras):
        p = points @ truth.poses[i, :3, :3].T + truth.poses[i, :3, 3]
        pinhole = (p @ camera.K.T)[:, :2] / p[:, 2:]
        xy = bend(pinhole, camera, truth.ks[i])
        limit = torch.tensor([camera.size_hw[1], camera.size_hw[0]]) - 2.0
        seen = (p[:, 2] > 0.2) & (xy > 2).all(-1) & (xy < limit).all(-1)
        seen &= (pinhole > 2).all(-1) & (pinhole < limit).all(-1)
        # Two pixels beside the silhouette: a soft mask would call it the object.
        for dx, dy in ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)):
            eye, d = rays_at(camera, truth.poses[i], pinhole + torch.tensor([dx, dy]))
            seen &= shape_depth("box", eye, d) == 0
        where[i, seen] = xy[seen]
    chosen = (where.isfinite().all(-1).sum(0) >= 3).nonzero()[:count, 0]
    assert len(chosen) == count
    return points[chosen], where[:, chosen]


_LENS = {"PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4}


def _write_model(folder: Path, truth: Truth, lens: str, mixed: bool, noise: float) -> None:
    rng = np.random.default_rng(7)
    kinds: list[tuple[str, int]] = [(lens, 0)] + ([("PINHOLE", 1)] if mixed else [])
    cameras = [struct.pack("<Q", len(kinds))]
    for number, (kind, i) in enumerate(kinds):
        (f, _, cx), (_, _, cy), _ = truth.cameras[i].K.tolist()
        k = truth.ks[i]
        params = {
            "PINHOLE": [f, f, cx, cy],
            "SIMPLE_RADIAL": [f, cx, cy, k],
            "RADIAL": [f, cx, cy, k, 0.0],
            "OPENCV": [f, f, cx, cy, k, 0.0, 0.0, 0.0],
        }[kind]
        h, w = truth.cameras[i].size_hw
        cameras.append(struct.pack("<IiQQ", number + 1, _LENS[kind], w, h))
        cameras.append(struct.pack(f"<{len(params)}d", *params))
    (folder / "cameras.bin").write_bytes(b"".join(cameras))

    # Ids are neither contiguous nor in order.
    ids = (np.arange(len(truth.points) + 60) * 3 + 11)[::-1].copy()
    world = truth.points @ (SCALE * TURN).T + SHIFT
    behind, where = _background(truth, 50)
    xyz = torch.cat([world, behind @ (SCALE * TURN).T + SHIFT, world[:10]]).numpy()
    observations: list[list[tuple[float, float, int]]] = []
    tracks: dict[int, list[tuple[int, int]]] = {row: [] for row in range(len(xyz))}
    for i, camera in enumerate(truth.cameras):
        h, w = camera.size_hw
        shaken = truth.xy[i].numpy() + rng.normal(0, 1, truth.xy[i].shape) * noise
        rows = [*zip(truth.seen[i].tolist(), shaken.tolist(), strict=True)]
        base = len(truth.points)
        for b in range(50):
            known = [v for v in range(len(truth.cameras)) if bool(where[v, b].isfinite().all())]
            if i in known[: len(truth.cameras) if b < 40 else 2]:
                rows.append((base + b, where[i, b].tolist()))
        rows += [(base + 50 + b, [w / 2, h / 2 + b]) for b in range(10)]
        order = rng.permutation(len(rows))
        shuffled: list[tuple[float, float, int]] = [(3.0, 4.0, -1)]
        for at in order:
            row, (x, y) = rows[int(at)]
            tracks[row].append((i, len(shuffled)))
            shuffled.append((x, y, int(ids[row])))
        observations.append(shuffled)

    images = [struct.pack("<Q", len(truth.cameras))]
    for i in reversed(range(len(truth.cameras))):
        R, t = world_pose(truth.poses[i])
        images.append(struct.pack("<I7d", 100 + i, *_quaternion(R.numpy()), *t.tolist()))
        images.append(struct.pack("<I", 2 if mixed and i % 2 else 1))
        images.append(f"{i + 1:03d}.jpg".encode() + b"\0")
        images.append(struct.pack("<Q", len(observations[i])))
        images += [struct.pack("<ddq", *seen) for seen in observations[i]]
    (folder / "images.bin").write_bytes(b"".join(images))

    used = [row for row in tracks if tracks[row]]
    points = [struct.pack("<Q", len(used))]
    for row in used:
        error = 9.0 if row >= len(truth.points) + 50 else 0.5
        points.append(struct.pack("<Q3d3Bd", int(ids[row]), *xyz[row].tolist(), 9, 8, 7, error))
        points.append(struct.pack("<Q", len(tracks[row])))
        points += [struct.pack("<II", 100 + i, at) for i, at in tracks[row]]
    (folder / "points3D.bin").write_bytes(b"".join(points))


def _quaternion(R: Any) -> tuple[float, float, float, float]:
    """(w, x, y, z) of a rotation, by the largest component."""
    four = [
        1 + R[0, 0] + R[1, 1] + R[2, 2],
        1 + R[0, 0] - R[1, 1] - R[2, 2],
        1 - R[0, 0] + R[1, 1] - R[2, 2],
        1 - R[0, 0] - R[1, 1] + R[2, 2],
    ]
    k = int(np.argmax(four))
    s = 2 * math.sqrt(four[k])
    a, b, c = (R[2, 1] - R[1, 2]) / s, (R[0, 2] - R[2, 0]) / s, (R[1, 0] - R[0, 1]) / s
    xy, xz, yz = (R[0, 1] + R[1, 0]) / s, (R[0, 2] + R[2, 0]) / s, (R[1, 2] + R[2, 1]) / s
    q = [
        (s / 4, a, b, c),
        (a, s / 4, xy, xz),
        (b, xy, s / 4, yz),
        (c, xz, yz, s / 4),
    ][k]
    return float(q[0]), float(q[1]), float(q[2]), float(q[3])


def write_co3d(
    root: Path,
    *,
    category: str = "toybox",
    sequence: str = "110_13051_23361",
    views: int = 5,
    size_hw: tuple[int, int] = (120, 90),
    intrinsics: str = "ndc_isotropic",
    points: int = 3000,
    depth_noise: float = 0.0,
) -> Truth:
    """Write one sequence and its category's annotations as CO3Dv2 has them, and return the truth.

    Depth maps are float16 bits in 16-bit PNGs over scale_adjustment, with holes that the depth
    mask marks; the cloud is a binary PLY.
    """
    folder = root / category / sequence
    for kind in ("images", "masks", "depths", "depth_masks"):
        (folder / kind).mkdir(parents=True)
    truth = Truth(folder, surface_points(points), poses(views))
    h, w = size_hw
    rng = np.random.default_rng(3)
    entries = []
    scale = 4.25
    for i in range(views):
        f, cx, cy = 1.2 * min(h, w), w / 2 + 2.0, h / 2 - 3.0
        K = torch.tensor([[f, 0, cx], [0, f, cy], [0, 0, 1]], dtype=torch.float64)
        truth.cameras.append(Camera(K, size_hw))
        truth.ks.append(0.0)
        color, depth = shoot(truth, i)
        at = f"{category}/{sequence}"
        name = f"frame{i + 1:06d}"
        rgb = (color * 255).round().to(torch.uint8).numpy()
        Image.fromarray(rgb).save(folder / f"images/{name}.jpg", quality=97, subsampling=0)
        white = ((depth > 0) * 255).to(torch.uint8).numpy()
        Image.fromarray(white).save(folder / f"masks/{name}.png")
        stereo = depth.numpy() * SCALE * (1 + depth_noise * rng.normal(size=(h, w)))
        bits = (stereo / scale).astype(np.float16).view(np.uint16)
        Image.fromarray(bits).save(folder / f"depths/{name}.jpg.geometric.png")
        valid = np.where((depth.numpy() > 0) & (rng.random((h, w)) > 0.1), 255, 0)
        Image.fromarray(valid.astype(np.uint8)).save(folder / f"depth_masks/{name}.png")
        # PyTorch3D: x left, y up, row vectors; NDC halves of the shorter side or of each side.
        R, t = world_pose(truth.poses[i])
        half = [min(h, w) / 2] * 2 if intrinsics == "ndc_isotropic" else [w / 2, h / 2]
        viewpoint = {
            "R": [[-float(R[0, r]), -float(R[1, r]), float(R[2, r])] for r in range(3)],
            "T": [-float(t[0]), -float(t[1]), float(t[2])],
            "focal_length": [f / half[0], f / half[1]],
            "principal_point": [(w / 2 - cx) / half[0], (h / 2 - cy) / half[1]],
            "intrinsics_format": intrinsics,
        }
        entries.append(
            {
                "sequence_name": sequence,
                "frame_number": i,
                "frame_timestamp": 0.2 * i,
                "image": {"path": f"{at}/images/{name}.jpg", "size": [h, w]},
                "depth": {
                    "path": f"{at}/depths/{name}.jpg.geometric.png",
                    "scale_adjustment": scale,
                    "mask_path": f"{at}/depth_masks/{name}.png",
                },
                "mask": {"path": f"{at}/masks/{name}.png", "mass": float((depth > 0).sum())},
                "viewpoint": viewpoint,
                "meta": {"frame_type": "train"},
            }
        )
    observe(truth)
    file = root / category / "frame_annotations.jgz"
    if file.exists():
        entries = json.loads(gzip.decompress(file.read_bytes())) + entries
    file.write_bytes(gzip.compress(json.dumps(entries).encode()))
    cloud = truth.points @ (SCALE * TURN).T + SHIFT
    rows = np.zeros(points, [("xyz", "<f4", 3), ("normal", "<f4", 3), ("rgb", "u1", 3)])
    rows["xyz"] = cloud.numpy()
    header = "ply\nformat binary_little_endian 1.0\ncomment fixture\n"
    header += f"element vertex {points}\n"
    header += "".join(f"property float {n}\n" for n in ("x", "y", "z", "nx", "ny", "nz"))
    header += "".join(f"property uchar {n}\n" for n in ("red", "green", "blue")) + "end_header\n"
    (folder / "pointcloud.ply").write_bytes(header.encode() + rows.tobytes())
    return truth

"""Write one known object as a capture, in any convention and with any mistake in it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.procedural import make_object
from data_prep.render_object import RenderOptions, render_object
from data_prep.viewpoints import ViewpointOptions
from equifeat.data.views import open_views

Array = NDArray[Any]
SIZE, WIDE = 112, 144  # height and width, so that a mistake about them shows


@dataclass
class Scene:
    """Posed depth of one object: OpenCV axes, corner pixels, metres."""

    color: list[Array]
    depth: list[Array]
    mask: list[Array]
    K: Array
    poses: Array

    def replace(self, **changes: Any) -> Scene:
        return dataclasses.replace(self, **changes)


def make_scene(folder: Path, views: int = 14, seed: int = 1) -> Scene:
    """Render an object without symmetry; the pictures are widened and fx differs from fy."""
    options = RenderOptions(
        size=160,
        viewpoints=ViewpointOptions(count=views, roll_jitter=8, look_at_jitter=0.03, seed=2),
    )
    out = render_object(make_object(seed), folder, options, "embree")
    (views_,) = open_views(out)
    shots = [views_.view(i) for i in range(views)]
    top, left = (160 - SIZE) // 2 + 3, (160 - WIDE) // 2 - 2
    window = (slice(top, top + SIZE), slice(left, left + WIDE))
    K = views_.K.double().numpy().copy()
    K[:, 0, 2] -= left
    K[:, 1, 2] -= top
    return Scene(
        [(s.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)[window] for s in shots],
        [s.depth.double().numpy()[window] for s in shots],
        [s.mask.numpy()[window] for s in shots],
        K,
        views_.cam_from_world.double().numpy(),
    )


def noisy(scene: Scene, sigma: float = 2e-3, holes: float = 0.08) -> Scene:
    """Noise of a depth sensor, and holes."""
    rng = np.random.default_rng(5)
    depth = [
        np.where((rng.random(d.shape) < holes) | (d == 0), 0.0, d + rng.normal(0, sigma, d.shape))
        for d in scene.depth
    ]
    return scene.replace(depth=depth)


def ray_lengths(scene: Scene, i: int) -> Array:
    """Length of the ray through each pixel's centre to z = 1."""
    h, w = scene.depth[i].shape
    x, y = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    K = scene.K[i]
    lengths: Array = np.sqrt(((x - K[0, 2]) / K[0, 0]) ** 2 + ((y - K[1, 2]) / K[1, 1]) ** 2 + 1)
    return lengths


def write_plain(
    folder: Path,
    scene: Scene,
    *,
    encoding: str = "png",
    unit: float = 1e-3,
    ray: bool = False,
    masks: bool = True,
    pose_files: str = "folder",
) -> Path:
    """Pictures, depth, masks, poses and intrinsics side by side."""
    for name in ("images", "depth", *(["masks"] if masks else [])):
        (folder / name).mkdir(parents=True)
    for i, (color, depth, mask) in enumerate(
        zip(scene.color, scene.depth, scene.mask, strict=True)
    ):
        Image.fromarray(color).save(folder / "images" / f"{i}.png")
        if masks:
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{i}.png")
        stored = depth * (ray_lengths(scene, i) if ray else 1.0) / unit
        write_depth(folder / "depth" / str(i), stored, encoding)
    if pose_files == "folder":
        (folder / "pose").mkdir()
        for i, pose in enumerate(scene.poses):
            np.savetxt(folder / "pose" / f"{i}.txt", pose)
    elif pose_files == "npy":
        np.save(folder / "poses.npy", scene.poses)
    else:
        named = {f"{i}.png": pose.tolist() for i, pose in enumerate(scene.poses)}
        (folder / "poses.json").write_text(json.dumps(named))
    np.savetxt(folder / "intrinsics.txt", scene.K[0])
    return folder


def write_depth(stem: Path, depth: Array, encoding: str) -> None:
    name = stem.name
    if encoding == "png":
        levels = depth.round().clip(0, 65535).astype(np.uint16)
        Image.fromarray(levels).save(stem.with_name(f"{name}.png"))
    elif encoding == "npy":
        np.save(stem.with_name(f"{name}.npy"), depth.astype(np.float32))
    elif encoding == "npz":
        np.savez(stem.with_name(f"{name}.npz"), depth=depth.astype(np.float32))
    elif encoding == "tiff":
        Image.fromarray(depth.astype(np.float32)).save(stem.with_name(f"{name}.tiff"))
    elif encoding == "colmap":
        h, w = depth.shape
        data = f"{w}&{h}&1&".encode() + depth.astype("<f4").tobytes()
        stem.with_name(f"{name}.png.geometric.bin").write_bytes(data)
    else:
        raise ValueError(encoding)


def opengl_world_from_cam(poses: Array) -> Array:
    flip = np.diag([1.0, -1.0, -1.0, 1.0])
    out: Array = np.linalg.inv(poses) @ flip
    return out


def write_nerf(folder: Path, scene: Scene, *, flavour: str = "ngp", **extra: Any) -> Path:
    """transforms.json: "ngp" (shared fl_x), "frames" (intrinsics a frame), "blender" (angle)."""
    (folder / "images").mkdir(parents=True)
    (folder / "depth").mkdir()
    h, w = scene.depth[0].shape
    data: dict[str, Any] = {"frames": [], "integer_depth_scale": 1e-3, **extra}
    K = scene.K[0]
    pinhole = {
        "fl_x": K[0, 0],
        "fl_y": K[1, 1],
        "cx": K[0, 2],
        "cy": K[1, 2],
        "w": w,
        "h": h,
    }
    if flavour == "ngp":
        data.update(pinhole)
    if flavour == "blender":
        data["camera_angle_x"] = 2 * math.atan(0.5 * w / K[0, 0])
        data["cx"], data["cy"] = K[0, 2], K[1, 2]
    for i, pose in enumerate(opengl_world_from_cam(scene.poses)):
        rgba = np.dstack([scene.color[i], scene.mask[i].astype(np.uint8) * 255])
        Image.fromarray(rgba).save(folder / "images" / f"r_{i}.png")
        write_depth(folder / "depth" / f"r_{i}", scene.depth[i] / 1e-3, "png")
        frame: dict[str, Any] = {
            "file_path": f"./images/r_{i}" + ("" if flavour == "blender" else ".png"),
            "depth_file_path": f"depth/r_{i}.png",
            "transform_matrix": pose.tolist(),
        }
        if flavour == "frames":
            frame.update(pinhole)
        data["frames"].append(frame)
    (folder / "transforms.json").write_text(json.dumps(data))
    return folder


def write_colmap(folder: Path, scene: Scene) -> Path:
    """A COLMAP text model with dense depth maps; the model holds no points."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "stereo" / "depth_maps").mkdir(parents=True)
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    h, w = scene.depth[0].shape
    K = scene.K[0]
    (model / "cameras.txt").write_text(
        f"1 PINHOLE {w} {h} {K[0, 0]} {K[1, 1]} {K[0, 2]} {K[1, 2]}\n"
    )
    lines = []
    for i, pose in enumerate(scene.poses):
        q = quaternion(pose[:3, :3])
        numbers = " ".join(repr(float(v)) for v in (*q, *pose[:3, 3]))
        lines.append(f"{i + 1} {numbers} 1 {i:03d}.png\n\n")
        Image.fromarray(scene.color[i]).save(folder / "images" / f"{i:03d}.png")
        mask = Image.fromarray(scene.mask[i].astype(np.uint8) * 255)
        mask.save(folder / "masks" / f"{i:03d}.png")
        write_depth(folder / "stereo" / "depth_maps" / f"{i:03d}", scene.depth[i], "colmap")
    (model / "images.txt").write_text("".join(lines))
    (model / "points3D.txt").write_text("")
    return folder


def quaternion(R: Array) -> Array:
    """(w, x, y, z) of a rotation, by its eigenvector."""
    K = np.array(
        [
            [R[0, 0] - R[1, 1] - R[2, 2], 0, 0, 0],
            [R[0, 1] + R[1, 0], R[1, 1] - R[0, 0] - R[2, 2], 0, 0],
            [R[0, 2] + R[2, 0], R[1, 2] + R[2, 1], R[2, 2] - R[0, 0] - R[1, 1], 0],
            [R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1], np.trace(R)],
        ]
    )
    values, vectors = np.linalg.eigh(K / 3)
    q: Array = vectors[[3, 0, 1, 2], int(values.argmax())]
    return q

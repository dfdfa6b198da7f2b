"""Meshes and lights as the worker of the cycles renderer wants them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.primitives import Mesh, Primitive
from data_prep.renderers.lights import Lights

Array = NDArray[Any]


def linear_lights(lights: Lights, pose: Array) -> dict[str, Any]:
    """Turn shares of sRGB brightness into radiance; full brightness of white stays white."""
    total = float((lights.ambient + lights.colors.sum(axis=0) + lights.head).mean())
    scale = total**2.2 / max(total, 1e-6)
    toward_camera = -pose[2, :3]
    lamps = []
    if lights.environment is None:
        places = [*lights.places, np.array([*toward_camera, 0.0])]
        for place, color in zip(places, [*lights.colors, lights.head], strict=True):
            peak = float(color.max())
            if peak <= 0:
                continue
            # a white surface that faces a sun of pi W/m2 has radiance 1
            energy = math.pi * scale * peak
            if place[3] != 0:
                energy *= 4.0 * math.pi * float((place[:3] ** 2).sum())
            lamps.append(
                {
                    "direction": bool(place[3] == 0),
                    "place": place[:3].tolist(),
                    "color": (color / peak).tolist(),
                    "energy": energy,
                }
            )
    return {
        "lamps": lamps,
        "sky": (lights.ambient * lights.sky * scale).tolist(),
        "environment": str(lights.environment.resolve()) if lights.environment else "",
        "turn": lights.environment_turn,
        "strength": total**2.2,
    }


def pack_mesh(mesh: Mesh) -> tuple[dict[str, Any], dict[str, Array]]:
    """Lay a mesh out for the worker; textures that parts share go once."""
    parts: list[dict[str, Any]] = []
    arrays: dict[str, Array] = {}
    textures: dict[int, int] = {}
    for i, part in enumerate(mesh.primitives):
        has_texture = part.texture is not None and part.uv is not None
        if has_texture:
            number = textures.setdefault(id(part.texture), len(textures))
            arrays[f"texture{number}"] = np.asarray(part.texture, np.uint8)
            arrays[f"uv{i}"] = np.asarray(part.uv, np.float32)
        arrays[f"points{i}"] = np.asarray(part.vertices, np.float32)
        arrays[f"normals{i}"] = np.asarray(part.normals, np.float32)
        arrays[f"faces{i}"] = _wound_by_normals(part)
        if part.vertex_colors is not None:
            colors = np.asarray(part.vertex_colors, np.float32).copy()
            colors[:, :3] = _linear(colors[:, :3])
            arrays[f"colors{i}"] = colors
        base = np.array(part.base_color, np.float64)
        parts.append(
            {
                "texture": textures[id(part.texture)] if has_texture else None,
                "base_color": [*_linear(base[:3]).tolist(), float(base[3])],
                "cutoff": float(part.cutoff) if part.cuts else 0.0,
                "wrap": list(part.wrap),
            }
        )
    return {"do": "load", "parts": parts}, arrays


def _wound_by_normals(part: Primitive) -> Array:
    """Turn triangles that disagree with their normals: Cycles takes the front from the winding."""
    corners = part.vertices[part.faces]
    side = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    against = np.einsum("fc,fc->f", side, part.normals[part.faces].mean(axis=1)) < 0
    faces = np.array(part.faces, np.int32)
    faces[against] = faces[against][:, ::-1]
    return faces


def _linear(srgb: Array) -> Array:
    """Decode sRGB values (IEC 61966-2-1)."""
    low, high = srgb / 12.92, ((srgb.clip(0.0) + 0.055) / 1.055) ** 2.4
    out: Array = np.where(srgb <= 0.04045, low, high).astype(srgb.dtype)
    return out

"""Vertex normals for meshes that have none: smooth over shallow edges, sharp over creases."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Vertices shared by more corners than this (fans, poles) are shaded flat: pairs grow as its square.
_MAX_VALENCE = 64


def corner_normals(
    vertices: NDArray[Any], faces: NDArray[Any], crease_deg: float = 40.0
) -> NDArray[np.float32]:
    """Return one normal for each corner of each triangle.

    A corner's normal is the area-weighted mean of the normals of those triangles at the same
    position that are within the crease angle of its own triangle.

    Args:
        vertices: (V, 3) positions; equal positions count as one vertex.
        faces: (F, 3) indices.
        crease_deg: Largest angle between triangles that are shaded as one surface.

    Returns:
        (3F, 3) unit normals; (0, 0, 1) for triangles without area.
    """
    corners = vertices[faces].astype(np.float64)
    area = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(area, axis=1, keepdims=True)
    flat = np.where(length > 0, area / np.where(length > 0, length, 1.0), [0.0, 0.0, 1.0])
    _, position = np.unique(
        np.ascontiguousarray(vertices[faces.reshape(-1)].astype(np.float32) + 0.0).view("V12"),
        return_inverse=True,
    )
    position = position.reshape(-1)
    order = np.argsort(position, kind="stable")
    counts = np.bincount(position)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    valence = counts[position]
    total = np.zeros((len(position), 3))
    cosine = np.cos(np.deg2rad(crease_deg))
    mine = np.arange(len(position))
    for step in range(min(int(counts.max()), _MAX_VALENCE)):
        live = mine[(valence > step) & (valence <= _MAX_VALENCE)]
        other = order[starts[position[live]] + step]
        near = (flat[live // 3] * flat[other // 3]).sum(axis=1) >= cosine
        live, other = live[near], other[near]
        total[live] += area[other // 3]
    norm = np.linalg.norm(total, axis=1, keepdims=True)
    own = flat[mine // 3]
    return np.where(norm > 0, total / np.where(norm > 0, norm, 1.0), own).astype(np.float32)

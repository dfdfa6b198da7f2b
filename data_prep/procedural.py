"""Seeded, textured, asymmetric compound objects, so that demo and tests need no download.

An object is a carved body with a dozen parts stuck on it and on each other: boxes, cylinders,
cones, tori, gears, tubes, wedges. Each part has its own texture atlas, and each side of a part its
own cell in it, so that hardly two places of an object look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.mesh import Mesh, mesh_from_bytes
from data_prep.procedural_textures import texture_atlas
from equifeat.errors import LazyExtra, RenderError
from equifeat.seeding import numpy_generator

Array = NDArray[Any]
_trimesh: Any = LazyExtra("trimesh", "render", "Making example meshes")
_shapes: Any = LazyExtra("trimesh.creation", "render", "Making example meshes")
_COLUMNS, _ROWS = 3, 2


def make_object(seed: int) -> Mesh:
    """Make one object.

    Args:
        seed: From 0; other seeds give other shapes, textures and arrangements.

    Returns:
        The mesh, read back from the very GLB bytes that `write_procedural` writes.
    """
    return mesh_from_bytes(Path(f"{object_name(seed)}.glb"), _glb(seed))


def write_procedural(folder: str | Path, seeds: Iterable[int]) -> list[Path]:
    """Write objects as GLB files.

    Args:
        folder: Made if needed.
        seeds: One object each.

    Returns:
        The files, in the order of the seeds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in seeds:
        path = folder / f"{object_name(seed)}.glb"
        temporary = path.with_suffix(".glb.partial")
        temporary.write_bytes(_glb(seed))
        temporary.replace(path)
        paths.append(path)
    return paths


def object_name(seed: int) -> str:
    """Return the name of the object of a seed."""
    return f"procedural_{seed:04d}"


def _glb(seed: int) -> bytes:
    if seed < 0:
        raise RenderError(f"seed = {seed}: give a number from 0")
    rng = numpy_generator(seed, 7)
    parts = [_body(rng)]
    for _ in range(int(rng.integers(9, 15))):
        # mostly on the body, sometimes on a part: arms, handles, wheels on axles
        host = parts[0] if rng.uniform() < 0.65 else parts[int(rng.integers(len(parts)))]
        parts.append(_attached(rng, host))
    scene = _trimesh.Scene()
    for i, part in enumerate(parts):
        atlas = texture_atlas(rng, 192 if i == 0 else 128, _COLUMNS, _ROWS)
        scene.add_geometry(_textured(part, atlas), geom_name=f"part_{i}")
    data: bytes = scene.export(file_type="glb", include_normals=False)
    return data


def _body(rng: np.random.Generator) -> Any:
    """Carve a big shape with two to four holes and notches."""
    size = rng.uniform([0.8, 0.45, 0.35], [1.2, 0.8, 0.7])
    kind = int(rng.integers(4))
    if kind == 0:
        shape = _shapes.box(size)
    elif kind == 1:
        shape = _shapes.cylinder(radius=0.5, height=1.0, sections=40)
    elif kind == 2:
        shape = _shapes.icosphere(subdivisions=3, radius=0.55)
    else:
        shape = _shapes.box((1.0, 1.0, 0.45))
        block = _shapes.box((0.5, 1.0, 1.0))
        block.apply_translation([rng.uniform(-0.25, 0.25), 0.0, 0.4])
        shape = _trimesh.boolean.union([shape, block], engine="manifold")
    if kind:
        shape.apply_scale(size)
    shape.apply_transform(_rotation(rng))
    for _ in range(int(rng.integers(2, 5))):
        point, normal = _surface_point(rng, shape)
        if rng.uniform() < 0.5:
            tool = _shapes.cylinder(radius=rng.uniform(0.05, 0.14), height=0.5, sections=28)
        else:
            tool = _shapes.box(rng.uniform([0.1, 0.1, 0.2], [0.3, 0.25, 0.4]))
        tool.apply_transform(_frame(rng, point, normal))
        carved = _trimesh.boolean.difference([shape, tool], engine="manifold")
        shape = carved if len(carved.faces) > 8 else shape
    return shape


def _attached(rng: np.random.Generator, host: Any) -> Any:
    """Make a part that stands on a random place of the host."""
    part = _SHAPES[int(rng.integers(len(_SHAPES)))](rng)
    part.apply_scale(rng.uniform(0.6, 1.4))
    low = part.bounds[0][2]
    part.apply_translation([0.0, 0.0, -low - 0.15 * part.extents[2]])
    point, normal = _surface_point(rng, host)
    tilt = normal + rng.normal(0.0, 0.25, 3)
    part.apply_transform(_frame(rng, point, tilt / np.linalg.norm(tilt)))
    return part


def _gear(rng: np.random.Generator) -> Any:
    """Make a toothed wheel with an off-centre hole, turned as a surface of columns."""
    wheel = _shapes.cylinder(radius=0.15, height=0.09, sections=32)
    teeth = int(rng.integers(6, 11))
    solids = [wheel]
    for i in range(teeth):
        tooth = _shapes.box((0.07, 0.05, 0.09))
        tooth.apply_translation([0.17, 0.0, 0.0])
        turn = 2 * np.pi * i / teeth
        solids.append(
            tooth.apply_transform(_trimesh.transformations.rotation_matrix(turn, [0, 0, 1]))
        )
    hole = _shapes.cylinder(radius=0.05, height=0.3, sections=20)
    hole.apply_translation([0.05, 0.0, 0.0])
    union = _trimesh.boolean.union(solids, engine="manifold")
    return _trimesh.boolean.difference([union, hole], engine="manifold")


def _wedge(rng: np.random.Generator) -> Any:
    """Cut a box by a slanted plane."""
    block, tool = (
        _shapes.box(rng.uniform([0.2, 0.15, 0.15], [0.45, 0.3, 0.3])),
        _shapes.box((1.0, 1.0, 1.0)),
    )
    tool.apply_translation([0.0, 0.0, 0.53])
    tool.apply_transform(
        _trimesh.transformations.rotation_matrix(rng.uniform(0.3, 0.8), [0.3, 1.0, 0.0])
    )
    return _trimesh.boolean.difference([block, tool], engine="manifold")


_SHAPES: list[Callable[[np.random.Generator], Any]] = [
    lambda r: _shapes.box(r.uniform([0.1, 0.08, 0.1], [0.4, 0.25, 0.45])),
    lambda r: _shapes.cylinder(
        radius=r.uniform(0.04, 0.12), height=r.uniform(0.2, 0.6), sections=28
    ),
    lambda r: _shapes.cone(radius=r.uniform(0.08, 0.18), height=r.uniform(0.2, 0.45), sections=28),
    lambda r: _shapes.torus(
        r.uniform(0.12, 0.2), r.uniform(0.03, 0.06), major_sections=30, minor_sections=14
    ),
    lambda r: _shapes.capsule(
        height=r.uniform(0.1, 0.4), radius=r.uniform(0.05, 0.1), count=[16, 16]
    ),
    lambda r: _shapes.annulus(
        r.uniform(0.05, 0.09), r.uniform(0.11, 0.17), r.uniform(0.08, 0.35), sections=28
    ),
    lambda r: _shapes.icosphere(subdivisions=2, radius=r.uniform(0.08, 0.16)).apply_scale(
        r.uniform([0.6, 0.8, 1.0], [1.0, 1.2, 1.5])
    ),
    _gear,
    _wedge,
]


def _rotation(rng: np.random.Generator) -> Array:
    matrix = np.eye(4)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    matrix[:3, :3] = q * np.sign(np.linalg.det(q))
    return matrix


def _frame(rng: np.random.Generator, point: Array, normal: Array) -> Array:
    """Return a transform that carries +z to the normal and the origin to the point."""
    side = np.cross(normal, rng.normal(size=3))
    side /= np.linalg.norm(side)
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([side, np.cross(normal, side), normal], axis=1)
    matrix[:3, 3] = point
    return matrix


def _surface_point(rng: np.random.Generator, mesh: Any) -> tuple[Array, Array]:
    area = mesh.area_faces
    face = int(rng.choice(len(area), p=area / area.sum()))
    point = rng.dirichlet([1.0, 1.0, 1.0]) @ mesh.triangles[face]
    normal: Array = np.asarray(mesh.face_normals[face])
    return point, normal


def _textured(part: Any, atlas: Any) -> Any:
    """Project each triangle along the axis it faces most, into that side's cell of the atlas."""
    corners = np.asarray(part.triangles, dtype=np.float64)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    axis = np.abs(normals).argmax(axis=1)
    front = np.take_along_axis(normals, axis[:, None], axis=1)[:, 0] > 0
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    # one scale for all axes keeps letters undistorted
    unit = (corners - (low + high) / 2) / (high - low).max() + 0.5
    across = np.array([[1, 2], [2, 0], [0, 1]])[axis]
    uv = np.take_along_axis(unit, across[:, None, :].repeat(3, axis=1), axis=2)
    margin = 2.0 / (atlas.width / _COLUMNS)
    uv = margin + uv * (1 - 2 * margin)
    cell = np.stack([axis, front.astype(int)], axis=1)[:, None, :]
    uv = (uv + cell) / [_COLUMNS, _ROWS]
    material = _trimesh.visual.material.PBRMaterial(
        baseColorTexture=atlas, metallicFactor=0.0, roughnessFactor=0.9
    )
    return _trimesh.Trimesh(
        vertices=corners.reshape(-1, 3),
        faces=np.arange(3 * len(corners)).reshape(-1, 3),
        visual=_trimesh.visual.TextureVisuals(uv=uv.reshape(-1, 2), material=material),
        process=False,
    )

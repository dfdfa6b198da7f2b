"""Poses and intrinsics of a capture: one file of all, or one file a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.capture_files import MATRIX_SUFFIXES, key_of, read_matrices
from equifeat.errors import ViewsError

Array = NDArray[Any]


def per_view(
    source: Path | dict[Any, Path] | None,
    images: dict[Any, Path],
    shape: tuple[int, int],
    what: str,
) -> list[Array]:
    """Read one matrix a picture.

    Args:
        source: A file of all, a folder of files, files by key, or None.
        images: The pictures by key, in order.
        shape: (4, 4) for poses, (3, 3) for intrinsics; one of these may serve all pictures.
        what: What messages call them.

    Returns:
        Matrices in the order of the pictures.

    Raises:
        ViewsError: Some are missing, or are no such matrices.
    """
    if source is None:
        raise ViewsError(f"{what} are missing; write poses.npy of (views, 4, 4) or pose/000000.txt")
    count = len(images)
    named: dict[Any, Array]
    if isinstance(source, Path) and source.is_file():
        table = read_matrices(source)
        if isinstance(table, dict):
            if "fx" in table:
                one = np.array([float(table[k]) for k in ("fx", "fy", "cx", "cy")])
                return [_K33(one, what)] * count
            named = {key_of(Path(name)): value for name, value in table.items()}
        else:
            return _split(table, count, shape, f"{source}")
    else:
        folder_files = (
            [f for f in source.glob("*") if f.suffix.lower() in MATRIX_SUFFIXES]
            if isinstance(source, Path)
            else list(source.values())
        )
        named = {}
        for file in folder_files:
            value = read_matrices(file)
            if isinstance(value, dict):
                raise ViewsError(f"{file}: expected numbers, not names")
            named[key_of(file)] = value
        if shape == (3, 3) and len(named) == 1:
            return _split(next(iter(named.values())), count, shape, what)
    missing = [path.name for key, path in images.items() if key not in named]
    if missing:
        raise ViewsError(f"{what} of {len(missing)} of {count} pictures are missing: {missing[0]}")
    make = _K33 if shape == (3, 3) else matrix44
    return [make(named[key], f"{what} of {path.name}") for key, path in images.items()]


def _split(table: Array, count: int, shape: tuple[int, int], what: str) -> list[Array]:
    make = _K33 if shape == (3, 3) else matrix44
    if shape == (3, 3) and (table.size in (4, 9) or table.shape in ((4, 4), (3, 4))):
        return [make(table, what)] * count
    size = next(
        (s for s in ((16, 12) if shape == (4, 4) else (9, 4)) if table.size == count * s), 0
    )
    if not size:
        raise ViewsError(f"{what}: {table.shape} numbers for {count} pictures; one a picture")
    return [make(part, what) for part in table.reshape(count, -1)]


def matrix44(values: Array, what: str) -> Array:
    """Return 16 or 12 numbers as a matrix.

    Args:
        values: The numbers, row by row; 12 lack the last row.
        what: What messages call them.

    Returns:
        (4, 4).

    Raises:
        ViewsError: Another count, or not finite.
    """
    if values.size == 12:
        return np.concatenate([values.reshape(3, 4), [[0.0, 0.0, 0.0, 1.0]]])
    if values.size != 16 or not np.isfinite(values).all():
        raise ViewsError(f"{what}: not a 4x4 or 3x4 matrix of finite numbers")
    return values.reshape(4, 4)


def _K33(values: Array, what: str) -> Array:  # noqa: N802
    if values.size == 4:
        fx, fy, cx, cy = values.reshape(-1)
        return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    if values.shape in ((4, 4), (3, 4)):
        values = values[:3, :3]
    if values.size != 9 or not np.isfinite(values).all():
        raise ViewsError(f"{what}: not a 3x3 matrix of finite numbers, nor fx fy cx cy")
    return values.reshape(3, 3)

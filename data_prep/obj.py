"""OBJ files to parts of a mesh, one a material and a kind of corner.

Read here and not by trimesh 5.2, which follows any path, reads the first material library only,
drops all texture coordinates when one index is wrong or some faces have none, ignores the options
of map_Kd, paints what has no colour grey, and takes relative indices from the end of the file.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf_guard import local_file
from data_prep.limits import Budget
from data_prep.mtl import ObjMaterial, read_library
from data_prep.primitives import Primitive, shifted_uv
from equifeat.errors import MeshError

Array = NDArray[Any]
_KINDS = ("v", "vt", "vn")
_COLUMNS = {"v": [0], "v/vt": [0, 1], "v//vn": [0, 2], "v/vt/vn": [0, 1, 2]}
# Faces whose corners are all alike, without relative indices: nearly all there are.
_REGULAR = {
    kind: re.compile(rf"(?:{corner}\s+)+{corner}\s*")
    for kind, corner in (
        ("v/vt/vn", r"\d{1,12}/\d{1,12}/\d{1,12}"),
        ("v/vt", r"\d{1,12}/\d{1,12}"),
        ("v//vn", r"\d{1,12}//\d{1,12}"),
        ("v", r"\d{1,12}"),
    )
}


def read_obj(path: Path, data: bytes, budget: Budget) -> list[tuple[Array, Primitive]]:
    """Read an OBJ file with all its material libraries.

    Args:
        path: The OBJ file.
        data: Its content.
        budget: Accounts for what it asks for.

    Returns:
        Vertices (V, 3) float64 of each part, and the rest as a primitive without vertices.

    Raises:
        MeshError: Damaged or too large, without triangles, or a reference leaves the folder or is
            missing.
    """
    return _ObjReader(path, budget).run(data)


class _ObjReader:
    def __init__(self, path: Path, budget: Budget) -> None:
        self._path = path
        self._budget = budget
        self._materials: dict[str, ObjMaterial] = {}
        self._images: dict[str, Array] = {}
        self._lines: dict[str, list[str]] = {kind: [] for kind in _KINDS}
        # (material, corners a face, indices a corner) -> one row of numbers a face
        self._faces: dict[tuple[str, int, str], list[Array | str]] = defaultdict(list)

    def run(self, data: bytes) -> list[tuple[Array, Primitive]]:
        # strings of lines take more memory than their numbers
        self._budget.values(7 * data.count(b"\n"))
        self._scan(data.decode("utf-8", errors="replace"))
        if not self._lines["v"]:
            raise MeshError(
                f"{self._path}: has no vertices ('v' lines); it is empty or not an OBJ file"
            )
        if not self._faces:
            raise MeshError(
                f"{self._path}: it holds points or lines only, and no triangles to render"
            )
        vertices, colors = self._vertices()
        tables = {kind: self._table(kind, least) for kind, least in (("vt", 2), ("vn", 3))}
        corners: dict[tuple[str, str], list[Array]] = defaultdict(list)
        for (material, count, kind), rows in self._faces.items():
            corners[material, kind].append(self._triangles(rows, count, kind))
        self._budget.nodes(len(corners), "parts")
        return [
            self._part(name, np.concatenate(found), vertices, colors, tables)
            for (name, _), found in corners.items()
        ]

    def _scan(self, text: str) -> None:
        """Sort the lines of the file; numbers are parsed afterwards, many at a time."""
        text = text.replace("\\\r\n", " ").replace("\\\n", " ")
        material, lines, triangles = "", self._lines, 0
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split(None, 1)
            if len(words) < 2:
                continue
            key, rest = words
            if key in lines:
                lines[key].append(rest)
            elif key == "f":
                count = len(rest.partition("#")[0].split())
                if count < 3:
                    continue  # has no area
                triangles += count - 2
                if triangles > self._budget.limits.max_triangles:
                    break
                self._face(number, rest, material)
            elif key == "usemtl":
                material = rest.strip()
            elif key == "mtllib":
                self._libraries(rest.strip())
        self._budget.triangles(triangles)

    def _libraries(self, names: str) -> None:
        # several names on one line, or one name with spaces
        try:
            split = [names] if local_file(self._path, names) else []
        except MeshError:
            split = names.split()
        for name in split:
            found = read_library(self._path, name, self._budget, self._images)
            self._materials = {**found, **self._materials}

    def _face(self, number: int, rest: str, material: str) -> None:
        rest = rest.partition("#")[0]
        words = rest.split()
        for kind, pattern in _REGULAR.items():
            if pattern.fullmatch(rest):
                self._faces[material, len(words), kind].append(rest)
                return
        rows = np.array([self._corner(number, word) for word in words])
        # one corner without texture coordinates takes them from the whole face
        texture, normal = (bool((rows[:, column] > 0).all()) for column in (1, 2))
        kind = "v" + ("/vt" if texture else "/" if normal else "") + ("/vn" if normal else "")
        self._faces[material, len(words), kind].append(rows[:, _COLUMNS[kind]].reshape(-1))

    def _corner(self, number: int, word: str) -> list[int]:
        """Return v, vt and vn of one corner, counted from 1; 0 where there is none."""
        fields = [*word.split("/"), "", ""][:3]
        try:
            values = [int(text) if text else 0 for text in fields]
        except ValueError:
            values = [0]
        for i, kind in enumerate(_KINDS[: len(values)]):
            if values[i] < 0:
                # relative indices count back from their own line
                values[i] += len(self._lines[kind]) + 1
                if values[i] < 1:
                    values = [0]
                    break
        if values[0] == 0 or max(values) > 2**40:
            raise MeshError(
                f"{self._path}: line {number} has the corner {word!r:.40}, which is not there or "
                "counts back too far; the file is damaged"
            )
        return values

    def _triangles(self, rows: list[Array | str], count: int, kind: str) -> Array:
        """Return (T, 3, 3): v, vt and vn of each corner counted from 0, -1 where there is none."""
        columns = _COLUMNS[kind]
        texts = [row for row in rows if isinstance(row, str)]
        values = [row for row in rows if not isinstance(row, str)]
        if texts:
            joined = " ".join(texts).replace("//", " ").replace("/", " ")
            values.append(np.fromstring(joined, dtype=np.int64, sep=" "))
        table = np.concatenate(values).reshape(-1, count, len(columns))
        if (table < 1).any():
            raise MeshError(f"{self._path}: a face uses index {table.min()}; they count from 1")
        faces = np.full((*table.shape[:2], 3), -1)
        faces[..., columns] = table - 1
        fan = [faces[:, [0, i, i + 1]] for i in range(1, count - 1)]
        return np.stack(fan, axis=1).reshape(-1, 3, 3)

    def _vertices(self) -> tuple[Array, Array | None]:
        """Return positions, and colours where any vertex has them (white where others do not)."""
        table = self._table("v", 3)
        if table.shape[1] < 6:
            return table[:, :3], None
        colors = np.nan_to_num(table[:, 3:6], nan=1.0)
        colors = np.clip(colors / (255.0 if colors.max() > 1.0 else 1.0), 0.0, 1.0)
        return table[:, :3], np.concatenate([colors, np.ones((len(colors), 1))], axis=1)

    def _table(self, kind: str, least: int) -> Array:
        """Parse the lines of a kind; what a line lacks is NaN."""
        lines = self._lines[kind]
        if any("#" in line for line in lines):
            lines = [line.partition("#")[0] for line in lines]
        widths = np.array([len(line.split()) for line in lines], dtype=np.int64)
        if not len(widths):
            return np.zeros((0, least))
        width = int(widths.max())
        # 1D texture coordinates are allowed, everything else that is short is not
        if width > 16 or (widths.min() < least and kind != "vt"):
            raise MeshError(
                f"{self._path}: its '{kind}' lines have {widths.min()} to {width} numbers; the "
                "file is damaged"
            )
        try:
            with warnings.catch_warnings():
                # NumPy says so when it stops before the end of the text
                warnings.simplefilter("error", DeprecationWarning)
                flat = np.fromstring(" ".join(lines), dtype=np.float64, sep=" ")
        except (ValueError, DeprecationWarning) as error:
            raise MeshError(
                f"{self._path}: its '{kind}' lines hold something that is no number; it is damaged"
            ) from error
        if len(flat) != widths.sum():
            raise MeshError(f"{self._path}: its '{kind}' lines cannot be read; it is damaged")
        self._budget.values(len(lines) * max(width, least))
        table = np.full((len(lines), max(width, least)), 0.0 if kind == "vt" else np.nan)
        table[np.arange(table.shape[1]) < widths[:, None]] = flat
        return table

    def _part(
        self,
        name: str,
        corners: Array,
        vertices: Array,
        colors: Array | None,
        tables: dict[str, Array],
    ) -> tuple[Array, Primitive]:
        for column, kind in ((0, "v"), (1, "vt")):
            count = len(vertices if kind == "v" else tables[kind])
            top = int(corners[..., column].max())
            if top >= count:
                raise MeshError(
                    f"{self._path}: a face uses '{kind}' {top + 1} of {count}; the file is damaged"
                )
        if corners[..., 2].max() >= len(tables["vn"]):
            corners[..., 2] = -1  # normals only shade, and are computed instead
        # each different corner becomes a vertex
        flat = corners.reshape(-1, 3) + 1
        pair = flat[:, 0] * (len(tables["vt"]) + 1) + flat[:, 1]
        if flat[:, 2].any():
            # numbered anew, so that the product stays within 64 bits
            pair = np.unique(pair, return_inverse=True)[1].reshape(-1)
            pair = pair * (len(tables["vn"]) + 1) + flat[:, 2]
        _, first, number = np.unique(pair, return_index=True, return_inverse=True)
        chosen, faces = flat[first] - 1, number.reshape(-1, 3).astype(np.int32)
        # a material that no library defines is white
        material = self._materials.get(name, ObjMaterial())
        positions = vertices[chosen[:, 0]]
        bad = int((~np.isfinite(positions)).any(axis=1).sum())
        if bad:
            raise MeshError(
                f"{self._path}: {bad} of {len(positions)} vertices of material {name!r:.80} are "
                "NaN or infinite; repair the file in the program it came from"
            )
        options: dict[str, Any] = {}
        red, green, blue = material.color
        if material.texture is not None and chosen[0, 1] >= 0:
            uv = tables["vt"][chosen[:, 1], :2] * material.scale + material.offset
            options["wrap"] = (material.wrap, material.wrap)
            options["uv"] = shifted_uv(self._path, uv * [1, -1] + [0, 1], options["wrap"])
            options["texture"] = material.texture
        elif colors is not None:
            # exporters leave a grey Kd beside vertex colours
            options["vertex_colors"] = colors[chosen[:, 0]].astype(np.float32)
            red, green, blue = 1.0, 1.0, 1.0
        normals = np.zeros((0, 3))
        if chosen[0, 2] >= 0:
            normals = tables["vn"][chosen[:, 2], :3]
        texture = options.get("texture")
        if material.alpha < 1.0 or (texture is not None and (texture[..., 3] < 255).any()):
            options["alpha_mode"] = "BLEND"
        r, g, b, a = (float(x) for x in np.clip([red, green, blue, material.alpha], 0.0, 1.0))
        part = Primitive(np.zeros((0, 3)), faces, normals, base_color=(r, g, b, a), **options)
        return positions, part

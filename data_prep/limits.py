"""How much a mesh file may ask for: limits, and the running account of one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equifeat.errors import MeshError


@dataclass(frozen=True)
class MeshLimits:
    """What is refused before memory is spent on it.

    Args:
        max_triangles: Triangles of the whole object; each instance counts.
        max_texture_pixels: Pixels of all base-colour textures together.
        max_file_bytes: Bytes of the file and of all files that it refers to, together.
        max_header_items: Values in the JSON of a glTF file; each takes about 100 bytes of memory.
        max_nodes: Nodes of the scene graph; as many instances; as many parts, instances counted.
    """

    max_triangles: int = 5_000_000
    max_texture_pixels: int = 2**28
    max_file_bytes: int = 2**30
    max_header_items: int = 5_000_000
    max_nodes: int = 200_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise MeshError(f"{name} = {value}: give at least 1")

    @property
    def max_values(self) -> int:
        """Numbers in all accessors, or in all lines of a text format.

        Triangles that share no vertex, with position, normal, texture coordinates, colour, index
        and a skin, need 63 numbers each.
        """
        return 72 * max(self.max_triangles, 50_000)


class Budget:
    """What one file has asked for so far.

    Args:
        where: What messages call the file.
        limits: What it may ask for.
    """

    def __init__(self, where: str | Path, limits: MeshLimits) -> None:
        self.limits = limits
        self._where = where
        self._spent: dict[str, int] = {}

    def triangles(self, count: int) -> None:
        """Account for triangles.

        Args:
            count: How many more.

        Raises:
            MeshError: More than max_triangles in all.
        """
        total = self._add("triangles", count)
        if total > self.limits.max_triangles:
            raise MeshError(
                f"{self._where}: has {total} triangles or more, above the limit of "
                f"{self.limits.max_triangles}; simplify it or give --max_triangles {total}"
            )

    def values(self, count: int) -> None:
        """Account for numbers to be decoded.

        Args:
            count: How many more.

        Raises:
            MeshError: More than fit to max_triangles.
        """
        total = self._add("values", count)
        if total > self.limits.max_values:
            raise MeshError(
                f"{self._where}: its geometry has {total} numbers or more, above the "
                f"{self.limits.max_values} that {self.limits.max_triangles} triangles can need; "
                "simplify it or give a larger --max_triangles"
            )

    def pixels(self, width: int, height: int) -> None:
        """Account for a texture.

        Args:
            width: In pixels.
            height: In pixels.

        Raises:
            MeshError: No size, or more than max_texture_pixels in all.
        """
        if width < 1 or height < 1:
            raise MeshError(f"{self._where}: a texture of {width}x{height} pixels has no size")
        total = self._add("pixels", width * height)
        self._check(
            "max_texture_pixels", total, f"its textures have (with one of {width}x{height})"
        )

    def file_bytes(self, count: int) -> None:
        """Account for bytes read from files.

        Args:
            count: How many more.

        Raises:
            MeshError: More than max_file_bytes in all.
        """
        total = self._add("bytes", count)
        self._check("max_file_bytes", total, "it and the files it refers to have")

    def header_items(self, count: int) -> None:
        """Account for values in JSON.

        Args:
            count: How many more.

        Raises:
            MeshError: More than max_header_items in all.
        """
        self._check("max_header_items", self._add("items", count), "its JSON has")

    def nodes(self, count: int, what: str = "nodes") -> None:
        """Account for nodes, instances or parts, each on its own.

        Args:
            count: How many more.
            what: Which of them.

        Raises:
            MeshError: More than max_nodes in all.
        """
        self._check("max_nodes", self._add(what, count), "its scene has", what)

    def _add(self, what: str, count: int) -> int:
        if count < 0:
            raise MeshError(f"{self._where}: claims {count} {what}; the file is damaged")
        self._spent[what] = self._spent.get(what, 0) + count
        return self._spent[what]

    def _check(self, name: str, total: int, phrase: str, what: str = "") -> None:
        limit = int(getattr(self.limits, name))
        what = what or name.removeprefix("max_").replace("_", " ")
        if total > limit:
            raise MeshError(
                f"{self._where}: {phrase} {total} {what} or more, above the limit of {limit}; "
                f"simplify it, or load it in Python with MeshLimits({name}={total})"
            )

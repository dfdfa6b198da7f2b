"""A normalised mesh: primitives, and the policy of what is see-through."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from equifeat.errors import MeshError

Array = NDArray[Any]
AlphaMode = Literal["OPAQUE", "MASK", "BLEND"]
Wrap = Literal["repeat", "mirror", "clamp"]


@dataclass(frozen=True)
class Primitive:
    """Triangles of one material, in normalised object coordinates.

    Attributes:
        vertices: (V, 3) float32.
        faces: (F, 3) int32; counter-clockwise seen from outside where the file says so.
        normals: (V, 3) float32, unit length.
        uv: (V, 2) float32 with (0, 0) at the texture's top-left corner, or None.
        texture: (H, W, 4) uint8 base colour, sRGB with straight alpha, or None.
        base_color: RGBA factor in [0, 1], sRGB-encoded so that it multiplies the texture.
        vertex_colors: (V, 4) float32 RGBA in [0, 1], sRGB-encoded, or None.
        alpha_mode: As in glTF.
        alpha_cutoff: As in glTF, used by MASK.
        double_sided: As in the file; all renderers draw back faces anyway.
        wrap: Wrapping of the texture along u and v.
    """

    vertices: Array
    faces: Array
    normals: Array
    uv: Array | None = None
    texture: Array | None = None
    base_color: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    vertex_colors: Array | None = None
    alpha_mode: AlphaMode = "OPAQUE"
    alpha_cutoff: float = 0.5
    double_sided: bool = True
    wrap: tuple[Wrap, Wrap] = ("repeat", "repeat")

    @property
    def cutoff(self) -> float:
        """The see-through policy: a point whose alpha is below this is not there at all.

        Alpha is texture (bilinear, full resolution) times factor times vertex colour. OPAQUE
        ignores it (0), MASK uses the file's cut-off, BLEND is cut at one half. What remains is
        drawn fully opaque. A view thus has one depth a pixel, and colour, depth and mask agree.
        """
        return {"OPAQUE": 0.0, "MASK": self.alpha_cutoff, "BLEND": 0.5}[self.alpha_mode]

    @property
    def cuts(self) -> bool:
        """Whether any point may be see-through: only then renderers look at alpha at all."""
        return self._lowest_alpha(np.min) < self.cutoff

    @property
    def invisible(self) -> bool:
        """Whether every point is see-through."""
        return self._lowest_alpha(np.max) < self.cutoff

    def _lowest_alpha(self, reduce: Any) -> float:
        alpha = self.base_color[3]
        if self.texture is not None:
            alpha *= float(reduce(self.texture[..., 3])) / 255.0
        if self.vertex_colors is not None:
            alpha *= float(reduce(self.vertex_colors[:, 3]))
        return alpha


@dataclass(frozen=True)
class Mesh:
    """A normalised object: p_object = (p_file - center) * scale.

    Attributes:
        name: File name without its suffix.
        primitives: At least one.
        center: (3,) float64, middle of the bounding box in file coordinates.
        scale: One over the longest side of that box.
        file: File name, for the record.
        sha256: Of the file's bytes, empty for meshes that have no file.
    """

    name: str
    primitives: list[Primitive]
    center: Array = field(default_factory=lambda: np.zeros(3))
    scale: float = 1.0
    file: str = ""
    sha256: str = ""

    @property
    def vertices(self) -> Array:
        """(V, 3) float32 vertices of all primitives."""
        return np.concatenate([p.vertices for p in self.primitives])

    @property
    def faces(self) -> Array:
        """(F, 3) rows of `vertices`, the triangles of all primitives."""
        starts = np.cumsum([0, *(len(p.vertices) for p in self.primitives[:-1])])
        return np.concatenate(
            [p.faces + start for p, start in zip(self.primitives, starts, strict=True)]
        )

    @property
    def num_faces(self) -> int:
        """Number of triangles."""
        return sum(len(p.faces) for p in self.primitives)


def shifted_uv(where: str | Path, uv: Array, wrap: tuple[Wrap, Wrap]) -> Array:
    """Move texture coordinates near 0, where float32 is exact.

    Args:
        where: For the message.
        uv: (V, 2) float64.
        wrap: Where a coordinate is clamped it stays; else a whole even shift changes nothing.

    Returns:
        (V, 2) float32.

    Raises:
        MeshError: They are NaN or infinite.
    """
    if not np.isfinite(uv).all():
        raise MeshError(f"{where}: texture coordinates are NaN or infinite; repair the file")
    low = uv.min(axis=0) if len(uv) else np.zeros(2)
    shift = np.where([w == "clamp" for w in wrap], 0.0, 2.0 * np.floor(low / 2.0))
    out: Array = (uv - shift).astype(np.float32)
    if not np.isfinite(out).all():
        raise MeshError(f"{where}: texture coordinates are too large; repair the file")
    return out


def srgb_from_linear(linear: Array) -> Array:
    """Encode linear light as sRGB (IEC 61966-2-1).

    Args:
        linear: Values, clipped to [0, 1].

    Returns:
        The same shape, in [0, 1].
    """
    x = np.clip(linear, 0.0, 1.0)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)

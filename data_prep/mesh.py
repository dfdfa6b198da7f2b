"""A mesh file to a :class:`Mesh`: world transforms baked, longest side 1, centred at the origin.

Trimesh reads the files; glTF is first checked and made plain by :mod:`data_prep.gltf`, OBJ and PLY
by :mod:`data_prep.sidecars`, because trimesh turns much of what it does not know into zeros.

What is see-through is one policy for all renderers, see :attr:`Primitive.cutoff`.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from data_prep.gltf import MaterialNotes, Wrap, read_plain_glb
from data_prep.normals import corner_normals
from data_prep.sidecars import check_obj, check_ply
from equifeat.errors import MeshError

Array = NDArray[Any]
AlphaMode = Literal["OPAQUE", "MASK", "BLEND"]

SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
_MAX_TEXTURE_PIXELS = 16384 * 8192
# A box side of fewer than this many float64 steps of its coordinates is rounding, not shape.
_RELATIVE_SIZE = 1e-12


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
    def num_faces(self) -> int:
        """Number of triangles."""
        return sum(len(p.faces) for p in self.primitives)


def load_mesh(path: str | Path) -> Mesh:
    """Read a GLB, glTF, OBJ or PLY file.

    Args:
        path: The file. Everything it refers to must lie in its own folder or below.

    Returns:
        The mesh: scene graph applied in float64, centred, longest bounding-box side 1.

    Raises:
        MeshError: One sentence that names the file, what is wrong with it and what to do.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise MeshError(f"{path}: no such mesh file")
    if suffix not in SUFFIXES:
        raise MeshError(f"{path}: {suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MeshError(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise MeshError(f"{path}: the file is empty (0 bytes)")
    notes: list[MaterialNotes] = []
    try:
        if suffix in (".glb", ".gltf"):
            plain, notes = read_plain_glb(path, data)
            scene = trimesh.load_scene(io.BytesIO(plain), file_type="glb", process=False)
        elif suffix == ".obj":
            check_obj(path, data)
            scene = trimesh.load_scene(path, process=False, maintain_order=True)
        else:
            check_ply(path, data)
            scene = trimesh.load_scene(path, process=False)
    except MeshError:
        raise
    except Exception as error:  # trimesh raises anything at all on broken files
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise MeshError(
            f"{path}: trimesh cannot read it ({reason}); the file is damaged or not really {suffix}"
        ) from error
    parts = _parts(path, scene, notes)
    digest = hashlib.sha256(data).hexdigest()
    return normalized(path.stem, parts, where=str(path), file=path.name, sha256=digest)


def normalized(
    name: str,
    parts: list[tuple[Array, Primitive]],
    where: str = "",
    file: str = "",
    sha256: str = "",
) -> Mesh:
    """Centre and scale parts given in file coordinates.

    Args:
        name: Name of the object.
        parts: For each primitive its (V, 3) float64 vertices; the primitive's own are replaced.
        where: What error messages call the object.
        file: File name to record.
        sha256: Hash to record.

    Returns:
        The mesh.

    Raises:
        MeshError: No visible triangles, vertices that are not finite, or an object without size.
    """
    where = where or name
    visible = [(v, p) for v, p in parts if len(p.faces) and not p.invisible]
    if not visible:
        why = "all of it is fully transparent" if parts else "its scene is empty"
        raise MeshError(f"{where}: there are no visible triangles, {why}")
    used = [v[np.unique(p.faces)] for v, p in visible]
    for points in used:
        bad = int((~np.isfinite(points)).any(axis=1).sum())
        if bad:
            raise MeshError(
                f"{where}: {bad} of {len(points)} vertices of a part are NaN or infinite; "
                "repair the file in the program it came from"
            )
    low = np.min([points.min(axis=0) for points in used], axis=0)
    high = np.max([points.max(axis=0) for points in used], axis=0)
    center, size = low + (high - low) / 2, float((high - low).max())
    if not np.isfinite(size) or size <= _RELATIVE_SIZE * float(np.abs([low, high]).max()):
        raise MeshError(f"{where}: its bounding box has no size (longest side {size:g})")
    out = []
    for vertices, part in visible:
        small = ((np.nan_to_num(vertices) - center) / size).astype(np.float32)
        out.append(_replace_vertices(part, small))
    return Mesh(name, out, center, 1.0 / size, file, sha256)


def _replace_vertices(part: Primitive, vertices: Array) -> Primitive:
    """Give a primitive its normalised vertices, and its own normals where the file has none."""
    faces, normals = part.faces, part.normals
    values = {name: getattr(part, name) for name in part.__dataclass_fields__}
    length = np.linalg.norm(normals, axis=1) if len(normals) else np.zeros(1)
    if len(normals) == len(vertices) and np.all(np.isfinite(length) & (length > 1e-6)):
        values["normals"] = (normals / length[:, None]).astype(np.float32)
        values["vertices"] = vertices
        return Primitive(**values)
    corners = faces.reshape(-1)
    values["vertices"] = vertices[corners]
    values["normals"] = corner_normals(vertices, faces)
    values["faces"] = np.arange(len(corners), dtype=np.int32).reshape(-1, 3)
    for name in ("uv", "vertex_colors"):
        if values[name] is not None:
            values[name] = values[name][corners]
    return Primitive(**values)


def _parts(
    path: Path, scene: trimesh.Scene, notes: list[MaterialNotes]
) -> list[tuple[Array, Primitive]]:
    """Walk a scene: one primitive a node with geometry, world transforms baked in float64."""
    parts: list[tuple[Array, Primitive]] = []
    textures: dict[int, Array] = {}
    points_only = False
    for node in scene.graph.nodes_geometry:
        world, name = scene.graph[node]
        geometry = scene.geometry[name]
        if not isinstance(geometry, trimesh.Trimesh) or len(geometry.faces) == 0:
            points_only = True
            continue
        faces = np.asarray(geometry.faces, dtype=np.int64)
        count = len(geometry.vertices)
        if faces.min() < 0 or faces.max() >= count:
            raise MeshError(
                f"{path}: part {name!r} uses vertex {int(faces.max())} but has {count}; "
                "the file is damaged"
            )
        vertices = np.asarray(geometry.vertices, dtype=np.float64) @ world[:3, :3].T + world[:3, 3]
        normals = np.zeros((0, 3))
        if "vertex_normals" in geometry._cache.cache:
            # normals transform by the cofactor matrix, which exists for flat scales as well
            normals = np.asarray(geometry.vertex_normals, np.float64) @ _cofactor(world[:3, :3]).T
        if np.linalg.det(world[:3, :3]) < 0:
            faces = faces[:, ::-1]
        part = _primitive(path, geometry.visual, faces.astype(np.int32), normals, notes, textures)
        parts.append((vertices, part))
    if not parts and points_only:
        raise MeshError(f"{path}: it holds points or lines only, and no triangles to render")
    return parts


def _cofactor(matrix: Array) -> Array:
    """Return det(M) M^-T without dividing."""
    a, b, c = matrix
    return np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)])


def _primitive(
    path: Path,
    visual: Any,
    faces: Array,
    normals: Array,
    notes: list[MaterialNotes],
    textures: dict[int, Array],
) -> Primitive:
    """Read a trimesh visual: texture, factor, vertex colours, alpha."""
    material = getattr(visual, "material", None)
    options: dict[str, Any] = {}
    image, color, is_gltf = None, None, bool(notes)
    if isinstance(material, trimesh.visual.material.PBRMaterial):
        image, color = material.baseColorTexture, material.baseColorFactor
        options["alpha_mode"] = material.alphaMode or "OPAQUE"
        options["alpha_cutoff"] = 0.5 if material.alphaCutoff is None else material.alphaCutoff
        options["double_sided"] = bool(material.doubleSided)
    elif isinstance(material, trimesh.visual.material.SimpleMaterial):
        image, color = material.image, material.diffuse
    rgba = np.ones(4) if color is None else _unit_rgba(color)
    note = notes[int(material.name)] if is_gltf and material is not None else None
    if note is not None:
        options["wrap"] = note.wrap
        rgba = np.asarray(note.base_color) if note.base_color is not None else rgba
        rgba = np.append(srgb_from_linear(rgba[:3]), rgba[3])
    uv = getattr(visual, "uv", None)
    if image is not None and uv is not None and len(uv):
        uv = np.asarray(uv, dtype=np.float64)[:, :2] * [1.0, -1.0] + [0.0, 1.0]
        if not np.isfinite(uv).all():
            raise MeshError(f"{path}: texture coordinates are NaN or infinite; repair the file")
        wrap = options.get("wrap", ("repeat", "repeat"))
        # small numbers keep float32 exact; a whole even shift changes nothing when repeating
        shift = np.where([w == "clamp" for w in wrap], 0.0, 2.0 * np.floor(uv.min(axis=0) / 2.0))
        options["uv"] = (uv - shift).astype(np.float32)
        options["texture"] = _texture(path, image, textures)
    colors = getattr(visual, "vertex_attributes", {}).get("color")
    if colors is None and visual.kind == "vertex":
        colors = visual.vertex_colors
    if colors is not None and len(colors):
        colors = np.asarray([_unit_rgba(colors)]).reshape(-1, 4)
        if is_gltf:
            colors = np.concatenate([srgb_from_linear(colors[:, :3]), colors[:, 3:]], axis=1)
        options["vertex_colors"] = np.clip(colors, 0.0, 1.0).astype(np.float32)
    elif visual.kind == "face":
        raise MeshError(f"{path}: colours are stored by face; convert them to vertex colours")
    if not is_gltf and (rgba[3] < 1.0 or _has_alpha(options.get("texture"))):
        options["alpha_mode"] = "BLEND"
    r, g, b, a = (float(x) for x in np.clip(rgba, 0.0, 1.0))
    return Primitive(np.zeros((0, 3)), faces, normals, base_color=(r, g, b, a), **options)


def _unit_rgba(color: Any) -> Array:
    """Return colours as float64 RGBA in [0, 1], whatever integer or float type they have."""
    values = np.asarray(color)
    if values.dtype.kind in "ui":
        values = values / np.iinfo(values.dtype).max
    values = values.astype(np.float64)
    if values.shape[-1] == 3:
        values = np.concatenate([values, np.ones_like(values[..., :1])], axis=-1)
    return np.nan_to_num(values)


def _has_alpha(texture: Array | None) -> bool:
    return texture is not None and bool((texture[..., 3] < 255).any())


def _texture(path: Path, image: Image.Image, cache: dict[int, Array]) -> Array:
    """Decode a Pillow image to (H, W, 4) uint8 once."""
    if id(image) not in cache:
        if image.width * image.height > _MAX_TEXTURE_PIXELS:
            raise MeshError(f"{path}: a texture of {image.width}x{image.height} is too large")
        try:
            cache[id(image)] = np.asarray(image.convert("RGBA"))
        except (OSError, ValueError, SyntaxError) as error:
            raise MeshError(f"{path}: a texture cannot be decoded ({error})") from error
    return cache[id(image)]


def srgb_from_linear(linear: Array) -> Array:
    """Encode linear light as sRGB (IEC 61966-2-1).

    Args:
        linear: Values, clipped to [0, 1].

    Returns:
        The same shape, in [0, 1].
    """
    x = np.clip(linear, 0.0, 1.0)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)

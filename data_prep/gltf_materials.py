"""Materials of a glTF file: base colour, its texture and where that lies, alpha."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.gltf_accessors import AccessorReader
from data_prep.gltf_guard import Json, entry, resolve_uri, whole
from data_prep.limits import Budget
from data_prep.primitives import Wrap, shifted_uv, srgb_from_linear
from data_prep.textures import decode_texture
from equifeat.errors import MeshError

Array = NDArray[Any]
_WRAPS: dict[int, Wrap] = {10497: "repeat", 33648: "mirror", 33071: "clamp"}


@dataclass(frozen=True)
class Material:
    """What of a material a primitive needs.

    Attributes:
        options: Fields of `data_prep.primitives.Primitive`.
        texture: (H, W, 4) uint8 or None.
        uv_set: Name of the attribute with the texture's coordinates.
        uv_matrix: (2, 2) and (2,): uv becomes matrix @ uv + offset.
    """

    options: dict[str, Any] = field(default_factory=dict)
    texture: Array | None = None
    uv_set: str = ""
    uv_matrix: tuple[Array, Array] = field(default_factory=lambda: (np.eye(2), np.zeros(2)))


class MaterialReader:
    """Reads each material and each image once.

    Args:
        path: For messages and files beside it.
        header: The glTF header.
        reader: Its buffer views.
        budget: Accounts for pixels and files.
    """

    def __init__(self, path: Path, header: Json, reader: AccessorReader, budget: Budget) -> None:
        self._path = path
        self._header = header
        self._reader = reader
        self._budget = budget
        self._found: dict[int, Material] = {}
        self._images: dict[int, Array] = {}

    def read(self, index: Any) -> Material:
        """Return a material.

        Args:
            index: What refers to it; None is the default material.

        Returns:
            The material.

        Raises:
            MeshError: It does not exist, or its texture cannot be read.
        """
        if index is None:
            return Material({"double_sided": False})
        source = entry(self._path, self._header, "materials", index)
        if int(index) not in self._found:
            self._found[int(index)] = self._material(int(index), source)
        return self._found[int(index)]

    def _material(self, index: int, source: Json) -> Material:
        plain = source.get("pbrMetallicRoughness", {})
        color = plain.get("baseColorFactor", [1.0] * 4)
        reference = plain.get("baseColorTexture")
        gloss = source.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")
        if gloss is not None:
            color = gloss.get("diffuseFactor", [1.0] * 4)
            reference = gloss.get("diffuseTexture")
        rgba = np.clip(self._numbers(color, 4, f"the colour of material {index}"), 0.0, 1.0)
        r, g, b = (float(x) for x in srgb_from_linear(rgba[:3]))
        mode = source.get("alphaMode", "OPAQUE")
        if mode not in ("OPAQUE", "MASK", "BLEND"):
            raise MeshError(f"{self._path}: alpha mode {mode!r:.40} does not exist")
        cutoff = self._numbers([source.get("alphaCutoff", 0.5)], 1, f"alphaCutoff of {index}")
        options = {
            "base_color": (r, g, b, float(rgba[3])),
            "alpha_mode": mode,
            "alpha_cutoff": float(cutoff[0]),
            "double_sided": source.get("doubleSided", False) is True,
        }
        if reference is None:
            return Material(options)
        transform = reference.get("extensions", {}).get("KHR_texture_transform", {})
        number = transform.get("texCoord", reference.get("texCoord", 0))
        uv_set = f"TEXCOORD_{whole(self._path, number, 'texCoord')}"
        texture, wrap = self._texture(reference["index"])
        return Material({**options, "wrap": wrap}, texture, uv_set, self._uv_matrix(transform))

    def _numbers(self, values: Any, count: int, what: str) -> Array:
        out = np.asarray(values, np.float64)
        if out.shape != (count,) or not np.isfinite(out).all():
            raise MeshError(f"{self._path}: {what} is {values!r:.60}; the file is damaged")
        return out

    def _uv_matrix(self, transform: Json) -> tuple[Array, Array]:
        """Return scale, then rotation, then offset (KHR_texture_transform)."""
        scale = self._numbers(transform.get("scale", [1.0, 1.0]), 2, "a texture's scale")
        offset = self._numbers(transform.get("offset", [0.0, 0.0]), 2, "a texture's offset")
        angle = self._numbers([transform.get("rotation", 0.0)], 1, "a texture's rotation")[0]
        c, s = np.cos(angle), np.sin(angle)
        return np.array([[c, s], [-s, c]]) * scale, offset

    def _texture(self, index: Any) -> tuple[Array, tuple[Wrap, Wrap]]:
        texture = entry(self._path, self._header, "textures", index)
        more = texture.get("extensions", {})
        # WebP is always readable; KTX2 only with its decoder, so a plain picture goes before it
        source = more.get("EXT_texture_webp", {}).get("source", texture.get("source"))
        if source is None:
            source = more.get("KHR_texture_basisu", {}).get("source")
        if source is None:
            names = ", ".join(more) or "no image"
            raise MeshError(
                f"{self._path}: a base-colour texture is stored as {names}, which cannot be read; "
                "convert it to PNG or JPEG, for example with gltf-transform"
            )
        sampler = {}
        if "sampler" in texture:
            sampler = entry(self._path, self._header, "samplers", texture["sampler"])
        u, v = (_WRAPS[sampler.get(k, 10497)] for k in ("wrapS", "wrapT"))
        image = entry(self._path, self._header, "images", source)
        if int(source) not in self._images:
            self._images[int(source)] = self._image(int(source), image)
        return self._images[int(source)], (u, v)

    def _image(self, index: int, image: Json) -> Array:
        if "bufferView" in image:
            data = bytes(self._reader.view(image["bufferView"]))
        else:
            data = resolve_uri(self._path, image["uri"], self._budget)
        return decode_texture(f"{self._path}: image {index}", data, self._budget)


def texture_coordinates(
    path: Path, material: Material, attributes: dict[str, Array]
) -> Array | None:
    """Return the texture's own set of coordinates with its transform applied.

    Args:
        path: For the message.
        material: The primitive's material.
        attributes: The primitive's attributes.

    Returns:
        (V, 2) float32, or None without a texture or without that set.

    Raises:
        MeshError: They are NaN or infinite.
    """
    uv = attributes.get(material.uv_set)
    if material.texture is None or uv is None or len(uv) != len(attributes["POSITION"]):
        return None
    matrix, offset = material.uv_matrix
    return shifted_uv(path, uv.astype(np.float64) @ matrix.T + offset, material.options["wrap"])

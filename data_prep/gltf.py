"""glTF made plain: what trimesh gets wrong or drops is carried out here, before it reads the file.

The result is one self-contained GLB with float32 positions, triangles only, one base-colour
texture a material, TEXCOORD_0 already transformed, and no extension left. Carried out: Draco,
meshopt, quantisation, sparse accessors, texture transforms and texture sets, instancing, skins and
morph targets in their rest pose, strips and fans. Left out on purpose: cameras, lights,
animations, and every texture but the base colour.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.gltf_accessors import AccessorReader, as_float
from data_prep.gltf_guard import Json, check_extensions, read_container, resolve_uri
from data_prep.gltf_scene import Scene
from data_prep.primitives import Wrap
from equifeat.errors import MeshError

Array = NDArray[Any]
_WRAPS: dict[int, Wrap] = {10497: "repeat", 33648: "mirror", 33071: "clamp"}
_TRIANGLE_MODES = (4, 5, 6)


@dataclass(frozen=True)
class MaterialNotes:
    """What trimesh does not keep of a material; notes[i] belongs to the material named str(i).

    Attributes:
        wrap: Wrap modes of the base-colour texture along u and v.
        base_color: RGBA factor, linear light.
    """

    wrap: tuple[Wrap, Wrap] = ("repeat", "repeat")
    base_color: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)


def read_plain_glb(path: Path, data: bytes) -> tuple[bytes, list[MaterialNotes]]:
    """Check a glTF or GLB file and rewrite it as a plain GLB.

    Args:
        path: The file, for its format, its folder and the messages.
        data: Its content.

    Returns:
        GLB bytes that need no other file, and notes of the materials.

    Raises:
        MeshError: The file is damaged, unsafe, empty, or needs what is not supported.
    """
    try:
        header, buffers = read_container(path, data)
        check_extensions(path, header)
        return _Rewriter(path, header, buffers).run()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise MeshError(
            f"{path}: its glTF structure is damaged ({type(error).__name__}: {error}); "
            "export it again"
        ) from error


class _Rewriter:
    def __init__(self, path: Path, header: Json, buffers: list[bytes]) -> None:
        self._path = path
        self._header = header
        self._reader = AccessorReader(path, header, buffers)
        self._out: Json = {
            "asset": {"version": "2.0"},
            "scene": 0,
            **{k: [] for k in ("accessors", "bufferViews", "meshes", "nodes", "materials")},
            **{k: [] for k in ("images", "textures")},
        }
        self._blob = bytearray()
        self._notes: list[MaterialNotes] = []
        self._materials: dict[int | None, tuple[int, Json | None]] = {}
        self._images: dict[int, int] = {}
        self._meshes: dict[int, int | None] = {}
        self._skipped_modes = False

    def run(self) -> tuple[bytes, list[MaterialNotes]]:
        scene = Scene(self._path, self._header, self._reader)
        for matrix, mesh, pose in scene.drawn():
            if pose is None:
                if mesh not in self._meshes:
                    self._meshes[mesh] = self._mesh(mesh, None)
                index = self._meshes[mesh]
            else:
                index = self._mesh(mesh, pose)
            if index is not None:
                name = f"n{len(self._out['nodes'])}"
                node = {"name": name, "mesh": index, "matrix": matrix.T.reshape(-1).tolist()}
                self._out["nodes"].append(node)
        if not self._out["nodes"]:
            if self._skipped_modes:
                raise MeshError(
                    f"{self._path}: it holds points or lines only, and no triangles to render"
                )
            raise MeshError(f"{self._path}: its scene is empty, no node holds a mesh")
        self._out["scenes"] = [{"nodes": list(range(len(self._out["nodes"])))}]
        self._out["buffers"] = [{"byteLength": len(self._blob)}]
        return _pack(self._out, bytes(self._blob)), self._notes

    def _mesh(self, index: int, pose: Any) -> int | None:
        """Write a mesh, in the pose of a skin or of morph weights; None if it has no triangles."""
        primitives = []
        for source in self._header["meshes"][index]["primitives"]:
            if source.get("mode", 4) not in _TRIANGLE_MODES:
                self._skipped_modes = True
                continue
            primitive = self._primitive(source, pose)
            if primitive is not None:
                primitives.append(primitive)
        if not primitives:
            return None
        self._out["meshes"].append({"name": f"m{index}", "primitives": primitives})
        return len(self._out["meshes"]) - 1

    def _primitive(self, source: Json, pose: Any) -> Json | None:
        attributes = self._attributes(source)
        faces = attributes.pop("_faces")
        if "POSITION" not in attributes or not len(faces):
            return None
        position = attributes["POSITION"]
        if int(faces.max()) >= len(position):
            raise MeshError(
                f"{self._path}: a triangle uses vertex {int(faces.max())} of {len(position)}; "
                "the file is damaged"
            )
        normal = attributes.get("NORMAL")
        if pose is not None:
            position, normal = pose(source, attributes)
        material, texture = self._material(source.get("material"))
        out = {"POSITION": self._accessor(position, "VEC3")}
        if normal is not None and len(normal) == len(position):
            out["NORMAL"] = self._accessor(normal, "VEC3")
        uv = self._uv(texture, attributes)
        if uv is not None:
            out["TEXCOORD_0"] = self._accessor(uv, "VEC2")
        color = attributes.get("COLOR_0")
        if color is not None and len(color) == len(position):
            color = as_float(color, True)
            if color.shape[1] == 3:
                color = np.concatenate([color, np.ones((len(color), 1))], axis=1)
            out["COLOR_0"] = self._accessor(color, "VEC4")
        indices = self._accessor(faces.reshape(-1, 1), "SCALAR", np.uint32)
        return {"attributes": out, "indices": indices, "material": material, "mode": 4}

    def _attributes(self, source: Json) -> dict[str, Array]:
        """Read the attributes of a primitive, and its triangles as "_faces"."""
        draco = source.get("extensions", {}).get("KHR_draco_mesh_compression")
        names = dict(source["attributes"])
        found: dict[str, Array] = {}
        if draco is not None:
            raw, faces = self._reader.draco(draco)
            for name, values in raw.items():
                accessor = self._header["accessors"][names[name]]
                values = values.reshape(len(values), -1)
                found[name] = as_float(values, bool(accessor.get("normalized", False)))
            found["_faces"] = faces.reshape(-1, 3)
        wanted = ("POSITION", "NORMAL", "COLOR_0", "TEXCOORD_", "JOINTS_", "WEIGHTS_")
        for name, index in names.items():
            if name.startswith(wanted) and name not in found:
                found[name] = self._reader.read(int(index))
        if "_faces" not in found:
            count = len(found["POSITION"]) if "POSITION" in found else 0
            order = np.arange(count)
            if "indices" in source:
                order = self._reader.read(int(source["indices"]))[:, 0].astype(np.int64)
            found["_faces"] = _triangles(self._path, order, source.get("mode", 4))
        return found

    def _uv(self, texture: Json | None, attributes: dict[str, Array]) -> Array | None:
        """Return the texture's own set of coordinates with its transform applied."""
        if texture is None:
            return None
        transform = texture.get("extensions", {}).get("KHR_texture_transform", {})
        which = transform.get("texCoord", texture.get("texCoord", 0))
        uv = attributes.get(f"TEXCOORD_{int(which)}")
        if uv is None or len(uv) != len(attributes["POSITION"]):
            return None
        uv = uv.astype(np.float64) * transform.get("scale", [1.0, 1.0])
        angle = float(transform.get("rotation", 0.0))
        c, s = np.cos(angle), np.sin(angle)
        turned = np.stack([c * uv[:, 0] + s * uv[:, 1], -s * uv[:, 0] + c * uv[:, 1]], axis=1)
        out: Array = turned + np.asarray(transform.get("offset", [0.0, 0.0]), np.float64)
        return out

    def _material(self, index: int | None) -> tuple[int, Json | None]:
        """Write a material once; return its number and the texture reference it came with."""
        if index in self._materials:
            return self._materials[index]
        source = self._header["materials"][index] if index is not None else {}
        plain = source.get("pbrMetallicRoughness", {})
        color = plain.get("baseColorFactor", [1.0] * 4)
        texture = plain.get("baseColorTexture")
        gloss = source.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")
        if gloss is not None:
            color = gloss.get("diffuseFactor", [1.0] * 4)
            texture = gloss.get("diffuseTexture")
        out: Json = {"name": str(len(self._notes)), "pbrMetallicRoughness": {}}
        for key in ("alphaMode", "alphaCutoff", "doubleSided"):
            if key in source:
                out[key] = source[key]
        if out.get("alphaMode", "OPAQUE") not in ("OPAQUE", "MASK", "BLEND"):
            raise MeshError(f"{self._path}: alpha mode {out['alphaMode']!r} does not exist")
        wrap: tuple[Wrap, Wrap] = ("repeat", "repeat")
        if texture is not None:
            number, wrap = self._texture(int(texture["index"]))
            out["pbrMetallicRoughness"]["baseColorTexture"] = {"index": number}
        r, g, b, a = (float(x) for x in color)
        self._notes.append(MaterialNotes(wrap, (r, g, b, a)))
        self._out["materials"].append(out)
        self._materials[index] = (len(self._notes) - 1, texture)
        return self._materials[index]

    def _texture(self, index: int) -> tuple[int, tuple[Wrap, Wrap]]:
        texture = self._header["textures"][index]
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
        source = webp.get("source", texture.get("source"))
        if source is None:
            names = ", ".join(texture.get("extensions", {})) or "no image"
            raise MeshError(
                f"{self._path}: a base-colour texture is stored as {names}, which cannot be read; "
                "convert it to PNG or JPEG, for example with gltf-transform"
            )
        sampler = {}
        if "sampler" in texture:
            sampler = self._header["samplers"][texture["sampler"]]
        wrap = tuple(_WRAPS[sampler.get(k, 10497)] for k in ("wrapS", "wrapT"))
        if source not in self._images:
            self._out["images"].append(self._image(int(source)))
            self._out["textures"].append({"source": len(self._out["images"]) - 1})
            self._images[source] = len(self._out["textures"]) - 1
        return self._images[source], (wrap[0], wrap[1])

    def _image(self, index: int) -> Json:
        image = self._header["images"][index]
        if "bufferView" in image:
            data = self._reader.view(int(image["bufferView"]))
        else:
            data = resolve_uri(self._path, str(image["uri"]))
        try:
            with Image.open(BytesIO(data)) as opened:
                mime = Image.MIME.get(opened.format or "", "image/png")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise MeshError(
                f"{self._path}: image {index} cannot be decoded ({error}); "
                "convert it to PNG or JPEG"
            ) from error
        return {"bufferView": self._append(data), "mimeType": mime}

    def _accessor(self, values: Array, kind: str, dtype: Any = np.float32) -> int:
        data = np.ascontiguousarray(values, dtype=dtype)
        entry = {
            "bufferView": self._append(data.tobytes()),
            "componentType": 5126 if dtype is np.float32 else 5125,
            "count": len(data),
            "type": kind,
        }
        self._out["accessors"].append(entry)
        return len(self._out["accessors"]) - 1

    def _append(self, data: bytes) -> int:
        view = {"buffer": 0, "byteOffset": len(self._blob), "byteLength": len(data)}
        self._blob += data + b"\0" * (-len(data) % 4)
        self._out["bufferViews"].append(view)
        return len(self._out["bufferViews"]) - 1


def _triangles(path: Path, order: Array, mode: int) -> Array:
    """Turn a list, strip or fan of vertex indices into (F, 3)."""
    if mode == 4:
        if len(order) % 3:
            raise MeshError(f"{path}: {len(order)} indices do not make triangles; it is damaged")
        return order.reshape(-1, 3)
    if len(order) < 3:
        return np.zeros((0, 3), np.int64)
    if mode == 6:
        return np.stack([np.full(len(order) - 2, order[0]), order[1:-1], order[2:]], axis=1)
    faces = np.stack([order[:-2], order[1:-1], order[2:]], axis=1)
    faces[1::2] = faces[1::2, ::-1]
    return faces


def _pack(header: Json, blob: bytes) -> bytes:
    text = json.dumps({k: v for k, v in header.items() if v != []}).encode()
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + 8 + len(blob)
    head = struct.pack("<4sIIII", b"glTF", 2, total, len(text), 0x4E4F534A)
    return head + text + struct.pack("<II", len(blob), 0x004E4942) + blob

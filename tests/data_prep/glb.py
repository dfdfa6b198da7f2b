"""Small GLB files made by hand, so that tests decide every byte."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TYPES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
KINDS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}

QUAD = np.array([[-0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, -0.5, 0], [-0.5, -0.5, 0]], "f4")
QUAD_UV = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], "f4")
# counter-clockwise seen from +z
QUAD_FACES = np.array([0, 3, 2, 0, 2, 1], "u2")
# a corner of a box: three different edge lengths, so no mirror image is the same
TETRA = np.array([[0, 0, 0], [1, 0, 0], [0, 0.6, 0], [0, 0, 0.3]], "f4")
TETRA_FACES = np.array([0, 2, 1, 0, 1, 3, 0, 3, 2, 1, 2, 3], "u2")


class Glb:
    """A glTF header and its binary chunk under construction."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {
            "asset": {"version": "2.0"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [],
            "accessors": [],
            "bufferViews": [],
        }
        self.blob = b""

    def view(self, data: bytes, **more: Any) -> int:
        entry = {"buffer": 0, "byteOffset": len(self.blob), "byteLength": len(data), **more}
        self.header["bufferViews"].append(entry)
        self.blob += data + b"\0" * (-len(data) % 4)
        return len(self.header["bufferViews"]) - 1

    def accessor(self, values: Any, **more: Any) -> int:
        array = np.ascontiguousarray(values)
        array = array.reshape(len(array), -1)
        entry = {
            "bufferView": self.view(array.tobytes()),
            "componentType": TYPES[array.dtype.str[1:]],
            "count": len(array),
            "type": KINDS[array.shape[1]],
            **more,
        }
        self.header["accessors"].append(entry)
        return len(self.header["accessors"]) - 1

    def mesh(self, positions: Any, faces: Any, mode: int = 4, **attributes: Any) -> dict[str, Any]:
        """Add a mesh and return its primitive."""
        names = {"POSITION": self.accessor(positions)}
        names.update({k: self.accessor(v) for k, v in attributes.items()})
        primitive: dict[str, Any] = {"attributes": names, "mode": mode}
        if faces is not None:
            primitive["indices"] = self.accessor(faces)
        self.header["meshes"].append({"primitives": [primitive]})
        return primitive

    def texture(self, pixels: Any, **sampler: int) -> int:
        packed = io.BytesIO()
        Image.fromarray(np.asarray(pixels, np.uint8)).save(packed, "PNG")
        image = {"bufferView": self.view(packed.getvalue()), "mimeType": "image/png"}
        for key, entry in (("images", image), ("samplers", dict(sampler))):
            self.header.setdefault(key, []).append(entry)
        number = len(self.header["images"]) - 1
        self.header.setdefault("textures", []).append({"source": number, "sampler": number})
        return number

    def material(self, texture: int | None = None, **more: Any) -> int:
        entry: dict[str, Any] = {"pbrMetallicRoughness": {}, **more}
        if texture is not None:
            entry["pbrMetallicRoughness"]["baseColorTexture"] = {"index": texture}
        self.header.setdefault("materials", []).append(entry)
        return len(self.header["materials"]) - 1

    def bytes(self) -> bytes:
        header = {**self.header}
        header.setdefault("buffers", [{"byteLength": len(self.blob)}])
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 4)
        total = 28 + len(text) + len(self.blob)
        return (
            struct.pack("<4sIIII", b"glTF", 2, total, len(text), 0x4E4F534A)
            + text
            + struct.pack("<II", len(self.blob), 0x004E4942)
            + self.blob
        )

    def write(self, folder: Path, name: str = "test.glb") -> Path:
        path = folder / name
        path.write_bytes(self.bytes())
        return path


def quad(**attributes: Any) -> tuple[Glb, dict[str, Any]]:
    """A unit square that faces +z, texture the right way up."""
    glb = Glb()
    primitive = glb.mesh(QUAD, QUAD_FACES, TEXCOORD_0=QUAD_UV, **attributes)
    return glb, primitive


def tetra() -> Glb:
    glb = Glb()
    glb.mesh(TETRA, TETRA_FACES)
    return glb


def points_only() -> Glb:
    glb = Glb()
    glb.mesh(TETRA, None, mode=0)
    return glb

"""Files that load, one for each thing the readers can do: where fuzzing starts from."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data_prep.glb import QUAD, QUAD_FACES, TETRA, TETRA_FACES, Glb, quad, tetra
from tests.helpers import GOLDEN, ROOT

Seed = tuple[str, bytes]

OBJ = b"""mtllib a.mtl
v 0 0 0 1 0 0
v 1 0 0 0 1 0
v 0 1 0 0 0 1
v 0 0 1 1 1 1
vt 0 0
vt 1 0
vt 0 1
vn 0 0 1
usemtl skin
f 1/1 2/2 3/3
f 1/1/1 2/2/1 4/3/1
usemtl red
f -4 -3 -1
f 1//1 3//1 4//1 2//1
"""
MTL = b"newmtl skin\nmap_Kd -s 2 2 -o 0.5 -clamp on skin.png\nnewmtl red\nKd 1 0 0\nd 0.7\n"
PLY_HEAD = """ply
format {kind} 1.0
comment TextureFile skin.png
element vertex 4
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
element face 2
property list uchar int vertex_indices
property list uchar float texcoord
end_header
"""
PLY_TEXT = """0 0 0 255 0 0
1 0 0 0 255 0
1 1 0 0 0 255
0 1 0 9 9 9
3 0 1 2 6 0 0 1 0 1 1
4 0 1 2 3 8 0 0 1 0 1 1 0 1
"""


def picture(kind: str = "PNG") -> bytes:
    """A small colourful picture."""
    y, x = np.mgrid[0:24, 0:32]
    rgba = np.stack([x * 8, y * 10, 255 - x * 4, np.where(x < 16, 255, 90)], axis=-1)
    image = Image.fromarray(rgba.astype(np.uint8))
    out = io.BytesIO()
    if kind == "JPEG":
        image = image.convert("RGB")
    image.save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def ktx2(codec: str = "etc1s") -> bytes:
    """A real KTX2 file of 48 x 32 pixels, made with Basis Universal (see its README)."""
    return (GOLDEN / "textures" / f"{codec}.ktx2").read_bytes()


def textured(data: bytes, extension: str | None = None, mode: str = "BLEND") -> Glb:
    """The unit square with a picture given as bytes."""
    glb, primitive = quad(COLOR_0=np.full((4, 4), 0.8, "f4"))
    primitive["material"] = glb.material(0, alphaMode=mode)
    glb.header["images"] = [{"bufferView": glb.view(data), "mimeType": "image/png"}]
    glb.header["samplers"] = [{"wrapS": 33071, "wrapT": 33648}]
    glb.header["textures"] = [{"source": 0, "sampler": 0}]
    if extension:
        glb.header["textures"] = [{"extensions": {extension: {"source": 0}}, "sampler": 0}]
        glb.header["extensionsUsed"] = glb.header["extensionsRequired"] = [extension]
    reference = glb.header["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]
    reference["extensions"] = {"KHR_texture_transform": {"scale": [2, 2], "rotation": 0.3}}
    return glb


def draco() -> Glb:
    """A small sphere, compressed with Draco."""
    import DracoPy
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=1)
    packed = DracoPy.encode(ball.vertices, ball.faces, quantization_bits=14)
    glb = Glb()
    primitive = glb.mesh(ball.vertices.astype("f4"), ball.faces.reshape(-1).astype("u2"))
    for accessor in glb.header["accessors"]:
        del accessor["bufferView"]
    glb.header["bufferViews"], glb.blob = [], b""
    primitive["extensions"] = {
        "KHR_draco_mesh_compression": {
            "bufferView": glb.view(packed),
            "attributes": {"POSITION": 0},
        }
    }
    glb.header["extensionsUsed"] = glb.header["extensionsRequired"] = ["KHR_draco_mesh_compression"]
    return glb


def posed() -> Glb:
    """A skin, morph targets, instances and a sparse accessor."""
    glb = Glb()
    weights = np.tile(np.array([[1, 0, 0, 0]], "f4"), (4, 1))
    primitive = glb.mesh(TETRA, TETRA_FACES, JOINTS_0=np.zeros((4, 4), "u1"), WEIGHTS_0=weights)
    primitive["targets"] = [{"POSITION": glb.accessor(TETRA)}]
    glb.mesh(QUAD, QUAD_FACES, mode=5)
    glb.header["meshes"][0]["weights"] = [0.5]
    bind = np.eye(4, dtype="f4").reshape(1, 16)
    glb.header["skins"] = [{"joints": [1], "inverseBindMatrices": glb.accessor(bind)}]
    glb.header["accessors"][primitive["attributes"]["POSITION"]]["sparse"] = {
        "count": 1,
        "indices": {"bufferView": glb.view(np.array([1], "u2").tobytes()), "componentType": 5123},
        "values": {"bufferView": glb.view(np.array([4, 0, 0], "f4").tobytes())},
    }
    places = {
        "TRANSLATION": glb.accessor(np.array([[0, 0, 0], [9, 0, 0]], "f4")),
        "ROTATION": glb.accessor(np.array([[0, 0, 0, 1], [0, 0, 1, 0]], "f4")),
        "SCALE": glb.accessor(np.ones((2, 3), "f4")),
    }
    glb.header["nodes"] = [
        {"mesh": 0, "skin": 0},
        {"scale": [3.0, 3.0, 3.0], "translation": [0.0, 2.0, 0.0], "children": [2]},
        {"mesh": 1, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": places}}},
    ]
    glb.header["scenes"] = [{"nodes": [0, 1]}]
    return glb


def external() -> bytes:
    """A glTF file with a buffer and a picture beside it."""
    glb = textured(b"")
    header = {**glb.header, "buffers": [{"uri": "data.bin", "byteLength": len(glb.blob)}]}
    header["images"] = [{"uri": "skin.png"}]
    return json.dumps(header).encode()


def ply_binary(order: str = "<") -> bytes:
    kind = "binary_little_endian" if order == "<" else "binary_big_endian"
    rows = [line.split() for line in PLY_TEXT.splitlines()]
    out = PLY_HEAD.format(kind=kind).encode()
    for row in rows[:4]:
        out += np.array(row[:3], f"{order}f4").tobytes() + np.array(row[3:], "u1").tobytes()
    for row in rows[4:]:
        n = int(row[0])
        out += bytes([n]) + np.array(row[1 : n + 1], f"{order}i4").tobytes()
        out += bytes([2 * n]) + np.array(row[n + 2 :], f"{order}f4").tobytes()
    return out


@cache
def seed_files() -> tuple[list[Seed], list[Seed]]:
    """Suffix and content of seeds: made here, and real where the shared inputs are there."""
    look: dict[str, Any] = {"KHR_materials_unlit": {}, "KHR_materials_pbrSpecularGlossiness": {}}
    unlit = textured(picture("JPEG"))
    unlit.header["materials"][0]["extensions"] = look
    seeds: list[Seed] = [
        (".glb", tetra().bytes()),
        (".glb", textured(picture()).bytes()),
        (".glb", textured(picture("WEBP"), "EXT_texture_webp").bytes()),
        (".glb", textured(ktx2("etc1s"), "KHR_texture_basisu").bytes()),
        (".glb", textured(ktx2("uastc"), "KHR_texture_basisu").bytes()),
        *((".glb", textured(picture(kind)).bytes()) for kind in ("TGA", "BMP", "GIF", "TIFF")),
        (".glb", unlit.bytes()),
        *[(".glb", draco().bytes())] * 3,
        *[(".glb", posed().bytes())] * 3,
        *[(".gltf", external())] * 2,
        *[(".obj", OBJ)] * 4,
        *[(".ply", (PLY_HEAD.format(kind="ascii") + PLY_TEXT).encode())] * 2,
        (".ply", ply_binary("<")),
        (".ply", ply_binary(">")),
    ]
    real: list[Seed] = []
    shared = ROOT.parent / "shared" / "meshes"
    for name in ("odd", "train"):
        if (shared / name).is_dir():
            files = sorted((shared / name).glob("*.glb"))
            real += [(f.suffix, f.read_bytes()) for f in files if f.stat().st_size < 400_000]
    return seeds, real


def make_folder(parent: Path) -> Path:
    """Make a folder with what seeds refer to, and bait outside it."""
    folder = parent / "meshes"
    folder.mkdir()
    (folder / "skin.png").write_bytes(picture())
    (folder / "a.mtl").write_bytes(MTL)
    (folder / "data.bin").write_bytes(textured(b"").blob)
    (folder / "link.png").symlink_to(parent / "secret.png")
    (folder / "loop").symlink_to(folder / "loop")
    (parent / "secret.png").write_bytes(picture())
    return folder

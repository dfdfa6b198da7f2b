"""Bombs: what a file asks for is refused before memory or time is spent on it."""

from __future__ import annotations

import io
import json
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.mesh import MeshLimits, load_mesh
from data_prep.render_object import RenderOptions
from equifeat.errors import MeshError
from tests.data_prep.glb import TETRA, TETRA_FACES, Glb, tetra
from tests.data_prep.seeds import ktx2, picture, posed, textured

SMALL = MeshLimits(max_triangles=1000, max_texture_pixels=2**20, max_nodes=500)


def refused(path: Path, pattern: str, limits: MeshLimits = SMALL, megabytes: float = 30) -> None:
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(MeshError, match=pattern):
            load_mesh(path, limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 1e6
    assert time.process_time() - start < 5


def many_triangles() -> Glb:
    glb = Glb()
    glb.mesh(TETRA, np.tile(TETRA_FACES, 500))
    return glb


def many_instances() -> Glb:
    glb = tetra()
    glb.header["accessors"].append(
        {
            **{"componentType": 5126, "type": "VEC3", "count": 400},
            "bufferView": glb.view(np.zeros((400, 3), "f4").tobytes()),
        }
    )
    attributes = {"TRANSLATION": len(glb.header["accessors"]) - 1}
    glb.header["nodes"][0]["extensions"] = {"EXT_mesh_gpu_instancing": {"attributes": attributes}}
    return glb


def lying_instances() -> Glb:
    glb = many_instances()
    glb.header["accessors"][-1]["count"] = 10**9
    return glb


def many_nodes_one_mesh() -> Glb:
    glb = tetra()
    glb.header["nodes"] = [{"mesh": 0}] * 400
    glb.header["scenes"] = [{"nodes": list(range(400))}]
    return glb


def too_many_nodes() -> Glb:
    glb = tetra()
    glb.header["nodes"] = [{"mesh": 0}] * 600
    return glb


def shared_children() -> Glb:
    """Billion laughs: each node has the next one ten times as its child."""
    glb = tetra()
    glb.header["nodes"] = [{"children": [i + 1] * 10} for i in range(9)] + [{"mesh": 0}]
    return glb


def claimed_triangles() -> Glb:
    """A header that claims more indices than any buffer has."""
    glb = tetra()
    glb.header["accessors"][1]["count"] = 3 * 10**9
    return glb


def sparse_from_nothing() -> Glb:
    glb = tetra()
    glb.header["accessors"][0] = {
        **{"componentType": 5126, "type": "VEC3", "count": 10**8},
        "sparse": {"count": 0, "indices": {}, "values": {}},
    }
    return glb


def one_view_many_accessors() -> Glb:
    """Ten thousand morph targets that are all the same megabyte."""
    glb = Glb()
    primitive = glb.mesh(np.zeros((80_000, 3), "f4"), TETRA_FACES)
    first = glb.header["accessors"][0]
    glb.header["accessors"] += [dict(first) for _ in range(10_000)]
    primitive["targets"] = [{"POSITION": i + 2} for i in range(10_000)]
    glb.header["meshes"][0]["weights"] = [0.5] * 10_000
    return glb


def meshopt_count() -> Glb:
    glb = tetra()
    glb.header["bufferViews"][0]["extensions"] = {
        "EXT_meshopt_compression": {
            **{"buffer": 0, "byteOffset": 0, "byteLength": 48, "byteStride": 256},
            **{"count": 10**8, "mode": "ATTRIBUTES"},
        }
    }
    return glb


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (
            many_triangles,
            r"has 2000 triangles or more, above the limit of 1000.*--max_triangles 2000",
        ),
        (many_instances, "has 1600 triangles or more"),
        (lying_instances, "scene has 1000000000 instances or more, above the limit of 500"),
        (many_nodes_one_mesh, "has 1004 triangles or more"),
        (too_many_nodes, r"scene has 600 nodes or more.*MeshLimits\(max_nodes=600\)"),
        (shared_children, "node 9 has two parents"),
        (claimed_triangles, "has 1000000000 triangles or more"),
        (sparse_from_nothing, "its geometry has 300000000 numbers or more"),
        (one_view_many_accessors, "numbers or more"),
        (meshopt_count, "numbers or more"),
    ],
)
def test_geometry_bombs(make: Callable[[], Glb], pattern: str, tmp_path: Path) -> None:
    refused(make().write(tmp_path), pattern, megabytes=60)


def test_a_limit_can_be_raised(tmp_path: Path) -> None:
    path = many_triangles().write(tmp_path)
    assert load_mesh(path, MeshLimits(max_triangles=2000)).num_faces == 2000
    with pytest.raises(MeshError, match="above the limit of 1999"):
        load_mesh(path, MeshLimits(max_triangles=1999))
    with pytest.raises(MeshError, match="max_nodes = 0: give at least 1"):
        MeshLimits(max_nodes=0)
    assert RenderOptions(limits=MeshLimits(max_triangles=9)).record() == RenderOptions().record()


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header and data promise that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(2000, 2000), (12_000, 12_000), (60_000, 60_000), (1, 2**31 - 1)])
def test_texture_bombs(size: tuple[int, int], tmp_path: Path) -> None:
    pattern = r"max_texture_pixels=|DecompressionBomb|cannot be decoded"
    refused(textured(bomb_png(*size)).write(tmp_path), pattern)


def test_pixels_of_all_textures_count_together(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (1000, 600)).save(out, "PNG")
    glb = textured(out.getvalue())
    assert load_mesh(glb.write(tmp_path), SMALL).primitives[0].texture is not None
    view = glb.view(out.getvalue())
    glb.header["images"].append({"bufferView": view})
    glb.header["textures"].append({"source": 1})
    material = json.loads(json.dumps(glb.header["materials"][0]))
    material["pbrMetallicRoughness"]["baseColorTexture"]["index"] = 1
    glb.header["materials"].append(material)
    primitive = dict(glb.header["meshes"][0]["primitives"][0], material=1)
    glb.header["meshes"][0]["primitives"].append(primitive)
    refused(glb.write(tmp_path), "its textures have .*1200000 texture pixels or more")


def test_ktx2_size_is_read_before_decoding(tmp_path: Path) -> None:
    data = bytearray(ktx2("uastc"))
    data[20:28] = struct.pack("<II", 16384, 16384)
    refused(textured(bytes(data), "KHR_texture_basisu").write(tmp_path), "pixels or more|damaged")


def test_json_bombs(tmp_path: Path) -> None:
    path = tmp_path / "a.gltf"
    path.write_text('{"asset": {"version": "2.0"}, "extras": [' + "[]," * 300_000 + "[]]}")
    refused(path, "its JSON has 600005 header items or more", MeshLimits(max_header_items=10_000))
    path.write_text('{"a":' * 200_000)
    refused(path, "its JSON cannot be read")
    path.write_text('{"buffers": [{"byteLength": ' + "9" * 10_000 + "}]}")
    refused(path, "its JSON cannot be read|cannot be; the file is damaged")


def test_files_beside_count_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(b"")
    with (tmp_path / "big.bin").open("r+b") as file:
        file.truncate(3_000_000_000)  # sparse on disk
    glb = tetra()
    header = {**glb.header, "buffers": [{"uri": "big.bin", "byteLength": 48}]}
    path = tmp_path / "a.gltf"
    path.write_text(json.dumps(header))
    refused(path, r"files it refers to have 30000\d* file bytes or more", MeshLimits())
    (tmp_path / "a.obj").write_text("mtllib big.bin\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    refused(tmp_path / "a.obj", "file bytes or more", MeshLimits())
    (tmp_path / "big.bin").rename(tmp_path / "big.glb")
    refused(tmp_path / "big.glb", "3000000000 file bytes or more", MeshLimits())
    # one file many times
    (tmp_path / "data.bin").write_bytes(glb.blob)
    header["buffers"] = [{"uri": "data.bin", "byteLength": 48}] * 100
    path.write_text(json.dumps(header))
    refused(path, "file bytes or more", MeshLimits(max_file_bytes=9000))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\n" + "f 1 2 3\n" * 1001),
        ("b.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf" + " 1 2 3" * 400),
        (
            "a.ply",
            "ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\n"
            "element face 4000000000\nproperty list uchar int vertex_indices\nend_header\n",
        ),
    ],
)
def test_text_formats(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, "triangles or more, above the limit of 1000")


def test_ply_that_declares_more_vertices_than_memory(tmp_path: Path) -> None:
    text = (
        "ply\nformat {kind} 1.0\nelement vertex 4000000000\nproperty float x\n"
        "element face 1\nproperty list uchar int vertex_indices\nend_header\n0"
    )
    for kind in ("ascii", "binary_little_endian"):
        (tmp_path / "a.ply").write_text(text.format(kind=kind))
        refused(tmp_path / "a.ply", "numbers or more")


def test_default_limits_let_ordinary_meshes_through(tmp_path: Path) -> None:
    assert load_mesh(posed().write(tmp_path)).num_faces > 4
    assert load_mesh(textured(picture()).write(tmp_path)).num_faces == 2

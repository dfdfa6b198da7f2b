from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.mesh import load_mesh
from equifeat.errors import MeshError
from tests.data_prep.glb import QUAD, TETRA, TETRA_FACES, Glb, points_only, quad, tetra
from tests.helpers import shared_dir


def fails(path: Path, pattern: str) -> None:
    with pytest.raises(MeshError, match=pattern) as caught:
        load_mesh(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


def nan_vertex() -> Glb:
    glb = Glb()
    bad = TETRA.copy()
    bad[2, 1] = np.nan
    glb.mesh(bad, TETRA_FACES)
    return glb


def infinite_transform() -> Glb:
    glb = tetra()
    glb.header["nodes"] = [{"mesh": 0, "scale": [1e308, 1e308, 1e308]}, {}]
    glb.header["nodes"] = [
        {"scale": [1e300] * 3, "children": [1]},
        {"scale": [1e300] * 3, "mesh": 0},
    ]
    return glb


def flat_point() -> Glb:
    glb = Glb()
    glb.mesh(np.ones((3, 3), "f4"), np.array([0, 1, 2], "u2"))
    return glb


def lying_count() -> Glb:
    glb = tetra()
    glb.header["accessors"][0]["count"] = 4000
    return glb


def view_leaves_buffer() -> Glb:
    glb = tetra()
    glb.header["bufferViews"][0]["byteLength"] = 10**6
    return glb


def negative_offset() -> Glb:
    glb = tetra()
    glb.header["bufferViews"][0]["byteOffset"] = -4
    return glb


def short_buffer() -> Glb:
    glb = tetra()
    glb.header["buffers"] = [{"byteLength": 10**6}]
    return glb


def index_beyond() -> Glb:
    glb = Glb()
    glb.mesh(TETRA, np.array([0, 1, 9], "u2"))
    return glb


def not_triangles() -> Glb:
    glb = Glb()
    glb.mesh(TETRA, np.array([0, 1, 2, 3], "u2"))
    return glb


def cyclic() -> Glb:
    glb = tetra()
    glb.header["nodes"] = [{"children": [1]}, {"children": [0], "mesh": 0}]
    return glb


def missing_node() -> Glb:
    glb = tetra()
    glb.header["scenes"] = [{"nodes": [7]}]
    return glb


def empty() -> Glb:
    glb = Glb()
    glb.header["nodes"] = [{}]
    return glb


def required_unknown() -> Glb:
    glb = tetra()
    glb.header["extensionsRequired"] = ["ACME_teapot"]
    return glb


def texture_of_unknown_kind() -> Glb:
    glb, primitive = quad()
    primitive["material"] = glb.material(glb.texture(np.zeros((2, 2, 3))))
    glb.header["textures"] = [{"extensions": {"MSFT_texture_dds": {"source": 0}}}]
    return glb


def draco_without_data() -> Glb:
    glb = tetra()
    del glb.header["accessors"][0]["bufferView"]
    return glb


def draco_garbage() -> Glb:
    glb = tetra()
    view = glb.view(b"not draco at all")
    glb.header["meshes"][0]["primitives"][0]["extensions"] = {
        "KHR_draco_mesh_compression": {"bufferView": view, "attributes": {"POSITION": 0}}
    }
    glb.header["extensionsRequired"] = ["KHR_draco_mesh_compression"]
    return glb


def meshopt_garbage() -> Glb:
    glb = tetra()
    glb.header["bufferViews"][0]["extensions"] = {
        "EXT_meshopt_compression": {
            **{"buffer": 0, "byteOffset": 0, "byteLength": 48, "byteStride": 12},
            **{"count": 4, "mode": "ATTRIBUTES"},
        }
    }
    return glb


def meshopt_absurd() -> Glb:
    glb = meshopt_garbage()
    packed = glb.header["bufferViews"][0]["extensions"]["EXT_meshopt_compression"]
    packed["byteStride"] = 4096
    return glb


def image_is_text() -> Glb:
    glb, primitive = quad()
    primitive["material"] = glb.material(glb.texture(np.zeros((2, 2, 3))))
    glb.header["images"] = [{"bufferView": glb.view(b"I am no image"), "mimeType": "image/png"}]
    return glb


def image_cut_off() -> Glb:
    glb, primitive = quad()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3))
    primitive["material"] = glb.material(glb.texture(noise))
    view = glb.header["bufferViews"][glb.header["images"][0]["bufferView"]]
    view["byteLength"] //= 2
    return glb


def all_transparent() -> Glb:
    glb, primitive = quad()
    primitive["material"] = glb.material(alphaMode="BLEND")
    glb.header["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"] = [1, 1, 1, 0.1]
    return glb


def structure() -> Glb:
    glb = tetra()
    glb.header["meshes"] = [{"primitives": [{"attributes": 5}]}]
    return glb


def escape_by_image() -> Glb:
    glb, primitive = quad()
    primitive["material"] = glb.material(glb.texture(np.zeros((2, 2, 3))))
    glb.header["images"] = [{"uri": "%2e%2e/secret.png"}]
    return glb


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (nan_vertex, r"1 of 4 vertices .* NaN or infinite"),
        (infinite_transform, "NaN or infinite"),
        (points_only, "points or lines only"),
        (flat_point, "bounding box has no size"),
        (lying_count, "claims 4000 elements"),
        (view_leaves_buffer, "buffer view 0 ends at byte 1000000"),
        (negative_offset, "byteOffset is -4, which cannot be"),
        (short_buffer, "buffer 0 has .* of its 1000000 bytes"),
        (index_beyond, "uses vertex 9 of 4"),
        (not_triangles, "4 indices do not make triangles"),
        (cyclic, "damaged"),
        (missing_node, "damaged"),
        (empty, "scene is empty"),
        (required_unknown, "ACME_teapot"),
        (texture_of_unknown_kind, "stored as MSFT_texture_dds, which cannot be read"),
        (draco_without_data, "accessor 0 has no data"),
        (draco_garbage, "Draco data"),
        (meshopt_garbage, "meshopt data is damaged"),
        (meshopt_absurd, "cannot have stride 4096"),
        (image_is_text, "image 0 cannot be decoded"),
        (image_cut_off, "decoded"),
        (all_transparent, "fully transparent"),
        (structure, "structure is damaged"),
        (escape_by_image, "outside its folder"),
    ],
)
def test_bad_glb_fails_with_its_own_sentence(
    make: Callable[[], Glb], pattern: str, tmp_path: Path
) -> None:
    fails(make().write(tmp_path), pattern)


@pytest.mark.parametrize("cut", [0, 3, 12, 19, 40, 200, -1])
def test_truncated_glb(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.glb"
    path.write_bytes(tetra().bytes()[:cut])
    fails(path, "truncated|empty|is not a GLB")


def test_missing_unknown_and_wrong_files(tmp_path: Path) -> None:
    fails(tmp_path / "nothing.glb", "no such mesh file")
    odd = tmp_path / "a.fbx"
    odd.write_bytes(b"x")
    fails(odd, "not one of")
    text = tmp_path / "text.glb"
    text.write_text("hello, I am a text file and no mesh")
    fails(text, "not a GLB file")
    version = tmp_path / "one.glb"
    version.write_bytes(struct.pack("<4sIIII", b"glTF", 1, 20, 0, 0))
    fails(version, "version 1")
    broken = tmp_path / "broken.gltf"
    broken.write_text("{")
    fails(broken, "JSON")


@pytest.mark.parametrize(
    "uri",
    [
        "../secret.bin",
        "%2e%2e/secret.bin",
        "/etc/hostname",
        "file:///etc/hostname",
        "https://example.org/a.bin",
        "..\\secret.bin",
        "link.bin",
        "sub/../../secret.bin",
    ],
)
def test_uris_do_not_leave_the_folder(uri: str, tmp_path: Path) -> None:
    glb = tetra()
    (tmp_path / "secret.bin").write_bytes(glb.blob)
    folder = tmp_path / "meshes"
    (folder / "sub").mkdir(parents=True)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    header = {**glb.header, "buffers": [{"uri": uri, "byteLength": len(glb.blob)}]}
    path = folder / "test.gltf"
    path.write_text(json.dumps(header))
    fails(path, "outside its folder")
    header["buffers"][0]["uri"] = "absent.bin"
    path.write_text(json.dumps(header))
    fails(path, "not there")


@pytest.mark.parametrize(
    ("library", "image", "pattern"),
    [
        ("../a.mtl", "skin.png", "outside"),
        ("a.mtl", "../skin.png", "outside"),
        ("a.mtl", "-bm 1 /etc/passwd", "outside"),
        ("gone.mtl", "skin.png", "not there"),
        ("a.mtl", "gone.png", "not there"),
    ],
)
def test_obj_references_do_not_leave_the_folder(
    library: str, image: str, pattern: str, tmp_path: Path
) -> None:
    (tmp_path / "skin.png").write_bytes(b"")
    folder = tmp_path / "meshes"
    folder.mkdir()
    (tmp_path / "a.mtl").write_text("newmtl t\n")
    (folder / "a.mtl").write_text(f"newmtl t\nmap_Kd {image}\n")
    path = folder / "a.obj"
    path.write_text(f"mtllib {library}\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    fails(path, pattern)


def test_bad_obj_and_ply(tmp_path: Path) -> None:
    cases = {
        "points.obj": ("v 0 0 0\nv 1 1 1\n", "points or lines only"),
        "empty.obj": ("# nothing\n", "no vertices"),
        "beyond.obj": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "a.*"),
        "nan.obj": ("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN or infinite"),
        "points.ply": (
            "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\n"
            "property float z\nend_header\n0 0 0\n",
            "points or lines only",
        ),
        "cut.ply": ("ply\nformat ascii 1.0\nelement ver", "truncated"),
        "short.ply": (
            "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\n"
            "property float z\nelement face 1\nproperty list uchar int vertex_indices\n"
            "end_header\n0 0 0\n1 0 0\n",
            "declares 3 elements of kind vertex and holds 2",
        ),
        "texture.ply": (
            "ply\nformat ascii 1.0\ncomment TextureFile ../a.png\nelement vertex 3\n"
            "property float x\nproperty float y\nproperty float z\nproperty float s\n"
            "property float t\nelement face 1\nproperty list uchar int vertex_indices\n"
            "end_header\n0 0 0 0 0\n1 0 0 1 0\n0 1 0 0 1\n3 0 1 2\n",
            "outside",
        ),
    }
    for name, (text, pattern) in cases.items():
        (tmp_path / name).write_text(text)
        fails(tmp_path / name, pattern)


@pytest.mark.parametrize(
    ("extension", "package"),
    [("KHR_draco_mesh_compression", "DracoPy"), ("EXT_meshopt_compression", "meshoptimizer")],
)
def test_absent_decoder_is_named(
    extension: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    glb = tetra()
    glb.header["extensionsUsed"] = glb.header["extensionsRequired"] = [extension]
    fails(glb.write(tmp_path), f'{package} is not installed: pip install "equifeat.formats."')


def test_quad_is_fine(tmp_path: Path) -> None:
    assert load_mesh(quad()[0].write(tmp_path)).num_faces == 2
    assert QUAD.shape == (4, 3)


ODD_FAILURES = {
    "box_inf": "24 of 24 vertices",
    "empty_nodes": "scene is empty",
    "empty_scene": "scene is empty",
    "nan_duck": "50 of 2399 vertices",
    "pointcloud": "points or lines only",
    "truncated_duck": "60242 of its 120484 bytes",
}


@pytest.mark.shared
def test_every_odd_mesh_loads_or_fails_with_its_own_sentence() -> None:
    files = sorted(shared_dir("meshes/odd").glob("*.glb"))
    assert len(files) >= 23
    faces = {}
    for path in files:
        if path.stem in ODD_FAILURES:
            fails(path, ODD_FAILURES[path.stem])
        else:
            faces[path.stem] = load_mesh(path).num_faces
    assert faces["draco_heart"] == 180
    assert faces["meshopt_pirate"] == 5010
    assert faces["gpu_instancing"] == 1500
    assert faces["skinned_quad"] == 2

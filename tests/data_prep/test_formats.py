"""Each thing a format can do, against a twin that does without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.mesh import Mesh, load_mesh
from equifeat.errors import MeshError
from tests.data_prep.glb import QUAD, QUAD_FACES, TETRA, TETRA_FACES, Glb, quad, tetra
from tests.data_prep.seeds import (
    MTL,
    PLY_HEAD,
    PLY_TEXT,
    draco,
    ktx2,
    picture,
    ply_binary,
    textured,
)
from tests.helpers import shared_dir


def written(folder: Path, name: str, data: bytes | str) -> Mesh:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return load_mesh(path)


def surface(mesh: Mesh) -> Any:
    """Corners of all triangles, in an order that does not depend on the file's."""
    corners = np.concatenate([p.vertices[p.faces] for p in mesh.primitives]).astype(np.float64)
    corners = np.stack([np.roll(c, -int(np.lexsort(c.T)[0]), axis=0) for c in corners])
    return corners[np.lexsort(corners.reshape(len(corners), -1).round(3).T)]


def same_surface(mesh: Mesh, twin: Mesh, atol: float = 1e-6) -> None:
    assert mesh.num_faces == twin.num_faces
    np.testing.assert_allclose(surface(mesh), surface(twin), atol=atol)


# glTF: compressed geometry


def test_draco_equals_its_uncompressed_twin(tmp_path: Path) -> None:
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=1)
    glb = Glb()
    glb.mesh(ball.vertices.astype("f4"), ball.faces.reshape(-1).astype("u2"))
    twin = load_mesh(glb.write(tmp_path, "plain.glb"))
    mesh = load_mesh(draco().write(tmp_path, "draco.glb"))
    assert mesh.num_faces == 80
    np.testing.assert_allclose(
        np.sort(surface(mesh).reshape(-1, 9), axis=0),
        np.sort(surface(twin).reshape(-1, 9), axis=0),
        atol=3e-4,
    )


def test_draco_that_holds_more_than_its_header_claims(tmp_path: Path) -> None:
    glb = draco()
    glb.header["accessors"][1]["count"] = 3
    with pytest.raises(MeshError, match="holds 80 triangles where the header claims 1"):
        load_mesh(glb.write(tmp_path))


def test_meshopt_equals_its_uncompressed_twin(tmp_path: Path) -> None:
    import meshoptimizer

    vertices = np.tile(TETRA, (1, 1)).astype("f4")
    packed = {
        0: meshoptimizer.encode_vertex_buffer(vertices, len(vertices), 12),
        1: meshoptimizer.encode_index_buffer(TETRA_FACES.astype("u4"), 12, 4),
    }
    glb = Glb()
    glb.mesh(vertices, TETRA_FACES.astype("u4"))
    modes = {0: ("ATTRIBUTES", 12, 4), 1: ("TRIANGLES", 4, 12)}
    glb.blob = b""
    for number, data in packed.items():
        mode, stride, count = modes[number]
        where = {"buffer": 0, "byteOffset": len(glb.blob), "byteLength": len(bytes(data))}
        glb.blob += bytes(data) + b"\0" * (-len(bytes(data)) % 4)
        glb.header["bufferViews"][number] = {
            "buffer": 1,
            "byteLength": stride * count,
            "extensions": {
                "EXT_meshopt_compression": {
                    **where,
                    **{"byteStride": stride, "count": count, "mode": mode},
                }
            },
        }
    glb.header["buffers"] = [
        {"byteLength": len(glb.blob)},
        {"byteLength": 96, "extensions": {"EXT_meshopt_compression": {"fallback": True}}},
    ]
    same_surface(load_mesh(glb.write(tmp_path)), load_mesh(tetra().write(tmp_path, "twin.glb")))


def test_meshopt_filter_of_an_index_view_is_refused(tmp_path: Path) -> None:
    """The C library would write eight bytes for each index of two."""
    glb = tetra()
    glb.header["bufferViews"][1]["extensions"] = {
        "EXT_meshopt_compression": {
            **{"buffer": 0, "byteOffset": 0, "byteLength": 48, "byteStride": 2},
            **{"count": 12, "mode": "INDICES", "filter": "QUATERNION"},
        }
    }
    with pytest.raises(MeshError, match=r"INDICES, QUATERNION.*cannot have stride 2"):
        load_mesh(glb.write(tmp_path))


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2"])
def test_quantised_without_normalisation_equals_floats(kind: str, tmp_path: Path) -> None:
    whole = np.rint(TETRA * 100).astype(kind)
    glb, twin = Glb(), Glb()
    glb.mesh(np.concatenate([whole, whole[:, :1]], axis=1)[:, :3], TETRA_FACES)
    glb.header["extensionsRequired"] = ["KHR_mesh_quantization"]
    twin.mesh(whole.astype("f4"), TETRA_FACES)
    same_surface(load_mesh(glb.write(tmp_path)), load_mesh(twin.write(tmp_path, "twin.glb")))


def test_strided_interleaved_attributes(tmp_path: Path) -> None:
    glb = Glb()
    both = np.concatenate([TETRA, np.full((4, 3), 7, "f4")], axis=1)
    view = glb.view(both.tobytes(), byteStride=24)
    primitive = glb.mesh(TETRA, TETRA_FACES)
    glb.header["accessors"][primitive["attributes"]["POSITION"]]["bufferView"] = view
    same_surface(load_mesh(glb.write(tmp_path)), load_mesh(tetra().write(tmp_path, "twin.glb")))


# glTF: textures


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TGA", "BMP", "TIFF"])
def test_lossless_textures_are_the_same_pixels(kind: str, tmp_path: Path) -> None:
    extension = "EXT_texture_webp" if kind == "WEBP" else None
    glb = textured(picture(kind), extension)
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    (twin,) = load_mesh(textured(picture()).write(tmp_path, "twin.glb")).primitives
    assert part.texture is not None
    assert twin.texture is not None
    columns = slice(0, 3) if kind == "BMP" else slice(0, 4)
    np.testing.assert_array_equal(part.texture[..., columns], twin.texture[..., columns])
    assert part.wrap == ("clamp", "mirror")


@pytest.mark.parametrize(("codec", "error"), [("uastc", 1.0), ("etc1s", 8.0)])
def test_ktx2_textures_are_nearly_the_picture_they_were_made_of(
    codec: str, error: float, tmp_path: Path
) -> None:
    (part,) = load_mesh(textured(ktx2(codec), "KHR_texture_basisu").write(tmp_path)).primitives
    y, x = np.mgrid[0:32, 0:48]
    source = np.stack([x * 5, y * 8, 255 - x * 4, np.where(x < 24, 255, 64)], axis=-1)
    assert part.texture is not None
    assert part.texture.shape == (32, 48, 4)
    off = np.abs(part.texture.astype(int) - source)
    assert off.mean(axis=(0, 1)).max() < error
    np.testing.assert_allclose(part.texture[..., 3], source[..., 3], atol=1)


def test_ktx2_without_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opengl_basisu", None)
    path = textured(ktx2(), "KHR_texture_basisu").write(tmp_path)
    with pytest.raises(MeshError, match=r"KTX2 .*pip install \"equifeat\[formats\]\""):
        load_mesh(path)
    # used but not required, with a picture to fall back on
    glb = textured(picture())
    view = glb.view(ktx2())
    glb.header["images"].append({"bufferView": view, "mimeType": "image/ktx2"})
    glb.header["textures"][0]["extensions"] = {"KHR_texture_basisu": {"source": 1}}
    glb.header["extensionsUsed"] = ["KHR_texture_basisu"]
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    assert part.texture is not None
    assert part.texture.shape == (24, 32, 4)


def test_damaged_ktx2(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="image 0 is damaged KTX2"):
        load_mesh(textured(ktx2()[:90], "KHR_texture_basisu").write(tmp_path))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(out, "PNG")
    (part,) = load_mesh(textured(out.getvalue()).write(tmp_path)).primitives
    assert part.texture is not None
    np.testing.assert_array_equal(part.texture[0, 0], [128, 128, 128, 255])


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"P6 1 1 255\n\0\0\0", b"", b"<svg/>", b"\0" * 100]
)
def test_only_known_picture_formats_are_opened(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(MeshError, match=r"image 0 cannot be decoded|empty|no size"):
        load_mesh(textured(data).write(tmp_path))


def test_texture_transform_equals_coordinates_that_are_already_transformed(tmp_path: Path) -> None:
    glb = textured(picture())
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    c, s = np.cos(0.3), np.sin(0.3)
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 2.0
    turned = np.stack([c * uv[:, 0] + s * uv[:, 1], -s * uv[:, 0] + c * uv[:, 1]], axis=1)
    assert part.uv is not None
    corner = {tuple(np.sign(v[:2])): u for v, u in zip(part.vertices, part.uv, strict=True)}
    expected = {(-1, 1): 0, (1, 1): 1, (1, -1): 2, (-1, -1): 3}
    offset = corner[-1, 1] - turned[0]
    np.testing.assert_allclose(offset % 2, [0, 0], atol=1e-6)  # u is clamped, v whole turns
    for key, number in expected.items():
        np.testing.assert_allclose(corner[key] - offset, turned[number], atol=1e-6)


def test_specular_glossiness_and_unlit_use_their_own_colour(tmp_path: Path) -> None:
    glb, primitive = quad()
    number = glb.texture(np.full((2, 2, 3), 50))
    gloss = {"diffuseFactor": [1, 0, 0, 1], "diffuseTexture": {"index": number}}
    name = "KHR_materials_pbrSpecularGlossiness"
    primitive["material"] = glb.material(extensions={name: gloss})
    glb.header["extensionsRequired"] = [name]
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    np.testing.assert_allclose(part.base_color, (1.0, 0.0, 0.0, 1.0))
    assert part.texture is not None
    assert part.texture[0, 0].tolist() == [50, 50, 50, 255]
    glb.header["materials"][0]["extensions"] = {"KHR_materials_unlit": {}}
    glb.header["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"] = [0, 1, 0, 1]
    glb.header["extensionsRequired"] = ["KHR_materials_unlit"]
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    np.testing.assert_allclose(part.base_color, (0.0, 1.0, 0.0, 1.0))


def test_parts_that_share_one_vertex_buffer_keep_only_their_own(tmp_path: Path) -> None:
    glb = Glb()
    many = np.concatenate([np.zeros((100, 3), "f4"), TETRA, np.full((9, 3), np.nan, "f4")])
    glb.mesh(many, TETRA_FACES + 100)
    mesh = load_mesh(glb.write(tmp_path))
    same_surface(mesh, load_mesh(tetra().write(tmp_path, "twin.glb")))
    assert len(mesh.primitives[0].vertices) == 12  # of 113; flat shading splits corners


@pytest.mark.shared
def test_shared_odd_meshes_have_the_values_they_were_made_with() -> None:
    odd = shared_dir("meshes/odd")
    assert load_mesh(odd / "twosided_plane.glb").primitives[0].double_sided
    specgloss = load_mesh(odd / "specgloss.glb").primitives
    assert any(p.texture is not None or p.base_color[:3] != (1.0, 1.0, 1.0) for p in specgloss)
    colored = load_mesh(odd / "vertexcolor_cube.glb").primitives[0].vertex_colors
    assert colored is not None
    np.testing.assert_allclose(colored, np.tile([1.0, 0.0, 1.0, 1.0], (len(colored), 1)))
    sizes = [load_mesh(odd / f"{n}_duck.glb").vertices for n in ("tiny", "nonuniform")]
    for vertices in sizes:
        extent = vertices.max(axis=0) - vertices.min(axis=0)
        assert extent.max() == pytest.approx(1.0, abs=1e-5)


# OBJ: what trimesh 5.2 loses


def test_obj_faces_of_mixed_kinds_keep_their_texture(tmp_path: Path) -> None:
    """Triangles, quads and pentagons, with and without texture coordinates, in one material."""
    (tmp_path / "skin.png").write_bytes(picture())
    (tmp_path / "a.mtl").write_bytes(b"newmtl skin\nmap_Kd skin.png\n")
    mesh = written(
        tmp_path,
        "a.obj",
        "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv .5 2 0\nvt 0 0\nvt 1 0\nvt 1 1\n"
        "vt 0 1\nvt .5 .5\nusemtl skin\nf 1/1 2/2 3/3\nf 1/1 2/2 3/3 4/4\n"
        "f 1/1 2/2 3/3 5/5 4/4\nf 1 2 3\n",
    )
    textured_parts = [p for p in mesh.primitives if p.uv is not None]
    assert sum(len(p.faces) for p in textured_parts) == 1 + 2 + 3
    assert mesh.num_faces == 7


def test_obj_texture_options_move_the_coordinates(tmp_path: Path) -> None:
    (tmp_path / "skin.png").write_bytes(picture())
    (tmp_path / "a.mtl").write_bytes(MTL)
    head = "mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nusemtl skin\n"
    (part,) = written(tmp_path, "a.obj", f"{head}f 1/1 2/2 3/3\n").primitives
    assert part.wrap == ("clamp", "clamp")
    assert part.uv is not None
    # u = 2u + 0.5, v = 2v, then v downwards
    found = sorted(map(tuple, part.uv.tolist()))
    assert found == [(0.5, -1.0), (0.5, 1.0), (2.5, 1.0)]


def test_obj_wrong_texture_index_is_refused_and_wrong_normals_computed(tmp_path: Path) -> None:
    (tmp_path / "skin.png").write_bytes(picture())
    head = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvn 0 0 1\n"
    with pytest.raises(MeshError, match="a face uses 'vt' 9 of 2"):
        written(tmp_path, "a.obj", f"{head}f 1/1 2/2 3/9\n")
    (part,) = written(tmp_path, "b.obj", f"{head}f 1//7 2//7 3//7\n").primitives
    np.testing.assert_allclose(part.normals, [[0, 0, 1]] * 3, atol=1e-6)


def test_obj_vertex_colours_and_stray_kd(tmp_path: Path) -> None:
    (tmp_path / "a.mtl").write_bytes(b"newmtl grey\nKd 0.5 0.5 0.5\n")
    (part,) = written(
        tmp_path,
        "a.obj",
        "mtllib a.mtl\nv 0 0 0 1 0 0\nv 1 0 0 0 1 0\nv 0 1 0\nusemtl grey\nf 1 2 3\n",
    ).primitives
    assert part.base_color == (1.0, 1.0, 1.0, 1.0)
    assert part.vertex_colors is not None
    rows = sorted(map(tuple, part.vertex_colors.tolist()))
    assert rows == [(0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize(
    ("lines", "pattern"),
    [
        ("f 1 2 x", "line 4 has the corner 'x'"),
        ("f 0 1 2", "index 0"),
        ("f 1 2 -9", "counts back too far"),
        ("v 1 2\nf 1 2 3", "2 to 3 numbers"),
        ("v 1 2 z\nf 1 2 3", "something that is no number"),
        ("vn 1 0 a\nf 1 2 3", "something that is no number"),
    ],
)
def test_obj_lines_that_cannot_be_read(lines: str, pattern: str, tmp_path: Path) -> None:
    with pytest.raises(MeshError, match=pattern):
        written(tmp_path, "a.obj", f"v 0 0 0\nv 1 0 0\nv 0 1 0\n{lines}\n")


# PLY: what trimesh 5.2 loses


@pytest.mark.parametrize("order", ["<", ">"])
def test_binary_ply_of_mixed_polygons_equals_its_text(order: str, tmp_path: Path) -> None:
    (tmp_path / "skin.png").write_bytes(picture())
    twin = written(tmp_path, "text.ply", PLY_HEAD.format(kind="ascii") + PLY_TEXT)
    mesh = written(tmp_path, "binary.ply", ply_binary(order))
    assert mesh.num_faces == 3
    same_surface(mesh, twin)
    (part,), (other,) = mesh.primitives, twin.primitives
    assert part.uv is not None
    assert other.uv is not None
    np.testing.assert_array_equal(part.uv, other.uv)
    assert sorted(set(map(tuple, part.uv.tolist()))) == [(0, 0), (0, 1), (1, 0), (1, 1)]


PLY_TRIANGLE = (
    "ply\nformat ascii 1.0\n{comment}element vertex 3\nproperty float x\nproperty float y\n"
    "property float z\n{vertex}element face 1\nproperty list uchar int vertex_index\n{face}"
    "end_header\n0 0 0{a}\n1 0 0{a}\n0 1 0{a}\n3 0 1 2{b}\n"
)


def ply(comment: str = "", vertex: str = "", face: str = "", a: str = "", b: str = "") -> str:
    return PLY_TRIANGLE.format(comment=comment, vertex=vertex, face=face, a=a, b=b)


def test_ply_colours_of_faces_and_under_other_names(tmp_path: Path) -> None:
    colors = "".join(f"property uchar {n}\n" for n in ("red", "green", "blue"))
    other = colors.replace("uchar ", "float diffuse_")
    for name, text in (
        ("face.ply", ply(face=colors, b=" 0 255 0")),
        ("other.ply", ply(vertex=other, a=" 0.0 1.0 0.0")),
    ):
        found = written(tmp_path, name, text).primitives[0].vertex_colors
        assert found is not None
        np.testing.assert_array_equal(found, [[0, 1, 0, 1]] * 3)


def test_ply_that_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "skin.png").write_bytes(picture())
    uv = "property float s\nproperty float t\n"
    two = "comment TextureFile skin.png\n" * 2
    with pytest.raises(MeshError, match="has 2 textures"):
        written(tmp_path, "a.ply", ply(comment=two, vertex=uv, a=" 0 0"))
    strips = ply().replace("element face", "element tristrips")
    with pytest.raises(MeshError, match="its triangles are strips"):
        written(tmp_path, "b.ply", strips)
    with pytest.raises(MeshError, match="uses vertex 7 of 3"):
        written(tmp_path, "c.ply", ply().replace("3 0 1 2", "3 0 1 7"))
    with pytest.raises(MeshError, match="declares 9 elements of kind vertex"):
        written(tmp_path, "d.ply", ply().replace("vertex 3", "vertex 9"))
    colors = "".join(f"property uchar {n}\n" for n in ("red", "green", "blue"))
    with pytest.raises(MeshError, match="does not fit its type uint8"):
        written(tmp_path, "e.ply", ply(vertex=colors, a=" 0 999 0"))


def test_ply_texture_by_vertex(tmp_path: Path) -> None:
    (tmp_path / "my skin.png").write_bytes(picture())
    text = ply(
        comment="comment TEXTUREFILE my skin.png\n",
        vertex="property float u\nproperty float v\n",
        a=" 0.25 0.25",
    )
    (part,) = written(tmp_path, "a.ply", text).primitives
    assert part.texture is not None
    assert part.uv is not None
    np.testing.assert_allclose(part.uv, [[0.25, 0.75]] * 3)


def test_data_uris_equal_the_file_beside(tmp_path: Path) -> None:
    import base64

    glb = tetra()
    body = base64.b64encode(glb.blob).decode()
    uri = f"data:application/octet-stream;base64,{body}"
    header = {**glb.header, "buffers": [{"uri": uri, "byteLength": len(glb.blob)}]}
    mesh = written(tmp_path, "a.gltf", json.dumps(header))
    same_surface(mesh, load_mesh(glb.write(tmp_path)))
    header["buffers"][0]["uri"] = uri[:-3] + "*"
    with pytest.raises(MeshError, match="not valid base64"):
        written(tmp_path, "a.gltf", json.dumps(header))


def test_a_second_part_upside_down_faces_the_same_way(tmp_path: Path) -> None:
    """A negative scale on one of two nodes with one mesh."""
    glb = Glb()
    glb.mesh(QUAD, QUAD_FACES)
    glb.header["nodes"] = [{"mesh": 0}, {"mesh": 0, "scale": [-1, 1, 1], "translation": [3, 0, 0]}]
    glb.header["scenes"] = [{"nodes": [0, 1]}]
    a, b, c = surface(load_mesh(glb.write(tmp_path))).transpose(1, 0, 2)
    assert (np.cross(b - a, c - a)[:, 2] > 0).all()

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.mesh import Mesh, load_mesh
from tests.data_prep.glb import (
    QUAD,
    QUAD_FACES,
    TETRA,
    TETRA_FACES,
    Glb,
    quad,
    tetra,
)


def triangles(mesh: Mesh) -> Any:
    return np.concatenate([p.vertices[p.faces] for p in mesh.primitives]).astype(np.float64)


def volume(mesh: Mesh) -> float:
    a, b, c = triangles(mesh).transpose(1, 0, 2)
    return float(np.einsum("nc,nc->n", a, np.cross(b, c)).sum() / 6)


def test_longest_side_is_one_and_the_centre_is_the_origin(tmp_path: Path) -> None:
    mesh = load_mesh(tetra().write(tmp_path))
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    np.testing.assert_allclose(high - low, [1.0, 0.6, 0.3], atol=1e-6)
    np.testing.assert_allclose(high + low, 0.0, atol=1e-6)
    np.testing.assert_allclose(mesh.center, [0.5, 0.3, 0.15], atol=1e-6)
    assert mesh.scale == pytest.approx(1.0)
    assert len(mesh.sha256) == 64


def test_mirrored_node_is_turned_inside_out_again(tmp_path: Path) -> None:
    plain = load_mesh(tetra().write(tmp_path))
    glb = tetra()
    glb.header["nodes"] = [{"mesh": 0, "scale": [-1.0, 1.0, 1.0]}]
    mirrored = load_mesh(glb.write(tmp_path, "mirrored.glb"))
    assert volume(plain) > 0.02
    assert volume(mirrored) == pytest.approx(volume(plain), rel=1e-5)
    np.testing.assert_allclose(
        np.sort(mirrored.vertices[:, 0]), np.sort(-plain.vertices[:, 0]), atol=1e-6
    )
    # computed normals point outwards in both
    for mesh in (plain, mirrored):
        (part,) = mesh.primitives
        a, b, c = part.vertices[part.faces].transpose(1, 0, 2)
        flat = np.cross(b - a, c - a)
        assert (np.einsum("nc,nc->n", flat, part.normals[part.faces[:, 0]]) > 0).all()


def test_stored_normals_follow_a_non_uniform_scale(tmp_path: Path) -> None:
    glb = Glb()
    slope = np.array([[0, 0, 0], [1, 0, 1], [0, 1, 0]], "f4")
    normal = np.tile(np.array([[-1, 0, 1]], "f4") / np.sqrt(2, dtype="f4"), (3, 1))
    glb.mesh(slope, np.array([0, 1, 2], "u2"), NORMAL=normal)
    glb.header["nodes"] = [{"mesh": 0, "scale": [1.0, 1.0, 3.0]}]
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    np.testing.assert_allclose(part.normals[0], np.array([-3, 0, 1]) / np.sqrt(10), atol=1e-6)


def test_nested_transforms_and_huge_coordinates_lose_nothing(tmp_path: Path) -> None:
    plain = load_mesh(tetra().write(tmp_path))
    glb = tetra()
    glb.header["nodes"] = [
        {"translation": [1e7, -3e7, 5e6], "children": [1]},
        {"rotation": [0.0, 0.0, 0.0, 1.0], "scale": [2.0, 2.0, 2.0], "mesh": 0},
    ]
    far = load_mesh(glb.write(tmp_path, "far.glb"))
    np.testing.assert_allclose(far.vertices, plain.vertices, atol=1e-6)
    assert far.scale == pytest.approx(0.5)


def test_quantised_positions_are_read_as_fractions(tmp_path: Path) -> None:
    glb = Glb()
    primitive = glb.mesh(TETRA, TETRA_FACES)
    primitive["attributes"]["POSITION"] = glb.accessor(
        np.rint(TETRA * 32767).astype("i2"), normalized=True
    )
    glb.header["nodes"] = [{"mesh": 0, "scale": [2.0, 2.0, 2.0]}]
    glb.header["extensionsRequired"] = glb.header["extensionsUsed"] = ["KHR_mesh_quantization"]
    mesh = load_mesh(glb.write(tmp_path))
    assert mesh.scale == pytest.approx(0.5)
    np.testing.assert_allclose(
        mesh.vertices, load_mesh(tetra().write(tmp_path)).vertices, atol=1e-4
    )


def test_strips_and_fans_become_triangles(tmp_path: Path) -> None:
    for mode, order in ((5, [3, 2, 0, 1]), (6, [0, 3, 2, 1])):
        glb = Glb()
        glb.mesh(QUAD, np.array(order, "u2"), mode=mode)
        mesh = load_mesh(glb.write(tmp_path, f"mode{mode}.glb"))
        a, b, c = triangles(mesh).transpose(1, 0, 2)
        normal = np.cross(b - a, c - a)
        np.testing.assert_allclose(normal, [[0, 0, 1]] * 2, atol=1e-6)


def test_sparse_accessor_moves_a_vertex(tmp_path: Path) -> None:
    glb = Glb()
    primitive = glb.mesh(TETRA, TETRA_FACES)
    glb.header["accessors"][primitive["attributes"]["POSITION"]]["sparse"] = {
        "count": 1,
        "indices": {"bufferView": glb.view(np.array([1], "u2").tobytes()), "componentType": 5123},
        "values": {"bufferView": glb.view(np.array([4, 0, 0], "f4").tobytes())},
    }
    assert load_mesh(glb.write(tmp_path)).scale == pytest.approx(0.25)


def test_instances_are_drawn(tmp_path: Path) -> None:
    glb = tetra()
    places = np.array([[0, 0, 0], [9, 0, 0], [0, 5, 0]], "f4")
    glb.header["nodes"][0]["extensions"] = {
        "EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": glb.accessor(places)}}
    }
    mesh = load_mesh(glb.write(tmp_path))
    assert mesh.num_faces == 12
    assert mesh.scale == pytest.approx(0.1)


def test_skin_and_morph_weights_pose_the_mesh(tmp_path: Path) -> None:
    glb = Glb()
    joints, weights = np.zeros((4, 4), "u1"), np.tile(np.array([[1, 0, 0, 0]], "f4"), (4, 1))
    primitive = glb.mesh(TETRA, TETRA_FACES, JOINTS_0=joints, WEIGHTS_0=weights)
    primitive["targets"] = [{"POSITION": glb.accessor(TETRA)}]
    glb.header["meshes"][0]["weights"] = [0.5]
    glb.header["skins"] = [{"joints": [1]}]
    glb.header["nodes"] = [
        # a skinned mesh ignores its own node's transform
        {"mesh": 0, "skin": 0, "translation": [100.0, 0.0, 0.0]},
        {"scale": [3.0, 3.0, 3.0], "translation": [0.0, 2.0, 0.0]},
    ]
    glb.header["scenes"] = [{"nodes": [0, 1]}]
    mesh = load_mesh(glb.write(tmp_path))
    assert 1.0 / mesh.scale == pytest.approx(1.5 * 3.0)
    np.testing.assert_allclose(mesh.center, [2.25, 2 + 0.9 * 1.5, 0.45 * 1.5], atol=1e-5)


def test_vertex_colours_and_factors_are_linear_light(tmp_path: Path) -> None:
    colors = np.tile(np.array([[0.2140, 0.0, 1.0, 1.0]], "f4"), (4, 1))
    glb, primitive = quad(COLOR_0=colors)
    primitive["material"] = glb.material()
    glb.header["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"] = [0.2140, 1, 1, 1]
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    assert part.vertex_colors is not None
    # linear 0.2140 is sRGB 0.5
    np.testing.assert_allclose(part.vertex_colors[0], [0.5, 0.0, 1.0, 1.0], atol=1e-3)
    assert part.base_color[0] == pytest.approx(0.5, abs=1e-3)


def test_texture_transform_and_second_set_of_coordinates(tmp_path: Path) -> None:
    other = np.full((4, 2), 0.25, "f4")
    glb, primitive = quad(TEXCOORD_1=other)
    primitive["material"] = glb.material(glb.texture(np.zeros((4, 4, 3))))
    glb.header["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]["extensions"] = {
        "KHR_texture_transform": {"texCoord": 1, "scale": [2.0, 1.0], "offset": [0.125, 0.0]}
    }
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    assert part.uv is not None
    np.testing.assert_allclose(part.uv, [[0.625, 0.25]] * len(part.uv), atol=1e-6)


def test_vertices_no_triangle_uses_do_not_count(tmp_path: Path) -> None:
    glb = Glb()
    glb.mesh(np.concatenate([TETRA, [[1e9, 0, 0]]]).astype("f4"), TETRA_FACES)
    assert load_mesh(glb.write(tmp_path)).scale == pytest.approx(1.0)


def test_external_gltf_is_read(tmp_path: Path) -> None:
    import json

    glb = tetra()
    (tmp_path / "data file.bin").write_bytes(glb.blob)
    header = {**glb.header, "buffers": [{"uri": "data%20file.bin", "byteLength": len(glb.blob)}]}
    path = tmp_path / "test.gltf"
    path.write_text(json.dumps(header))
    assert load_mesh(path).num_faces == 4


def test_obj_with_texture_and_material_colour(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / "skin.png")
    (tmp_path / "a.mtl").write_text("newmtl t\nmap_Kd -s 1 1 1 skin.png\nnewmtl c\nKd 0.5 0 0\n")
    (tmp_path / "a.obj").write_text(
        "mtllib a.mtl\nv 0 0 0\nv 2 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0 1\n"
        "usemtl t\nf 1/1 2/2 3/3\nusemtl c\nf 1 2 4\n"
    )
    mesh = load_mesh(tmp_path / "a.obj")
    textured = [p for p in mesh.primitives if p.texture is not None]
    plain = [p for p in mesh.primitives if p.texture is None]
    assert len(textured) == len(plain) == 1
    assert textured[0].texture is not None
    assert textured[0].uv is not None
    np.testing.assert_array_equal(textured[0].texture[0, 0], [10, 200, 30, 255])
    # bottom-left in OBJ is (0, 1) here
    corners = {
        tuple(v): tuple(u) for v, u in zip(textured[0].vertices, textured[0].uv, strict=True)
    }
    low = tuple(textured[0].vertices.min(axis=0))
    assert corners[(low[0], low[1], low[2])] == (0.0, 1.0)
    assert plain[0].base_color[0] == pytest.approx(0.5, abs=0.01)
    assert mesh.scale == pytest.approx(0.5)


def test_obj_with_two_libraries_relative_indices_and_opacity(tmp_path: Path) -> None:
    (tmp_path / "a.mtl").write_text("newmtl red\nKd 1 0 0\n")
    (tmp_path / "b.mtl").write_text("newmtl ghost\nKd 0 1 0\nd 0.2\n")
    (tmp_path / "a.obj").write_text(
        "mtllib a.mtl\nmtllib b.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl red\nf -3 -2 -1\n"
        "v 0 0 0.5\nv 1 0 0.5\nv 0 1 0.5\nf -3 -2 -1\nusemtl ghost\nf 1 2 4\n"
    )
    (part,) = load_mesh(tmp_path / "a.obj").primitives
    assert part.base_color == (1.0, 0.0, 0.0, 1.0)
    assert len(part.faces) == 2
    # both triangles are there, not the last one twice
    assert sorted(np.unique(part.vertices[:, 2])) == pytest.approx([-0.25, 0.25])


def test_obj_without_material_is_white(tmp_path: Path) -> None:
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n")
    mesh = load_mesh(tmp_path / "a.obj")
    assert mesh.num_faces == 2
    assert mesh.primitives[0].base_color == (1.0, 1.0, 1.0, 1.0)


def test_ply_with_vertex_colours(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\n"
        "property float z\nproperty uchar red\nproperty uchar green\nproperty uchar blue\n"
        "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
        "0 0 0 255 0 0\n4 0 0 255 0 0\n0 1 0 255 0 0\n3 0 1 2\n"
    )
    mesh = load_mesh(tmp_path / "a.ply")
    colors = mesh.primitives[0].vertex_colors
    assert colors is not None
    np.testing.assert_allclose(colors, [[1.0, 0.0, 0.0, 1.0]] * 3)
    assert mesh.scale == pytest.approx(0.25)


def test_smooth_and_sharp_normals(tmp_path: Path) -> None:
    import trimesh

    sphere = trimesh.creation.icosphere(subdivisions=3)
    glb = Glb()
    glb.mesh(sphere.vertices.astype("f4"), sphere.faces.reshape(-1).astype("u2"))
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    radial = part.vertices / np.linalg.norm(part.vertices, axis=1, keepdims=True)
    assert np.einsum("nc,nc->n", radial, part.normals).min() > 0.999
    box = trimesh.creation.box()
    glb = Glb()
    glb.mesh(box.vertices.astype("f4"), box.faces.reshape(-1).astype("u2"))
    (part,) = load_mesh(glb.write(tmp_path)).primitives
    np.testing.assert_allclose(np.abs(part.normals).max(axis=1), 1.0, atol=1e-6)


def test_faces_of_quad_helper_face_plus_z() -> None:
    a, b, c = QUAD[QUAD_FACES.reshape(-1, 3)].transpose(1, 0, 2)
    assert (np.cross(b - a, c - a)[:, 2] > 0).all()

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from numpy.typing import NDArray

from data_prep.mesh import Mesh, load_mesh, normalized
from data_prep.primitives import Primitive
from data_prep.procedural import make_object
from data_prep.renderers import Rendered, RendererName, choose_renderer, open_renderer
from data_prep.renderers.pyrender_ import unavailable
from data_prep.viewpoints import ViewpointOptions, make_viewpoints
from equifeat.errors import RenderError
from equifeat.geometry.camera import look_at
from tests.data_prep.glb import QUAD, QUAD_FACES, QUAD_UV, Glb, quad, tetra
from tests.helpers import shared_dir

Array = NDArray[Any]
SIZE = (512, 512)
K = np.array([[560.0, 0, 256], [0, 560, 256], [0, 0, 1]])


@pytest.fixture(params=["embree", "pyrender"])
def renderer(request: pytest.FixtureRequest) -> RendererName:
    name: RendererName = request.param
    if name == "pyrender" and unavailable():
        pytest.skip(f"pyrender does not work here: {unavailable()}")
    return name


def pose(*eye: float) -> Array:
    at = torch.tensor(eye, dtype=torch.float64)
    out: Array = look_at(at, torch.zeros(3).double(), torch.tensor([0.0, 1, 0]).double()).numpy()
    return out


FRONT = pose(0, 0, 2)


def draw(name: RendererName, mesh: Mesh, *cameras: Array, normals: bool = False) -> list[Rendered]:
    opened = open_renderer(name, mesh)
    views = [opened.render(K, camera, SIZE, normals) for camera in cameras]
    opened.close()
    return views


def shape(solid: Any) -> Mesh:
    none = np.zeros((0, 3))
    part = Primitive(none, solid.faces.astype(np.int32), none)
    return normalized("solid", [(np.asarray(solid.vertices, np.float64), part)])


def rays() -> Array:
    y, x = np.mgrid[0:512, 0:512] + 0.5
    return np.stack([(x - 256) / 560, (y - 256) / 560, np.ones_like(x)], axis=-1)


def test_box_depth_is_exact(renderer: RendererName) -> None:
    # seen from the front the box is one plane at z = 2 - 0.2, 1 x 0.6 in size
    (view,) = draw(renderer, shape(trimesh.creation.box((1.0, 0.6, 0.4))), FRONT, normals=True)
    points = rays() * 1.8
    expected = (np.abs(points[..., 0]) < 0.5) & (np.abs(points[..., 1]) < 0.3)
    np.testing.assert_array_equal(view.mask, expected)
    assert np.abs(view.depth[view.mask] - 1.8).max() < 1e-6
    assert (view.depth[~view.mask] == 0).all()
    assert view.depth.dtype == np.float32
    assert view.normals is not None
    assert np.abs(view.normals[view.mask] - [0, 0, -1]).max() < 0.01
    assert (view.normals[~view.mask] == 0).all()


def test_slanted_box_matches_its_planes(renderer: RendererName) -> None:
    camera = pose(1.1, 0.9, 1.4)
    (view,) = draw(renderer, shape(trimesh.creation.box((1.0, 0.6, 0.4))), camera)
    direction = rays() @ camera[:3, :3]
    eye = -camera[:3, :3].T @ camera[:3, 3]
    # slab test (Kay and Kajiya 1986); directions have z = 1 in the camera, so t is the z-depth
    half = np.array([0.5, 0.3, 0.2])
    with np.errstate(divide="ignore"):
        near = ((-np.sign(direction) * half - eye) / direction).max(axis=-1)
        far = ((np.sign(direction) * half - eye) / direction).min(axis=-1)
    hit = near < far
    assert (hit != view.mask).mean() < 1e-4
    both = hit & view.mask
    assert np.percentile(np.abs(view.depth - near)[both], 99.9) < 2e-6
    assert np.abs(view.depth - near)[both].max() < 2e-3


def test_sphere_depth(renderer: RendererName) -> None:
    sphere = trimesh.creation.icosphere(subdivisions=5, radius=0.5)
    (view,) = draw(renderer, shape(sphere), pose(0.3, -1.2, 1.5), normals=True)
    ray = rays()
    distance = float(np.linalg.norm([0.3, -1.2, 1.5]))
    a, b, c = (ray**2).sum(-1), -2 * distance * ray[..., 2], distance**2 - 0.25
    root = b * b - 4 * a * c
    z = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / (2 * a), 0)
    inner = (root > 0.02) & view.mask
    # the triangles lie up to 2e-4 inside the sphere
    assert np.abs(view.depth - z)[inner].max() < 1e-3
    assert np.logical_xor(view.mask, root > 0).sum() / view.mask.sum() < 0.01
    assert view.normals is not None
    points = ray * z[..., None] - [0, 0, distance]
    cosine = (view.normals * points).sum(-1)[inner] / 0.5
    assert cosine.min() > 0.999


def test_texture_is_the_right_way_up(renderer: RendererName, tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :32], pixels[:32, 32:] = (255, 0, 0), (0, 255, 0)
    pixels[32:, :32], pixels[32:, 32:] = (0, 0, 255), (255, 255, 255)
    glb, primitive = quad()
    primitive["material"] = glb.material(glb.texture(pixels))
    mesh = load_mesh(glb.write(tmp_path))
    front, back = draw(renderer, mesh, FRONT, pose(0, 0, -2))
    for view, columns in ((front, (180, 330)), (back, (330, 180))):
        quarters = [view.color[r, c].astype(int) for r in (180, 330) for c in columns]
        lit = [q > 0.5 * max(int(q.max()), 1) for q in quarters]
        expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
        np.testing.assert_array_equal(np.array(lit), np.array(expected, bool))
        # two-sided: the back is lit as well
        assert quarters[0][0] > 60


@pytest.mark.parametrize("wrap", [10497, 33648, 33071])
def test_wrap_modes(renderer: RendererName, wrap: int, tmp_path: Path) -> None:
    glb = Glb()
    primitive = glb.mesh(QUAD, QUAD_FACES, TEXCOORD_0=QUAD_UV * np.array([2, 1], "f4"))
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    primitive["material"] = glb.material(glb.texture(pixels, wrapS=wrap, wrapT=wrap))
    (view,) = draw(renderer, load_mesh(glb.write(tmp_path)), FRONT)
    # centres of the four quarters along u = 0.25, 0.75, 1.25, 1.75
    bright = [bool(view.color[256, c, 0] > 100) for c in (151, 221, 291, 361)]
    expected = {10497: [0, 1, 0, 1], 33648: [0, 1, 1, 0], 33071: [0, 1, 1, 1]}[wrap]
    assert bright == [bool(e) for e in expected]


def alpha_mesh(folder: Path, mode: str, alpha: int, cutoff: float = 0.5) -> Mesh:
    """A green square with a hole of the given alpha, in front of a red one."""
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[..., [0, 2]] = 0
    pixels[16:48, 16:48, 3] = alpha
    glb = Glb()
    front = glb.mesh(QUAD + np.array([0, 0, 0.2], "f4"), QUAD_FACES, TEXCOORD_0=QUAD_UV)
    front["material"] = glb.material(glb.texture(pixels), alphaMode=mode, alphaCutoff=cutoff)
    if mode != "MASK":
        del glb.header["materials"][0]["alphaCutoff"]
    back = glb.mesh(QUAD, QUAD_FACES)
    back["material"] = glb.material()
    glb.header["materials"][1]["pbrMetallicRoughness"]["baseColorFactor"] = [1, 0, 0, 1]
    glb.header["nodes"] = [{"mesh": 0}, {"mesh": 1}]
    glb.header["scenes"] = [{"nodes": [0, 1]}]
    return load_mesh(glb.write(folder))


@pytest.mark.parametrize(
    ("mode", "alpha", "cutoff", "hole"),
    [
        ("OPAQUE", 0, 0.5, False),
        ("MASK", 100, 0.5, True),
        ("MASK", 100, 0.3, False),
        ("BLEND", 100, 0.5, True),
        ("BLEND", 160, 0.5, False),
    ],
)
def test_alpha_policy(
    renderer: RendererName, mode: str, alpha: int, cutoff: float, hole: bool, tmp_path: Path
) -> None:
    (view,) = draw(renderer, alpha_mesh(tmp_path, mode, alpha, cutoff), FRONT)
    near, far = 2 - 0.1, 2 + 0.1
    assert view.depth[256, 256] == pytest.approx(far if hole else near, abs=1e-5)
    assert view.depth[160, 256] == pytest.approx(near, abs=1e-5)
    red, green, _ = view.color[256, 256]
    assert (red > 100) == hole
    assert (green > 100) == (not hole)
    assert view.mask[256, 256]


def test_vertex_colours_are_interpolated(renderer: RendererName, tmp_path: Path) -> None:
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 255, 0], [255, 0, 0]], "u1")
    glb, primitive = quad()
    primitive["attributes"]["COLOR_0"] = glb.accessor(colors, normalized=True)
    (view,) = draw(renderer, load_mesh(glb.write(tmp_path)), FRONT)
    left, middle, right = (view.color[256, c].astype(int) for c in (130, 256, 382))
    assert left[0] > 150 > 30 > left[1]
    assert right[1] > 150 > 30 > right[0]
    assert abs(middle[0] - middle[1]) < 6


def compare(mesh: Mesh, indices: tuple[int, ...], colour: float) -> None:
    views = make_viewpoints(ViewpointOptions(), SIZE)
    cameras = [views.cam_from_world[i].numpy() for i in indices]
    pairs = zip(draw("embree", mesh, *cameras), draw("pyrender", mesh, *cameras), strict=True)
    for cast, drawn in pairs:
        both, either = cast.mask & drawn.mask, cast.mask | drawn.mask
        assert both.sum() / either.sum() >= 0.995
        apart = np.abs(cast.depth - drawn.depth)[both]
        assert (apart > 1e-4).mean() <= 1e-3
        assert np.abs(cast.color.astype(int) - drawn.color)[both].mean() < colour


def needs_pyrender() -> None:
    if unavailable():
        pytest.skip(f"pyrender does not work here: {unavailable()}")


def test_renderers_agree_on_a_procedural_object() -> None:
    needs_pyrender()
    compare(make_object(3), (3, 17, 30), colour=6.0)


def test_renderers_agree_on_see_through_textures(tmp_path: Path) -> None:
    needs_pyrender()
    compare(alpha_mesh(tmp_path, "MASK", 0), (3, 30, 41), colour=4.0)


@pytest.mark.shared
def test_renderers_agree_on_all_validation_meshes() -> None:
    files = sorted(shared_dir("meshes/val").glob("*.glb"))
    needs_pyrender()
    assert len(files) == 13
    for k, path in enumerate(files):
        # 11 looks along an axis: edges then run along columns of pixel centres
        compare(load_mesh(path), (11, 3 * k % 42, (3 * k + 20) % 42), colour=8.0)


def test_auto_says_what_it_took_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.renderers import pyrender_

    monkeypatch.setattr(pyrender_, "unavailable", lambda: "no EGL device can be opened (test)")
    choice = choose_renderer("auto")
    assert choice.name == "embree"
    assert "no EGL device can be opened (test)" in choice.reason
    with pytest.raises(RenderError, match="use --renderer embree"):
        choose_renderer("pyrender")
    monkeypatch.setattr(pyrender_, "unavailable", lambda: "")
    monkeypatch.setattr(pyrender_, "device", lambda: "Teapot 9000")
    assert choose_renderer("auto") == ("pyrender", "EGL works (Teapot 9000)")
    with pytest.raises(RenderError, match="Did you mean embree"):
        choose_renderer("embre")


def test_mirrored_node_renders_as_its_mirror_image(renderer: RendererName, tmp_path: Path) -> None:
    plain, flipped = tetra(), tetra()
    flipped.header["nodes"] = [{"mesh": 0, "scale": [-1.0, 1.0, 1.0]}]
    (a,) = draw(renderer, load_mesh(plain.write(tmp_path)), FRONT)
    (b,) = draw(renderer, load_mesh(flipped.write(tmp_path, "b.glb")), FRONT)
    mirror = b.depth[:, ::-1]
    both = (a.depth > 0) & (mirror > 0)
    assert both.sum() / ((a.depth > 0) | (mirror > 0)).sum() > 0.995
    assert np.percentile(np.abs(a.depth - mirror)[both], 99.9) < 1e-5


def test_what_torch_compiles_with_loads_behind_gl() -> None:
    """Two LLVMs in one process: Mesa's first and then Triton's was a crash."""
    pytest.importorskip("triton", reason="this torch has no triton")
    if unavailable():
        pytest.skip(f"pyrender does not work here: {unavailable()}")
    code = (
        "from data_prep.renderers.pyrender_ import unavailable\n"
        "assert not unavailable(), unavailable()\n"
        "import triton, timm\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray
from PIL import Image

from data_prep.backgrounds import compose, draw_background
from data_prep.mesh import normalized
from data_prep.primitives import Primitive
from data_prep.procedural import make_object
from data_prep.randomize import SceneOptions, draw_scene
from data_prep.render_object import RenderOptions, render_object
from data_prep.renderers import Rendered, RendererName, open_renderer
from data_prep.renderers.lights import FIXED_LIGHT, Lights
from data_prep.renderers.pyrender_ import unavailable
from data_prep.viewpoints import ViewpointOptions, make_viewpoints
from equifeat.errors import RenderError
from tests.helpers import GOLDEN

Array = NDArray[Any]
SIZE = (64, 64)
WILD = SceneOptions(
    light="view", lights=4, light_jitter=0.4, light_saturation=0.6, light_distance=2
)


def needs_pyrender() -> None:
    if unavailable():
        pytest.skip(f"pyrender does not work here: {unavailable()}")


def draw(name: RendererName, lights: Lights, size: int, view: int = 3, number: int = 3) -> Rendered:
    K, poses = make_viewpoints(ViewpointOptions(), (size, size))
    opened = open_renderer(name, make_object(number))
    out = opened.render(K[view].numpy(), poses[view].numpy(), (size, size), False, lights)
    opened.close()
    return out


@pytest.mark.parametrize("name", ["embree", "pyrender"])
@pytest.mark.parametrize("view", [3, 17])
def test_the_fixed_light_gives_the_pictures_it_always_gave(name: RendererName, view: int) -> None:
    if name == "pyrender":
        needs_pyrender()
    golden = np.load(GOLDEN / "fixed_light.npz")[f"{name}_{view}"].astype(int)
    apart = np.abs(draw(name, FIXED_LIGHT, 64, view).color - golden)
    # equal on one machine; another processor or driver may round another way
    assert (apart > 1).mean() < (1e-3 if name == "embree" else 1e-2)
    assert golden.max() > 150
    # the options' own defaults are that light
    scene = draw_scene(SceneOptions(seed=4), "any", 7, SIZE)
    assert scene.background is None
    for field in ("ambient", "places", "colors", "head", "sky"):
        np.testing.assert_array_equal(getattr(scene.lights, field), getattr(FIXED_LIGHT, field))


@pytest.mark.parametrize("view", range(3))
def test_renderers_agree_under_drawn_lights(view: int) -> None:
    needs_pyrender()
    lights = draw_scene(WILD, "thing", view, SIZE).lights
    cast, drawn = (draw(name, lights, 256, 5 * view).color for name in ("embree", "pyrender"))
    both = cast.any(axis=2) & drawn.any(axis=2)
    apart = np.abs(cast.astype(int) - drawn)[both]
    assert apart.mean() < 6.0
    # and the light does something
    plain = draw("embree", FIXED_LIGHT, 256, 5 * view).color
    assert np.abs(plain.astype(int) - cast)[both].mean() > 2 * apart.mean()


@pytest.mark.parametrize("name", ["embree", "pyrender"])
def test_a_light_shines_from_where_it_is(name: RendererName) -> None:
    if name == "pyrender":
        needs_pyrender()
    solid, none = trimesh.creation.icosphere(subdivisions=4), np.zeros((0, 3))
    part = Primitive(none, solid.faces.astype(np.int32), none)
    ball = normalized("ball", [(np.asarray(solid.vertices, np.float64), part)])
    K, poses = make_viewpoints(ViewpointOptions(), (128, 128))
    pose = poses[3].numpy()
    right = pose[0, :3]
    dark = dataclasses.replace(FIXED_LIGHT, ambient=np.zeros(3), head=np.zeros(3))
    opened = open_renderer(name, ball)
    for place, sign in (
        ([*right, 0.0], 1),
        ([*-right, 0.0], -1),
        ([*(2 * right), 1.0], 1),
        ([*(-2 * right), 1.0], -1),
    ):
        lights = dataclasses.replace(
            dark, places=np.array([place]), colors=np.array([[1.0, 0.5, 0.0]])
        )
        view = opened.render(K[3].numpy(), pose, (128, 128), False, lights)
        columns = np.nonzero(view.mask[64])[0]
        line = view.color[64, columns].astype(int)[::sign]
        assert line[..., 2].max() == 0
        np.testing.assert_allclose(line[:, 1], line[:, 0] / 2, atol=1.01)
        # 0.5 + 0.5 n·l from the dark side to the bright one
        assert (np.diff(line[:, 0]) >= -1).all()
        assert line[2, 0] < 50
        assert line[-3, 0] > 205
        # at the middle n·l is 0, or -0.5 / sqrt(4 + 0.25) for a point light at distance 2
        middle = 127 if place[3] == 0 else 127.5 * (1 - 0.5 / 4.25**0.5)
        assert abs(line[len(line) // 2, 0] - middle) < 4
    opened.close()


def scenes(options: SceneOptions, name: str = "thing") -> list[dict[str, Any]]:
    return [draw_scene(options, name, i, SIZE).record for i in range(4)]


def test_light_of_object_and_of_view() -> None:
    views = scenes(WILD)
    assert views == scenes(WILD)
    assert len({json.dumps(view) for view in views}) == 4
    assert views != scenes(WILD, "other")
    assert views != scenes(dataclasses.replace(WILD, seed=1))
    of_object = dataclasses.replace(WILD, light="object")
    assert len({json.dumps(view) for view in scenes(of_object)}) == 1
    assert scenes(of_object) != scenes(of_object, "other")
    # view i does not depend on what else was drawn
    assert draw_scene(WILD, "thing", 2, SIZE).record == views[2]


def test_drawn_lights_stay_in_their_ranges() -> None:
    options = SceneOptions(
        light="view", lights=3, light_elevation=20.0, light_jitter=0.3, light_saturation=0.5
    )
    drawn = [draw_scene(options, "thing", i, SIZE).lights for i in range(200)]
    assert {len(x.places) for x in drawn} == {1, 2, 3}
    places = np.concatenate([x.places for x in drawn])
    np.testing.assert_allclose(np.linalg.norm(places[:, :3], axis=1), 1.0)
    assert (places[:, 3] == 0).all()
    assert np.rad2deg(np.arcsin(places[:, 1].min())) >= 20.0 - 1e-9
    total = np.array([x.colors.sum(axis=0).mean() for x in drawn]) / 0.40
    ambient = np.array([x.ambient.mean() for x in drawn]) / 0.45
    for ratio in (total, ambient):
        assert 0.7 <= ratio.min() < 0.75
        assert 1.25 < ratio.max() <= 1.3
    colors = np.concatenate([x.colors for x in drawn])
    saturation = 1 - colors.min(axis=1) / colors.max(axis=1)
    assert 0.4 < saturation.max() <= 0.5 + 1e-9
    assert abs(np.corrcoef(total, ambient)[0, 1]) < 0.3


def test_drawn_numbers_are_those_of_every_process() -> None:
    code = (
        "from data_prep.randomize import *;"
        "print(draw_scene(SceneOptions(light='view', lights=4), 'a/b', 1, (8, 8)).record)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = draw_scene(SceneOptions(light="view", lights=4), "a/b", 1, (8, 8)).record
    assert out.stdout.strip() == str(here)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lights": 9, "light": "view"}, "give 1 to 8"),
        ({"lights": 2}, "no effect on the fixed light; give --light object"),
        ({"light_jitter": 0.2}, "light_jitter = 0.2 has no effect"),
        ({"light_distance": 0.5, "light": "view"}, "light_distance = 0.5"),
        ({"ambient": -1.0}, "ambient = -1.0"),
        ({"ambient": 0.0, "head_light": 0.0, "light_intensity": 0.0}, "no light at all"),
        ({"background": "grey"}, "background = 'grey'"),
        ({"background": "gradiant"}, "Did you mean gradient"),
        ({"environment": "/nowhere"}, "environment = '/nowhere'"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(RenderError, match=words):
        SceneOptions(**wrong)


def test_composing_keeps_the_object_and_fills_the_rest() -> None:
    color = np.array([[[200, 100, 50], [100, 50, 25], [0, 0, 0]]], np.uint8)
    depth = np.array([[2.0, 0.0, 0.0]], np.float32)
    view = Rendered(color, depth, depth > 0, None, np.array([[255, 128, 0]], np.uint8))
    white = np.full((1, 3, 3), 255, np.uint8)
    out = compose(view, white)
    # (255 - 128) of white shine through the half-covered pixel
    np.testing.assert_array_equal(out.color[0], [[200, 100, 50], [227, 177, 152], [255, 255, 255]])
    assert out.depth is view.depth
    assert compose(view, None) is view
    by_mask = compose(view._replace(coverage=None), white)
    np.testing.assert_array_equal(by_mask.color[0, 1], [255, 255, 255])


@pytest.mark.parametrize("name", ["embree", "pyrender"])
def test_coverage_is_the_share_of_the_pixel(name: RendererName) -> None:
    if name == "pyrender":
        needs_pyrender()
    view = draw(name, FIXED_LIGHT, 128)
    assert view.coverage is not None
    assert view.coverage.dtype == np.uint8
    inner = (view.coverage == 255).mean()
    edge = (view.coverage > 0) & (view.coverage < 255)
    assert 0.02 < inner < view.mask.mean()
    assert edge.any()
    # no colour without coverage, and the mean of both counts the same surface
    assert (view.color[view.coverage == 0] == 0).all()
    assert abs(view.coverage.mean() / 255 - view.mask.mean()) < 2e-3
    # a dark rim would show on white: an edge pixel is at least as bright as its uncovered share
    white = compose(view, np.full((128, 128, 3), 255, np.uint8))
    assert (white.color[edge].astype(int) >= 254 - view.coverage[edge][:, None]).all()


@pytest.mark.parametrize("kind", ["white", "color", "noise", "gradient", "#102030"])
def test_backgrounds(kind: str) -> None:
    first, record = draw_background(kind, (40, 60), np.random.default_rng(1))
    again, _ = draw_background(kind, (40, 60), np.random.default_rng(1))
    other, _ = draw_background(kind, (40, 60), np.random.default_rng(2))
    assert first.shape == (40, 60, 3)
    assert first.dtype == np.uint8
    assert record["kind"] == kind
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (kind in ("white", "#102030"))
    if kind == "#102030":
        assert (first == [0x10, 0x20, 0x30]).all()
    if kind == "gradient":
        steps = np.abs(np.diff(first.astype(int), axis=1))
        assert np.ptp(first.astype(int), axis=(0, 1)).max() >= 10
        assert steps.max() < 12


def test_background_folder_is_recorded_by_its_bytes(tmp_path: Path) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    for i, level in enumerate((40, 90, 140)):
        Image.new("RGB", (50, 30 + i), (level, level, level)).save(images / f"{i}.png")
    scene = SceneOptions(background=str(images), seed=2)
    points = ViewpointOptions(count=8, distance=2.2)
    options = RenderOptions(48, points, scene=scene)
    folder = render_object(make_object(0), tmp_path / "out", options, "embree")
    record = json.loads((folder / "views.json").read_text())
    assert record["options"]["scene"]["background"]["folder"] == "photos"
    assert record["options"]["scene"]["background"]["files"] == 3
    assert len(record["scenes"]) == 8
    seen = set()
    for i, drawn in enumerate(record["scenes"]):
        file = images / drawn["background"]["file"]
        with Image.open(file) as picture, Image.open(folder / f"color_{i:06d}.png") as color:
            level, corner = np.asarray(picture)[0, 0], np.asarray(color)[0, 0]
            np.testing.assert_array_equal(level, corner)
        with Image.open(folder / f"mask_{i:06d}.png") as mask:
            assert np.asarray(mask)[0, 0] == 0
        seen.add((drawn["background"]["file"], drawn["background"]["sha256"]))
    assert len(seen) > 1
    # finished, and the same again only with the same options
    render_object(make_object(0), tmp_path / "out", options, "embree")
    plain = RenderOptions(48, points)
    with pytest.raises(RenderError, match="another scene"):
        render_object(make_object(0), tmp_path / "out", plain, "embree")


def test_damaged_background_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(RenderError, match=r"broken\.png: cannot be read as an image"):
        draw_background(str(tmp_path), SIZE, np.random.default_rng(0))


def test_folders_of_earlier_versions_count_as_default(tmp_path: Path) -> None:
    options = RenderOptions(48, ViewpointOptions(count=2))
    folder = render_object(make_object(0), tmp_path, options, "embree")
    path = folder / "views.json"
    record = json.loads(path.read_text())
    for key in ("scene", "distance_jitter", "angle_jitter"):
        del record["options"][key]
    assert "scenes" not in record
    path.write_text(json.dumps(record))
    render_object(make_object(0), tmp_path, options, "embree")
    assert "scene" not in json.loads(path.read_text())["options"]  # left as it was
    for other in ({"scene": WILD}, {"viewpoints": ViewpointOptions(count=2, angle_jitter=3.0)}):
        changed = dataclasses.replace(options, **other)
        with pytest.raises(RenderError, match="was rendered with another"):
            render_object(make_object(0), tmp_path, changed, "embree")

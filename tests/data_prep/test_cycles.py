"""The cycles renderer: its process and protocol always, its pictures where bpy is at hand."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import trimesh
from numpy.typing import NDArray

from data_prep.mesh import Mesh, load_mesh, normalized
from data_prep.primitives import Primitive
from data_prep.procedural import make_object
from data_prep.randomize import SceneOptions, draw_scene
from data_prep.render_object import RenderOptions, render_object
from data_prep.renderers import Rendered, choose_renderer, cycles, open_renderer
from data_prep.renderers.cycles import CyclesOptions, close_workers, default_python, find_python
from data_prep.renderers.cycles_process import WorkerProcess
from data_prep.renderers.lights import FIXED_LIGHT, Lights
from data_prep.viewpoints import ViewpointOptions, make_viewpoints
from equifeat.errors import RenderError
from tests.data_prep.glb import QUAD, QUAD_FACES, QUAD_UV, Glb
from tests.data_prep.test_renderers import alpha_mesh, pose
from tests.helpers import ROOT, shared_dir

Array = NDArray[Any]
RENDERERS = ROOT / "data_prep" / "renderers"
FAST = CyclesOptions(samples=4, denoise=False)
FRONT = pose(0, 0, 2)
SIZE = (128, 128)
K = np.array([[140.0, 0, 64], [0, 140, 64], [0, 0, 1]])

FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(RENDERERS)!r})
from cycles_protocol import read_message, write_message
mode = sys.argv[1]
while True:
    try:
        request, arrays = read_message(sys.stdin.buffer)
    except EOFError:
        break
    if mode == "crash":
        sys.stderr.write("something\\nthe driver fell over\\n")
        sys.stderr.flush()
        os.abort()
    if mode == "leave":
        sys.exit(7)
    if mode == "hang":
        time.sleep(60)
    if mode == "noise":
        sys.stdout.buffer.write(b"Fra:1 Mem:20M and so on, and so forth")
        sys.stdout.buffer.flush()
        continue
    if mode == "chatty":
        sys.stderr.write("x" * 1_000_000)
    if mode == "refuse":
        answer = {{"ok": False, "error": "ValueError: no such thing"}}
        write_message(sys.stdout.buffer, answer, {{}})
        continue
    write_message(sys.stdout.buffer, {{"ok": True, "got": request}}, arrays)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Any]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made = []

    def start(mode: str) -> WorkerProcess:
        made.append(WorkerProcess([sys.executable, "-I", str(script), mode], "cycles"))
        return made[-1]

    yield start
    for process in made:
        process.close()


def test_messages_survive_the_way(fake: Any) -> None:
    worker = fake("echo")
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "a": rng.random((300, 400, 3)).astype(np.float32),
        "b": rng.integers(0, 255, (5, 7, 4)).astype(np.uint8)[:, ::-1],
        "c": np.arange(6, dtype=np.int32).reshape(2, 3).T,
        "empty": np.zeros((0, 3), np.float32),
    }
    for _ in range(2):
        answer, back = worker.ask({"x": [1, "é"]}, arrays, 30.0)
        assert answer["got"] == {"x": [1, "é"]}
        assert list(back) == list(arrays)
        for name, values in arrays.items():
            assert back[name].dtype == values.dtype
            np.testing.assert_array_equal(back[name], values)


def test_a_full_error_pipe_does_not_block(fake: Any) -> None:
    worker = fake("chatty")
    for _ in range(3):
        assert worker.ask({}, {}, 30.0)[0]["ok"]


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("crash", "ended by signal 6: the driver fell over"),
        ("leave", "ended with exit code 7"),
        ("noise", "makes no sense"),
        ("hang", r"no answer within 0\.5 s"),
    ],
)
def test_failures_say_what_happened(fake: Any, mode: str, words: str) -> None:
    worker = fake(mode)
    with pytest.raises(RenderError, match=words):
        worker.ask({}, {"big": np.zeros(3_000_000, np.float32)}, 0.5 if mode == "hang" else 30.0)
    assert not worker.alive
    assert not psutil.pid_exists(worker.pid)


def test_a_refusal_leaves_the_worker_alive(fake: Any) -> None:
    worker = fake("refuse")
    for _ in range(2):
        with pytest.raises(RenderError, match="cycles: ValueError: no such thing"):
            worker.ask({}, {}, 30.0)
    assert worker.alive


def test_interpreter_that_does_not_exist_or_lacks_bpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EQUIFEAT_CYCLES_PYTHON", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    place = tmp_path / "equifeat" / "cycles"
    assert default_python() == place / "bin" / "python"
    with pytest.raises(RenderError) as missing:
        choose_renderer("cycles")
    # the sentence holds both commands of the documentation
    assert f"python3.11 -m venv {place} && {place}/bin/pip install bpy==5.0.1" in str(missing.value)
    with pytest.raises(RenderError, match=r"--cycles_python = /no/where: there is no such"):
        find_python(CyclesOptions(python="/no/where"))
    monkeypatch.setenv("EQUIFEAT_CYCLES_PYTHON", sys.executable)
    assert find_python(CyclesOptions()) == sys.executable
    with pytest.raises(RenderError, match=r"has no bpy: .* -m pip install bpy==5\.0\.1"):
        choose_renderer("cycles")
    # and the real worker, asked all the same, passes the reason on
    with pytest.raises(RenderError, match="ModuleNotFoundError: No module named 'bpy'"):
        cycles.CyclesRenderer(make_object(0))
    assert not cycles._workers


def test_missing_system_library_is_explained(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho 'ImportError: libSM.so.6: cannot open shared object file' >&2\nexit 1\n"
    )
    python.chmod(0o755)
    with pytest.raises(RenderError, match=r"lacks a system library \(.*libSM.*install libx11-6"):
        choose_renderer("cycles", CyclesOptions(python=str(python)))


def test_auto_never_takes_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycles, "unavailable", lambda options: "")
    assert choose_renderer("cycles").name == "cycles"
    assert choose_renderer("auto").name != "cycles"


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"threads": -1}, {"seconds": float("inf")}])
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(RenderError, match=f"cycles_{next(iter(wrong))} = "):
        CyclesOptions(**wrong)


def test_the_worker_needs_nothing_of_this_project() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(RENDERERS)!r}); import cycles_worker as w;"
        "w._stand_in_packages(); import data_prep.renderers.cycles_protocol,"
        "data_prep.renderers.cycles_studio;"
        "print([m for m in sys.modules if m.split('.')[0] in"
        "('torch', 'trimesh', 'PIL', 'equifeat', 'scipy')])"
    )
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (out.stdout.strip(), out.stderr) == ("[]", "")


PARENT = """
import sys, time
from data_prep.renderers.cycles import _WORKER
from data_prep.renderers.cycles_process import WorkerProcess
worker = WorkerProcess([sys.executable, "-I", str(_WORKER)], "cycles")
print(worker.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int, seconds: float = 15.0) -> bool:
    """Whether a process ends in time; a zombie that nobody waits for has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_the_worker_dies_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(child)


# --- with a real bpy ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpy() -> Iterator[CyclesOptions]:
    problem = cycles.unavailable(FAST)
    if problem:
        pytest.skip(problem)
    yield FAST
    close_workers()


def draw(
    mesh: Mesh, camera: Array, lights: Lights = FIXED_LIGHT, intrinsics: Array = K
) -> Rendered:
    opened = open_renderer("cycles", mesh, FAST)
    view = opened.render(intrinsics, camera, SIZE, True, lights)
    opened.close()
    return view


def shape(solid: Any) -> Mesh:
    none = np.zeros((0, 3))
    part = Primitive(none, solid.faces.astype(np.int32), none)
    return normalized("solid", [(np.asarray(solid.vertices, np.float64), part)])


def test_box_depth_is_exact(bpy: CyclesOptions) -> None:
    # one plane at z = 1.8, seen off the axis by a camera whose pixels are not square
    odd = np.array([[140.0, 0, 60.3], [0, 119, 71.7], [0, 0, 1]])
    view = draw(shape(trimesh.creation.box((1.0, 0.6, 0.4))), FRONT, intrinsics=odd)
    y, x = np.mgrid[0:128, 0:128] + 0.5
    points = np.stack([(x - 60.3) / 140, (y - 71.7) / 119], axis=-1) * 1.8
    expected = (np.abs(points[..., 0]) < 0.5) & (np.abs(points[..., 1]) < 0.3)
    np.testing.assert_array_equal(view.mask, expected)
    assert np.abs(view.depth[view.mask] - 1.8).max() < 1e-6
    assert (view.depth[~view.mask] == 0).all()
    assert view.depth.dtype == np.float32
    assert view.normals is not None
    assert np.abs(view.normals[view.mask] - [0, 0, -1]).max() < 0.01
    assert (view.normals[~view.mask] == 0).all()
    assert view.coverage is not None
    assert (view.color[view.coverage == 0] == 0).all()


def compare(mesh: Mesh, indices: tuple[int, ...]) -> None:
    views = make_viewpoints(ViewpointOptions(), SIZE)
    opened = [open_renderer("cycles", mesh, FAST), open_renderer("embree", mesh)]
    for i in indices:
        camera = views.K[i].numpy(), views.cam_from_world[i].numpy()
        traced, cast = (renderer.render(*camera, SIZE, True) for renderer in opened)
        both, either = traced.mask & cast.mask, traced.mask | cast.mask
        assert both.sum() / either.sum() > 0.999
        apart = np.abs(traced.depth - cast.depth)[both]
        assert np.median(apart) < 1e-6
        assert (apart > 1e-4).mean() <= 1e-3
        assert traced.normals is not None
        assert cast.normals is not None
        assert ((traced.normals * cast.normals).sum(-1)[both] > 0.99).mean() > 0.99
        assert traced.coverage is not None
        assert cast.coverage is not None
        assert np.abs(traced.coverage.astype(int) - cast.coverage).mean() < 2.0
        # another light model and few samples, but the same surface
        levels = [x.color[both].astype(float).mean(axis=1) for x in (traced, cast)]
        assert np.corrcoef(*levels)[0, 1] > 0.6


def test_agrees_with_embree_on_a_procedural_object(bpy: CyclesOptions) -> None:
    compare(make_object(3), (3, 17))


@pytest.mark.shared
def test_agrees_with_embree_on_real_meshes(bpy: CyclesOptions) -> None:
    files = sorted(shared_dir("meshes/val").glob("*.glb"))
    for path in files[:4]:
        compare(load_mesh(path), (11,))


@pytest.mark.parametrize(
    ("mode", "alpha", "hole"), [("OPAQUE", 0, False), ("MASK", 100, True), ("BLEND", 160, False)]
)
def test_alpha_policy(
    bpy: CyclesOptions, mode: str, alpha: int, hole: bool, tmp_path: Path
) -> None:
    view = draw(alpha_mesh(tmp_path, mode, alpha), FRONT)
    assert view.depth[64, 64] == pytest.approx(2.1 if hole else 1.9, abs=1e-5)
    assert view.depth[40, 64] == pytest.approx(1.9, abs=1e-5)
    red, green, _ = view.color[64, 64]
    assert (red > 100) == hole
    assert (green > 100) == (not hole)


def test_texture_lies_as_in_embree_for_every_wrap_mode(bpy: CyclesOptions, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (4, 4, 3), dtype=np.uint8) * 255
    for wraps in ((10497, 10497), (33648, 33071), (33071, 10497)):
        glb = Glb()
        uv = QUAD_UV * np.array([2.5, 1.7], "f4") - np.array([0.6, 0.4], "f4")
        primitive = glb.mesh(QUAD, QUAD_FACES, TEXCOORD_0=uv)
        texture = glb.texture(
            np.repeat(np.repeat(pixels, 8, 0), 8, 1), wrapS=wraps[0], wrapT=wraps[1]
        )
        primitive["material"] = glb.material(texture)
        mesh = load_mesh(glb.write(tmp_path))
        cast = open_renderer("embree", mesh).render(K, FRONT, SIZE).color > 100
        traced = draw(mesh, FRONT).color > 100
        assert (cast != traced).mean() < 0.02
        assert 0.1 < cast.mean() < 0.6


def test_vertex_colours(bpy: CyclesOptions, tmp_path: Path) -> None:
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 255, 0], [255, 0, 0]], "u1")
    glb = Glb()
    primitive = glb.mesh(QUAD, QUAD_FACES)
    primitive["attributes"]["COLOR_0"] = glb.accessor(colors, normalized=True)
    view = draw(load_mesh(glb.write(tmp_path)), FRONT)
    left, right = view.color[64, 32].astype(int), view.color[64, 96].astype(int)
    assert left[0] > 150 > left[1]
    assert right[1] > 150 > right[0]


def test_same_seed_same_picture_also_in_a_new_worker(bpy: CyclesOptions) -> None:
    mesh = make_object(1)
    lights = draw_scene(SceneOptions(light="view", lights=3, seed=1), "thing", 0, SIZE).lights
    first, again = draw(mesh, FRONT, lights), draw(mesh, FRONT, lights)
    close_workers()
    third = draw(mesh, FRONT, lights)
    for other in (again, third):
        np.testing.assert_array_equal(first.color, other.color)
        np.testing.assert_array_equal(first.depth, other.depth)
    plain = draw(mesh, FRONT)
    np.testing.assert_array_equal(first.depth, plain.depth)
    assert np.abs(first.color.astype(int) - plain.color)[first.mask].mean() > 3


def ball_brightness(lights: Lights) -> tuple[float, float, float, float]:
    """Mean brightness of a white ball's top, bottom, left and right quarter, seen from +z."""
    view = draw(shape(trimesh.creation.icosphere(subdivisions=4)), FRONT, lights)
    rows, columns = np.nonzero(view.mask)
    level = view.color[rows, columns].mean(axis=1)
    y, x = rows - rows.mean(), columns - columns.mean()
    parts = (y < -16, y > 16, x < -16, x > 16)
    return tuple(float(level[part].mean()) for part in parts)  # type: ignore[return-value]


def test_lights_shine_from_where_they_are(bpy: CyclesOptions) -> None:
    dark = dataclasses.replace(FIXED_LIGHT, ambient=np.zeros(3), head=np.zeros(3))
    means = []
    for place in ([1.0, 0, 0, 0], [4.0, 0, 0, 1]):
        top, bottom, left, right = ball_brightness(
            dataclasses.replace(dark, places=np.array([place]), colors=np.ones((1, 3)))
        )
        assert right > 3 * left
        assert abs(top - bottom) < 15
        means.append(right)
    # a point light is as strong as a direction at the object's centre; this side is nearer to it
    assert means[0] * 0.95 < means[1] < means[0] * 1.5
    sky = np.array([[2.0, 2, 2], [0.9, 0.9, 0.9], [0.1, 0.1, 0.1]])
    top, bottom, left, right = ball_brightness(
        dataclasses.replace(FIXED_LIGHT, places=np.zeros((0, 4)), colors=np.zeros((0, 3)), sky=sky)
    )
    assert top > bottom + 30
    assert abs(left - right) < 15


def write_hdr(path: Path, pixels: Array) -> None:
    """Write (H, W) grey radiance 0 or 1 as an uncompressed Radiance picture."""
    h, w = pixels.shape
    rgbe = np.where(pixels[..., None] > 0, [128, 128, 128, 129], [0, 0, 0, 0]).astype(np.uint8)
    head = f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {h} +X {w}\n"
    path.write_bytes(head.encode() + rgbe.tobytes())


def test_environment_picture_is_the_right_way_up_and_turns(
    bpy: CyclesOptions, tmp_path: Path
) -> None:
    sky, side = np.zeros((16, 32)), np.zeros((16, 32))
    sky[:8], side[:, :16] = 1, 1
    write_hdr(tmp_path / "sky.hdr", sky)
    write_hdr(tmp_path / "side.hdr", side)
    up = dataclasses.replace(FIXED_LIGHT, environment=tmp_path / "sky.hdr")
    top, bottom, left, right = ball_brightness(up)
    assert top > bottom + 40
    assert abs(left - right) < 15
    apart = []
    for turn in (0.0, np.pi / 2, np.pi, 1.5 * np.pi):
        half = dataclasses.replace(
            FIXED_LIGHT, environment=tmp_path / "side.hdr", environment_turn=turn
        )
        top, bottom, left, right = ball_brightness(half)
        assert abs(top - bottom) < 15
        apart.append(right - left)
    # the bright half stands at one side, then at the other
    assert max(apart) > 40
    assert min(apart) < -40
    assert abs(apart[0] + apart[2]) < 15


def test_views_json_records_the_versions(bpy: CyclesOptions, tmp_path: Path) -> None:
    options = RenderOptions(64, ViewpointOptions(count=2), cycles=FAST)
    folder = render_object(make_object(0), tmp_path, options, "cycles")
    record = json.loads((folder / "views.json").read_text())
    found = record["renderer"]
    assert found["name"] == "cycles"
    assert found["version"].startswith("5.")
    assert found["python"].startswith("3.11")
    assert found["numpy"].startswith("1.26")
    assert (found["device"], found["samples"], found["denoise"]) == ("CPU", 4, False)
    assert record["options"]["cycles"] == {"samples": 4, "denoise": False}
    # done already, and not to be confused with another renderer's or other settings
    render_object(make_object(0), tmp_path, options, "cycles")
    more = dataclasses.replace(options, cycles=dataclasses.replace(FAST, samples=5))
    with pytest.raises(RenderError, match="another cycles"):
        render_object(make_object(0), tmp_path, more, "cycles")
    with pytest.raises(RenderError, match="another renderer"):
        render_object(make_object(0), tmp_path, options, "embree")


def test_a_killed_worker_costs_one_object(bpy: CyclesOptions) -> None:
    opened = open_renderer("cycles", make_object(0), FAST)
    (worker, _) = next(iter(cycles._workers.values()))
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RenderError, match="ended by signal 9"):
        opened.render(K, FRONT, SIZE)
    assert draw(make_object(0), FRONT).mask.any()


BUSY = """
import numpy as np
from data_prep.procedural import make_object
from data_prep.renderers import cycles, open_renderer
opened = open_renderer("cycles", make_object(0), cycles.CyclesOptions(samples=60000, denoise=False))
print(next(iter(cycles._workers.values()))[0].pid, flush=True)
K = np.array([[560.0, 0, 256], [0, 560, 256], [0, 0, 1]])
pose = np.eye(4)
pose[2, 3] = 2
opened.render(K, pose, (512, 512))
"""


def test_a_busy_worker_dies_with_its_parent(bpy: CyclesOptions) -> None:
    parent = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(3.0)  # into the middle of the picture, which takes minutes
    assert parent.poll() is None
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(child)

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_prep.contact import contact_sheet
from data_prep.coverage import CoverageCheck
from data_prep.mesh import load_mesh
from data_prep.primitives import Mesh
from data_prep.procedural import make_object, write_procedural
from data_prep.render import (
    RenderOptions,
    find_meshes,
    render_command,
    render_many,
    render_object,
)
from data_prep.renderers import Rendered
from data_prep.renderers.embree import EmbreeRenderer
from data_prep.view_folder import depth_step
from data_prep.viewpoints import ViewpointOptions, make_viewpoints
from equifeat.data.views import open_views
from equifeat.errors import EquifeatError, MeshError, RenderError, ViewsError
from tests.data_prep.glb import points_only, quad, tetra
from tests.helpers import GOLDEN, ROOT, shared_dir

SMALL = RenderOptions(size=64, viewpoints=ViewpointOptions(count=5))


def files(folder: Path) -> set[str]:
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith("manifest.sqlite")}


def names(folder: Path) -> set[str]:
    """What is in a folder of objects, beside its manifest."""
    return {p.name for p in folder.iterdir() if not p.name.startswith("manifest.sqlite")}


def test_folder_holds_what_the_format_says(tmp_path: Path) -> None:
    mesh = make_object(0)
    options = RenderOptions(size=96, viewpoints=ViewpointOptions(count=3), normals=True)
    folder = render_object(mesh, tmp_path, options, "embree")
    assert folder == tmp_path / "procedural_0000"
    kinds = ("color", "depth", "mask", "normal")
    expected = {f"{kind}_{i:06d}.png" for kind in kinds for i in range(3)} | {"views.json"}
    assert files(folder) == expected
    assert names(tmp_path) == {"procedural_0000"}
    record = json.loads((folder / "views.json").read_text())
    assert record["source"] == {"file": "procedural_0000.glb", "sha256": mesh.sha256}
    assert record["object_scale"] == mesh.scale
    assert record["depth_step"] <= 1e-4
    views = make_viewpoints(options.viewpoints, (96, 96))
    opened = EmbreeRenderer(mesh)
    for i, view in enumerate(record["views"]):
        np.testing.assert_array_equal(view["K"], views.K[i].numpy())
        np.testing.assert_array_equal(view["cam_from_world"], views.cam_from_world[i].numpy())
        exact = opened.render(np.array(view["K"]), np.array(view["cam_from_world"]), (96, 96))
        with Image.open(folder / f"depth_{i:06d}.png") as image:
            assert image.mode == "I;16"
            levels = np.asarray(image)
        depth = levels * record["depth_step"]
        # the quantisation error is half a step
        assert np.abs(depth - exact.depth)[exact.mask].max() <= 0.5 * record["depth_step"] + 1e-7
        assert np.abs(depth - exact.depth).max() < 5e-5
        mask = np.asarray(Image.open(folder / f"mask_{i:06d}.png"))
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, exact.mask * np.uint8(255))
        np.testing.assert_array_equal(levels > 0, exact.mask)
        color = np.asarray(Image.open(folder / f"color_{i:06d}.png"))
        np.testing.assert_array_equal(color, exact.color)
        normals = np.asarray(Image.open(folder / f"normal_{i:06d}.png")).astype(float)
        length = np.linalg.norm((normals - 128) / 127, axis=2)
        np.testing.assert_allclose(length, exact.mask, atol=0.02)


def test_views_json_matches_the_golden_file(tmp_path: Path) -> None:
    """The format is a contract with readers: change its version, not its meaning."""
    path = tetra().write(tmp_path, "tetra.glb")
    options = RenderOptions(size=32, viewpoints=ViewpointOptions(count=2, elevation=(0.0, 0.0)))
    folder = render_object(path, tmp_path, options, "embree")
    found = json.loads((folder / "views.json").read_text())
    golden = json.loads((GOLDEN / "views.json").read_text())
    found["renderer"]["version"] = golden["renderer"]["version"]
    assert list(found) == list(golden)

    def same(a: Any, b: Any) -> None:
        if isinstance(b, dict):
            assert list(a) == list(b)
            for key in b:
                same(a[key], b[key])
        elif isinstance(b, list):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                same(x, y)
        elif isinstance(b, float):
            assert a == pytest.approx(b, abs=1e-7)
        else:
            assert a == b

    same(found, golden)


def test_depth_step_bounds_the_error() -> None:
    assert depth_step(2.9) / 2 < 5e-5
    with pytest.raises(RenderError, match="16 bits"):
        depth_step(7.0)
    with pytest.raises(RenderError, match=r"--distance below 5\.7"):
        render_object(make_object(0), "/nonexistent", far(20.0), "embree")


def far(distance: float) -> RenderOptions:
    return RenderOptions(size=64, viewpoints=ViewpointOptions(count=1, distance=distance))


def test_finished_objects_are_skipped_and_others_refused(tmp_path: Path) -> None:
    path = tetra().write(tmp_path)
    out = tmp_path / "out"
    folder = render_object(path, out, SMALL, "embree")
    stamp = (folder / "views.json").stat().st_mtime_ns
    assert render_object(path, out, SMALL, "auto") == folder
    assert (folder / "views.json").stat().st_mtime_ns == stamp
    larger = RenderOptions(size=96, viewpoints=SMALL.viewpoints)
    with pytest.raises(RenderError, match=r"another size.*--overwrite"):
        render_object(path, out, larger, "embree")
    with pytest.raises(RenderError, match="another renderer"):
        render_object(path, out, SMALL, "pyrender")
    summary = render_many([path], out, SMALL, "embree")
    assert summary.count("skipped") == 1
    path.write_bytes(quad()[0].bytes())
    with pytest.raises(RenderError, match="another source file"):
        render_object(path, out, SMALL, "embree")
    again = RenderOptions(size=96, viewpoints=SMALL.viewpoints, overwrite=True)
    render_object(path, out, again, "embree")
    assert json.loads((folder / "views.json").read_text())["size_hw"] == [96, 96]
    assert names(out) == {"test"}


def test_overwrite_never_deletes_what_is_not_a_rendering(tmp_path: Path) -> None:
    path = tetra().write(tmp_path)
    (tmp_path / "out" / "test").mkdir(parents=True)
    (tmp_path / "out" / "test" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        options = RenderOptions(64, SMALL.viewpoints, overwrite=overwrite)
        with pytest.raises(RenderError, match="not a rendered object"):
            render_object(path, tmp_path / "out", options, "embree")
    assert (tmp_path / "out" / "test" / "thesis.txt").read_text() == "precious"


def test_failures_do_not_stop_the_others(tmp_path: Path) -> None:
    good, bad = tetra().write(tmp_path, "good.glb"), points_only().write(tmp_path, "bad.glb")
    seen: list[str] = []
    summary = render_many(
        [bad, good, tmp_path / "gone.glb"],
        tmp_path / "out",
        SMALL,
        "embree",
        progress=lambda report: seen.append(report.status),
    )
    assert seen == ["failed", "done", "failed"]
    assert [source for source, _ in summary.failures] == [str(bad), str(tmp_path / "gone.glb")]
    assert "points or lines" in summary.failures[0][1]
    assert summary.count("done") == 1
    assert summary.objects_per_hour > 0
    assert "1 rendered, 0 skipped, 2 failed with embree" in str(summary)
    assert "objects/hour" in str(summary)
    assert names(tmp_path / "out") == {"good"}


def test_same_names_and_missing_paths_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tetra().write(tmp_path / name)
    with pytest.raises(RenderError, match="would both be written to 'test'"):
        find_meshes([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(RenderError, match="would both be written to 'test'"):
        render_many(find_meshes([tmp_path]), tmp_path / "out", SMALL, "embree")
    assert not (tmp_path / "out").exists()
    assert find_meshes([tmp_path / "a"]) == [tmp_path / "a" / "test.glb"]
    with pytest.raises(MeshError, match="no such mesh file or folder"):
        find_meshes([tmp_path / "c"])
    (tmp_path / "c").mkdir()
    with pytest.raises(MeshError, match=r"no .*file in this folder"):
        find_meshes([tmp_path / "c"])


def test_command_writes_plain_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    tetra().write(tmp_path / "sub", "one.glb")
    points_only().write(tmp_path, "two.glb")
    out = tmp_path / "out"
    with pytest.raises(RenderError, match=r"1 of 2 meshes failed, first .*two.glb"):
        render_command([tmp_path], out, "embree", size=48, views=4, fov=60.0, workers=2)
    text = capsys.readouterr().err
    assert "renderer: embree (asked for)" in text
    assert "rendering: 2/2" in text
    assert re.search(r"failed: .*two.glb: it holds points or lines only", text)
    assert "objects/hour" in text
    assert "failed: 1 refused" in text
    assert re.search(r"an object: load .* render .* encode .* write .*%", text)
    assert re.search(r"views per core-second, 0\.\d+ GiB peak of a worker", text)
    assert "\x1b" not in text
    record = json.loads((out / "sub" / "one" / "views.json").read_text())
    assert record["options"]["fov"] == 60.0
    assert record["object"] == "sub/one"
    (views,) = open_views(out)
    assert views.name == "sub/one"
    with pytest.raises(RenderError, match=r"two.glb: it holds points or lines only"):
        render_command([tmp_path / "two.glb"], out / "more", "embree", engine="here")
    new = tmp_path / "new"
    (source,) = find_meshes([tmp_path / "sub"])
    good = render_command(
        [], new, "embree", size=48, views=4, engine="here", source=str(source), time_limit=0
    )
    assert "1 rendered, 0 skipped, 0 failed" in str(good)
    with pytest.raises(RenderError, match="size = 4"):
        render_command([tmp_path], out, "embree", size=4)
    with pytest.raises(RenderError, match="no meshes given"):
        render_command([], out, "embree")


def test_killed_render_leaves_no_half_object(tmp_path: Path) -> None:
    (path,) = write_procedural(tmp_path, [0])
    out = tmp_path / "out"
    code = (
        "from data_prep.render import *; import sys; "
        "render_object(sys.argv[1], sys.argv[2], RenderOptions(size=512), 'embree')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(out)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".partial/*/color_000003.png")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "procedural_0000").exists()
    assert not list(out.glob("*/views.json"))
    (left,) = (out / ".partial").iterdir()
    assert left.name.endswith(".procedural_0000")
    # another run's folder that is still at work stays
    busy = left.with_name(left.name.replace(f"-{process.pid}-", f"-{os.getppid()}-"))
    busy.mkdir()
    render_object(path, out, SMALL, "embree")
    assert {p.name for p in out.iterdir()} == {"procedural_0000", ".partial"}
    assert [p.name for p in (out / ".partial").iterdir()] == [busy.name]


def test_failing_view_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = EmbreeRenderer.render

    def blank_at_third(self: EmbreeRenderer, *args: Any, **more: Any) -> Rendered:
        nonlocal calls
        calls += 1
        view = real(self, *args, **more)
        if calls < 3:
            return view
        return Rendered(view.color * 0, view.depth * 0, view.mask & False, None)

    monkeypatch.setattr(EmbreeRenderer, "render", blank_at_third)
    with pytest.raises(RenderError, match="view 2: the picture"):
        render_object(make_object(0), tmp_path, SMALL, "embree")
    assert list(tmp_path.iterdir()) == []


def corrupt(view: Rendered, kind: str) -> NDArray[Any]:
    depth = view.depth.copy()
    if kind == "half":
        depth[:, : depth.shape[1] // 2] = 0
    elif kind == "flipped":
        depth = depth[::-1]
    elif kind == "far":
        depth[depth > 0] += 0.2
    return depth


@pytest.mark.parametrize("kind", ["none", "half", "flipped", "far"])
def test_coverage_finds_wrong_pictures(kind: str, tmp_path: Path) -> None:
    mesh = load_mesh(tetra().write(tmp_path))
    check = CoverageCheck(mesh)
    views = make_viewpoints(ViewpointOptions(), (128, 128))
    K, pose = views.K[17].numpy(), views.cam_from_world[17].numpy()
    depth = corrupt(EmbreeRenderer(mesh).render(K, pose, (128, 128)), kind)
    if kind == "none":
        check(K, pose, depth, "here")
        return
    with pytest.raises(RenderError, match="here: the picture shows"):
        check(K, pose, depth, "here")


def test_object_out_of_the_picture_is_an_error(tmp_path: Path) -> None:
    mesh = load_mesh(tetra().write(tmp_path))
    K = np.array([[5000.0, 0, 5000], [0, 5000, 5000], [0, 0, 1]])
    pose = make_viewpoints(ViewpointOptions(), (64, 64)).cam_from_world[0].numpy()
    with pytest.raises(RenderError, match="outside the image"):
        CoverageCheck(mesh)(K, pose, np.zeros((64, 64), np.float32), "here")


def edge_on(mesh: Mesh) -> bool:
    return float(np.ptp(mesh.vertices, axis=0).min()) == 0.0


def test_flat_object_may_be_seen_edge_on(tmp_path: Path) -> None:
    path = quad()[0].write(tmp_path)
    assert edge_on(load_mesh(path))
    options = RenderOptions(size=64, viewpoints=ViewpointOptions())
    folder = render_object(path, tmp_path / "out", options, "embree")
    blank = [not np.asarray(Image.open(p)).any() for p in sorted(folder.glob("mask_*.png"))]
    assert 0 < sum(blank) < 12


def test_contact_sheet(tmp_path: Path) -> None:
    for seed in (0, 1):
        render_object(make_object(seed), tmp_path / "out", SMALL, "embree")
    assert names(tmp_path / "out") == {"procedural_0000", "procedural_0001"}
    sheet = contact_sheet(tmp_path / "out", tmp_path / "sheet.png", views_per_object=3, tile=40)
    with Image.open(sheet) as image:
        assert image.width >= 2 * 3 * 40
        assert np.asarray(image).max() > 150
    contact_sheet(tmp_path / "out" / "procedural_0000", tmp_path / "one.png")
    with pytest.raises(ViewsError, match="no rendered object"):
        contact_sheet(tmp_path / "nothing", tmp_path / "none.png")


@pytest.mark.shared
def test_every_odd_mesh_renders_or_fails(tmp_path: Path) -> None:
    meshes = sorted(shared_dir("meshes/odd").glob("*.glb"))
    options = RenderOptions(size=128, viewpoints=ViewpointOptions(count=12))
    summary = render_many(meshes, tmp_path, options, "embree")
    assert summary.count("done") + summary.count("failed") == len(meshes)
    assert {Path(s).stem for s, _ in summary.failures} == {
        *("box_inf", "empty_nodes", "empty_scene", "nan_duck", "pointcloud", "truncated_duck")
    }
    assert len({error.split(": ", 1)[1] for _, error in summary.failures}) >= 5
    assert all("unexpected" not in error for _, error in summary.failures)


def test_errors_are_equifeat_errors() -> None:
    assert issubclass(RenderError, EquifeatError)

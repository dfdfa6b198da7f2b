"""Runs of the command that are killed, repeated and changed, on real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.manifest import Manifest
from data_prep.procedural import write_procedural
from data_prep.render import (
    FarmOptions,
    RenderOptions,
    ViewpointOptions,
    find_objects,
    render_many,
)
from data_prep.render_summary import RenderSummary
from equifeat.errors import ManifestError
from tests.data_prep.farm_tasks import hostile_job
from tests.data_prep.glb import points_only, quad, tetra
from tests.helpers import ROOT

SMALL = RenderOptions(size=64, viewpoints=ViewpointOptions(count=5))


def tree(folder: Path) -> dict[str, bytes]:
    """Everything that is not the manifest, which holds times."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else b"folder"
        for p in folder.rglob("*")
        if not p.name.startswith("manifest.sqlite")
    }


def command(meshes: Path, out: Path) -> list[str]:
    options = ["--renderer", "embree", "--size", "192", "--views", "12", "--workers", "2"]
    start = [sys.executable, "-m", "equifeat.cli", "render"]
    return [*start, str(meshes), "--out", str(out), *options]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)


def processes(root: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(root)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def test_killed_at_any_moment_the_result_is_the_same(tmp_path: Path) -> None:
    """SIGKILL of the driver, or of everything, then the same command: file by file the same."""
    meshes = tmp_path / "meshes"
    files = write_procedural(meshes, range(5))
    (meshes / "000-001").mkdir()
    for file in files[3:]:
        file.rename(meshes / "000-001" / file.name)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # unbroken, and in one process: how the work is spread does not matter either
    options = RenderOptions(192, ViewpointOptions(count=12))
    assert render_many(find_objects([meshes]), whole, options, "embree").count("done") == 5
    draw = random.Random(0)
    for everything in (False, True):
        at_work = len(list(broken.glob("**/views.json")))
        driver = subprocess.Popen(command(meshes, broken), cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while driver.poll() is None and len(list(broken.glob("**/color_*.png"))) <= 12 * at_work:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.8))
        family = processes(driver.pid)
        for process in family if everything else family[:1]:
            process.send_signal(signal.SIGKILL)
        driver.wait()
        psutil.wait_procs(family[1:], timeout=30)
        assert not any(p.is_running() and p.status() != "zombie" for p in family[1:])
        for record in broken.glob("**/views.json"):
            if ".partial" not in record.parts:
                assert len(list(record.parent.glob("*.png"))) == 36
    # what a dead machine of a cluster left is swept as well
    left = broken / ".partial" / "elsewhere-1-abcdef.procedural_0000"
    left.mkdir(parents=True)
    again = run(command(meshes, broken))
    assert again.returncode == 0, again.stderr
    assert tree(broken) == tree(whole)
    with Manifest(broken / "manifest.sqlite", "render") as manifest:
        assert manifest.count("ok") == 5
        ids = [r.id for r in manifest.records()]
    assert ids == sorted([*(f.stem for f in files[:3]), *(f"000-001/{f.stem}" for f in files[3:])])
    last = render_many(find_objects([meshes]), broken, options, "embree")
    assert (last.count("skipped"), last.count("done")) == (5, 0)


def test_a_failure_is_remembered_until_it_may_pass(tmp_path: Path) -> None:
    bad, good = points_only().write(tmp_path, "bad.glb"), tetra().write(tmp_path, "good.glb")
    out = tmp_path / "out"

    def again(retry_failed: bool = False) -> RenderSummary:
        farm = FarmOptions(retry_failed=retry_failed)
        return render_many([bad, good], out, SMALL, "embree", farm=farm)

    first = again()
    assert (first.count("done"), first.count("failed"), first.earlier) == (1, 1, 0)
    second = again()
    assert (second.count("skipped"), second.count("failed"), second.earlier) == (1, 1, 1)
    assert second.failures == first.failures
    assert "failed: 1 refused; 1 of them in earlier runs, --retry_failed" in str(second)
    assert again(retry_failed=True).earlier == 0
    with Manifest(out / "manifest.sqlite", "render") as manifest:
        row = manifest.get("bad")
        assert row is not None
        assert row.attempts == 2
        assert row.info["kind"] == "refused"
        assert "points or lines" in row.why
    quad()[0].write(tmp_path, "bad.glb")
    repaired = again()
    assert (repaired.count("done"), repaired.count("skipped")) == (1, 1)
    with Manifest(out / "manifest.sqlite", "render") as manifest:
        row = manifest.get("bad")
        assert row is not None
        assert row.status == "ok"
        assert row.info["device"] == "CPU"
        assert set(row.info["seconds"]) == {"load", "render", "encode", "write"}


def test_manifest_folder_and_source_disagree(tmp_path: Path) -> None:
    path, out = tetra().write(tmp_path, "a.glb"), tmp_path / "out"

    def again() -> RenderSummary:
        return render_many([path], out, SMALL, "embree")

    assert again().count("done") == 1
    before = tree(out)
    # the manifest says ok, the folder is gone
    for file in (out / "a").iterdir():
        file.unlink()
    (out / "a").rmdir()
    assert again().count("done") == 1
    assert tree(out) == before
    # killed between folder and row, and folders of versions without a manifest: adopted
    (out / "manifest.sqlite").unlink()
    assert again().count("skipped") == 1
    assert tree(out) == before
    # touched, but the same content
    os.utime(path)
    assert again().count("skipped") == 1
    # other content is neither taken for the same nor rendered over
    quad()[0].write(tmp_path, "a.glb")
    changed = again()
    assert "another source file" in changed.failures[0][1]
    assert tree(out) == before
    anew = RenderOptions(64, SMALL.viewpoints, overwrite=True)
    assert render_many([path], out, anew, "embree").count("done") == 1
    assert again().count("skipped") == 1


def test_other_settings_are_refused_before_any_work(tmp_path: Path) -> None:
    path, out = tetra().write(tmp_path, "a.glb"), tmp_path / "out"
    render_many([path], out, SMALL, "embree")
    before = tree(out)
    larger = RenderOptions(size=96, viewpoints=SMALL.viewpoints)
    with pytest.raises(ManifestError, match=r"other settings \(size 64 instead of 96\)"):
        render_many([path], out, larger, "embree")
    assert tree(out) == before
    anew = RenderOptions(size=96, viewpoints=SMALL.viewpoints, overwrite=True)
    assert render_many([path], out, anew, "embree").count("done") == 1
    assert render_many([path], out, larger, "embree").count("skipped") == 1
    with (
        Manifest(out / "manifest.sqlite", "render"),
        pytest.raises(ManifestError, match="another run"),
    ):
        render_many([path], out, larger, "embree")


def test_the_reason_of_a_crash_lands_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segmentation fault and greed in the middle of real work."""
    meshes = [tetra().write(tmp_path, f"{name}.glb") for name in ("a", "segfault", "gobble", "z")]
    monkeypatch.setattr("data_prep.render_many.render_job", hostile_job)
    farm = FarmOptions("local", memory_limit=1.5, retries=1)
    summary = render_many(meshes, tmp_path / "out", SMALL, "embree", farm=farm)
    assert summary.count("done") == 2
    assert summary.kinds == {"crash": 1, "memory limit": 1}
    assert summary.peak > 2**27
    with Manifest(tmp_path / "out" / "manifest.sqlite", "render") as manifest:
        rows = {row.id: row for row in manifest.records("failed")}
    assert rows["segfault"].why.startswith(f"{meshes[1]}: its worker process died (SIGSEGV)")
    assert "over the memory limit of 1.5 GiB" in rows["gobble"].why
    assert {row.attempts for row in rows.values()} == {2}
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["a", "z"]

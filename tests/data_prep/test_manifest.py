from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.manifest import Manifest, Record
from equifeat.errors import ManifestError
from tests.helpers import ROOT


def test_rows_are_kept_replaced_and_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "new" / "manifest.sqlite"
    first = Record("b", "failed", "too large", 2, {"kind": "memory limit"})
    with Manifest(path, "render", {"size": 64}) as manifest:
        assert manifest.get("b") is None
        manifest.put(first)
        manifest.put(Record("a", "ok", "", 1, {"split": {"load": 0.5}}))
    with Manifest(path, "render", {"size": 64}) as manifest:
        assert manifest.get("b") == first
        assert [r.id for r in manifest.records()] == ["a", "b"]
        assert [r.id for r in manifest.records("failed")] == ["b"]
        manifest.put(first._replace(status="ok", why=""))
        assert (manifest.count("ok"), manifest.count("failed")) == (2, 0)
        manifest.forget("b")
        manifest.forget("never there")
        assert manifest.get("b") is None


def test_other_jobs_and_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.sqlite"
    with Manifest(path, "render", {"size": 64, "fov": None}) as manifest:
        manifest.put(Record("a", "ok", "", 1, {}))
    with pytest.raises(ManifestError, match=r'another job \(kind "render" instead of "pack"\)'):
        Manifest(path, "pack")
    with pytest.raises(ManifestError, match=r"other settings \(size 64 instead of 96\)"):
        Manifest(path, "render", {"size": 96})
    # what cannot be known by an older run is accepted and kept from then on
    with Manifest(path, "render", {"normals": False}) as manifest:
        assert manifest.count("ok") == 1
    with pytest.raises(ManifestError, match="normals false instead of true"):
        Manifest(path, "render", {"normals": True})


def test_starting_anew_forgets_other_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "manifest.sqlite"
    with Manifest(path, "render", {"size": 64}) as manifest:
        manifest.put(Record("a", "ok", "", 1, {}))
    with Manifest(path, "render", {"size": 64}, start_anew=True) as manifest:
        assert manifest.count("ok") == 1
    with Manifest(path, "render", {"size": 96}, start_anew=True) as manifest:
        assert manifest.count("ok") == 0
    with Manifest(path, "render", {"size": 96}):
        pass
    with pytest.raises(ManifestError, match="another job"):
        Manifest(path, "pack", {}, start_anew=True)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "manifest.sqlite"
    with (
        Manifest(path, "render"),
        pytest.raises(ManifestError, match="another run is writing to it"),
    ):
        Manifest(path, "render")
    Manifest(path, "render").close()


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "manifest.sqlite"
    path.write_bytes(b"this is no database, whatever its name says" * 30)
    with pytest.raises(ManifestError, match=r"not a readable manifest .* move it away"):
        Manifest(path, "render")
    path.unlink()
    Manifest(path, "render").close()


def test_every_row_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "manifest.sqlite"
    code = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from data_prep.manifest import Manifest, Record\n"
        "with Manifest(Path(sys.argv[1]), 'render') as manifest:\n"
        "    for i in itertools.count():\n"
        "        manifest.put(Record(f'{i:06d}', 'ok', '', 1, {'i': i}))\n"
        "        print(i, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    told = [int(writer.stdout.readline()) for _ in range(50)]
    writer.send_signal(signal.SIGKILL)
    told += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    writer.wait()
    writer.stdout.close()
    # the lock died with its owner, and what was said to be written is there
    with Manifest(path, "render") as manifest:
        rows = [r.info["i"] for r in manifest.records("ok")]
    assert rows[: len(told)] == told
    assert len(rows) <= len(told) + 1

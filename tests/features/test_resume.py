"""The same command goes on where it was stopped; what differs is refused or computed anew."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import equifeat.features
from equifeat.errors import EquifeatError, FeaturesError, ImageError, RecipeError
from tests.features.made import MODEL, compute, write_image, write_images
from tests.helpers import ROOT

OUT = {"npz": "out", "safetensors": "out", "zarr": "out.zarr"}


def feature_files(out: Path) -> dict[str, Path]:
    """Files of features by image."""
    if out.suffix == ".zarr":
        return {f.parent.relative_to(out).as_posix(): f for f in out.rglob("c.0.0.0")}
    files = [f for kind in (".npz", ".safetensors") for f in out.rglob(f"*{kind}")]
    found = {f.relative_to(out).with_suffix("").as_posix(): f for f in files}
    return {name: f for name, f in found.items() if name != "pca"}


def times(out: Path) -> dict[str, int]:
    return {name: file.stat().st_mtime_ns for name, file in feature_files(out).items()}


@pytest.mark.parametrize("kind", OUT)
def test_only_what_is_missing_is_computed(tmp_path: Path, kind: str) -> None:
    images, out = write_images(tmp_path / "images"), tmp_path / OUT[kind]
    compute(tmp_path / "images", out=out, format=kind)
    before = times(out)
    assert len(before) == 4
    text = compute(tmp_path / "images", out=out, format=kind)
    assert "4 were there already" in text
    assert "computed" not in text
    assert times(out) == before
    # damaged, gone, of another image, and a new one
    files = feature_files(out)
    files["a/0.png"].write_bytes(files["a/0.png"].read_bytes()[:100])
    files["b/1.png"].unlink()
    write_image(images[2], (64, 64), seed=9)
    write_image(tmp_path / "images" / "b" / "new.png", (64, 64))
    text = compute(tmp_path / "images", out=out, format=kind)
    assert "4 computed" in text
    assert "1 were there already" in text
    after = times(out)
    assert [name for name in after if after[name] == before.get(name)] == ["b/3.png"]
    path = out / "a" / "2.png" if kind == "zarr" else out / "a" / f"2.png.{kind}"
    assert equifeat.features.read(path).size_hw == (64, 64)


def test_a_moved_modification_time_counts(tmp_path: Path) -> None:
    (image,) = write_images(tmp_path / "images", [(32, 32)])
    compute(image, out=tmp_path / "out")
    os.utime(image, ns=(1, 1))
    assert "1 computed" in compute(image, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resolution": 3}, "resolution null, but now it is 3"),
        ({"layers": [0]}, "layers"),
        ({"format": "safetensors"}, "file format"),
        ({"dtype": "float16"}, "dtype"),
        ({"tile": 20}, "tile"),
        ({"root": "ROOT"}, "give --root"),
        ({"precision": "bfloat16"}, "model|precision"),
    ],
)
def test_other_options_are_refused(tmp_path: Path, options: dict[str, object], match: str) -> None:
    images = write_images(tmp_path / "images", [(32, 32)])
    out = tmp_path / "out"
    compute(*images, out=out)
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    options = {key: tmp_path if value == "ROOT" else value for key, value in options.items()}
    with pytest.raises(RecipeError, match=match) as caught:
        compute(*images, out=out, **options)
    assert "\n" not in str(caught.value)
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_a_run_without_a_single_image_binds_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"this is no image")
    with pytest.raises(ImageError, match="1 of 1 failed"):
        compute(bad, out=tmp_path / "out", resolution=2)
    images = write_images(tmp_path / "images", [(32, 32)])
    assert "1 computed" in compute(*images, out=tmp_path / "out", resolution=3)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", [(32, 32)])
    with pytest.raises(RecipeError, match=r"not a folder of features.*'a'"):
        compute(*images, out=tmp_path / "images")
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="cannot be written"):
        compute(*images, out=tmp_path / "file")
    out = tmp_path / "out"
    compute(*images, out=out)
    index = json.loads((out / "index.json").read_text())
    for text, error in (("{", "damaged"), (json.dumps({**index, "version": 9}), "version 9")):
        (out / "index.json").write_text(text)
        with pytest.raises(FeaturesError, match=error):
            compute(*images, out=out)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", [(32, 32)])
    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import fcntl, sys, time\n"
        f"file = open({str(out / '.lock')!r}, 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('process 1 on other', file=file, flush=True)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    assert fcntl.LOCK_EX
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RecipeError, match=r"written by another run .process 1 on other"):
            compute(*images, out=out)
        holder.kill()
    assert "1 computed" in compute(*images, out=out)


def test_bad_images_are_listed_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    bad = tmp_path / "images" / "a" / "bad.jpg"
    bad.write_bytes(b"this is no image")
    cut = tmp_path / "images" / "b" / "cut.png"
    cut.write_bytes(write_image(tmp_path / "images" / "b" / "9.png", (64, 64)).read_bytes()[:900])
    out = tmp_path / "out"
    with pytest.raises(ImageError, match=r"2 of 7 failed.*failed\.txt.*a/bad\.jpg") as caught:
        compute(tmp_path / "images", out=out, pca=True)
    assert "\n" not in str(caught.value)
    lines = (out / "failed.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a/bad.jpg", "b/cut.png"]
    assert "damaged" in lines[1]
    assert len(feature_files(out)) == 5
    assert len(list(out.rglob("*_pca.png"))) == 5
    assert json.loads((out / "index.json").read_text())["failed"] == 2
    text = compute(tmp_path / "images", out=out, skip_errors=True)
    assert "5 were there already" in text
    assert "2 of 7 failed" in text
    bad.unlink()
    cut.unlink()
    compute(tmp_path / "images", out=out)
    assert not (out / "failed.txt").exists()
    listed = tmp_path / "list.txt"
    listed.write_text("images/a/0.png\nimages/a/gone.png\n")
    with pytest.raises(ImageError, match=r"1 of 2 failed.*no such image file"):
        compute(listed, out=tmp_path / "other")


def test_wrong_options_leave_nothing(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", [(32, 32)])
    out = tmp_path / "out"
    for options, match in (
        ({"layers": [99]}, "layers has 99"),
        ({"overlap": 3}, "overlap=3"),
        ({"at": "pixel"}, "--at 'pixel'.*patch, image"),
        ({"dtype": "int8"}, "--dtype"),
        ({"precision": "fp8"}, "--precision 'fp8'.*bfloat16"),
        ({"resolution": 0}, "--resolution 0"),
        ({"tile": 4, "tile_overlap": 4}, "--tile 4"),
        ({"batch": 0}, "--batch 0"),
        ({"every": 0}, "--every 0"),
        ({"workers": -1}, "--workers -1"),
        ({"device": "cuda:77"}, "--device cuda:77 cannot"),
        ({"device": "gpu"}, "--device gpu cannot"),
    ):
        with pytest.raises(EquifeatError, match=match):
            compute(*images, out=out, **options)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["npz", "zarr"])
def test_a_killed_run_leaves_whole_files_and_goes_on(tmp_path: Path, kind: str) -> None:
    """A real SIGKILL between two files, with loader processes, then the same command."""
    count = 48
    write_images(tmp_path / "images", [(160, 160 + 16 * (i % 2)) for i in range(count)])
    out = tmp_path / OUT[kind]
    script = (
        "from pathlib import Path\n"
        "from equifeat.features.command import features_command\n"
        f"features_command([Path('images')], {MODEL!r}, Path({out.name!r}), weights='random', "
        "workers=1, batch=4, device='cpu')\n"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(feature_files(out)) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = feature_files(out)
    assert 5 <= len(left) < count
    features = {}
    for name, file in left.items():
        if ".tmp_" not in file.as_posix():
            path = file.parent if kind == "zarr" else file
            features[name] = equifeat.features.read(path).features
    assert (
        json.loads(
            ((out if kind == "npz" else tmp_path / "out_report") / "index.json").read_text()
        )["complete"]
        is False
    )
    before = times(out)
    text = compute(tmp_path / "images", out=out, batch=4)
    assert f"{len(features)} were there already" in text
    assert not list(tmp_path.rglob(".tmp_*"))
    after = feature_files(out)
    assert len(after) == count
    kept = times(out)
    assert all(kept[name] == before[name] for name in features)
    compute(tmp_path / "images", out=tmp_path / "fresh", batch=4)
    for name, file in after.items():
        found = equifeat.features.read(file.parent if kind == "zarr" else file).features
        fresh = equifeat.features.read(tmp_path / "fresh" / f"{name}.npz").features
        assert torch.allclose(found, fresh, atol=1e-5)

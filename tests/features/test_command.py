"""The command as a user runs it: loader processes, videos, pictures."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import equifeat.features
from equifeat.cli import run
from equifeat.errors import ImageError
from equifeat.image_files import read_pixels
from equifeat.pca_colors import fit_basis
from equifeat.video_files import VideoFrames
from equifeat.viz import pca_rgb
from tests.features.made import MODEL, compute, model, write_image, write_images

OPTIONS = ["--model", MODEL, "--weights", "random", "--device", "cpu"]


def write_video(path: Path, frames: int = 7) -> Path:
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.width, stream.height = 64, 48
        for _ in range(frames):
            coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((64, 48)))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_folders_with_loader_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images", [(64, 64 + 16 * (i % 3)) for i in range(10)])
    monkeypatch.chdir(tmp_path)
    options = [*OPTIONS, "--workers", "2", "--batch", "2", "--layers", "-1", "0"]
    run(["features", "images/a", "images/b", *options, "--out", "zarr", "--pca"])
    text = capsys.readouterr().out
    assert "features of 10 images in features.zarr: 10 computed" in text
    assert "images/s; 10 pictures in features_report" in text
    run(["features", "images", *options, "--out", "plain", "--format", "npz"])
    for i in range(10):
        name = f"{'ab'[i % 2]}/{i}.png"
        found = equifeat.features.read(tmp_path / "features.zarr" / name)
        plain = equifeat.features.read(tmp_path / "plain" / f"{name}.npz")
        assert torch.allclose(found.features, plain.features, atol=1e-5)
        assert found.features.shape == (1, 128, 4, 4 + i % 3)
        with Image.open(tmp_path / "features_report" / f"{name}_pca.png") as picture:
            assert picture.size == (found.size_hw[1], found.size_hw[0])


def test_frames_of_a_video(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "0.png", (32, 32))
    video = write_video(tmp_path / "in" / "clip.mp4")
    out = tmp_path / "out"
    assert "features of 4 images" in compute(tmp_path / "in", out=out, every=3, batch=2)
    files = sorted(path.name for path in (out / "clip.mp4").iterdir())
    assert files == ["000000.npz", "000003.npz", "000006.npz"]
    frames = list(VideoFrames(video))
    pixels = torch.from_numpy(frames[3].image).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model().dense(pixels)
    found = equifeat.features.read(out / "clip.mp4" / "000003.npz")
    assert torch.allclose(found.features, expected.features, atol=1e-5)
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert [item.get("time") for item in items] == [None, 0.0, 0.3, pytest.approx(0.6)]
    # one frame gone, and every second one asked for: 0 and 6 are there, 2 and 4 are new
    (out / "clip.mp4" / "000000.npz").unlink()
    text = compute(tmp_path / "in", out=out, every=2)
    assert "3 computed" in text
    assert "2 were there already" in text


def test_a_damaged_video_keeps_its_good_frames(tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.avi", frames=40)
    video.write_bytes(video.read_bytes()[:200])
    write_image(tmp_path / "0.png", (32, 32))
    with pytest.raises(ImageError, match=r"1 of 2 failed.*clip\.avi"):
        compute(tmp_path, out=tmp_path / "out")
    assert equifeat.features.read(tmp_path / "out" / "0.png.npz").grid_hw == (2, 2)


def test_pictures_share_one_basis(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", [(64, 64)] * 4)
    out = tmp_path / "out"
    assert "4 pictures" in compute(tmp_path / "images", out=out, pca=True)
    names = [image.relative_to(tmp_path / "images").as_posix() for image in images]
    maps = [equifeat.features.read(out / f"{name}.npz").features for name in names]
    expected = pca_rgb(torch.cat(maps))
    for name, colors in zip(names, expected, strict=True):
        drawn = read_pixels(out / f"{name}_pca.png")[:, 8::16, 8::16].permute(1, 2, 0) / 255
        assert (drawn - colors).abs().max() < 0.01
    # nothing to do, one picture gone, one more image
    before = (out / "pca.safetensors").read_bytes()
    assert "; 0 pictures" in compute(tmp_path / "images", out=out, pca=True)
    (out / "b" / "1.png_pca.png").unlink()
    assert "; 1 pictures" in compute(tmp_path / "images", out=out, pca=True)
    assert (out / "pca.safetensors").read_bytes() == before
    write_image(tmp_path / "images" / "c.png", (64, 64), seed=8)
    assert "; 5 pictures" in compute(tmp_path / "images", out=out, pca=True)
    assert (out / "pca.safetensors").read_bytes() != before


def test_a_basis_of_few_or_equal_features() -> None:
    for rows in (torch.ones(1, 8), torch.ones(50, 8), torch.rand(50, 2)):
        colors = fit_basis(rows).colors(rows[None])
        assert colors.shape == (1, len(rows), 3)
        assert colors.isfinite().all()
        assert 0.0 <= colors.min() <= colors.max() <= 1.0

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equifeat.errors import ImageError
from equifeat.image_files import read_image


def test_reads_rgb_in_unit_range_and_turns_upright(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = (255, 0, 128)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn by 90 degrees clockwise to view
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 3, 2)
    assert torch.allclose(image[:, 0, 1], torch.tensor([1.0, 0.0, 128 / 255]))


def test_transparency_becomes_black(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 255, 255, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").max() == 0


@pytest.mark.parametrize("kind", ["missing", "text", "truncated"])
def test_bad_images_are_named_in_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.png"
    if kind == "text":
        path.write_text("no image")
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"bad\.png: .+; .+") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)

"""Photographs of planes: homographies carry known points, sizes, names, whole folders or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_prep import photographs
from data_prep.photographs import photographs_command
from equifeat.data.hpatches import read_planes
from equifeat.data.image_pairs import read_picture
from equifeat.errors import EvalDataError
from equifeat.geometry.pixels import pixel_centers, sample

SIZE_HW = (150, 200)
# From the first photograph of the pair to the second, integer pixel centres.
H13 = np.array([[0.9, -0.12, 14.0], [0.08, 0.95, 6.0], [2e-4, 1e-4, 1.0]])


def waves(xy: Tensor) -> Tensor:
    """(..., 3) colours of a plane at places in pixels of its first photograph."""
    x, y = xy.unbind(-1)
    phases = (x / 7.0, y / 6.0, (x + y) / 8.0 + 1.0)
    return 0.5 + 0.45 * torch.stack([torch.sin(phase) for phase in phases], dim=-1)


def save(path: Path, size_hw: tuple[int, int] = SIZE_HW, H: np.ndarray | None = None) -> Path:
    """Photograph the plane, its first pixel's centre at (0, 0) of the waves."""
    xy = pixel_centers(size_hw, dtype=torch.float64) - 0.5
    if H is not None:
        back = torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1) @ torch.from_numpy(
            np.linalg.inv(H).T
        )
        xy = back[..., :2] / back[..., 2:]
    Image.fromarray((waves(xy) * 255).round().to(torch.uint8).numpy()).save(path)
    return path


def unlike(first: Tensor, other: Tensor, H: Tensor, shift: float = 0.0) -> tuple[float, float]:
    """Mean difference of colours that should agree, in levels, and the share of pixels compared."""
    h, w = first.shape[-2:]
    at = pixel_centers((h, w), dtype=torch.float64).reshape(-1, 2)
    there = torch.cat([at, torch.ones(len(at), 1, dtype=torch.float64)], dim=1) @ H.mT
    xy = there[:, :2] / there[:, 2:] + shift
    size_hw = (other.shape[-2], other.shape[-1])
    found = sample(other[None], xy.float()[None], size_hw)[0]
    inside = ((xy > 2) & (xy < xy.new_tensor([size_hw[1], size_hw[0]]) - 2)).all(dim=1)
    # black is outside of the photograph, whose own colours are not
    inside &= found.amin(dim=1) > 0.04
    want = first.reshape(3, -1).T
    return float((found - want)[inside].abs().mean()) * 255, float(inside.double().mean())


def check(root: Path, largest: float) -> None:
    pairs = read_planes(root, "oxford")
    assert len(pairs) % 5 == 0
    for pair in pairs:
        first, other = read_picture(pair.image0), read_picture(pair.image1)
        error, share = unlike(first, other, pair.H)
        assert error < largest, pair.name
        assert share > 0.1, pair.name
        # the test would see half a pixel
        assert unlike(first, other, pair.H, 0.5)[0] > 1.5 * error, pair.name


def test_homographies_carry_points_of_photographs(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    save(tmp_path / "own" / "one.png")
    save(tmp_path / "own" / "two.png", (200, 150))
    said = photographs_command([tmp_path / "own"], tmp_path / "out", side=160)
    assert "6 pictures each of one, two" in said
    check(tmp_path / "out", 6.0)
    for name, hw in (("one", (120, 160)), ("two", (160, 120))):
        assert read_picture(tmp_path / "out" / name / "img1.png").shape[1:] == hw
    # not enlarged, the first picture is the photograph without its rim
    whole = np.asarray(Image.open(tmp_path / "own" / "one.png"))
    first = np.asarray(Image.open(tmp_path / "out" / "one" / "img1.png"))
    assert np.array_equal(first, whole[15:135, 20:180])


def test_two_photographs_of_one_plane_keep_their_own_homography(tmp_path: Path) -> None:
    save(tmp_path / "graf1.png", (200, 260))
    save(tmp_path / "graf3.png", (220, 240), H13)
    words = " ".join(f"{v:.8e}" for v in H13.reshape(-1))
    xml = f"<opencv_storage><H13><rows>3</rows><data>\n{words} </data></H13></opencv_storage>"
    (tmp_path / "H1to3p.xml").write_text(xml)
    photographs_command([Path("graf")], tmp_path / "out", opencv=tmp_path, side=180)
    check(tmp_path / "out", 8.0)
    # the second picture is the second photograph, seen from nowhere else
    second = np.asarray(Image.open(tmp_path / "out" / "graf" / "img2.png")).astype(float)
    with Image.open(tmp_path / "graf3.png") as photograph:
        small = photograph.resize((225, 206), Image.Resampling.BILINEAR)
    middle = np.asarray(small).astype(float)[21:185, 22:203]
    h, w = min(len(second), len(middle)), min(second.shape[1], middle.shape[1])
    assert np.abs(second[:h, :w] - middle[:h, :w]).mean() < 6.0
    (tmp_path / "H1to3p.xml").write_text("<data>1 2 3</data>")
    with pytest.raises(EvalDataError, match="holds no 3x3 matrix"):
        photographs_command([Path("graf")], tmp_path / "new", opencv=tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_picture_depends_on_its_name_and_the_seed_only(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one.png"), save(tmp_path / "two.png")

    def written(name: str, *files: Path, seed: int = 0) -> bytes:
        photographs_command(files, tmp_path / name, side=100, seed=seed)
        return (tmp_path / name / "one" / "img4.png").read_bytes()

    first = written("a", one)
    assert written("b", two, one) == first
    assert written("c", one, seed=1) != first
    assert (tmp_path / "b/two/img4.png").read_bytes() != first


def test_a_photograph_of_a_package_is_found_by_name(tmp_path: Path) -> None:
    # matplotlib is always installed
    photographs_command([Path("grace_hopper")], tmp_path / "out", side=96)
    assert len(read_planes(tmp_path / "out", "oxford")) == 5


def test_what_is_missing_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    one = save(tmp_path / "one.png")
    small = save(tmp_path / "small.png", (70, 200))
    (tmp_path / "more").mkdir()
    again = save(tmp_path / "more" / "one.png")
    source = photographs._Source("no_such_package", ("a.png",))
    monkeypatch.setattr(photographs, "SOURCES", {**photographs.SOURCES, "coffee": source})
    monkeypatch.setattr(photographs, "_INSTALL", {"no_such_package": "no-such-package"})
    calls: dict[str, Callable[[Path], str]] = {
        "Did you mean chelsea": lambda out: photographs_command([Path("chelse")], out),
        "pip install --no-deps no-such-package": lambda out: photographs_command(
            [Path("coffee")], out
        ),
        "samples/data by --opencv": lambda out: photographs_command([Path("graf")], out),
        "leuvenA.jpg: leuven is not there": lambda out: photographs_command(
            [Path("leuven")], out, opencv=tmp_path
        ),
        "have one name": lambda out: photographs_command([one, again], out),
        "a side below 64 px": lambda out: photographs_command([one, small], out),
        "side = 20": lambda out: photographs_command([one], out, side=20),
    }
    for sentence, call in calls.items():
        with pytest.raises(EvalDataError, match=sentence) as caught:
            call(tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    names = {"out", "one.png", "small.png", "more"}
    assert {p.name for p in tmp_path.iterdir()} == names

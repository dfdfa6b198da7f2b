"""What is written equals what the model gives, and plain libraries read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import zarr
from safetensors.numpy import load_file, save_file

import equifeat.features
from equifeat.errors import FeaturesError, RecipeError
from equifeat.features.formats import FORMATS, parse_out
from equifeat.geometry.pixels import resize
from equifeat.image_files import read_image, read_pixels
from tests.features.made import compute, model, write_image, write_images

OUT = {"npz": "out", "safetensors": "out", "zarr": "out.zarr"}


def stored(out: Path, kind: str, name: str) -> Path:
    return out / name if kind == "zarr" else out / f"{name}.{kind}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("written")
    outs = {kind: root / kind / name for kind, name in OUT.items()}
    for kind, out in outs.items():
        compute(images, out=out, format=kind, batch=3)
    return outs


@pytest.mark.parametrize("kind", FORMATS)
def test_features_are_those_of_dense(written: dict[str, Path], images: Path, kind: str) -> None:
    extractor = model()
    for path in sorted(images.rglob("*.png")):
        name = path.relative_to(images).as_posix()
        found = equifeat.features.read(stored(written[kind], kind, name))
        with torch.no_grad():
            exact = extractor.dense(read_image(path)[None])
            whole = extractor.grid_hw(exact.size_hw)
            pixels = resize(read_pixels(path)[None], (whole[0] * 16, whole[1] * 16))
            expected = extractor.dense(pixels)
        assert found.size_hw == exact.size_hw
        assert torch.equal(found.centers(), exact.centers())
        assert torch.allclose(found.features, expected.features, atol=1e-5)
        # Rounding the resized pixels to 8 bits is all that differs from the exact features.
        alike = F.cosine_similarity(found.features, exact.features, dim=1)
        assert alike.min() > 0.999
        if exact.size_hw == (64, 96):
            assert torch.allclose(found.features, exact.features, atol=1e-5)


def test_plain_numpy_reads_npz(written: dict[str, Path]) -> None:
    path = written["npz"] / "a" / "2.png.npz"
    with np.load(path, allow_pickle=False) as data:
        assert data["features"].shape == (64, 3, 5)
        assert data["features"].dtype == np.float32
        assert data["size_hw"].tolist() == [50, 81]
        assert data["stride_yx"].tolist() == pytest.approx([50 / 3, 81 / 5])
        assert data["margin_yx"].tolist() == [0.0, 0.0]
        assert json.loads(str(data["equifeat"]))["name"] == "a/2.png"


def test_plain_safetensors_reads_safetensors(written: dict[str, Path]) -> None:
    path = written["safetensors"] / "a" / "2.png.safetensors"
    features = load_file(path)["features"]
    assert np.array_equal(
        features, equifeat.features.read(written["npz"] / "a" / "2.png.npz").features[0].numpy()
    )
    header = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")["__metadata__"]
    assert json.loads(header["size_hw"]) == [50, 81]


def test_plain_zarr_reads_the_store(written: dict[str, Path]) -> None:
    group = zarr.open_group(written["zarr"], mode="r")
    assert sorted(name for name, _ in group.groups()) == ["a", "b"]
    names = [name for name, member in group.members(max_depth=None) if hasattr(member, "shape")]
    assert sorted(names) == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]
    array = group["a/2.png"]
    assert isinstance(array, zarr.Array)
    assert array.shape == array.chunks == (64, 3, 5)
    assert array.metadata.dimension_names == ("channel", "y", "x")  # type: ignore[union-attr]
    assert array.attrs["size_hw"] == [50, 81]
    plain = equifeat.features.read(written["npz"] / "a" / "2.png.npz").features[0].numpy()
    assert np.array_equal(array[:], plain)
    index: Any = group.attrs["equifeat"]
    assert index["convention"]["x"].startswith("feature [:, i, j] lies at x")


def test_index_and_items_say_what_is_there(written: dict[str, Path]) -> None:
    index = json.loads((written["npz"] / "index.json").read_text())
    assert index["complete"] is True
    assert (index["images"], index["failed"]) == (4, 0)
    assert index["model"]["patch_size"] == 16
    lines = (written["npz"] / "items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert [item["name"] for item in items] == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]
    assert all((written["npz"] / item["file"]).is_file() for item in items)
    side = written["zarr"].with_name("out_report")
    assert sorted(path.name for path in side.iterdir()) == [
        ".lock",
        "index.json",
        "items.jsonl",
    ]


def test_options_reach_the_model(tmp_path: Path) -> None:
    path = write_image(tmp_path / "0.png", (64, 96))
    out = tmp_path / "out"
    asked = {"layers": [-1, 0], "overlap": 2, "resolution": 5}
    compute(path, out=out, dtype="float16", normalize=True, no_norm=True, **asked)
    found = equifeat.features.read(out / "0.png.npz")
    assert found.features.dtype == torch.float16
    with torch.no_grad():
        exact = model().dense(read_image(path)[None], 5, overlap=2, layers=(-1, 0), norm=False)
    assert found.features.shape == exact.features.shape == (1, 128, 5, 9)
    assert torch.allclose(found.centers(), exact.centers())
    assert found.margin_yx == pytest.approx(exact.margin_yx)
    expected = exact.normalized().features
    assert F.cosine_similarity(found.features.float(), expected, dim=1).min() > 0.999
    assert torch.allclose(found.features.float().norm(dim=1), torch.ones(5, 9), atol=2e-3)


def test_a_feature_for_every_pixel(tmp_path: Path) -> None:
    path = write_image(tmp_path / "0.png", (32, 48))
    compute(path, out=tmp_path / "out.zarr", at="image")
    found = equifeat.features.read(tmp_path / "out.zarr" / "0.png")
    with torch.no_grad():
        exact = model().dense(read_image(path)[None], at="image")
    assert found.features.shape == (1, 64, 32, 48)
    assert torch.allclose(found.features, exact.features, atol=1e-5)


def test_windows_of_a_large_image(tmp_path: Path) -> None:
    path = write_image(tmp_path / "0.png", (96, 160))
    compute(path, out=tmp_path / "out", tile=5, tile_overlap=2, batch=2)
    found = equifeat.features.read(tmp_path / "out" / "0.png.npz").features
    exact = model().dense_tiled(read_image(path)[None], tile=5, tile_overlap=2).features
    assert torch.allclose(found, exact, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(found, model().dense(read_image(path)[None]).features, atol=1e-3)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_features_are_named(written: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source = stored(written[kind], kind, "a/0.png")
    file = source / "c.0.0.0" if kind == "zarr" else source
    data = file.read_bytes()
    target = stored(tmp_path, kind, "0.png")
    if kind == "zarr":
        target.mkdir()
        meta = (source / "zarr.json").read_text()
        (target / "zarr.json").write_text(meta)
    damaged = target / "c.0.0.0" if kind == "zarr" else target
    for content in (data[: len(data) // 2], b"", data[:-1]):
        damaged.write_bytes(content)
        with pytest.raises(FeaturesError, match=r"0\.png") as caught:
            equifeat.features.read(target)
        assert "\n" not in str(caught.value)
    damaged.write_bytes(data)
    assert equifeat.features.read(target).grid_hw == (4, 6)
    if kind == "zarr":
        for old, new in (('"version": 1', '"version": 2'), ("[64, 4, 6]", "[64, 6, 4]")):
            (target / "zarr.json").write_text(json.dumps(json.loads(meta)).replace(old, new))
            with pytest.raises(FeaturesError, match=r"version 2|instead of"):
                equifeat.features.read(target)


class Bomb:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_in_a_strangers_file_is_run(written: dict[str, Path], tmp_path: Path) -> None:
    with np.load(written["npz"] / "a" / "0.png.npz") as data:
        good = dict(data)
    bomb = np.array([Bomb(tmp_path / "ran")], dtype=object)
    for key in ("features", "equifeat"):
        np.savez(tmp_path / "bad.npz", **{**good, key: bomb})
        with pytest.raises(FeaturesError, match=r"bad\.npz is damaged"):
            equifeat.features.read(tmp_path / "bad.npz")
    assert not (tmp_path / "ran").exists()
    np.savez(tmp_path / "plain.npz", features=good["features"])
    save_file({"features": good["features"]}, tmp_path / "plain.safetensors")
    for name in ("plain.npz", "plain.safetensors", "missing.npz", "missing"):
        with pytest.raises(FeaturesError, match=name):
            equifeat.features.read(tmp_path / name)
    about = json.loads(str(good["equifeat"]))
    for change in ({"size_hw": [0, 5]}, {"margin_yx": [40, 0]}, {"grid_hw": "a"}, {"format": "x"}):
        good["equifeat"] = np.array(json.dumps({**about, **change}))
        np.savez(tmp_path / "bad.npz", **good)
        with pytest.raises(FeaturesError, match=r"bad\.npz"):
            equifeat.features.read(tmp_path / "bad.npz")


def test_out_says_format_and_place() -> None:
    for word, file in (("npz", "features"), ("safetensors", "features"), ("zarr", "features.zarr")):
        store = parse_out(Path(word), None)
        assert (store.kind, store.out) == (word, Path(file))
    assert parse_out(Path("x.zarr"), None).kind == "zarr"
    assert parse_out(Path("x"), None).kind == "npz"
    assert parse_out(Path("x"), "safetensors").file("a/1.jpg") == "a/1.jpg.safetensors"
    for out, kind, match in (
        ("x", "zarr", r"must end in \.zarr"),
        ("x.zarr", "npz", "means zarr"),
        ("npz", "zarr", "means npz"),
        ("x", "npy", "Did you mean npz"),
    ):
        with pytest.raises(RecipeError, match=match):
            parse_out(Path(out), kind)

"""Features of a scene as published trainers read them: their readers are written anew here.

LERF: lerf/data/utils/feature_dataloader.py and dino_dataloader.py of kerrj/lerf. Order of images:
nerfstudio_dataparser.py and dataparsers_utils.py of nerfstudio-project/nerfstudio. Feature 3DGS:
scene/dataset_readers.py and train.py of ShijieZhou-UCLA/feature-3dgs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from equifeat.checkpoint import save_model
from equifeat.downstream.nerf_images import scene_images
from equifeat.downstream.radiance_field import (
    SceneOptions,
    radiance_field_command,
    write_scene_features,
)
from equifeat.errors import ImageError, RecipeError
from equifeat.geometry.pixels import patch_centers
from equifeat.image_files import read_image
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.feature_map import FeatureMap
from tests.model.tiny import backbone

H, W = 48, 80


class Places(FeatureExtractor):
    """Features that say where they are: (x, y) of the patch in the image, and the image's red."""

    grid_hw_of_maps = (5, 9)
    calls = 0

    def dense(self, images: Tensor, resolution: int | None = None, **_: Any) -> FeatureMap:  # type: ignore[override]
        """Return a map of 3 channels."""
        type(self).calls += 1
        size_hw = (int(images.shape[-2]), int(images.shape[-1]))
        xy = patch_centers(self.grid_hw_of_maps, size_hw).movedim(-1, 0)
        red = images[0, :1, :1, :1].expand(1, *self.grid_hw_of_maps)
        return FeatureMap(torch.cat([xy, red])[None], size_hw)


@pytest.fixture
def places() -> Places:
    Places.calls = 0
    return Places(backbone("vit"))


def write_scene(
    folder: Path, names: Sequence[str], size_hw: tuple[int, int] = (H, W), **meta: Any
) -> Path:
    """Write a nerfstudio scene; the red of image i of names is 10 * i."""
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size_hw[::-1], (10 * index, 0, 99)).save(path)
    frames = [{"file_path": name, "transform_matrix": np.eye(4).tolist()} for name in names]
    text = json.dumps({"fl_x": 50.0, "w": W, "h": H, "frames": frames, **meta})
    (folder / "transforms.json").write_text(text)
    return folder


class LerfReader:
    """What FeatureDataloader and DinoDataloader of LERF do with their cache."""

    def __init__(self, cache: Path, image_shape: list[int]) -> None:
        self.cfg = {"image_shape": image_shape}
        with cache.with_suffix(".info").open() as file:
            cfg = json.loads(file.read())
        if cfg != self.cfg:
            raise ValueError("Config mismatch")
        self.data = torch.from_numpy(np.load(cache))

    def __call__(self, img_points: Tensor) -> Tensor:
        scale = [self.data.shape[axis + 1] / self.cfg["image_shape"][axis] for axis in (0, 1)]
        first, second = ((img_points[:, axis + 1] * scale[axis]).long() for axis in (0, 1))
        return self.data[img_points[:, 0].long(), first, second]


def lerf_order(names: Sequence[str], fraction: float) -> list[str]:
    """The training images of nerfstudio's dataparser."""
    names = [names[index] for index in np.argsort([str(Path(name)) for name in names])]
    count = math.ceil(len(names) * fraction)
    return [names[index] for index in np.linspace(0, len(names) - 1, count, dtype=int)]


def all_pixels() -> tuple[Tensor, Tensor]:
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    return rows.flatten(), columns.flatten()


def test_lerf_reads_the_right_patch_of_the_right_image(tmp_path: Path, places: Places) -> None:
    names = [f"images/frame_{index:05d}.png" for index in (3, 1, 12, 0, 2, 7)]
    scene = write_scene(tmp_path / "scene", names)
    out = tmp_path / "outputs" / "scene"
    options = SceneOptions(normalize=False, train_fraction=0.6)
    said = write_scene_features(scene, places, out, "lerf", options)
    assert "wrote 4 maps, the first of 5 x 9 patches and 3 channels (float32" in said
    assert "set n_output_dims=3 of its dino_net" in said
    reader = LerfReader(out / "dino.npy", [H, W])
    assert reader.data.shape == (4, 5, 9, 3)
    order = lerf_order(names, 0.6)
    rows, columns = all_pixels()
    for index, name in enumerate(order):
        points = torch.stack([torch.full_like(rows, index), rows, columns], dim=1)
        x, y, red = reader(points).unbind(1)
        assert torch.allclose(red, torch.tensor(10 * names.index(name) / 255))
        # LERF asks for the patch that holds the pixel's upper left corner.
        assert float((x - columns).abs().max()) <= W / 9 / 2 + 1e-4
        assert float((y - rows).abs().max()) <= H / 5 / 2 + 1e-4
    assert sorted(path.name for path in out.iterdir()) == ["dino.info", "dino.npy", "features.json"]


def test_lerf_takes_its_own_share_and_listed_files(tmp_path: Path, places: Places) -> None:
    names = [f"images/{index:03d}.png" for index in range(120)]
    scene = write_scene(tmp_path / "scene", names, (4, 4))
    write_scene_features(scene, places, tmp_path / "out", options=SceneOptions(normalize=False))
    listed = json.loads((tmp_path / "out" / "features.json").read_text())["images"]
    assert [image["file"] for image in listed] == [Path(n).name for n in lerf_order(names, 0.99)]
    assert len(listed) == 119  # one of 120 is held out
    chosen = ["images/007.png", "./images/002.png"]
    scene = write_scene(tmp_path / "listed", names[:9], (4, 4), train_filenames=chosen)
    assert [image.path.name for image in scene_images(scene)] == ["002.png", "007.png"]
    assert len(scene_images(scene / "images")) == 9
    assert scene_images(scene / "transforms.json")[0].path.name == "002.png"


def test_smaller_copies_are_taken_as_nerfstudio_does(tmp_path: Path) -> None:
    scene = write_scene(tmp_path, ["images/a.png"], (20, 3300))
    for factor in (2, 4):
        (tmp_path / f"images_{factor}").mkdir()
        Image.new("RGB", (3300 // factor, 20 // factor)).save(tmp_path / f"images_{factor}/a.png")
    (image,) = scene_images(scene)
    # 1650 is not below 1600 yet
    assert (image.path.parent.name, image.size_hw) == ("images_4", (5, 825))
    assert scene_images(scene, downscale=2)[0].size_hw == (10, 1650)
    assert scene_images(scene, downscale=1)[0].size_hw == (20, 3300)
    (tmp_path / "images_4" / "a.png").unlink()
    assert scene_images(scene)[0].size_hw == (10, 1650)
    with pytest.raises(ImageError, match=r"images_8/a.png: no such image file"):
        scene_images(scene, downscale=8)


def test_feature_3dgs_compares_the_right_places(tmp_path: Path, places: Places) -> None:
    names = ["images/b.png", "images/a.jpg"]
    scene = write_scene(tmp_path / "scene", names)
    out = scene / "rgb_feature_langseg"
    options = SceneOptions(normalize=False)
    write_scene_features(scene / "images", places, out, "feature-3dgs", options)
    # What a perfect field would render: at every pixel its own place, centres at 0.5.
    rows, columns = all_pixels()
    rendered = torch.stack([columns + 0.5, rows + 0.5]).reshape(1, 2, H, W)
    for name in names:
        image_name = Path(name).name.split(".")[0]
        feature = torch.load(out / f"{image_name}_fmap_CxHxW.pt", weights_only=True)
        assert feature.shape == (3, 5, 9)
        shrunk = F.interpolate(rendered, feature.shape[1:], mode="bilinear", align_corners=True)[0]
        # Bilinear sampling of places gives the place itself, but for the half patch at the border.
        inner = (slice(None), slice(1, -1), slice(1, -1))
        torch.testing.assert_close(feature[:2][inner], shrunk[inner], rtol=0, atol=1e-4)
        assert float((feature[:2] - shrunk).abs().max()) <= W / 9 / 2
        red = read_image(scene / name)[0, 0, 0]
        assert torch.allclose(feature[2], red, atol=1e-6)


def test_feature_3dgs_at_the_maps_own_size(tmp_path: Path, places: Places) -> None:
    scene = write_scene(tmp_path / "scene", ["images/a.png"])
    out, options = tmp_path / "out", SceneOptions(normalize=False)
    write_scene_features(scene / "images", places, out, "feature-3dgs-r0", options)
    feature = torch.load(out / "a_fmap_CxHxW.pt", weights_only=True)
    h, w = feature.shape[1:]
    # With -r 0 the picture is shrunk to w x h pixels, corner to corner, and rendered so.
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rendered = torch.stack([(columns + 0.5) * W / w, (rows + 0.5) * H / h])
    torch.testing.assert_close(feature[:2], rendered)


def test_plain_files_are_the_maps_of_the_model(tmp_path: Path) -> None:
    model = build_extractor(backbone("vit"), head="residual", lora_blocks=1).eval()
    scene = write_scene(tmp_path / "scene", ["images/a.png", "images/b.png"])
    Image.new("RGB", (50, 90), (200, 30, 1)).save(scene / "images" / "b.png")
    out = tmp_path / "out"
    write_scene_features(scene, model, out, "npy", SceneOptions(resolution=4, half=True))
    index = json.loads((out / "features.json").read_text())
    assert index["channels"] == 64
    assert "the first pixel's centre is (0.5, 0.5)" in index["pixels"]
    assert [image["size_hw"] for image in index["images"]] == [[H, W], [90, 50]]
    for name in ("a", "b"):
        found = np.load(out / f"{name}.npy", allow_pickle=False)
        assert found.dtype == np.float16
        with torch.no_grad():
            maps = model.dense(read_image(scene / f"images/{name}.png")[None], 4).normalized()
        expected = maps.features[0]
        torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=0, atol=1e-3)


def test_principal_components_are_those_of_all_images(tmp_path: Path) -> None:
    model = build_extractor(backbone("vit"), lora_blocks=0).eval()
    scene = tmp_path / "images"
    scene.mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(generator.integers(0, 256, (64, 80, 3), np.uint8)).save(
            scene / f"{name}.png"
        )
    write_scene_features(scene, model, tmp_path / "out", "lerf", SceneOptions(pca=6))
    found = np.load(tmp_path / "out" / "dino.npy")
    stored = load_file(tmp_path / "out" / "pca.safetensors")
    assert found.shape == (3, 4, 5, 6)
    with torch.no_grad():
        maps = [
            model.dense(read_image(path)[None]).normalized() for path in sorted(scene.iterdir())
        ]
    flat = torch.cat([m.features[0].flatten(1).T for m in maps]).double()
    centred = flat - flat.mean(0)
    _, values, rows = torch.linalg.svd(centred, full_matrices=False)
    share = values.square() / values.square().sum()
    torch.testing.assert_close(stored["share"], share[:6].float(), rtol=1e-3, atol=1e-5)
    ours = torch.from_numpy(found).reshape(-1, 6)
    expected = (centred @ rows[:6].T).float()
    signs = (ours * expected).sum(0).sign()
    torch.testing.assert_close(ours, expected * signs, rtol=0, atol=1e-4)
    assert bool((stored["components"].abs().max(1).values == stored["components"].amax(1)).all())


def test_an_interrupted_run_goes_on_and_a_finished_one_is_kept(
    tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = write_scene(tmp_path / "scene", [f"images/{i}.png" for i in range(5)])
    out, options = tmp_path / "out", SceneOptions(normalize=False)

    def stop(*_: Any, **__: Any) -> FeatureMap:
        if Places.calls == 3:
            raise KeyboardInterrupt
        return Places.dense(places, *_, **__)

    monkeypatch.setattr(places, "dense", stop)
    with pytest.raises(KeyboardInterrupt):
        write_scene_features(scene, places, out, "lerf", options)
    monkeypatch.undo()
    assert not (out / "dino.npy").exists()
    half = SceneOptions(normalize=False, half=True)  # the type may change without a new start
    write_scene_features(scene, places, out, "lerf", half)
    assert Places.calls == 5
    assert np.load(out / "dino.npy").dtype == np.float16
    assert not (out / ".partial").exists()
    assert write_scene_features(scene, places, out, "lerf", half) == (
        f"{out} holds these features already"
    )
    assert Places.calls == 5
    with pytest.raises(RecipeError, match="features of another model, of other images or with ot"):
        write_scene_features(scene, places, out, "lerf", options)
    # what waits of another job is not mixed with this one's
    other = tmp_path / "other"
    monkeypatch.setattr(places, "dense", stop)
    Places.calls = 0
    with pytest.raises(KeyboardInterrupt):
        write_scene_features(scene, places, other, "lerf", options)
    monkeypatch.undo()
    write_scene_features(scene, places, other, "lerf", SceneOptions(normalize=True))
    assert Places.calls == 3 + 5


def test_the_command_opens_a_model_folder(tmp_path: Path) -> None:
    model = build_extractor("test_vit.r160_in1k", "random", head="conv")
    folder = save_model(model, tmp_path / "model")
    scene = write_scene(tmp_path / "scene", ["images/a.png"])
    out = tmp_path / "out"
    said = radiance_field_command(str(scene), str(folder), out, "feature-3dgs", pca=2, half=True)
    assert "2 channels (float16" in said
    feature = torch.load(out / "a_fmap_CxHxW.pt", weights_only=True)
    assert (feature.shape, feature.dtype) == ((2, 3, 5), torch.float16)


def test_wrong_scenes_are_named(tmp_path: Path, places: Places) -> None:
    scene = write_scene(tmp_path / "scene", ["images/a.png", "images/b.png"])
    text = (scene / "transforms.json").read_text()

    def refused(reason: str, what: Path = scene, error: type[Exception] = RecipeError) -> None:
        with pytest.raises(error, match=reason) as caught:
            write_scene_features(what, places, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("is neither a folder of images nor one with transforms.json", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused("holds no images", tmp_path / "empty")
    for wrong in ("images/../../a.png", "/etc/passwd", ".."):
        (scene / "transforms.json").write_text(text.replace("images/b.png", wrong))
        refused("which is outside of its folder")
    (scene / "transforms.json").write_text(text.replace("images/b.png", "images/c.png"))
    refused(r"c\.png: no such image file", error=ImageError)
    for broken in ("{", "[1]", '{"frames": []}', '{"frames": [1]}', '{"frames": [{}]}'):
        (scene / "transforms.json").write_text(broken)
        refused("cannot be read as JSON|is not a transforms.json|no list of frames")
    named = {**json.loads(text), "train_filenames": ["images/x.png"]}
    (scene / "transforms.json").write_text(json.dumps(named))
    refused("lists x.png in train_filenames but not in frames")
    (scene / "transforms.json").write_text(text)
    (scene / "images" / "b.png").write_text("no picture")
    refused(r"b\.png: damaged or unreadable image", error=ImageError)
    Image.new("RGB", (W, H + 2)).save(scene / "images" / "b.png")
    refused(r"b\.png: 80x50 px, but a\.png has 80x48, and LERF needs", error=ImageError)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (W, H)).save(scene / "images" / "b.png", exif=exif)
    refused(r"stored turned \(EXIF orientation 6\)", error=ImageError)


def test_wrong_options_are_named(tmp_path: Path, places: Places) -> None:
    scene = write_scene(tmp_path / "scene", ["images/a.png", "images/a.jpg", "images/c.x.png"])
    out = tmp_path / "out"
    for layout in ("npy", "feature-3dgs", "feature-3dgs-r0"):
        with pytest.raises(RecipeError, match="would both become a"):
            write_scene_features(scene, places, out, layout)
    with pytest.raises(
        RecipeError, match=r"layout must be one of lerf, feature-3dgs, .*, npy, not 'x'"
    ):
        write_scene_features(scene, places, out, "x")
    for options, reason in [
        (SceneOptions(pca=0), "pca must be between 1 and the model's 64 channels"),
        (SceneOptions(pca=65), "pca must be between"),
        (SceneOptions(train_fraction=0.0), "train_fraction must be above 0"),
        (SceneOptions(downscale=0), "downscale must be at least 1"),
    ]:
        with pytest.raises(RecipeError, match=reason):
            write_scene_features(scene, places, out, "lerf", options)
    assert not out.exists()
    out.mkdir()
    (out / "features.json").write_text("{")
    with pytest.raises(RecipeError, match=r"features.json cannot be read"):
        write_scene_features(scene, places, out)

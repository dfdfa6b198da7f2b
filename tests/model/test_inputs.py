from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from equifeat.errors import ImageError, KeypointError, RecipeError
from equifeat.image_files import find_images, read_image, read_pixels
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.inputs import gather, unit_floats
from equifeat.video_files import Frame, VideoFrames
from tests.model.tiny import backbone, images

H, W = 30, 44


@cache
def tiny() -> FeatureExtractor:
    return build_extractor(backbone("dinov2"), head="residual", lora_blocks=2).eval()


def picture(seed: int = 0, size: tuple[int, int] = (H, W)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def floats(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous().float() / 255


def same_as(kind: str, pixels: NDArray[np.uint8], folder: Path) -> Any:
    """The same image, as a user may have it."""
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    Image.fromarray(pixels).save(folder / "a.png")
    opaque = np.dstack([pixels, np.full((H, W, 1), 255, np.uint8)])
    return {
        "tensor": floats(pixels),
        "tensor of one": floats(pixels)[0],
        "bytes": tensor[None],
        "bytes of one": tensor,
        "double": tensor.double() / 255,
        "PIL": Image.fromarray(pixels),
        "array": pixels,
        "array of two turned": pixels[:, :, ::-1][:, :, ::-1],
        "batch of arrays": pixels[None],
        "RGBA": opaque,
        "float array": pixels.astype(np.float64) / 255,
        "16 bits": pixels.astype(np.uint16) * 257,
        "path": folder / "a.png",
        "name": str(folder / "a.png"),
        "list": [pixels],
        "tuple": (folder / "a.png",),
    }[kind]


KINDS = [
    *("tensor", "tensor of one", "bytes", "bytes of one", "double", "PIL", "array"),
    *("array of two turned", "batch of arrays", "RGBA", "float array", "16 bits", "path"),
    *("name", "list", "tuple"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_image_gives_the_features_of_its_tensor(kind: str, tmp_path: Path) -> None:
    model, pixels = tiny(), picture()
    keypoints = torch.tensor([[[3.0, 4.0], [43.5, 29.0]]])
    expected = model.dense(floats(pixels))
    given = same_as(kind, pixels, tmp_path)
    found = model.dense(given)
    assert found.size_hw == (H, W)
    # Resizing sums in another order where channels come last in memory.
    assert torch.allclose(found.features.float(), expected.features, atol=2e-5)
    out = model.at(given, keypoints)
    assert torch.allclose(out.float(), expected.sample(keypoints), atol=2e-5)
    assert torch.allclose(model.at(given, keypoints[0].numpy()).float(), out.float(), atol=1e-6)


def test_a_float_batch_is_taken_as_it_is() -> None:
    batch = images(2)
    assert unit_floats(gather(batch), torch.device("cpu")) is batch
    assert gather(batch.half()).dtype == torch.float16


def test_bytes_stay_bytes_until_they_are_where_they_are_used() -> None:
    assert gather([picture(), Image.fromarray(picture(1))]).dtype == torch.uint8
    on_device = unit_floats(gather(picture()), torch.device("meta"))
    assert on_device.dtype == torch.float32
    assert on_device.is_meta
    mixed = gather([picture(), picture(1).astype(np.float32) / 255])
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed[:1], floats(picture()))
    assert torch.allclose(mixed[1:], floats(picture(1)))


def test_a_list_is_one_batch_in_its_order() -> None:
    model = tiny()
    parts = [picture(seed) for seed in range(3)]
    found = model.dense([parts[0], Image.fromarray(parts[1]), floats(parts[2])])
    expected = model.dense(torch.cat([floats(part) for part in parts]))
    assert torch.allclose(found.features, expected.features, atol=2e-5)


def _pil(mode: str) -> tuple[Image.Image, float]:
    """An image of 2 × 2 equal pixels, and the red it must become."""
    opaque = {"RGBA": (200, 0, 0, 255), "LA": (200, 255), "RGBa": (200, 0, 0, 255)}
    if mode == "I;16":
        return Image.fromarray(np.full((2, 2), 51400, np.uint16)), 200 / 255
    if mode == "I":
        return Image.fromarray(np.full((2, 2), 51400, np.int32)), 200 / 255
    if mode == "F":
        return Image.fromarray(np.full((2, 2), 0.25, np.float32)), 0.25
    if mode == "P":
        return Image.new("RGB", (2, 2), (200, 0, 0)).quantize(4), 200 / 255
    if mode == "1":
        return Image.new("1", (2, 2), 1), 1.0
    if mode == "CMYK":
        return Image.new("CMYK", (2, 2), (0, 255, 255, 55)), 200 / 255
    value = opaque.get(mode, (200, 0, 0) if mode == "RGB" else 200)
    return Image.new(mode, (2, 2), value), 200 / 255


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "RGBa", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK"]
)
def test_every_mode_of_pillow_keeps_its_brightness(mode: str) -> None:
    image, red = _pil(mode)
    assert image.mode == mode
    found = unit_floats(gather(image), torch.device("cpu"))
    assert found.shape == (1, 3, 2, 2)
    assert torch.allclose(found[:, 0], torch.tensor(red), atol=0.005)
    grey = mode in ("L", "LA", "1", "I;16", "I", "F")
    assert torch.allclose(found[:, 1], torch.tensor(red if grey else 0.0), atol=0.005)


def test_16_bit_files_are_not_cut_off_at_8(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        expected = torch.from_numpy(ramp.astype(np.float32) / 65535).expand(3, -1, -1)
        assert torch.allclose(read_image(tmp_path / name), expected, atol=1e-6)


def test_orientation_and_alpha_are_those_of_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.dstack([picture(), np.random.default_rng(1).integers(0, 256, (H, W), np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        found = gather(opened)
    assert found.shape == (1, 3, W, H)
    assert torch.equal(found[0], read_pixels(tmp_path / "a.png"))
    upright = np.ascontiguousarray(np.rot90(pixels, -1))
    assert torch.equal(gather(upright), found)  # alpha is rounded as Pillow rounds it
    assert torch.allclose(gather(upright / 255.0), found / 255, atol=0.5 / 255)
    # A palette with a transparent colour.
    clear = Image.new("P", (2, 2), 0)
    clear.putpalette([255, 0, 0])
    clear.info["transparency"] = 0
    assert int(gather(clear).max()) == 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (np.zeros((3, 20, 30), np.uint8), r"not \(3, 20, 30\); give channels-first images as a"),
        (np.zeros((3, 20, 3), np.uint8), "may have its channels first or last"),
        (np.zeros((2, 4, 20, 3), np.uint8), "may have its channels first or last"),
        (np.zeros((20, 30, 2), np.uint8), r"must have the shape .*not \(20, 30, 2\)$"),
        (np.zeros((0, 30, 3), np.uint8), r"not \(0, 30, 3\)"),
        (np.full((20, 30, 3), 255.0), "largest value is 255: divide by 255"),
        (np.zeros((20, 30, 3), np.int64), "not int64: convert it with astype"),
        (np.zeros((20, 30), bool), "not bool"),
        (torch.zeros(20, 30, 3), r"not \(20, 30, 3\): move the channels with movedim\(-1, -3\)"),
        (torch.full((3, 20, 30), -2.1), "smallest value is -2.1: give them without normalisation"),
        (Image.fromarray(np.full((2, 2), 9.0, np.float32)), r"mode 'F' must be floats in \[0, 1\]"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "whole numbers from 0 to 65535"),
        ([], "the list of images is empty"),
        ([picture(), [picture()]], "not a list inside a list"),
        ([picture(), None], "not NoneType"),
        ((picture(k) for k in range(2)), r"not generator: dense_many\(\) takes"),
        (
            [picture(), np.zeros((9, 9, 3))],
            "image 0 is 44 x 30 px but image 1 is 9 x 9: dense_many",
        ),
        ([picture(), np.full((H, W, 3), 2.5)], "image 1: images must be floats"),
        ("no such.png", "no such.png: no such image file"),
    ],
)
def test_doubtful_images_are_refused_in_one_sentence(given: Any, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        gather(given)
    assert "\n" not in str(caught.value)


def test_too_many_pixels_and_damage_are_found_in_opened_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    with Image.open(tmp_path / "b.png") as cut, pytest.raises(ImageError, match="is damaged"):
        gather(cut)
    monkeypatch.setattr("equifeat.image_files._MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="44x30 px is more than 1000 pixels"):
        gather(Image.fromarray(picture()))


def test_points_may_be_arrays_or_whole_numbers() -> None:
    model, image = tiny(), picture()
    whole = torch.tensor([[[3, 4], [40, 20]]])
    expected = model.at(image, whole.float())
    assert torch.equal(model.at(image, whole), expected)
    assert torch.equal(model.at(image, whole.numpy().astype(np.float64)), expected)
    with pytest.raises(KeypointError, match="keypoint 1 of image 0"):
        model.at(image, np.array([[3.0, 4.0], [44.0, 4.0]]))
    with pytest.raises(KeypointError, match=r"\(2, N, 2\), not \(2, 2\)"):
        model.at([image, image], np.zeros((2, 2)))


def _video(path: Path, count: int = 3) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 60 * index, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_folder_gives_its_images_and_videos_by_name(tmp_path: Path) -> None:
    model = tiny()
    Image.fromarray(picture(0)).save(tmp_path / "b.PNG")
    Image.fromarray(picture(1, (20, 60))).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(picture(1)).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no image")
    _video(tmp_path / "c.mp4")
    found = list(model.dense_many(tmp_path))
    names = [Path(one.name).name for one in found]
    assert names == ["a.jpg", "b.PNG", "c.mp4#000000", "c.mp4#000001", "c.mp4#000002"]
    assert [one.time_s for one in found[:2]] == [None, None]
    assert [one.time_s for one in found[2:]] == pytest.approx([0.0, 0.1, 0.2])
    assert [one.maps.size_hw for one in found] == [(20, 60), (30, 44), *[(48, 64)] * 3]
    for one in found[:2]:
        assert torch.allclose(one.maps.features, model.dense(one.name).features.detach(), atol=1e-5)
    frames = [frame.image for frame in VideoFrames(tmp_path / "c.mp4")]
    together = torch.cat([one.maps.features for one in found[2:]])
    assert torch.allclose(together, model.dense(frames).features, atol=1e-5)
    pattern = list(model.dense_many(str(tmp_path / "*.[jP]*")))
    assert [one.name for one in pattern] == [found[0].name, found[1].name]


def test_many_images_keep_their_order_and_are_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    sizes = [(30, 44), (30, 44), (44, 30), (30, 44), (30, 44), (30, 44)]
    read: list[int] = []
    ran: list[int] = []

    def source() -> Iterator[NDArray[np.uint8]]:
        for seed, size in enumerate(sizes):
            read.append(seed)
            yield picture(seed, size)

    trunk = model.backbone.trunk

    def counted(batch: Tensor, *args: Any) -> Any:
        ran.append(len(batch))
        return trunk(batch, *args)

    monkeypatch.setattr(model.backbone, "trunk", counted)
    found = model.dense_many(source(), batch_size=2)
    first = next(found)
    assert read == [0, 1, 2]  # one further image shows that the batch is full
    assert torch.is_grad_enabled()
    rest = list(found)
    assert ran == [2, 1, 2, 1]
    for seed, one in enumerate([first, *rest]):
        assert one.name == str(seed)
        assert one.maps.size_hw == sizes[seed]
        assert not one.maps.features.requires_grad
        alone = model.dense(picture(seed, sizes[seed])).features
        assert torch.allclose(one.maps.features, alone, atol=1e-5)


def test_many_takes_frames_batches_and_options(tmp_path: Path) -> None:
    model = tiny()
    video = VideoFrames(_video(tmp_path / "a.mkv", 4), step=2)
    mixed: Any = [video, Frame(7.5, picture()), images(2, H, W), tmp_path / "a.mkv"]
    found = list(model.dense_many(mixed, 4, layers=(0, -1), out_device="cpu"))
    assert [one.time_s for one in found] == pytest.approx(
        [0.0, 0.2, 7.5, None, None, 0.0, 0.1, 0.2, 0.3]
    )
    assert [Path(one.name).name for one in found[:6]] == [
        *("a.mkv#000000", "a.mkv#000001", "0", "1", "2", "a.mkv#000000")
    ]
    assert {tuple(one.maps.features.shape) for one in found} == {(1, 2 * model.dim, 3, 4)}
    tiled = list(model.dense_many([picture()], 4, tile=3, tile_overlap=2))
    expected = model.dense_tiled(picture(), 4, tile=3, tile_overlap=2)
    assert torch.equal(tiled[0].maps.features, expected.features)


def test_many_name_what_is_wrong(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ImageError, match=r"none\.png: no such file, folder or pattern"):
        next(model.dense_many(tmp_path / "none.png"))
    with pytest.raises(ImageError, match=r"no files here that end in \.3gp"):
        next(model.dense_many(tmp_path))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ImageError, match=r"a\.png: not an image"):
        next(model.dense_many(tmp_path))
    bad: Any = iter([picture(), np.zeros((5, 5, 3), np.int64)])
    with pytest.raises(ImageError, match="image 1: an array must be uint8"):
        list(model.dense_many(bad))
    with pytest.raises(RecipeError, match="batch_size"):
        list(model.dense_many([picture()], batch_size=0))


def test_find_images_sorts_and_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.png", "b/10.png", "a.png", "x.txt", "folder.png/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert find_images("**/*.png") == [Path("a.png"), Path("b/10.png"), Path("b/2.png")]
    assert find_images(tmp_path / "b") == [tmp_path / "b/10.png", tmp_path / "b/2.png"]
    assert find_images(str(tmp_path / "*" / "c.*")) == [tmp_path / "folder.png/c.jpg"]
    assert find_images("x.txt") == [Path("x.txt")]
    assert find_images("missing") is None
    with pytest.raises(ImageError, match=r"\*\.bmp: no files here"):
        find_images("*.bmp")

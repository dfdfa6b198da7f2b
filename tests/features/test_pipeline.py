"""Batches of equal size, bounded memory, background threads and their errors."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import equifeat.features
from equifeat.errors import FeaturesError, ImageError
from equifeat.features import pipeline
from equifeat.features.background import Background
from equifeat.features.formats import Store
from equifeat.features.loader import Facts, GridRule, Group
from equifeat.features.pipeline import Buckets
from equifeat.model.extractor import FeatureExtractor
from tests.features.made import compute, model, write_image, write_images
from tests.model import tiny


def group(first: int, count: int, size: int = 4) -> Group:
    pixels = torch.arange(first, first + count, dtype=torch.uint8)
    facts = [Facts(str(i), (size, size), "") for i in range(first, first + count)]
    return Group(pixels[:, None, None, None].expand(-1, 3, size, size), facts)


def members(parts: list[Group]) -> list[int]:
    pixels = torch.cat([part.pixels for part in parts])[:, 0, 0, 0].tolist()
    assert [fact.name for part in parts for fact in part.facts] == [str(i) for i in pixels]
    return [int(i) for i in pixels]


def test_images_of_one_size_fill_batches() -> None:
    buckets = Buckets(4)
    full = [members(parts) for parts in buckets.add(group(0, 3))]
    full += [members(parts) for parts in buckets.add(group(10, 5, size=8))]
    full += [members(parts) for parts in buckets.add(group(20, 6))]
    assert full == [[10, 11, 12, 13], [0, 1, 2, 20], [21, 22, 23, 24]]
    assert sorted(members(parts) for parts in buckets.rest()) == [[14], [25]]
    assert list(buckets.rest()) == []


def test_few_images_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = Buckets(2)
    given = [parts for size in range(1, 40) for parts in buckets.add(group(size, 1, size))]
    assert len(given) == 39 - 2 * 8  # all but eight batches
    monkeypatch.setattr(pipeline, "_WAITING_BYTES", 1000)
    assert [members(p) for p in buckets.add(group(99, 1, size=100))][-1] == [99]


def test_the_background_lets_only_so_much_wait() -> None:
    gate, done = threading.Event(), []

    def work() -> None:
        gate.wait(5)
        done.append(1)

    with Background(2, 100) as background:
        for _ in range(2):
            background.submit(50, work)
        third = threading.Thread(target=background.submit, args=(50, work))
        third.start()
        time.sleep(0.05)
        assert third.is_alive()
        gate.set()
        third.join(5)
        assert not third.is_alive()
        background.submit(1000, work)  # larger than the limit: alone
    assert len(done) == 4
    assert background.most == 1000


def test_an_error_in_the_background_stops_the_rest() -> None:
    def fail() -> None:
        raise OSError("disk full")

    def submit(times: int) -> None:
        with Background(1, 10) as background:
            for _ in range(times):
                background.submit(10, fail)

    for times in (1, 100):
        with pytest.raises(OSError, match="disk full"):
            submit(times)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images")
    write, failing = Store.write, ["b/3.png"]

    def full(self: Store, about, features) -> None:  # type: ignore[no-untyped-def]
        if about.name in failing:
            raise OSError(28, "No space left on device")
        write(self, about, features)

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(FeaturesError, match=r"No space left.*same command goes on"):
        compute(*images, out=tmp_path / "out", batch=1)
    failing.clear()
    assert "3 were there already" in compute(*images, out=tmp_path / "out", batch=1)


def test_a_killed_loader_process_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "images")
    here = os.getpid()

    def header(self: Store, name: str) -> None:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Store, "header", header)
    with pytest.raises(FeaturesError, match=r"loader process was ended.*fewer --workers"):
        compute(*images, out=tmp_path / "out", workers=1, batch=1)


def test_what_is_not_finite_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images", [(32, 32), (32, 32)])
    tail = FeatureExtractor.tail

    def large(self, *args, **options):  # type: ignore[no-untyped-def]
        found = tail(self, *args, **options)
        if len(found.features) == 2:
            found.features[1] *= 1e9
        return found

    monkeypatch.setattr(FeatureExtractor, "tail", large)
    with pytest.raises(ImageError, match=r"1 of 2 failed.*not finite in float16.*--dtype float32"):
        compute(*images, out=tmp_path / "out", dtype="float16", batch=2)
    assert not (tmp_path / "out" / "b" / "1.png.npz").exists()
    assert equifeat.features.read(tmp_path / "out" / "a" / "0.png.npz").features.isfinite().all()


@pytest.mark.parametrize("resolution", [None, 1, 7])
@pytest.mark.parametrize("position", ["timm", "reference"])
def test_loaders_resize_as_the_extractor_does(position: str, resolution: int | None) -> None:
    extractor = FeatureExtractor(tiny.backbone("dinov2", position=position))
    rule = GridRule.of(extractor, resolution)
    p = extractor.patch_size
    for size in ((1, 1), (50, 81), (81, 50), (300, 20), (700, 701)):
        h, w = extractor.grid_hw(size, resolution)
        assert rule.whole(size) == (h * p, w * p)


def test_wide_grey_images_are_read(tmp_path: Path) -> None:
    from PIL import Image

    levels = torch.arange(0, 65536, 64, dtype=torch.int32).reshape(32, 32).numpy()
    Image.fromarray(levels.astype("uint16")).save(tmp_path / "wide.png")
    Image.fromarray((levels // 257).astype("uint8")).save(tmp_path / "narrow.png")
    write_image(tmp_path / "other.png", (32, 32))
    compute(tmp_path, out=tmp_path / "out")
    wide, narrow, other = (
        equifeat.features.read(tmp_path / "out" / f"{name}.png.npz").features
        for name in ("wide", "narrow", "other")
    )
    assert (wide - narrow).abs().max() < 0.1 * (wide - other).abs().max()
    assert model().patch_size == 16

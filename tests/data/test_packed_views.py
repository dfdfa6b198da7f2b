from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equifeat.data import packed_views
from equifeat.data.datamodule import PairDataModule
from equifeat.data.views import ObjectViews, open_views
from equifeat.errors import EquifeatError, ImageError, ViewsError
from tests.synthetic import write_views

pytest.importorskip("datasets")
from data_prep.pack import pack_views


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of three objects, one of another size, and the packed set in several shards."""
    root = tmp_path_factory.mktemp("both")
    write_views(root / "views" / "a", "sphere", 5, 64)
    write_views(root / "views" / "b", "box", 4, 64)
    write_views(root / "views" / "c", "box", 4, 64, object_name="third")
    pack_views([root / "views"], root / "ds", shard_mb=0.02)
    assert len(list((root / "ds" / "data").iterdir())) > 1
    return root / "views", root / "ds"


@pytest.fixture
def packed(both: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(both[1], tmp_path / "ds")


def test_a_packed_view_is_the_folders_view(both: tuple[Path, Path]) -> None:
    for folder, packed in zip(*(open_views(path) for path in both), strict=True):
        assert (folder.name, len(folder)) == (packed.name, len(packed))
        assert folder.depth_step == packed.depth_step
        assert torch.equal(folder.K, packed.K)
        assert torch.equal(folder.cam_from_world, packed.cam_from_world)
        for i in range(len(folder)):
            assert packed.camera(i).size_hw == folder.camera(i).size_hw
            for x, y in zip(folder.view(i), packed.view(i), strict=True):
                if isinstance(x, Tensor):
                    assert x.dtype == y.dtype
                    assert x.stride() == y.stride()
                    assert torch.equal(x, y)


@pytest.mark.parametrize("sampler", ["covisible", "reference"])
@pytest.mark.parametrize("workers", [0, 2])
def test_draws_from_the_folder_and_the_packed_set_are_identical(
    both: tuple[Path, Path], workers: int, sampler: Any
) -> None:
    loaders = []
    for path in both:
        data = PairDataModule(
            path,
            seed=5,
            batch_size=3,
            num_workers=workers,
            sampler=sampler,
            num_keypoints=80,
            draws_per_epoch=12,
        )
        data.setup("fit")
        loaders.append(data.train_dataloader())
    count = 0
    for x, y in zip(*loaders, strict=True):
        count += 1
        for field in fields(x):
            u, v = getattr(x, field.name), getattr(y, field.name)
            if isinstance(u, Tensor):
                assert torch.equal(u, v), field.name
            elif isinstance(u[0], Tensor):
                assert all(torch.equal(a, b) for a, b in zip(u, v, strict=True)), field.name
            else:
                assert u == v, field.name
    assert count == 4


def first_pixels(views: ObjectViews) -> list[float]:
    return [float(views.view(i).image.sum()) for i in range(len(views))]


def test_handles_are_small_and_work_in_another_process(both: tuple[Path, Path]) -> None:
    objects = open_views(both[1])
    here = [first_pixels(views) for views in objects]  # the files are mapped before the fork
    assert max(len(pickle.dumps(views)) for views in objects) < 400
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(first_pixels, objects) == here


def test_the_callers_tensors_do_not_reach_the_cache(both: tuple[Path, Path]) -> None:
    views = open_views(both[1])[0]
    for part in views.view(0)[:3]:
        part.zero_()
    assert float(views.view(0).image.max()) > 0.1
    assert bool(views.view(0).mask.any())


def test_a_set_packed_anew_is_not_read_from_the_cache(
    both: tuple[Path, Path], packed: Path, tmp_path: Path
) -> None:
    old = open_views(packed)[0]
    before = old.view(0).image
    shutil.rmtree(packed)
    write_views(tmp_path / "other", "box", 2, 32)
    pack_views([tmp_path / "other"], packed)
    assert open_views(packed)[0].view(0).image.shape != before.shape
    packed_views._index.cache_clear()  # as in a worker that starts now
    with pytest.raises(ViewsError, match="packed anew while it was in use"):
        pickle.loads(pickle.dumps(old))


def change(**values: Any) -> Callable[[Path], None]:
    def apply(packed: Path) -> None:
        file = packed / "packed.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return apply


def first_shard(packed: Path) -> Path:
    return min((packed / "data").iterdir())


def cut_shard(packed: Path) -> None:
    file = first_shard(packed)
    file.write_bytes(file.read_bytes()[:-1])


def flip_index(packed: Path) -> None:
    file = packed / "index.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: first_shard(p).unlink(), r"train-00000-of-\d+\.parquet: no such shard"),
        (cut_shard, r"train-00000-of-\d+\.parquet: \d+ bytes instead of \d+"),
        (flip_index, r"index\.parquet: damaged or of another set"),
        (lambda p: (p / "index.parquet").unlink(), r"index\.parquet: not readable"),
        (change(version=2), "format version 2, this release reads 1"),
        (change(format="other"), "not an equifeat-packed file"),
        (change(views=3), "of another packed set"),
        (change(shards=[{"file": "../../etc/passwd", "size": 1}]), "no shard's name"),
        (change(shards=[{"file": "a"}]), "a field is missing or wrong"),
        (lambda p: (p / "packed.json").write_text("{"), "not readable JSON"),
    ],
)
def test_a_damaged_set_is_one_sentence(
    packed: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(packed)
    with pytest.raises(ViewsError, match=message) as caught:
        open_views(packed)
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_is_named(packed: Path) -> None:
    """The size is right and the shard opens: only the bytes of a view are wrong."""
    file = first_shard(packed)
    data = bytearray(file.read_bytes())
    at = data.index(b"WEBP") + 60
    data[at] ^= 255
    file.write_bytes(data)
    views = open_views(packed)[0]
    with pytest.raises(ImageError, match=r"train-00000.*its color is damaged"):
        views.view(0)
    views.view(1)
    with pytest.raises(IndexError, match="5 views"):
        views.view(5)


def test_a_missing_package_is_named(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(EquifeatError, match=r"pip install \"equifeat\[pack\]\""):
        open_views(packed)


def test_a_folder_with_both_kinds_and_the_layout_option(both: tuple[Path, Path]) -> None:
    assert len(open_views(both[1], "packed")) == 3
    with pytest.raises(ViewsError, match=r"no folder with packed\.json"):
        open_views(both[0], "packed")
    with pytest.raises(ViewsError, match="both named 'sphere'"):
        open_views(both[0].parent)

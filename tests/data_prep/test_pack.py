from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import pack_shard
from data_prep.pack import pack_command, pack_views
from data_prep.pack_hub import push_folder
from equifeat.data.packed_codec import Pictures, decode, encode, window_of
from equifeat.data.views import open_views
from equifeat.errors import ImageError, PackError, ViewsError
from tests.data_prep.hub_uploads import UploadHub
from tests.helpers import ROOT
from tests.synthetic import write_reference_views, write_views

pytest.importorskip("datasets")
import pyarrow as pa
import pyarrow.parquet as pq


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four objects of three views of 48 px."""
    root = tmp_path_factory.mktemp("views")
    for n in range(4):
        write_views(root / f"o{n}", "box" if n % 2 else "sphere", 3, 48, object_name=f"object {n}")
    return root


def tree(root: Path) -> dict[str, bytes]:
    return {
        file.relative_to(root).as_posix(): file.read_bytes()
        for file in root.rglob("*")
        if file.is_file()
    }


def shards(root: Path) -> list[Path]:
    return sorted((root / "data").glob("train-*.parquet"))


@pytest.mark.parametrize("color", ["webp", "png"])
def test_every_column_says_what_the_source_says(folder: Path, tmp_path: Path, color: Any) -> None:
    said = pack_views([folder], tmp_path / "ds", color)
    assert "4 objects, 12 views in 1 shards" in said
    rows = pq.read_table(shards(tmp_path / "ds")[0]).to_pylist()
    assert [(row["object"], row["view"]) for row in rows] == [
        (f"object {n}", i) for n in range(4) for i in range(3)
    ]
    for row in rows:
        source = folder / f"o{row['object'][-1]}"
        x0, y0, x1, y1 = row["window"]
        picture = Image.open(io.BytesIO(row["color"]["bytes"]))
        assert picture.format == color.upper()
        whole = np.zeros((48, 48, 3), np.uint8)
        whole[y0:y1, x0:x1] = np.asarray(picture)
        file = source / f"color_{row['view']:06d}.png"
        assert np.array_equal(whole, np.asarray(Image.open(file)))
        depth = np.zeros((48, 48), np.uint16)
        raw = pa.decompress(row["depth"], 2 * (x1 - x0) * (y1 - y0), "zstd")
        depth[y0:y1, x0:x1] = np.frombuffer(raw, "<u2").reshape(y1 - y0, x1 - x0)
        file = source / f"depth_{row['view']:06d}.png"
        assert np.array_equal(depth, np.asarray(Image.open(file)))
        assert row["mask"] is None
        meta = json.loads((source / "views.json").read_text())
        camera = meta["views"][row["view"]]
        assert np.allclose(np.reshape(row["K"], (3, 3)), camera["K"])
        assert np.allclose(np.reshape(row["cam_from_world"], (4, 4)), camera["cam_from_world"])
        assert row["depth_step"] == meta["depth_step"]
        assert row["size_hw"] == [48, 48]
        assert (json.loads(row["record"]) == meta) if row["view"] == 0 else row["record"] is None


def test_datasets_opens_the_folder_and_the_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    pack_views([folder], tmp_path / "ds", shard_mb=0.02)
    files = [str(file) for file in shards(tmp_path / "ds")]
    assert len(files) > 1
    for found in (
        datasets.load_dataset(str(tmp_path / "ds"), split="train", cache_dir=str(tmp_path / "a")),
        datasets.load_dataset(
            "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "b")
        ),
    ):
        assert len(found) == 12
        assert isinstance(found.features["color"], datasets.Image)
        row = found[5]
        x0, y0, x1, y1 = row["window"]
        assert row["object"] == "object 1"
        assert row["color"].size == (x1 - x0, y1 - y0)
        assert len(row["K"]) == 9


@pytest.mark.parametrize("color", ["webp", "png"])
def test_a_view_that_is_not_black_outside_or_has_another_mask_is_kept(color: Any) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    depth = rng.integers(0, 65536, (9, 7)).astype(np.uint16)
    empty = Pictures(np.zeros((9, 7, 3), np.uint8), np.zeros((9, 7), np.uint16), depth < 0)
    assert window_of(empty) == (0, 0, 1, 1)
    lonely = Pictures(empty.color.copy(), empty.depth, empty.mask)
    lonely.color[8, 6] = 1  # colour alone widens the window
    assert window_of(lonely) == (6, 8, 7, 9)
    for whole in (empty, lonely, Pictures(pixels, depth, rng.random((9, 7)) < 0.5)):
        encoded = encode(whole, color)
        x0, y0, x1, y1 = encoded.window
        part = decode(encoded, "here")
        assert np.array_equal(whole.color[y0:y1, x0:x1], part.color)
        assert np.array_equal(whole.depth[y0:y1, x0:x1], part.depth)
        assert np.array_equal(whole.mask[y0:y1, x0:x1], part.mask)
    with pytest.raises(ImageError, match="here: not a readable view"):
        decode(encoded._replace(color=encoded.color[:40]), "here")
    with pytest.raises(ImageError, match="here: not a readable view"):
        decode(encoded._replace(depth=b"none"), "here")
    with pytest.raises(ImageError, match="in a window of 8x7"):
        decode(encoded._replace(window=(0, 0, 7, 8)), "here")


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    for n in range(16):
        write_views(tmp_path / "views" / f"o{n:02d}", "box", 3, 64, object_name=f"o{n}")
    mb = 0.01
    out = tmp_path / "killed"
    code = (
        "from data_prep.pack import pack_views; "
        f"pack_views([{str(tmp_path / 'views')!r}], {str(out)!r}, shard_mb={mb})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        limit = time.monotonic() + 60
        while len(shards(out)) < 2 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (out / "packed.json").exists()
    done = {file.name: file.stat().st_mtime_ns for file in shards(out)}
    assert 2 <= len(done) < 16
    (out / "data" / ".tmp_left.parquet").write_bytes(b"half")
    with pytest.raises(ViewsError, match="packing was not finished"):
        open_views(out)
    with pytest.raises(PackError, match="unfinished set of another source or other options"):
        pack_views([tmp_path / "views"], out, "png", shard_mb=mb)
    pack_views([tmp_path / "views"], out, shard_mb=mb)
    # What was done stays; the one that was being recorded may have been written again.
    kept = [name for name, when in done.items() if shards_by_name(out)[name] == when]
    assert len(kept) >= len(done) - 1
    pack_views([tmp_path / "views"], tmp_path / "whole", shard_mb=mb)
    assert tree(out) == tree(tmp_path / "whole")
    assert len(shards(out)) == 16


def shards_by_name(root: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in shards(root)}


def test_any_number_of_workers_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pack_views([folder], tmp_path / "one", shard_mb=0.01)
    pack_views([folder], tmp_path / "two", shard_mb=0.01, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(shards(tmp_path / "one")) == 4


def test_a_finished_set_is_left_alone_and_another_one_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    views = shutil.copytree(folder, tmp_path / "views")
    out = tmp_path / "ds"
    pack_views([views], out)
    before = tree(out)
    assert "4 objects" in pack_views([views], out)
    assert tree(out) == before
    with pytest.raises(PackError, match=r"packed with color=webp, not png.*another --out"):
        pack_views([views], out, "png")
    write_views(views / "o1", "sphere", 3, 48, object_name="object 1")
    with pytest.raises(PackError, match="from other views"):
        pack_views([views], out)
    assert tree(out) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(PackError, match="not empty and holds no packed set"):
        pack_views([views], other)
    assert list(other.iterdir()) == [other / "thesis.txt"]


def test_bad_input_is_one_sentence_and_leaves_no_shard(folder: Path, tmp_path: Path) -> None:
    views = shutil.copytree(folder, tmp_path / "views")
    with pytest.raises(PackError, match="workers 0"):
        pack_views([views], tmp_path / "ds", workers=0)
    with pytest.raises(PackError, match="both named 'object 0'"):
        pack_views([views, folder], tmp_path / "ds")
    picture = views / "o2" / "color_000001.png"
    picture.write_bytes(picture.read_bytes()[:300])
    with pytest.raises(ImageError, match=r"color_000001\.png"):
        pack_views([views], tmp_path / "ds")
    assert shards(tmp_path / "ds") == []
    picture.unlink()
    with pytest.raises(ViewsError, match=r"color_000001\.png missing"):
        pack_views([views], tmp_path / "ds2")
    assert not (tmp_path / "ds2").exists()
    pack_views([folder], tmp_path / "ds3")
    with pytest.raises(PackError, match="only those can be packed"):
        pack_views([tmp_path / "ds3"], tmp_path / "ds4")


def test_a_row_that_comes_back_different_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check must see one wrong pixel, and one wrong number."""
    right = encode

    def wrong(pictures: Pictures, color: Any) -> Any:
        pixels = pictures.color.copy()
        pixels[24, 24, 1] ^= 1
        return right(pictures._replace(color=pixels), color)

    monkeypatch.setattr(pack_shard, "encode", wrong)
    with pytest.raises(PackError, match="view 0 of 'object 0': what was read back is not"):
        pack_views([folder], tmp_path / "ds")
    assert shards(tmp_path / "ds") == []
    monkeypatch.setattr(pack_shard, "encode", right)
    posed, calls = pack_shard._posed, iter(range(10**6))

    def shifted(views: Any, i: int) -> Any:
        found = posed(views, i)
        found["K"][2] += next(calls) == 4
        return found

    monkeypatch.setattr(pack_shard, "_posed", shifted)
    with pytest.raises(PackError, match="view 1 of 'object 1'"):
        pack_views([folder], tmp_path / "ds")
    monkeypatch.setattr(pack_shard, "_posed", posed)
    pack_views([folder], tmp_path / "ds")


def test_the_reference_layout_is_packed_with_its_poses(tmp_path: Path) -> None:
    write_reference_views(tmp_path / "views" / "000-001" / "uid", views=2)
    pack_views([tmp_path / "views"], tmp_path / "ds")
    (source,), (packed,) = open_views(tmp_path / "views"), open_views(tmp_path / "ds")
    assert packed.name == "000-001/uid"
    assert packed.K.equal(source.K)
    assert packed.view(1).depth.equal(source.view(1).depth)


def test_a_hub_that_cannot_be_reached_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    pack_views([folder], tmp_path / "ds")
    with pytest.raises(PackError, match="USER/NAME"):
        push_folder(tmp_path / "ds", "a/b/c", endpoint="http://127.0.0.1:9")
    with pytest.raises(PackError, match=r"cannot be reached.*run the same command again") as caught:
        push_folder(tmp_path / "ds", "me/views", endpoint="http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_the_command_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    assert "equal to its source" in pack_command([folder], tmp_path / "ds")


# huggingface_hub's own LFS upload, with httpx of today
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push_to_hub_sends_the_whole_set_and_goes_on_after_a_break(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a local server that plays the hub's upload endpoints, without xet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    pack_views([folder], tmp_path / "ds", shard_mb=0.01)
    with UploadHub(breaks=1) as hub:
        with pytest.raises(PackError, match=r"refused 'me/views'.*run the same command again"):
            push_folder(tmp_path / "ds", "me/views", endpoint=hub.url)
        assert hub.files == {}
        before = hub.puts
        said = push_folder(tmp_path / "ds", "me/views", endpoint=hub.url)
        assert said == f"uploaded to {hub.url}/datasets/me/views"
        assert hub.files == tree(tmp_path / "ds")
        assert hub.puts == 5  # four shards and the index, each once
        assert before < 5
        asked = hub.repos["me/views"]
        assert asked.get("private") is True or asked.get("visibility") == "private"
        assert hub.tokens == {"Bearer hf_test"}

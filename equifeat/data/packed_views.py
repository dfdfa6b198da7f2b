"""Packed views: Parquet shards of Hugging Face ``datasets``, read at random through an index.

Parquet gives no cheap way to one row: a reader decodes a whole row group. The blobs of a packed set
lie uncompressed and unencoded in its shards, so index.parquet says where each one starts, and a
view is a slice of a memory-mapped file. The shards stay ordinary Parquet to everybody else.
"""

from __future__ import annotations

import json
import mmap
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equifeat.data.object_views import (
    CACHED_VIEWS,
    MAX_SIDE,
    ObjectViews,
    check_intrinsics,
    check_poses,
)
from equifeat.data.packed_codec import Encoded, Pictures, decode
from equifeat.errors import ImageError, ViewsError, import_extra
from equifeat.geometry.pixels import SizeHW

FORMAT, VERSION = "equifeat-packed", 1
META_FILE, INDEX_FILE, DATA_FOLDER = "packed.json", "index.parquet", "data"
BLOBS = ("color", "depth", "mask")


class _Index(NamedTuple):
    """Where everything of a packed set is; row = view, rows of an object adjacent.

    Attributes:
        folder: The packed set.
        shards: Names of the shard files.
        names: Names of the objects.
        first: (objects + 1,) first row of each object.
        shard: (rows,) number of the shard.
        spans: (rows, 3, 3) offset, size and CRC-32 of colour, depth and mask; size -1 for none.
        windows: (rows, 4) x0, y0, x1, y1.
        sizes_hw: (rows, 2).
        depth_step: (rows,).
        K: (rows, 3, 3) float32.
        cam_from_world: (rows, 4, 4) float32.
    """

    folder: Path
    shards: tuple[str, ...]
    names: list[str]
    first: NDArray[np.int64]
    shard: NDArray[np.int64]
    spans: NDArray[np.int64]
    windows: NDArray[np.int64]
    sizes_hw: NDArray[np.int64]
    depth_step: NDArray[np.float64]
    K: Tensor
    cam_from_world: Tensor


class PackedViews(ObjectViews):
    """The views of one object of a packed set.

    It travels to another process as the set's path and a number; the file is mapped there when the
    first view is read.

    Args:
        index: The set's index.
        stamp: When the set was written; another set of the same path is refused.
        number: Which object of the set.
    """

    def __init__(self, index: Any, stamp: int, number: int) -> None:
        first, end = (int(row) for row in index.first[number : number + 2])
        # One size for all views is the rule; a tuple a view would be most of an object's memory.
        sizes: list[SizeHW] = [
            (int(h), int(w)) for h, w in np.unique(index.sizes_hw[first:end], axis=0)
        ]
        if len(sizes) > 1:
            sizes = [(int(h), int(w)) for h, w in index.sizes_hw[first:end]]
        super().__init__(
            index.names[number],
            f"{index.folder}[{index.names[number]}]",
            index.K[first:end],
            index.cam_from_world[first:end],
            sizes[0] if len(sizes) == 1 else sizes,
            float(index.depth_step[first]),
        )
        self._folder: Path = index.folder
        self._stamp = stamp
        self._number = number
        self._first = first

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self._folder), self._stamp, self._number)

    def _pictures(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        (x0, y0, x1, y1), part = _decode(self._folder, self._stamp, self._first + i)
        h, w = self.camera(i).size_hw
        image = np.zeros((3, h, w), np.float32)
        depth = np.zeros((h, w), np.float32)
        mask = np.zeros((h, w), np.bool_)
        # The same arithmetic as for a folder, so that draws are equal to the last bit.
        image[:, y0:y1, x0:x1] = part.color.transpose(2, 0, 1).astype(np.float32) / 255.0
        depth[y0:y1, x0:x1] = part.depth.astype(np.float32) * np.float32(self.depth_step)
        mask[y0:y1, x0:x1] = part.mask
        return torch.from_numpy(image), torch.from_numpy(depth), torch.from_numpy(mask)


def is_packed(folder: Path) -> bool:
    """Whether this is a packed set, or one whose packing was not finished.

    Args:
        folder: Any folder.

    Returns:
        True where packed.json is, or shards without it.
    """
    return (folder / META_FILE).is_file() or (folder / ".packing").is_dir()


def open_packed(folder: Path) -> list[ObjectViews]:
    """Open a packed set.

    Args:
        folder: The folder with packed.json.

    Returns:
        Its objects, in their order in the set.

    Raises:
        ViewsError: Packing was not finished, a file is missing, or it is of another version.
        MissingExtraError: pyarrow is not installed.
    """
    file = folder / META_FILE
    if not file.is_file():
        raise ViewsError(f"{folder}: packing was not finished; run the same `equifeat pack` again")
    stamp = file.stat().st_mtime_ns
    index = _index(folder.resolve(), stamp)
    return [PackedViews(index, stamp, number) for number in range(len(index.names))]


def read_meta(folder: Path) -> dict[str, Any]:
    """Read packed.json.

    Args:
        folder: A packed set.

    Returns:
        Its fields.

    Raises:
        ViewsError: It is unreadable, or of another format or version.
    """
    file = folder / META_FILE
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ViewsError(f"{file}: not readable JSON ({error}); pack the views again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ViewsError(f"{file}: not an {FORMAT} file; pack the views again")
    if meta.get("version") != VERSION:
        raise ViewsError(
            f"{file}: format version {meta.get('version')!r}, this release reads {VERSION}; "
            "install the equifeat that wrote it or pack the views again"
        )
    return meta


def _reopen(folder: str, stamp: int, number: int) -> PackedViews:
    return PackedViews(_index(Path(folder), stamp), stamp, number)


@lru_cache(maxsize=8)
def _index(folder: Path, stamp: int) -> _Index:
    """Read the index once a process; the stamp keeps one that was packed anew from the cache."""
    meta = read_meta(folder)
    file = folder / META_FILE
    if file.stat().st_mtime_ns != stamp:
        raise ViewsError(f"{folder} was packed anew while it was in use; start again")
    try:
        shards = [(str(shard["file"]), int(shard["size"])) for shard in meta["shards"]]
        views, index_crc = int(meta["views"]), int(meta["index_crc32"])
    except (KeyError, TypeError, ValueError) as error:
        raise ViewsError(f"{file}: a field is missing or wrong ({error!r})") from error
    for name, size in shards:
        _check_shard(folder, name, size)
    table = _read_index(folder / INDEX_FILE, index_crc)
    if len(table["shard"]) != views or not shards or int(table["shard"].max()) >= len(shards):
        raise ViewsError(f"{folder / INDEX_FILE}: of another packed set; pack the views again")
    names = table["object"]
    first = np.flatnonzero(np.r_[True, names[1:] != names[:-1], True])
    K = torch.from_numpy(table["K"].reshape(-1, 3, 3))
    poses = torch.from_numpy(table["cam_from_world"].reshape(-1, 4, 4))
    check_intrinsics(K, folder / INDEX_FILE)
    check_poses(poses, folder / INDEX_FILE)
    spans = np.stack(
        [table[f"{blob}_{field}"] for blob in BLOBS for field in ("offset", "size", "crc32")], 1
    ).reshape(-1, 3, 3)
    return _Index(
        folder,
        tuple(name for name, _ in shards),
        [str(name) for name in names[first[:-1]]],
        first,
        table["shard"],
        spans,
        table["window"].reshape(-1, 4),
        table["size_hw"].reshape(-1, 2),
        table["depth_step"],
        K,
        poses,
    )


def _check_shard(folder: Path, name: str, size: int) -> None:
    file = folder / DATA_FOLDER / name
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise ViewsError(f"{folder / META_FILE}: {name!r} is no shard's name; pack the views again")
    if not file.is_file():
        raise ViewsError(f"{file}: no such shard; fetch or pack the set again")
    if file.stat().st_size != size:
        raise ViewsError(
            f"{file}: {file.stat().st_size} bytes instead of {size}; fetch or pack the set again"
        )


def _read_index(file: Path, crc: int) -> dict[str, NDArray[Any]]:
    import_extra("pyarrow", "pack", "reading packed views")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        data = file.read_bytes()
    except OSError as error:
        raise ViewsError(f"{file}: not readable ({error}); fetch or pack the set again") from error
    if zlib.crc32(data) != crc:
        raise ViewsError(f"{file}: damaged or of another set; fetch or pack the set again")
    try:
        table = pq.read_table(pa.BufferReader(data)).combine_chunks()
        out: dict[str, NDArray[Any]] = {}
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            if pa.types.is_fixed_size_list(column.type):
                column = column.flatten()
            values = column.to_numpy(zero_copy_only=False)
            out[name] = values.astype(np.int64) if values.dtype.kind in "iu" else values.copy()
        return out
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ViewsError(f"{file}: not a readable index ({error}); pack the views again") from error


@lru_cache(maxsize=4096)
def _mapped(file: Path, stamp: int) -> mmap.mmap:
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


@lru_cache(maxsize=CACHED_VIEWS)
def _decode(folder: Path, stamp: int, row: int) -> tuple[tuple[int, int, int, int], Pictures]:
    index = _index(folder, stamp)
    file = folder / DATA_FOLDER / index.shards[int(index.shard[row])]
    window = tuple(index.windows[row].tolist())
    size_hw = index.sizes_hw[row].tolist()
    where = f"{file}, row {row} of the index"
    if not (0 <= window[0] < window[2] <= size_hw[1] <= MAX_SIDE) or not (
        0 <= window[1] < window[3] <= size_hw[0] <= MAX_SIDE
    ):
        raise ImageError(f"{where}: window {window} in a view of {size_hw}; pack the views again")
    try:
        data = _mapped(file, stamp)
    except (OSError, ValueError) as error:
        raise ImageError(f"{file}: cannot be read ({error}); fetch or pack it again") from error
    blobs: list[bytes | None] = []
    for blob, (offset, size, crc) in zip(BLOBS, index.spans[row].tolist(), strict=True):
        part = data[offset : offset + size] if size >= 0 else None
        if part is not None and zlib.crc32(part) != crc:
            raise ImageError(f"{where}: its {blob} is damaged; fetch or pack the shard again")
        blobs.append(part)
    color, depth, mask = blobs
    return window, decode(Encoded(window, color or b"", depth or b"", mask), where)

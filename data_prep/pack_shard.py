"""Write one shard of a packed set and read every row of it back."""

from __future__ import annotations

import mmap
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equifeat.data.folder_views import FolderViews, is_equifeat, open_equifeat
from equifeat.data.packed_codec import Color, Encoded, Pictures, decode, encode
from equifeat.data.packed_views import BLOBS
from equifeat.data.reference_views import open_reference
from equifeat.errors import ImageError, MissingExtraError, PackError
from equifeat.files import atomic_file, sha256_of

_LEAVES = {"color": "color.bytes", "depth": "depth", "mask": "mask"}


class SourceObject(NamedTuple):
    """What a worker opens again: an object's folder and the folder the user named."""

    folder: Path
    root: Path


class ShardTask(NamedTuple):
    """One shard to write.

    Attributes:
        objects: What it holds, in order.
        color: Format of the colour pictures.
        shard: The file to write.
        part: Where its rows of the index go.
        number: Number of the shard.
    """

    objects: tuple[SourceObject, ...]
    color: Color
    shard: Path
    part: Path
    number: int


class Written(NamedTuple):
    """A shard that was written and checked."""

    number: int
    file: str
    rows: int
    size: int
    sha256: str


def open_source(source: SourceObject) -> FolderViews:
    """Open an object to pack.

    Args:
        source: Where it is.

    Returns:
        Its views.
    """
    if is_equifeat(source.folder):
        return open_equifeat(source.folder)
    return open_reference(source.folder, source.root)


def read_record(source: SourceObject) -> str | None:
    """Return the text of views.json, None for a layout without one.

    Args:
        source: Where it is.

    Returns:
        The text as it is.
    """
    file = source.folder / "views.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def source_pictures(views: FolderViews, i: int) -> Pictures:
    """Read a view of the source.

    Args:
        views: The object.
        i: Index of the view.

    Returns:
        Its pixels.

    Raises:
        PackError: A depth does not fit 16 bits.
    """
    color, depth, mask = views.raw(i)
    if depth.min() < 0 or depth.max() > 65535:
        raise PackError(f"{views.where}: depth_{i:06d}.png does not fit 16 bits; render again")
    return Pictures(color, depth.astype(np.uint16), mask > 127)


@lru_cache(maxsize=1)
def schema() -> Any:
    """Return the columns, with what ``datasets`` needs to show colour as pictures.

    Returns:
        A pyarrow schema.

    Raises:
        MissingExtraError: datasets is not installed.
    """
    try:
        from datasets import Features, Image, Sequence, Value
    except ImportError as error:
        raise MissingExtraError("datasets", "pack", "packing views") from error
    features = Features(
        {
            "object": Value("string"),
            "view": Value("int32"),
            "color": Image(),
            "depth": Value("binary"),
            "mask": Value("binary"),
            "window": Sequence(Value("int32"), length=4),
            "size_hw": Sequence(Value("int32"), length=2),
            "depth_step": Value("float64"),
            "K": Sequence(Value("float32"), length=9),
            "cam_from_world": Sequence(Value("float32"), length=16),
            "record": Value("string"),
        }
    )
    return features.arrow_schema


def index_schema() -> Any:
    """Return the columns of index.parquet.

    Returns:
        A pyarrow schema.
    """
    import pyarrow as pa

    spans = [
        pa.field(f"{blob}_{field}", pa.int64())
        for blob in BLOBS
        for field in ("offset", "size", "crc32")
    ]
    return pa.schema(
        [
            pa.field("object", pa.string()),
            pa.field("view", pa.int32()),
            pa.field("shard", pa.int32()),
            *spans,
            pa.field("window", pa.list_(pa.int32(), 4)),
            pa.field("size_hw", pa.list_(pa.int32(), 2)),
            pa.field("depth_step", pa.float64()),
            pa.field("K", pa.list_(pa.float32(), 9)),
            pa.field("cam_from_world", pa.list_(pa.float32(), 16)),
        ]
    )


def write_shard(task: ShardTask) -> Written:
    """Write a shard and its part of the index; both appear only after every row was compared.

    Args:
        task: What to write.

    Returns:
        What was written.

    Raises:
        PackError: A row that was read back differs from the source.
        ImageError: A picture of the source cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_file(task.shard) as path:
        with pq.ParquetWriter(path, schema(), **_options()) as writer:
            for source in task.objects:
                # One row group an object: a reader of plain Parquet gets an object at once.
                writer.write_table(pa.Table.from_pylist(_rows(source, task.color), schema()))
        rows = _verified(path, task)
        with atomic_file(task.part) as part:
            pq.write_table(pa.Table.from_pylist(rows, index_schema()), part)
        size, digest = path.stat().st_size, sha256_of(path)
    return Written(task.number, task.shard.name, len(rows), size, digest)


def _options() -> dict[str, Any]:
    """Blobs stay as they are, so that a slice of the file is a picture."""
    names = [name for name in schema().names if name not in BLOBS]
    return {
        "compression": {
            **dict.fromkeys(names, "zstd"),
            **dict.fromkeys((*_LEAVES.values(), "color.path"), "none"),
        },
        "use_dictionary": ["object"],
        "write_statistics": ["object", "view"],
        "store_schema": True,
    }


def _rows(source: SourceObject, color: Color) -> list[dict[str, Any]]:
    views = open_source(source)
    rows = []
    for i in range(len(views)):
        encoded = encode(source_pictures(views, i), color)
        rows.append(
            {
                "object": views.name,
                "view": i,
                "color": {"bytes": encoded.color, "path": None},
                "depth": encoded.depth,
                "mask": encoded.mask,
                "window": list(encoded.window),
                **_posed(views, i),
                "record": read_record(source) if i == 0 else None,
            }
        )
    return rows


def _posed(views: FolderViews, i: int) -> dict[str, Any]:
    return {
        "size_hw": list(views.size_hw),
        "depth_step": views.depth_step,
        "K": views.K[i].reshape(-1).tolist(),
        "cam_from_world": views.cam_from_world[i].reshape(-1).tolist(),
    }


def _verified(path: Path, task: ShardTask) -> list[dict[str, Any]]:
    """Read the file back, as Parquet and by its places, and compare it with the source."""
    import pyarrow.parquet as pq

    out = []
    file = pq.ParquetFile(path)
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if file.num_row_groups != len(task.objects):
            raise PackError(f"{task.shard}: {file.num_row_groups} objects came back")
        for group, source in enumerate(task.objects):
            views = open_source(source)
            rows = file.read_row_group(group).to_pylist()
            starts = _chunk_starts(file, group)
            if len(rows) != len(views):
                raise PackError(f"{task.shard}: {len(rows)} views of {views.name!r} came back")
            for i, row in enumerate(rows):
                where = f"{task.shard.name}, view {i} of {views.name!r}"
                posed = _posed(views, i)
                blobs = {"color": row["color"]["bytes"], "depth": row["depth"], "mask": row["mask"]}
                same = row["object"] == views.name and row["view"] == i
                same = same and all(row[key] == value for key, value in posed.items())
                same = same and row["record"] == (read_record(source) if i == 0 else None)
                if not same or not _same_pixels(views, i, row["window"], blobs, where):
                    raise PackError(
                        f"{where}: what was read back is not what is in {source.folder}; "
                        "check the disk and run the command again"
                    )
                found = {"object": views.name, "view": i, "shard": task.number}
                for blob, content in blobs.items():
                    found |= _place(data, starts, blob, content, where)
                out.append({**found, "window": row["window"], **posed})
    return out


def _same_pixels(
    views: FolderViews, i: int, window: list[int], blobs: dict[str, bytes | None], where: str
) -> bool:
    whole = source_pictures(views, i)
    x0, y0, x1, y1 = window
    try:
        encoded = Encoded(
            (x0, y0, x1, y1), blobs["color"] or b"", blobs["depth"] or b"", blobs["mask"]
        )
        part = decode(encoded, where)
    except ImageError:
        return False
    pairs: list[tuple[Any, Any]] = list(zip(whole, part, strict=True))
    for full, cut in pairs:
        back = np.zeros_like(full)
        back[y0:y1, x0:x1] = cut
        if not np.array_equal(back, full):
            return False
    return True


def _chunk_starts(file: Any, group: int) -> dict[str, list[int]]:
    """Where the column chunk of each blob starts, and its end."""
    meta = file.metadata.row_group(group)
    chunks = {meta.column(j).path_in_schema: meta.column(j) for j in range(meta.num_columns)}
    return {
        blob: [
            chunks[leaf].data_page_offset,
            chunks[leaf].data_page_offset + chunks[leaf].total_compressed_size,
        ]
        for blob, leaf in _LEAVES.items()
    }


def _place(
    data: mmap.mmap, starts: dict[str, list[int]], blob: str, content: bytes | None, where: str
) -> dict[str, int]:
    """Find a blob in the file behind the one before it: its length comes first, then itself."""
    if content is None:
        return {f"{blob}_offset": 0, f"{blob}_size": -1, f"{blob}_crc32": 0}
    start, end = starts[blob]
    at = data.find(struct.pack("<I", len(content)) + content, start, end)
    if at < 0:
        raise PackError(f"{where}: its {blob} is not in the file as it is; use another pyarrow")
    starts[blob][0] = at + 4 + len(content)
    return {
        f"{blob}_offset": at + 4,
        f"{blob}_size": len(content),
        f"{blob}_crc32": zlib.crc32(content),
    }

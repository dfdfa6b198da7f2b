"""``equifeat pack``: rendered views to Parquet shards of Hugging Face ``datasets``."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_prep.manifest import Manifest, Record
from data_prep.pack_card import card
from data_prep.pack_hub import push_folder
from data_prep.pack_shard import ShardTask, SourceObject, Written, read_record, schema, write_shard
from equifeat.data.folder_views import FolderViews
from equifeat.data.packed_codec import Color
from equifeat.data.packed_views import (
    DATA_FOLDER,
    FORMAT,
    INDEX_FILE,
    META_FILE,
    VERSION,
    read_meta,
)
from equifeat.data.views import Layout, open_views
from equifeat.errors import ManifestError, PackError
from equifeat.files import atomic_file
from equifeat.progress import progress

_WORK = ".packing"  # what an unfinished set holds besides its shards
_README = "README.md"


def pack_command(
    views: list[Path],
    out: Path,
    color: Color = "webp",
    shard_mb: float = 500,
    workers: int = 1,
    layout: Layout = "auto",
    push_to_hub: str | None = None,
    public: bool = False,
) -> str:
    """Pack rendered views into Parquet shards.

    Args:
        views: View folders or folders of them.
        out: Folder of the packed set; the same command goes on with an unfinished one.
        color: Lossless format of the colour pictures: webp (smaller) or png.
        shard_mb: About how many megabytes of pictures a shard holds.
        workers: Processes; any number writes the same bytes.
        layout: Layout of the view folders: auto, equifeat or reference.
        push_to_hub: Dataset repository to upload the finished set to, as USER/NAME.
        public: Whether a repository that is made for it is public.

    Returns:
        What was written, in one or two lines.
    """
    text = pack_views(views, out, color, shard_mb, workers, layout)
    if push_to_hub is not None:
        text += "\n" + push_folder(out, push_to_hub, private=not public)
    return text


def pack_views(
    views: Sequence[str | Path],
    out: str | Path,
    color: Color = "webp",
    shard_mb: float = 500,
    workers: int = 1,
    layout: Layout = "auto",
) -> str:
    """Write a packed set, or go on with an unfinished one.

    Every row is read back and compared with its source before its shard gets its name. A run that
    is killed leaves whole shards only; the same call then writes the rest, to the same bytes.

    Args:
        views: View folders or folders of them; their objects follow each other in this order.
        out: Folder of the packed set.
        color: Format of the colour pictures.
        shard_mb: About how many megabytes of source pictures a shard holds.
        workers: Processes.
        layout: Layout of the view folders.

    Returns:
        One line about the set.

    Raises:
        ViewsError: The views are incomplete.
        PackError: The folder holds something else, or a set of another source or other options.
        ImageError: A picture of the source cannot be read.
    """
    if not shard_mb > 0 or workers < 1:
        raise PackError(
            f"shard_mb is {shard_mb} and workers {workers}: use more than 0 and at least 1"
        )
    schema()  # a missing package is said before anything is read
    out = Path(out)
    sources, sizes, digest = _survey([Path(root) for root in views], layout)
    settings = {"format": VERSION, "color": color, "shard_mb": shard_mb, "source": digest}
    if (out / META_FILE).is_file():
        return _already(out, settings)
    if out.exists() and any(out.iterdir()) and not (out / _WORK).is_dir():
        raise PackError(f"{out} is not empty and holds no packed set: choose another --out")
    tasks = _plan(sources, sizes, out, color, shard_mb)
    try:
        with Manifest(out / _WORK / "manifest.sqlite", "pack", settings) as manifest:
            _remove_leftovers(out)
            todo = [task for task in tasks if not _is_done(manifest, task)]
            for done in progress(_write_all(todo, workers), "packing shards", len(todo)):
                manifest.put(Record(done.file, "ok", "", 1, done._asdict()))
            written = [manifest.get(task.shard.name) for task in tasks]
            meta = _finish(out, tasks, [w.info for w in written if w], len(sources), settings)
    except ManifestError as error:
        if "other settings" not in str(error):
            raise
        raise PackError(
            f"{out} holds an unfinished set of another source or other options: run the command "
            "that began it, or choose another --out"
        ) from error
    shutil.rmtree(out / _WORK)
    return _summary(out, meta)


def _survey(roots: Sequence[Path], layout: Layout) -> tuple[list[SourceObject], list[int], str]:
    """What to pack, the bytes of its pictures, and a digest of all that a row depends on."""
    found = [(root, views) for root in roots for views in open_views(root, layout)]
    named: dict[str, str] = {}
    sources, sizes, digest = [], [], hashlib.sha256()
    for root, views in progress(found, "looking at objects"):
        if not isinstance(views, FolderViews):
            raise PackError(
                f"{views.where} is not a folder of rendered views: only those can be packed"
            )
        if views.name in named:
            raise PackError(
                f"{named[views.name]} and {views.where} are both named {views.name!r}: "
                "pack them into two sets"
            )
        named[views.name] = views.where
        source = SourceObject(views.folder, root)
        files = sorted(views.folder.glob("*_[0-9][0-9][0-9][0-9][0-9][0-9].png"))
        kept = [file for file in files if file.name.startswith(("color_", "depth_", "mask_"))]
        bytes_of = [(file.name, file.stat().st_size) for file in kept]
        described = [views.name, views.size_hw, views.depth_step, read_record(source), bytes_of]
        digest.update(json.dumps(described).encode())
        digest.update(views.K.numpy().tobytes() + views.cam_from_world.numpy().tobytes())
        sources.append(source)
        sizes.append(sum(size for _, size in bytes_of))
    return sources, sizes, digest.hexdigest()


def _already(out: Path, settings: dict[str, Any]) -> str:
    """A finished set stays as it is when it is the one that was asked for."""
    meta = read_meta(out)
    found = {key: meta.get("settings", {}).get(key) for key in settings}
    if found != settings:
        wrong = ", ".join(
            f"{key}={found[key]}, not {settings[key]}"
            for key in settings
            if found[key] != settings[key] and key != "source"
        )
        raise PackError(
            f"{out} was packed {'with ' + wrong if wrong else 'from other views'}: "
            "choose another --out"
        )
    open_views(out, "packed")
    if (out / _WORK).is_dir():
        shutil.rmtree(out / _WORK)
    return _summary(out, meta)


def _plan(
    sources: Sequence[SourceObject], sizes: Sequence[int], out: Path, color: Color, shard_mb: float
) -> list[ShardTask]:
    """Cut the objects into shards by the size of their pictures; an object is never cut."""
    groups: list[list[SourceObject]] = [[]]
    room = limit = round(shard_mb * 1_000_000)
    for source, size in zip(sources, sizes, strict=True):
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(source)
        room -= size
    count = len(groups)
    return [
        ShardTask(
            tuple(group),
            color,
            out / DATA_FOLDER / f"train-{number:05d}-of-{count:05d}.parquet",
            out / _WORK / f"index-{number:05d}.parquet",
            number,
        )
        for number, group in enumerate(groups)
    ]


def _remove_leftovers(out: Path) -> None:
    """Temporary files of a killed run; the manifest's lock says that no run is using them."""
    for folder in (out, out / DATA_FOLDER, out / _WORK):
        for file in folder.glob(".tmp_*"):
            file.unlink()


def _is_done(manifest: Manifest, task: ShardTask) -> bool:
    record = manifest.get(task.shard.name)
    if record is None or not task.part.is_file() or not task.shard.is_file():
        return False
    return bool(task.shard.stat().st_size == record.info["size"])


def _write_all(tasks: Sequence[ShardTask], workers: int) -> Iterator[Written]:
    if workers == 1 or len(tasks) < 2:
        yield from map(write_shard, tasks)
        return
    # A fork would copy the threads of torch and pyarrow in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context)
    try:
        futures = [pool.submit(write_shard, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise PackError(
            "a packing process was killed, most likely for want of memory: run the command again "
            "with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(
    out: Path,
    tasks: Sequence[ShardTask],
    written: Sequence[dict[str, Any]],
    objects: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Join the index, write the card, and at the very end the file that makes it a set."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = pa.concat_tables([pq.read_table(task.part) for task in tasks])
    with atomic_file(out / INDEX_FILE) as path:
        pq.write_table(index, path, compression="zstd")
        crc = zlib.crc32(path.read_bytes())
    with atomic_file(out / _README) as path:
        path.write_text(card(objects, len(index), settings["color"]), encoding="utf-8")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "objects": objects,
        "views": len(index),
        "index_crc32": crc,
        "settings": settings,
        "shards": [
            {key: one[key] for key in ("file", "rows", "size", "sha256")} for one in written
        ],
    }
    with atomic_file(out / META_FILE) as path:
        path.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


def _summary(out: Path, meta: dict[str, Any]) -> str:
    size = sum(shard["size"] for shard in meta["shards"])
    return (
        f"{out}: {meta['objects']} objects, {meta['views']} views in {len(meta['shards'])} shards, "
        f"{size / 1e6:.1f} MB; every row was read back and is equal to its source"
    )

"""Open posed views of any layout: one entry for training, evaluation, checks and packing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from equifeat.data.co3d_views import is_co3d, open_co3d
from equifeat.data.colmap_views import is_capture, open_capture
from equifeat.data.folder_views import FolderViews, is_equifeat, open_equifeat
from equifeat.data.object_views import ObjectViews as ObjectViews
from equifeat.data.object_views import View as View
from equifeat.data.packed_views import is_packed, open_packed
from equifeat.data.reference_views import check_poses_fit, is_reference, open_reference
from equifeat.data.reference_views import reference_poses as reference_poses
from equifeat.data.sparse_views import CaptureOptions as CaptureOptions
from equifeat.errors import ImageError, ViewsError

Layout = Literal["auto", "equifeat", "packed", "reference", "colmap", "mvimgnet", "co3d"]
_log = logging.getLogger(__name__)
_SEARCH_DEPTH = 3  # the reference nests its objects two folders deep


class _Reader(NamedTuple):
    """How one layout is known and opened.

    Attributes:
        mark: The file that a folder of this layout holds.
        here: Whether a folder is one of this layout.
        open: The objects of such a folder, given it, the folder the user named and how
            captures are read.
    """

    mark: str
    here: Callable[[Path], bool]
    open: Callable[[Path, Path, CaptureOptions], Sequence[ObjectViews]]


def _captured(folder: Path, root: Path, options: CaptureOptions) -> list[ObjectViews]:
    try:
        return [open_capture(folder, root, options)]
    except (ViewsError, ImageError) as error:
        if folder == root:
            raise
        _leave_out(error)
        return []


def _leave_out(error: Exception) -> None:
    """Captures come with failed reconstructions: one costs itself, not the other thousands."""
    _log.warning("left out: %s", error)


_CAPTURE = _Reader("images/ and sparse/0/", is_capture, _captured)
# In the order in which a folder is tried.
_READERS: dict[str, _Reader] = {
    "equifeat": _Reader("views.json", is_equifeat, lambda at, root, how: [open_equifeat(at)]),
    "packed": _Reader("packed.json", is_packed, lambda at, root, how: open_packed(at)),
    "reference": _Reader(
        "color_000000.png", is_reference, lambda at, root, how: [open_reference(at, root)]
    ),
    "colmap": _CAPTURE,
    "mvimgnet": _CAPTURE,
    "co3d": _Reader(
        "frame_annotations.jgz", is_co3d, lambda at, root, how: open_co3d(at, how, _leave_out)
    ),
}


def open_views(
    path: str | Path, layout: Layout = "auto", captures: CaptureOptions | None = None
) -> list[ObjectViews]:
    """Open one object's view folder, or every object in a folder of them.

    Args:
        path: A view folder, or a folder that holds view folders (up to three levels deep).
        layout: "equifeat" (views.json), "packed" (what `equifeat pack` wrote), "reference"
            (BlenderProc pictures of 3DCorrEnhance; its poses are read from obj_poses.npy in the
            folder or above it), "colmap" or "mvimgnet" (photographs with images/ and sparse/0/),
            "co3d" (a category or a sequence of CO3Dv2), or "auto" for any.
        captures: How photographs of the last three are read; None for the defaults.

    Returns:
        The objects, sorted by folder.

    Raises:
        ViewsError: Nothing to read, a file is missing, or the metadata is of another format.
    """
    if layout not in get_args(Layout):
        *first, last = get_args(Layout)
        raise ViewsError(f"layout {layout!r} is unknown: use {', '.join(first)} or {last}")
    root = Path(path)
    if not root.is_dir():
        raise ViewsError(f"{root}: no such folder of views; `equifeat render` makes one")
    readers: dict[str, _Reader] = _READERS if layout == "auto" else {layout: _READERS[layout]}
    objects: list[ObjectViews] = []
    checked = False
    for folder, kind in _find(root, readers):
        objects += readers[kind].open(folder, root, captures or CaptureOptions())
        if kind == "reference" and not checked:
            # One set of poses serves every object of a reference folder: one look is enough.
            assert isinstance(objects[-1], FolderViews)
            check_poses_fit(objects[-1])
            checked = True
    if not objects:
        wanted = " or ".join(dict.fromkeys(reader.mark for reader in readers.values()))
        raise ViewsError(f"{root}: no folder with {wanted} in it; `equifeat render` makes one")
    by_name: dict[str, str] = {}
    for found in objects:
        if found.name in by_name:
            raise ViewsError(
                f"{by_name[found.name]} and {found.where} are both named {found.name!r}: "
                "give one another name in its views.json"
            )
        by_name[found.name] = found.where
    return objects


def _find(root: Path, readers: dict[str, _Reader]) -> Iterator[tuple[Path, str]]:
    """Yield the view folders at or below root; a view folder is not searched further."""
    pending = [(root, 0)]
    while pending:
        folder, depth = pending.pop(0)
        kind = next((name for name, reader in readers.items() if reader.here(folder)), None)
        if kind:
            yield folder, kind
        elif depth < _SEARCH_DEPTH:
            # Hidden folders are half-written renders.
            below = sorted(f for f in folder.iterdir() if f.is_dir() and f.name[0] != ".")
            pending = [(f, depth + 1) for f in below] + pending

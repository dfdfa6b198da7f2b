"""What to compute features of: files, folders, globs and lists become named images and videos."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from equifeat.errors import ImageError, RecipeError
from equifeat.image_files import IMAGE_SUFFIXES
from equifeat.video_files import VIDEO_SUFFIXES

_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


class Source(NamedTuple):
    """One image or video file.

    Attributes:
        name: Path relative to the root, with forward slashes; what its features are called.
        path: Where it is.
        video: Whether it is a video file; its frames are then `NAME/000012`.
    """

    name: str
    path: str
    video: bool


class Sources(NamedTuple):
    """Everything that was asked for.

    Attributes:
        root: Folder that names are relative to.
        files: Images and videos, sorted by name, each once.
    """

    root: Path
    files: tuple[Source, ...]


def find_sources(
    words: Sequence[str | Path], root: str | Path | None = None, skip: Sequence[Path] = ()
) -> Sources:
    """Find images and videos.

    Names are relative to the deepest folder that holds everything asked for, so that no two files
    have one name: `photos/` alone gives `1.jpg`, `a/ b/` give `a/1.jpg` and `b/1.jpg`.

    Args:
        words: Image and video files, folders (searched with all below, but for hidden ones),
            globs, and .txt lists with one path a line, relative to the list.
        root: Folder that names are relative to, instead.
        skip: Folders not to search: where features are written.

    Returns:
        What was found. Lines of a list may name files that do not exist.

    Raises:
        ImageError: Something named does not exist, or nothing was found.
        RecipeError: A file lies outside the root.
    """
    skipped = {_absolute(folder) for folder in skip}
    paths: set[Path] = set()
    bases: set[Path] = set()
    for word in words:
        for base, path in _expand(str(word), skipped):
            bases.add(base)
            paths.add(path)
    if not paths:
        raise ImageError(f"{', '.join(str(word) for word in words)}: no image or video there")
    top = _absolute(root) if root is not None else _common(bases)
    outside = [path for path in paths if top not in path.parents]
    if outside:
        raise RecipeError(f"{min(outside)} lies outside of --root {top}: give a folder above it")
    files = sorted(
        Source(path.relative_to(top).as_posix(), str(path), path.suffix.lower() in VIDEO_SUFFIXES)
        for path in paths
    )
    return Sources(top, tuple(files))


def _expand(word: str, skip: set[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield (folder that names may be relative to, absolute path) for each file of a word."""
    path = _absolute(word)
    if path.is_dir():
        yield from ((path, file) for file in _walk(path, skip))
    elif path.is_file():
        if path.suffix.lower() == ".txt":
            yield from _listed(path)
        else:
            yield path.parent, path
    elif glob.has_magic(word):
        fixed = path
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        pattern = path.relative_to(fixed)
        matches = sorted(fixed.glob(str(pattern)))
        if not any(part[0] == "." for part in pattern.parts):  # as shells do
            matches = [one for one in matches if not _hidden(one.relative_to(fixed))]
        if not matches:
            raise ImageError(f"{word}: no file fits this pattern; check the path")
        for match in matches:
            if match.is_dir():
                yield from ((fixed, file) for file in _walk(match, skip))
            elif match.suffix.lower() in _SUFFIXES and skip.isdisjoint(match.parents):
                yield fixed, match
    else:
        raise ImageError(f"{word}: no such image file or folder; check the path")


def _walk(folder: Path, skip: set[Path]) -> Iterator[Path]:
    for name, folders, files in os.walk(folder):
        here = Path(name)
        folders[:] = [one for one in folders if one[0] != "." and here / one not in skip]
        for file in files:
            path = here / file
            if file[0] != "." and path.suffix.lower() in _SUFFIXES:
                yield path


def _listed(file: Path) -> Iterator[tuple[Path, Path]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{file}: unreadable list ({error}); write one path a line") from error
    for line in lines:
        if line.strip() and not line.startswith("#"):
            path = _absolute(file.parent / line.strip())
            yield path.parent, path


def _common(bases: set[Path]) -> Path:
    try:
        return Path(os.path.commonpath(bases))
    except ValueError as error:  # several drives
        raise RecipeError("the images have no folder in common: run one drive at a time") from error


def _hidden(path: Path) -> bool:
    return any(part[0] == "." for part in path.parts)


def _absolute(path: str | Path) -> Path:
    # Not resolve(): a link keeps the name that the user gave it.
    return Path(os.path.normpath(Path(path).absolute()))

"""Which meshes a command is given, and what each object is called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from data_prep.mesh import SUFFIXES
from equifeat.errors import MeshError, RenderError

_MAGIC = "*?["


def find_objects(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Expand files, folders, patterns and lists to meshes with their names.

    A mesh of a folder, at any depth, is named by its path in that folder without the suffix, so
    that 000-023/uid.glb becomes the object 000-023/uid; a mesh of a pattern by its path below the
    first folder with a wildcard in it; a single file by its stem. A .txt file lists one path a
    line, relative to its own folder, and names them so. What starts with a dot is passed over.

    Args:
        paths: Mesh files, folders, quoted patterns such as "glbs/*/a*.glb", and .txt lists.

    Returns:
        File by name, in the order given; those of a folder or pattern are sorted.

    Raises:
        MeshError: A path does not exist, or holds no mesh.
        RenderError: Two meshes would share a folder.
    """
    objects: dict[str, Path] = {}
    for path in map(Path, paths):
        for name, file in _expand(path):
            other = objects.setdefault(name, file)
            if other != file:
                raise _clash(other, file, name)
    check_names(objects)
    return objects


def check_names(names: Iterable[str]) -> None:
    """Refuse names of which one is a folder of another.

    Args:
        names: Names of objects.

    Raises:
        RenderError: Two objects would share a folder.
    """
    known = set(names)
    for name in known:
        for parent in PurePosixPath(name).parents:
            if str(parent) in known:
                raise RenderError(
                    f"the views of {name!r} would be written into those of {str(parent)!r}; "
                    "rename one of the meshes or give each its own --out"
                )


def named_by_stem(files: Iterable[Path]) -> dict[str, Path]:
    """Name files by their stems.

    Args:
        files: Mesh files.

    Returns:
        File by name.

    Raises:
        RenderError: Two meshes would share a folder.
    """
    objects: dict[str, Path] = {}
    for file in files:
        other = objects.setdefault(file.stem, file)
        if other is not file:
            raise _clash(other, file, file.stem)
    return objects


def _clash(one: Path, other: Path, name: str) -> RenderError:
    return RenderError(f"{one} and {other} would both be written to {name!r}; rename one of them")


def _expand(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_dir():
        found = sorted(_walk(path))
        if not found:
            raise MeshError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        yield from ((_name(file, path), file) for file in found)
    elif path.suffix == ".txt" and path.is_file():
        yield from _listed(path)
    elif path.exists():
        yield path.stem, path
    elif any(c in str(path) for c in _MAGIC):
        fixed = Path(*_before_wildcard(path))
        pattern = str(path.relative_to(fixed)) if fixed.parts else str(path)
        matches = sorted(fixed.glob(pattern))
        found = [m for m in matches if _is_mesh(m, fixed)]
        if not found:
            raise MeshError(f"{path}: no {', '.join(SUFFIXES)} file fits this pattern")
        yield from ((_name(file, fixed), file) for file in found)
    else:
        raise MeshError(f"{path}: no such mesh file or folder")


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(where, name)


def _is_mesh(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _before_wildcard(path: Path) -> Iterator[str]:
    for part in path.parts[:-1]:
        if any(c in part for c in _MAGIC):
            return
        yield part


def _listed(path: Path) -> Iterator[tuple[str, Path]]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise MeshError(f"{path}: cannot be read as a list of meshes ({error})") from error
    entries = [Path(line) for line in lines if line and not line.startswith("#")]
    if not entries:
        raise MeshError(f"{path}: this list names no mesh")
    for entry in entries:
        file = path.parent / entry
        if not file.is_file():
            raise MeshError(f"{path}: it lists {str(entry)!r}, which is no file ({file})")
        inside = not entry.is_absolute() and ".." not in entry.parts
        yield (_name(file, path.parent) if inside else file.stem), file


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()

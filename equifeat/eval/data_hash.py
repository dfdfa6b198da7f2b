"""The identity of a data set, and its check against a list of hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from equifeat.errors import EvalDataError
from equifeat.files import atomic_file, sha256_of

SUMS = "SHA256SUMS"


def data_hash(root: Path, contents: Iterable[Path], sizes: Iterable[Path] = ()) -> str:
    """Return the hash that a cache of predictions is keyed by.

    Args:
        root: Folder of the data; paths count relative to it, with forward slashes.
        contents: Files that count by content: annotations.
        sizes: Files that count by path and size: pictures, of which there are many.

    Returns:
        64 hexadecimal digits.
    """
    lines = [f"{_relative(p, root)} {sha256_of(p)}" for p in contents]
    lines += [f"{_relative(p, root)} {p.stat().st_size}" for p in sizes]
    return hashlib.sha256("\n".join(sorted(set(lines))).encode()).hexdigest()


def check_sums(root: Path, sums: Path | None = None) -> tuple[int, list[str]]:
    """Compare files with a list of hashes as `sha256sum` writes it.

    Args:
        root: Folder of the data.
        sums: The list; SHA256SUMS in the folder when None.

    Returns:
        How many files were compared, and a sentence for each that is missing or differs; (0, [])
        where there is no list.

    Raises:
        EvalDataError: The list is damaged, or names a file outside the folder.
    """
    sums = sums or root / SUMS
    if not sums.is_file():
        return 0, []
    problems, count = [], 0
    for number, line in enumerate(sums.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        digest, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*")
        path = root / name
        if len(digest) != 64 or not name or not path.resolve().is_relative_to(root.resolve()):
            raise EvalDataError(
                f"{sums}: line {number} is not 'SHA256  file' with a file in {root}; write the "
                "list again with sha256sum."
            )
        count += 1
        if not path.is_file():
            problems.append(f"{path} is listed in {sums.name} but missing")
        elif sha256_of(path) != digest:
            problems.append(f"{path} is not the file that {sums.name} lists: its hash differs")
    return count, problems


def write_sums(root: Path) -> Path:
    """Write the hashes of all files of a folder, as `sha256sum` does.

    Args:
        root: The folder.

    Returns:
        The list, SHA256SUMS in it.
    """
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != SUMS)
    with atomic_file(root / SUMS) as temporary:
        lines = (f"{sha256_of(p)}  {_relative(p, root)}\n" for p in files)
        temporary.write_text("".join(lines), encoding="utf-8")
    return root / SUMS


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()

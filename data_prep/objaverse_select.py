"""Which objects of Objaverse are meant: a list of uids, a random draw, LVIS categories."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equifeat.errors import DownloadError, suggest
from equifeat.seeding import numpy_generator

# Sketchfab's ids. They become file names, so nothing else is let through.
_UID = re.compile(r"[0-9a-f]{32}")
_PATH = re.compile(r"glbs/([0-9]{3}-[0-9]{3})/([0-9a-f]{32})\.glb")
_ENTRY = re.compile(r"(?:(?:glbs/)?[0-9]{3}-[0-9]{3}/)?([0-9a-f]{32})(?:\.glb)?")


def is_uid(text: object) -> bool:
    """Return whether something is the uid of an object: 32 lower-case hexadecimal digits."""
    return isinstance(text, str) and _UID.fullmatch(text) is not None


def checked_path(uid: str, path: object) -> str | None:
    """Return a path of the index if it is where this object belongs.

    Args:
        uid: The object.
        path: What the index says.

    Returns:
        "glbs/NNN-NNN/uid.glb", None for anything else: a path decides where a file is written.
    """
    found = _PATH.fullmatch(path) if isinstance(path, str) else None
    return found[0] if found and found[2] == uid else None


def read_uids(file: Path) -> list[str]:
    """Read a list of objects.

    Args:
        file: One object a line, as uid, NNN-NNN/uid or glbs/NNN-NNN/uid.glb; empty lines and what
            follows a # are passed over. Or a JSON list of such strings.

    Returns:
        The uids in their order, possibly with duplicates.

    Raises:
        DownloadError: Unreadable, empty, or a line that names no object.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DownloadError(f"--uids {file}: cannot be read ({why})") from error
    entries: list[tuple[str, object]]
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DownloadError(f"--uids {file}: not valid JSON ({error})") from error
        entries = [(f"entry {i}", value) for i, value in enumerate(values)]
    else:
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        entries = [(f"line {i}", line) for i, line in enumerate(lines, 1) if line]
    uids = []
    for where, entry in entries:
        found = _ENTRY.fullmatch(entry) if isinstance(entry, str) else None
        if found is None:
            raise DownloadError(
                f"--uids {file}: {where} is {str(entry)[:80]!r}; expected a uid of 32 hexadecimal "
                "digits, or NNN-NNN/uid"
            )
        uids.append(found[1])
    if not uids:
        raise DownloadError(f"--uids {file}: names no object")
    return uids


def random_uids(known: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw objects at random.

    Args:
        known: All objects, in any order.
        count: How many.
        seed: Of the draw; the first n of a larger draw are the draw of n.

    Returns:
        The uids in the order drawn.

    Raises:
        DownloadError: More than there are.
    """
    if count > len(known):
        raise DownloadError(f"--random {count}: the dataset has {len(known)} objects; give fewer")
    ordered = sorted(known)
    return [ordered[i] for i in numpy_generator(seed).permutation(len(ordered))[:count]]


def lvis_uids(categories: str, annotations: Mapping[str, Any]) -> list[str]:
    """Return the objects of LVIS categories.

    Args:
        categories: One name, or several with commas between.
        annotations: uids by category.

    Returns:
        The uids, category by category, without duplicates.

    Raises:
        DownloadError: No such category.
    """
    names = [categories] if categories in annotations else categories.split(",")
    uids: dict[str, None] = {}
    for name in (part.strip() for part in names):
        if name not in annotations:
            raise DownloadError(
                f"--lvis: there is no category {name!r} among the {len(annotations)} of LVIS."
                f"{suggest(name, annotations)}"
            )
        uids.update(dict.fromkeys(filter(is_uid, annotations[name] or ())))
    return list(uids)

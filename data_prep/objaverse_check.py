"""Files from strangers, checked before anything trusts them: index files and GLBs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from equifeat.files import read_gzip, sha256_of

# The largest index file, 800,000 paths, unpacks to about 80 MB; more is a bomb.
_UNPACKED_LIMIT = 256 * 2**20


class GoneError(Exception):
    """The hub answers, and has no such file, or holds something that is no GLB."""


class BrokenAnswerError(Exception):
    """The hub answers with other bytes than it promised; to be asked again."""


class DamagedError(Exception):
    """An index file that does not unpack."""


def read_json_gz(path: Path, limit: int = _UNPACKED_LIMIT) -> dict[str, Any]:
    """Unpack a JSON object, but never more than a limit.

    Args:
        path: A .json.gz file.
        limit: Largest unpacked size in bytes.

    Returns:
        The object.

    Raises:
        DamagedError: No gzip, no JSON object, or larger than the limit.
    """
    try:
        data = read_gzip(path, limit)
        if data is None:
            raise DamagedError(f"{path}: unpacks to more than {limit} bytes")
        value = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not readable as .json.gz ({error})") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: holds {type(value).__name__} instead of a JSON object")
    return value


def check_glb(file: Path, promised: str | None) -> dict[str, Any]:
    """Check a file against its own header and the hub's hash.

    Args:
        file: What was fetched.
        promised: The SHA-256 that the hub told, None when it told none.

    Returns:
        bytes, sha256 and checked.

    Raises:
        BrokenAnswerError: Another hash, or no GLB where no hash tells whose fault that is.
        GoneError: No GLB, and the hash says that the hub holds just this.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = stream.read(12)
    found = sha256_of(file)
    if promised is not None and found != promised:
        raise BrokenAnswerError("the bytes do not have the SHA-256 that the hub told")
    whole = len(header) == 12 and header[:4] == b"glTF"
    if not whole or struct.unpack("<I", header[8:])[0] != size:
        what = "is no GLB" if not whole else "is a GLB whose header states another length"
        if promised is None:
            raise BrokenAnswerError(f"the answer {what}")
        raise GoneError(f"the file that the hub holds {what}")
    return {"bytes": size, "sha256": found, "checked": promised is not None}

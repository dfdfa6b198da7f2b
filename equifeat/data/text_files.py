"""Lists and annotations of strangers: read as text, bounded, naming plain files only."""

from __future__ import annotations

from pathlib import Path

from equifeat.errors import EvalDataError

# A list of pairs or an annotation that is larger is not one of the data sets read here.
MAX_LIST_BYTES = 64 * 2**20
MAX_ANNOTATION_BYTES = 4 * 2**20


def read_text(path: Path, limit: int) -> str:
    """Read a text file of a stranger.

    Args:
        path: The file.
        limit: Largest size in bytes.

    Returns:
        Its text.

    Raises:
        EvalDataError: It is missing, too large or no UTF-8 text.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise EvalDataError(
                f"{path}: {size} bytes are more than the {limit} of any such file; "
                "get the data set anew."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalDataError(f"{path}: cannot be read ({error}); get the data set anew.") from error


def plain_name(where: str, name: str) -> str:
    """Return the last part of a path that a file names, which must be a plain file name.

    Args:
        where: For messages: file and line.
        name: What the file says, with forward slashes.

    Returns:
        The part behind the last slash.

    Raises:
        EvalDataError: It is empty or leaves its folder.
    """
    last = name.strip().rsplit("/", 1)[-1]
    if last in ("", ".", "..") or "\\" in last or "\0" in last:
        raise EvalDataError(f"{where}: {name!r} is no name of a picture in this data set.")
    return last

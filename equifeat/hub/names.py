"""How a model of a hub is named: USER/NAME, hf://USER/NAME, hf://USER/NAME@REVISION."""

from __future__ import annotations

import re
from typing import NamedTuple

from equifeat.errors import CheckpointError

HUB = "hf://"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w./-]*", re.ASCII)


class HubName(NamedTuple):
    """A model repository of a hub.

    Attributes:
        repo: USER/NAME.
        revision: Branch, tag or commit; None for the main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{HUB}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def is_hub_word(word: str) -> bool:
    """Return whether a word names a model of a hub and cannot mean a folder.

    Args:
        word: What the user wrote.

    Returns:
        True for hf://….
    """
    return word.startswith(HUB)


def hub_name(word: str, revision: str | None = None) -> HubName:
    """Read the name of a model repository.

    Args:
        word: ``USER/NAME`` or ``USER/NAME@REVISION``, with or without ``hf://`` before it.
        revision: Branch, tag or commit, where the word has none.

    Returns:
        The name.

    Raises:
        CheckpointError: It is no such name, or two revisions are given.
    """
    repo, at, named = word.removeprefix(HUB).partition("@")
    if not _NAME.fullmatch(repo):
        raise CheckpointError(
            f"{word!r} is neither a folder nor USER/NAME of a model repository: check the path, or "
            f"write {HUB}USER/NAME or {HUB}USER/NAME@REVISION"
        )
    if at and revision is not None and named != revision:
        raise CheckpointError(f"{word!r} and revision={revision!r} differ: give one of them")
    wanted = named if at else revision
    if wanted is not None and not _REVISION.fullmatch(wanted):
        raise CheckpointError(f"revision {wanted!r} of {repo} is no branch, tag or commit")
    return HubName(repo, wanted)


def is_name(word: str) -> bool:
    """Return whether a word has the form of a repository's name, which a folder may have too.

    Args:
        word: What the user wrote.

    Returns:
        True for USER/NAME and USER/NAME@REVISION.
    """
    return _NAME.fullmatch(word.partition("@")[0]) is not None

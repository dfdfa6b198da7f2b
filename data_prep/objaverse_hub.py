"""Files of the dataset repo allenai/objaverse: fetched once, checked, moved into place whole.

Index files stay in the hub's cache (HF_HOME), where later runs and offline runs find them. A GLB is
fetched into a folder of its own below --out and renamed once it is checked, so it lies on the disk
once; one that the cache holds already is hard-linked, or copied from another file system.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS
from pathlib import Path
from random import uniform
from typing import Any

from data_prep.objaverse_check import (
    BrokenAnswerError,
    DamagedError,
    GoneError,
    check_glb,
    read_json_gz,
)
from equifeat.errors import DownloadError, MissingExtraError

try:
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
except ImportError as error:
    raise MissingExtraError("huggingface_hub", "objaverse", "downloading Objaverse") from error

REPO = "allenai/objaverse"

_INDEX_TRIES = 5
_DISK = {ENOSPC, EDQUOT, EROFS, EACCES, EPERM, EFBIG}
_SHA256 = re.compile(r"^[0-9a-f]{64}$", re.MULTILINE)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class NotCachedError(Exception):
    """Offline, and the file is not in the cache."""


class Hub:
    """The dataset repo at one commit; safe to use from several threads once made.

    Args:
        revision: Branch, tag or commit. The first index file decides which commit it is, and
            everything else is then read from that commit.
    """

    def __init__(self, revision: str) -> None:
        self.revision = revision
        self.offline = bool(constants.HF_HUB_OFFLINE)

    def index(self, name: str) -> dict[str, Any]:
        """Read one of the repo's index files.

        Args:
            name: For example "object-paths.json.gz".

        Returns:
            The JSON object in it.

        Raises:
            DownloadError: Not to be had, or damaged after a second download as well.
        """
        again, tried = False, 0
        while True:
            tried += 1
            last = self.offline or tried == _INDEX_TRIES
            try:
                return read_json_gz(self._index_file(name, again))
            except DamagedError as damage:
                if last or again:
                    raise DownloadError(
                        f"{damage}; remove it, and see whether {constants.ENDPOINT} is the hub"
                    ) from damage
                again = True
            except Exception as error:
                # such a one comes after five tries of huggingface_hub's own
                hopeless = isinstance(error, errors.EntryNotFoundError)
                if last or hopeless or _refusal(error, self.revision):
                    raise DownloadError(self._why_no_index(name, error)) from error
            time.sleep(2 ** (tried - 1) * uniform(0.5, 1.5))

    def _index_file(self, name: str, again: bool) -> Path:
        found = huggingface_hub.hf_hub_download(
            REPO, name, repo_type="dataset", revision=self.revision, force_download=again
        )
        commit = Path(found).parts[-len(Path(name).parts) - 1]
        if _COMMIT.fullmatch(commit):
            self.revision = commit
        return Path(found)

    def _why_no_index(self, name: str, error: Exception) -> str:
        if self.offline:
            return (
                f"{name} of {REPO} is not in the cache {constants.HF_HUB_CACHE}, and offline mode "
                "is on (HF_HUB_OFFLINE): run once without it, or set HF_HOME to a cache that has it"
            )
        return _refusal(error, self.revision) or (
            f"{name} of {REPO} could not be fetched from {constants.ENDPOINT} ({explain(error)}): "
            "check the network, HF_ENDPOINT and proxies, then give the same command again"
        )

    def fetch(self, path: str, target: Path, staging: Path) -> dict[str, Any]:
        """Bring one GLB to its place: from the cache if it is there, else from the hub.

        Args:
            path: Of the file in the repo.
            target: Where it belongs; appears whole or not at all.
            staging: An unused folder name on the file system of the target, for the time of this
                call.

        Returns:
            bytes, sha256, checked (whether the hub told the SHA-256), commit.

        Raises:
            GoneError: Asking again is of no use.
            BrokenAnswerError: The answer was not what the hub promised.
            NotCachedError: Offline, and not in the cache.
            DownloadError: The whole run must stop: no access to the repo, or the disk is full.
        """
        try:
            staging.mkdir(parents=True, exist_ok=True)
            try:
                file, promised = self._bring(path, staging)
                info = check_glb(file, promised)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except (GoneError, BrokenAnswerError, NotCachedError):
            raise
        except Exception as error:
            if _is_missing(_root(error)):
                raise GoneError("the hub has no such file (404)") from error
            stop = _refusal(error, self.revision) or _disk(error, target)
            if stop:
                raise DownloadError(stop) from error
            raise
        return {**info, "commit": self.revision}

    def _bring(self, path: str, staging: Path) -> tuple[Path, str | None]:
        cached = huggingface_hub.try_to_load_from_cache(
            REPO, path, repo_type="dataset", revision=self.revision
        )
        if isinstance(cached, str):
            blob = Path(cached).resolve()
            promised = blob.name if _SHA256.fullmatch(blob.name) else None
            try:
                check_glb(blob, promised)
            except (GoneError, BrokenAnswerError, OSError):
                pass  # a damaged cache entry: fetched as if it were not there
            else:
                return _linked(blob, staging / "cached.glb"), promised
        if self.offline:
            raise NotCachedError("not in the cache, and offline mode is on (HF_HUB_OFFLINE)")
        # force_download: the folder is empty, and the retries are ours, with jitter
        file = huggingface_hub.hf_hub_download(
            REPO,
            path,
            repo_type="dataset",
            revision=self.revision,
            local_dir=staging,
            force_download=True,
        )
        # three lines: commit, ETag, time; the ETag of a file in LFS is its SHA-256
        note = staging / ".cache" / "huggingface" / "download" / f"{path}.metadata"
        told = _SHA256.search(note.read_text(encoding="utf-8")) if note.is_file() else None
        return Path(file), told and told[0]


def _linked(source: Path, target: Path) -> Path:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
    return target


def explain(error: BaseException) -> str:
    """Put an error of the network into a few words without addresses, so that equal ones group.

    Args:
        error: What huggingface_hub raised; it often wraps the true one.

    Returns:
        Some words.
    """
    error = _root(error)
    if _is_missing(error):
        return "it has no such file"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 429:
        return "HTTP 429, too many requests: a token (HF_TOKEN) raises the limit"
    if status is not None:
        return f"HTTP {status}"
    if isinstance(error, (GoneError, BrokenAnswerError, NotCachedError)):
        return str(error)
    if "Consistency check failed" in str(error):
        return "fewer or more bytes than the hub told"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"no answer: {type(error).__name__}"


def stated_wait(error: BaseException) -> float | None:
    """Return how long the hub asks to wait, when it says that there were too many requests.

    Args:
        error: What huggingface_hub raised.

    Returns:
        Seconds, None for any other error.
    """
    response = getattr(_root(error), "response", None)
    if getattr(response, "status_code", None) != 429:
        return None
    headers = getattr(response, "headers", {})
    # "Retry-After: 55", or the hub's own 'RateLimit: "resolvers";r=0;t=55'
    told = re.fullmatch(r"\s*([0-9]+)\s*", headers.get("Retry-After", ""))
    told = told or re.search(r";\s*t\s*=\s*([0-9]+)", headers.get("RateLimit", ""))
    return min(float(told[1]) if told else 60.0, 600.0)


def _root(error: BaseException) -> BaseException:
    """The error behind huggingface_hub's wrappers: it failed, so it says, due to another."""
    wrappers = (ValueError, errors.LocalEntryNotFoundError)
    while isinstance(error, wrappers) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_missing(error: BaseException) -> bool:
    # the subclass says that the hub could not be asked
    local = isinstance(error, errors.LocalEntryNotFoundError)
    return isinstance(error, errors.EntryNotFoundError) and not local


def _refusal(error: BaseException, revision: str) -> str:
    """One sentence when no other file could be had either, else an empty string."""
    error = _root(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"revision {revision!r}: {REPO} has none of that name; leave --revision out"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            f"{constants.ENDPOINT} gives no access to the dataset {REPO} ({explain(error)}): check "
            "HF_ENDPOINT, and HF_TOKEN where a mirror wants one"
        )
    return ""


def _disk(error: BaseException, target: Path) -> str:
    error = _root(error)
    # hf_xet is Rust: its errors carry the number in their text only
    full = isinstance(error, RuntimeError) and "os error 28" in str(error)
    if full or (isinstance(error, OSError) and error.errno in _DISK):
        reason = "no space left" if full else os.strerror(getattr(error, "errno", 0))
        return (
            f"{target}: cannot be written ({reason}); make room or mend the permissions, then give "
            "the same command again: what is there is kept"
        )
    return ""


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub from drawing one bar a file and from logging each retry."""
    level, bars = hub_logging.get_verbosity(), not are_progress_bars_disabled()
    hub_logging.set_verbosity(logging.ERROR)
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if bars:
            enable_progress_bars()

"""What huggingface_hub raises, in one sentence each.

Its network errors come from the HTTP library of the day, so they are told apart by what they carry,
not by their types.
"""

from __future__ import annotations

import os
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS

from equifeat.errors import import_extra

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
# of httpx and its successors
_BROKEN_OFF = {"RemoteProtocolError", "ReadError", "ReadTimeout", "WriteError", "WriteTimeout"}
_DISK = {ENOSPC, EDQUOT, EROFS, EACCES, EPERM, EFBIG}


def is_unreachable(error: BaseException) -> bool:
    """Return whether the hub gave no answer, so that what the cache holds may serve.

    Args:
        error: What huggingface_hub raised.

    Returns:
        False for every answer that says no, and for what has nothing to do with the network.
    """
    error = _root(error)
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    return type(error).__module__.split(".")[0] in {"httpx", "httpx2", "httpcore", "requests"}


def why_not(
    error: BaseException,
    name: object,
    where: object,
    *,
    offline: bool = False,
    writing: bool = False,
) -> str:
    """Put an error into one sentence that names the repository and a remedy.

    Args:
        error: What huggingface_hub raised.
        name: The repository.
        where: The hub or the cache that was asked.
        offline: Whether the network was not to be used.
        writing: Whether something was to be uploaded.

    Returns:
        The sentence.
    """
    errors = import_extra("huggingface_hub", "hub", "a model of a hub").errors
    error = _root(error)
    status = _status(error)
    said = f" (HTTP {status})" if status is not None else ""
    if offline and isinstance(error, errors.EntryNotFoundError):
        return (
            f"{name} is not in {where}, and the network is not to be used (HF_HUB_OFFLINE or "
            "local_files_only): open it once with network, or give a cache that has it"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{name} is no USER/NAME of a model repository"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name} is gated{said}: ask for access on its page at {where}, then {LOG_IN}, or give "
            "token=…"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no such revision{said}: leave it out for the main branch"
    # without a token, the hub answers 401 for what is private and for what is not there
    if not writing and (isinstance(error, errors.RepositoryNotFoundError) or status == 401):
        return (
            f"{where} has no model repository {name}, or it is private{said}: check the name; for "
            f"a private one {LOG_IN}, or give token=…"
        )
    if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
        return f"{where} refuses {name} to this token{said}: {LOG_IN}, with rights to do this"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{name} lacks a file that its config.json names{said}: the model is incomplete"
    if status is not None:
        return f"{where} answers {name} with an error{said}: try again later"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{where} was not asked for {name}: offline mode is on (HF_HUB_OFFLINE)"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{name} needs a token: {LOG_IN}"
    if "Consistency check failed" in str(error):
        return f"{name}: the transfer broke off, fewer bytes came than {where} told: try again"
    if isinstance(error, OSError) and error.errno in _DISK:
        return (
            f"{name}: the cache cannot be written ({os.strerror(error.errno or 0)}): make room, or "
            "give another cache_dir or HF_HOME"
        )
    reason = " ".join(str(error).split())[:160]
    if type(error).__name__ in _BROKEN_OFF:
        return f"{name}: the transfer broke off ({type(error).__name__}: {reason}): try again"
    return (
        f"{where} cannot be reached for {name} ({type(error).__name__}: {reason}): check the "
        "network, HF_ENDPOINT and proxies; HF_HUB_OFFLINE=1 uses the cache"
    )


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _root(error: BaseException) -> BaseException:
    """The error behind huggingface_hub's own: a file is not in the cache *because* of another."""
    errors = import_extra("huggingface_hub", "hub", "a model of a hub").errors
    wrappers = (errors.LocalEntryNotFoundError, ValueError, RuntimeError)
    kept = (errors.HFValidationError, errors.HfHubHTTPError)
    while isinstance(error, wrappers) and not isinstance(error, kept) and error.__cause__:
        error = error.__cause__
    return error

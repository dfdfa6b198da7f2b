"""The files of a model of a hub, fetched into huggingface_hub's cache and checked.

Only the files of a model folder are ever asked for, by name: whatever else a repository holds
(code, pickles) stays there. Address, cache, token and offline mode are those of huggingface_hub
(HF_ENDPOINT, HF_HOME, HF_TOKEN or ``hf auth login``, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from equifeat.checkpoint import CONFIG, HEAD_WEIGHTS, read_config
from equifeat.errors import CheckpointError, import_extra
from equifeat.files import sha256_of
from equifeat.hub.errors import is_unreachable, why_not
from equifeat.hub.names import HubName
from equifeat.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS

# A 7B ViT's 3×3 convolution has 0.6 GB; JSON files have a few kilobytes.
MAX_BYTES = {
    CONFIG: 2**20,
    ADAPTER_CONFIG: 2**20,
    ADAPTER_WEIGHTS: 2**32,
    HEAD_WEIGHTS: 2**32,
}
_PURPOSE = "a model of a hub"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


def fetch_model(
    name: HubName,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    endpoint: str | None = None,
) -> Path:
    """Bring the files of a model folder into huggingface_hub's cache.

    Where the hub gives no answer, what the cache holds of that revision is used.

    Args:
        name: The repository.
        token: See `from_pretrained`.
        cache_dir: See `from_pretrained`.
        local_files_only: See `from_pretrained`.
        force_download: See `from_pretrained`.
        endpoint: Address of the hub; None for huggingface_hub's own.

    Returns:
        A folder of the cache with the files of one commit.

    Raises:
        CheckpointError: They cannot be had, are too large, damaged, or of no equifeat model.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = import_extra("huggingface_hub", "hub", _PURPOSE)
    api = hub.HfApi(endpoint=endpoint, token=token)
    offline = local_files_only or bool(hub.constants.HF_HUB_OFFLINE)
    if offline and force_download:
        raise CheckpointError(f"{name}: offline, nothing can be downloaded anew (force_download)")

    def file(filename: str, revision: str | None, *, local: bool, force: bool) -> Path:
        found = api.hf_hub_download(
            name.repo,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local,
            force_download=force,
        )
        return Path(found)

    try:
        if not offline:
            try:
                return _fetch(api, name, file, force_download)
            except Exception as error:
                if force_download or not is_unreachable(error):
                    raise
                try:
                    folder = _whole(name, lambda one, at: file(one, at, local=True, force=False))
                except Exception:
                    # what was wrong first says more than that the cache is empty
                    raise error from None
                _log.warning("%s gives no answer: using commit %s", api.endpoint, folder.name)
                return folder
        return _whole(name, lambda one, at: file(one, at, local=True, force=False))
    except CheckpointError:
        raise
    except Exception as error:
        # huggingface_hub raises many types, of several libraries
        cache = cache_dir or hub.constants.HF_HUB_CACHE
        where = f"the cache {cache}" if offline else api.endpoint
        raise CheckpointError(why_not(error, name, where, offline=offline)) from error


def _fetch(api: Any, name: HubName, file: Callable[..., Path], force: bool) -> Path:
    """Fetch all that is needed from one commit; no file before its size is known."""
    info = _listed(api, name, name.revision)

    def fetched(filename: str, revision: str | None) -> Path:
        nonlocal info
        if filename != CONFIG and revision != info.sha:
            info = _listed(api, name, revision)  # somebody pushed in between
        _check_listed(name, filename, info)
        path = file(filename, revision, local=False, force=force)
        if not _sound(path):
            path = file(filename, revision, local=False, force=True)
        return path

    return _whole(name, fetched)


def _whole(name: HubName, file: Callable[[str, str | None], Path]) -> Path:
    """Get config.json, and with it the commit, then what it names, and check all of it."""
    config_file = file(CONFIG, name.revision)
    folder, commit = config_file.parent, config_file.parent.name
    if not _COMMIT.fullmatch(commit):
        raise CheckpointError(f"{name}: {commit!r} is no commit")
    paths = [config_file]
    try:
        _check_size(name, config_file)
        config = read_config(folder)
    except (CheckpointError, RecursionError) as error:
        raise CheckpointError(f"{name} cannot be used: {error}") from error
    paths += [file(filename, commit) for filename in _needed(config)]
    for path in paths:
        _check_size(name, path)
        if not _sound(path):
            raise CheckpointError(
                f"{name}: {path.name} is damaged, its SHA-256 is not the one the hub told: fetch "
                "it again with force_download=True"
            )
    return folder


def _needed(config: Mapping[str, Any]) -> list[str]:
    """Name the files that config.json speaks of; a garbled one is load_model's to refuse."""
    names = [] if config.get("lora") is None else [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    head = config.get("head")
    kind = head.get("kind") if isinstance(head, Mapping) else None
    return names if kind in (None, "none") else [*names, HEAD_WEIGHTS]


def _listed(api: Any, name: HubName, revision: str | None) -> Any:
    return api.model_info(name.repo, revision=revision, files_metadata=True, timeout=30)


def _check_listed(name: HubName, filename: str, info: Any) -> None:
    """Refuse a file that the repository lacks or that is too large to be what it is called."""
    sizes = {one.rfilename: one.size for one in info.siblings or ()}
    if filename not in sizes:
        what = (
            "it is not an equifeat model" if filename == CONFIG else "the model there is incomplete"
        )
        raise CheckpointError(f"{name} has no {filename}: {what}")
    size = sizes[filename]
    if size is not None and size > MAX_BYTES[filename]:
        raise CheckpointError(
            f"{name}: {filename} has {size:,} bytes, more than the {MAX_BYTES[filename]:,} that "
            "such a file may have"
        )


def _check_size(name: HubName, path: Path) -> None:
    if path.stat().st_size > MAX_BYTES[path.name]:
        raise CheckpointError(
            f"{name}: {path.name} has {path.stat().st_size:,} bytes, more than the "
            f"{MAX_BYTES[path.name]:,} that such a file may have"
        )


def _sound(path: Path) -> bool:
    """Compare a file of the cache with its SHA-256, by which large files are named there."""
    blob = path.resolve()
    return not _SHA256.fullmatch(blob.name) or sha256_of(blob) == blob.name

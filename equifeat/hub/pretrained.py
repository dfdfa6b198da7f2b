"""Open a model of a hub, or a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from equifeat.checkpoint import load_model, read_config
from equifeat.errors import CheckpointError, WeightsError
from equifeat.hub.fetch import fetch_model
from equifeat.hub.names import HubName, hub_name, is_hub_word, is_name
from equifeat.model.extractor import FeatureExtractor


def from_pretrained(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    weights: str | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """Open a model of a hub, or a model folder; strictly, as `equifeat.load_model` does.

    Args:
        repo_or_folder: ``USER/NAME``, ``hf://USER/NAME[@REVISION]``, or a folder, which wins where
            a name is both.
        revision: Branch, tag or commit of the repository.
        token: Of the hub; None for the one of HF_TOKEN or ``hf auth login``.
        cache_dir: Where fetched files are kept; None for huggingface_hub's cache.
        local_files_only: Ask nothing of the network.
        force_download: Fetch again what the cache holds.
        weights: Another place to take the backbone's weights from: "hub", "packaged" or a file.
        device: Where to put the model.

    Returns:
        The extractor, in eval mode.

    Raises:
        CheckpointError: There is no such model, it cannot be had, or it is damaged or no equifeat
            model.
        WeightsError: The backbone's weights, which are not in the repository, cannot be had.
        MissingExtraError: huggingface_hub is not installed.
    """
    word = str(repo_or_folder)
    if not is_hub_word(word) and (Path(word).exists() or not is_name(word)):
        if revision is not None:
            raise CheckpointError(f"{word} is no model of a hub: a folder has no revision")
        return load_model(Path(word), device, weights=weights)
    name = hub_name(word, revision)
    try:
        folder = fetch_model(
            name,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    except CheckpointError as error:
        if is_hub_word(word):
            raise
        raise CheckpointError(f"{error} (nor is there a folder {word})") from error
    return load_fetched(folder, name, device, weights)


def load_fetched(
    folder: Path, name: HubName, device: torch.device | str = "cpu", weights: str | None = None
) -> FeatureExtractor:
    """Open what `fetch_model` gave.

    Args:
        folder: The folder in the cache.
        name: Where it came from, for messages.
        device: Where to put the model.
        weights: See `from_pretrained`.

    Returns:
        The extractor, in eval mode.

    Raises:
        CheckpointError: It is damaged or no equifeat model.
        WeightsError: The backbone's weights cannot be had.
    """
    spec = read_config(folder).get("backbone")
    spec = spec if isinstance(spec, Mapping) else {}
    source = spec.get("weights")
    # A path in a stranger's file means nothing here and is not looked at.
    if weights is None and isinstance(source, Mapping) and source.get("source") == "file":
        raise CheckpointError(
            f"{name} was trained on weights of {spec.get('name')!r} from a file of its author: "
            "give that file, weights=FILE"
        )
    try:
        return load_model(folder, device, weights=weights)
    except WeightsError as error:
        raise WeightsError(
            f"{name} was fetched, but it holds only what was trained, not its backbone: {error}"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error

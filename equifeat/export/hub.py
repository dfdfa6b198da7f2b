"""A model folder to a Hugging Face hub: a card with measured numbers, checked, one commit."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equifeat.checkpoint import CARD, CONFIG, HEAD_WEIGHTS, load_model, read_config
from equifeat.errors import CheckpointError, ExportError, import_extra
from equifeat.export.hub_results import card_facts
from equifeat.files import atomic_folder
from equifeat.hub.errors import why_not
from equifeat.hub.names import HUB, HubName, hub_name
from equifeat.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from equifeat.model.backbone import Backbone
from equifeat.model.card import RESULTS, card_section, model_card, without_folders

# Nothing else of a folder is ever copied or uploaded.
FILES = (CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_WEIGHTS, CARD)
_PURPOSE = "uploading a model"


def write_hub_folder(
    folder: str | Path,
    out: str | Path,
    *,
    repo: str | None = None,
    results: str | Path | None = None,
    weights: str | None = None,
    card: Mapping[str, Any] | None = None,
    backbone: Backbone | None = None,
) -> str:
    """Write a model folder as it is uploaded: its known files and a full model card.

    The model is opened first, strictly. Absolute paths in config.json are cut to their last part.

    Args:
        folder: A model folder.
        out: Folder to write; an older model folder there is replaced.
        repo: USER/NAME or USER/NAME@REVISION, for the card; the name of `out` when None.
        results: results.json of ``equifeat evaluate … --controls`` of this model. Without, the
            results that the folder's card tells are kept.
        weights: Another place to take the backbone's weights from, see `load_model`.
        card: More facts for the card, see `equifeat.model.card.model_card`.
        backbone: A backbone already loaded, in place of weights.

    Returns:
        A sentence for the user.

    Raises:
        CheckpointError: The folder is no sound model folder.
        ExportError: The results are not of this model or lack its controls, or `out` holds
            something else.
    """
    folder, out = Path(folder), Path(out)
    _refuse_foreign(folder, out)
    name = hub_name(repo) if repo is not None else None
    extractor = load_model(folder, weights=weights, backbone=backbone)
    config = without_folders(read_config(folder))
    facts: dict[str, Any] = dict(card or {})
    if results is not None:
        facts |= card_facts(Path(results), extractor, folder)
    elif not any(facts.get(key) for key in ("results", "tables", "results_text")):
        told = folder / CARD
        text = told.read_text(encoding="utf-8") if told.is_file() else ""
        facts["results_text"] = card_section(text, RESULTS)
    if name is not None:
        facts["repo"] = str(name).removeprefix(HUB)
    title = name.repo.rpartition("/")[2] if name is not None else out.name
    with atomic_folder(out) as new:
        for file in FILES:
            if file not in (CONFIG, CARD) and (folder / file).is_file():
                shutil.copyfile(folder / file, new / file)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (new / CARD).write_text(model_card(title, config, facts), encoding="utf-8")
        load_model(new, backbone=extractor.backbone)
    measured = "results of " + Path(results).name if results is not None else "no new results"
    return f"wrote {out}: {', '.join(sorted(f.name for f in out.iterdir()))} (card with {measured})"


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    results: str | Path | None = None,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
    token: str | bool | None = None,
    weights: str | None = None,
    card: Mapping[str, Any] | None = None,
    backbone: Backbone | None = None,
) -> str:
    """Upload a model folder with a full model card, as one commit.

    Nothing is sent unless the model opens and the results are its own. An upload that breaks off
    changes nothing that others see; the same call goes on with it.

    Args:
        folder: A model folder.
        repo: USER/NAME; it is made when it does not exist.
        private: Whether a repository that is made is private; None for the hub's default.
        results: See `write_hub_folder`.
        revision: Branch to commit to; it is made when it does not exist.
        message: Title of the commit.
        create_pr: Open a pull request instead of changing the branch.
        endpoint: Address of the hub; None for huggingface_hub's own.
        token: Of the hub; None for the one of HF_TOKEN or ``hf auth login``.
        weights: See `write_hub_folder`.
        card: See `write_hub_folder`.
        backbone: See `write_hub_folder`.

    Returns:
        Where it is, and how to open it.

    Raises:
        CheckpointError: The folder is no sound model folder, or the name is none.
        ExportError: The hub refuses or cannot be reached, the repository holds something else, or
            the results do not fit.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = import_extra("huggingface_hub", "hub", _PURPOSE)
    name = hub_name(repo, revision)
    if create_pr and name.revision is not None:
        raise ExportError(
            f"a pull request is opened against the main branch: leave out revision {name.revision}"
        )
    api = hub.HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory(prefix="equifeat_push_") as scratch:
        out = Path(scratch) / "model"
        write_hub_folder(
            folder,
            out,
            repo=str(name),
            results=results,
            weights=weights,
            card=card,
            backbone=backbone,
        )
        try:
            info = _commit(hub, api, name, out, private, message, create_pr)
        except ExportError:
            raise
        except Exception as error:
            # huggingface_hub raises many types, of several libraries
            raise ExportError(
                f"{why_not(error, name, api.endpoint, writing=True)}; others see nothing of an "
                "upload that failed: run the same again"
            ) from error
    where = info.pr_url or info.commit_url
    opened = str(name).removeprefix(HUB)
    return f'pushed to {where}; open it with equifeat.from_pretrained("{opened}")'


def _commit(
    hub: Any,
    api: Any,
    name: HubName,
    folder: Path,
    private: bool | None,
    message: str | None,
    create_pr: bool,
) -> Any:
    """Make the repository and the branch where they are missing, and one commit."""
    api.create_repo(name.repo, private=private, exist_ok=True)
    branch = name.revision
    if branch is not None and branch != "main":
        api.create_branch(name.repo, branch=branch, exist_ok=True)
    there = {one.rfilename for one in api.model_info(name.repo, revision=branch).siblings or ()}
    _refuse_other_model(api, name, there)
    files = {path.name: path for path in folder.iterdir()}
    operations: list[Any] = [
        hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=files[file])
        for file in FILES
        if file in files
    ]
    # an older model's head beside a model without one would make the folder unreadable
    operations += [
        hub.CommitOperationDelete(path_in_repo=file)
        for file in FILES
        if file in there and file not in files
    ]
    return api.create_commit(
        name.repo,
        operations,
        commit_message=message or "equifeat model",
        revision=branch,
        create_pr=create_pr,
    )


def _refuse_other_model(api: Any, name: HubName, there: set[str]) -> None:
    """Raise unless the repository is new or holds a model of ours."""
    if CONFIG not in there:
        foreign = sorted(file for file in there if re.search(r"\.(safetensors|bin|pt)$", file))
        if foreign:
            raise ExportError(
                f"{name} holds {foreign[0]} and no equifeat model: choose another name"
            )
        return
    with tempfile.TemporaryDirectory(prefix="equifeat_push_") as scratch:
        api.hf_hub_download(name.repo, CONFIG, revision=name.revision, local_dir=scratch)
        try:
            read_config(Path(scratch))
        except CheckpointError as error:
            raise ExportError(
                f"{name} holds another model and will not be overwritten ({CONFIG} there is not "
                "of an equifeat model that this version knows): choose another name"
            ) from error


def _refuse_foreign(folder: Path, out: Path) -> None:
    """Raise unless `out` is new, or a model folder that is not the source."""
    if out.resolve() == folder.resolve():
        raise ExportError(f"{out} is the model folder itself: give another folder to write to")
    if not out.exists():
        return
    there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    if there and (CONFIG not in there or there - set(FILES)):
        found = min(there - set(FILES)) if there - set(FILES) else min(there)
        raise ExportError(
            f"{out} is no model folder (it holds {found!r}) and will not be overwritten: give a "
            "new folder"
        )
    if there:
        read_config(out)

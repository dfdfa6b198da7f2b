"""from_pretrained, save_pretrained and push_to_hub of a model, named as elsewhere in the field."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equifeat.model.extractor import FeatureExtractor


class HubMixin:
    """What a FeatureExtractor can do with folders and hubs.

    The work is done by modules of higher layers, which are looked up when they are needed.
    """

    recipe: Mapping[str, Any] | None = None
    """How the model was trained, where it was opened from a hub; it is saved and pushed again."""

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        weights: str | None = None,
        device: Any = "cpu",
    ) -> FeatureExtractor:
        """Open a model of a hub, or a model folder; see `equifeat.from_pretrained`.

        Args:
            repo_or_folder: ``USER/NAME``, ``hf://USER/NAME[@REVISION]`` or a folder.
            revision: Branch, tag or commit of the repository.
            token: Of the hub; None for the one of HF_TOKEN or ``hf auth login``.
            cache_dir: Where fetched files are kept; None for huggingface_hub's cache.
            local_files_only: Ask nothing of the network.
            force_download: Fetch again what the cache holds.
            weights: Another place to take the backbone's weights from.
            device: Where to put the model.

        Returns:
            The extractor, in eval mode.

        Raises:
            CheckpointError: There is no such model, or it cannot be had or opened.
            WeightsError: The backbone's weights cannot be had.
            MissingExtraError: huggingface_hub is not installed.
        """
        model: FeatureExtractor = importlib.import_module(
            "equifeat.hub.pretrained"
        ).from_pretrained(
            repo_or_folder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            weights=weights,
            device=device,
        )
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        recipe: Mapping[str, Any] | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a model folder, as `equifeat.save_model` does.

        Args:
            folder: Where to write.
            recipe: How the model was trained; None for `recipe`.
            card: Facts for the model card, see `equifeat.model.card.model_card`.

        Returns:
            The folder.

        Raises:
            CheckpointError: The folder holds something else, or the model cannot be named.
        """
        checkpoint = importlib.import_module("equifeat.checkpoint")
        recipe = self.recipe if recipe is None else recipe
        path: Path = checkpoint.save_model(self, folder, recipe, card)
        return path

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        results: str | Path | None = None,
        recipe: Mapping[str, Any] | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload the model with a model card, as one commit.

        Args:
            repo_id: USER/NAME; the repository is made when it does not exist.
            private: Whether a repository that is made is private; None for the hub's default.
            token: Of the hub; None for the one of HF_TOKEN or ``hf auth login``.
            revision: Branch to commit to; it is made when it does not exist.
            commit_message: Title of the commit.
            create_pr: Open a pull request instead of changing the branch.
            results: results.json of ``equifeat evaluate … --controls`` of this model.
            recipe: How the model was trained; None for `recipe`.
            card: More facts for the card, see `equifeat.model.card.model_card`.

        Returns:
            Where it is, and how to open it.

        Raises:
            ExportError: The hub refuses or cannot be reached, or the results are not of this model.
            CheckpointError: The model cannot be saved.
            MissingExtraError: huggingface_hub is not installed.
        """
        export = importlib.import_module("equifeat.export.hub")
        with tempfile.TemporaryDirectory(prefix="equifeat_push_") as scratch:
            folder = self.save_pretrained(Path(scratch) / "model", recipe=recipe)
            said: str = export.push(
                folder,
                repo_id,
                private=private,
                results=results,
                revision=revision,
                message=commit_message,
                create_pr=create_pr,
                token=token,
                card=card,
                backbone=getattr(self, "backbone", None),
            )
        return said

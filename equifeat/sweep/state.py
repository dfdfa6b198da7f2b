"""The fits of a sweep and what is known of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from equifeat.checkpoint import CONFIG, read_config
from equifeat.errors import RecipeError
from equifeat.files import atomic_file
from equifeat.sweep.grid import Row


class Planned(NamedTuple):
    """A fit of a sweep, looked at.

    Attributes:
        row: Its row.
        seed: Its seed.
        folder: Folder of the run.
        arguments: Arguments behind ``equifeat fit``.
        steps: Optimiser steps at its end.
    """

    row: Row
    seed: int
    folder: Path
    arguments: list[str]
    steps: int

    @property
    def name(self) -> str:
        """Row and seed."""
        return f"{self.row.name}/seed_{self.seed}"

    @property
    def model(self) -> Path:
        """Folder of the finished model."""
        return self.folder / "model"


def finished(one: Planned) -> bool:
    """Return whether a fit reached its end: a model folder is written whole, and only then.

    Args:
        one: The fit.

    Returns:
        Whether its model is there.
    """
    if not (one.model / CONFIG).is_file():
        return False
    recipe = read_config(one.model).get("recipe") or {}
    return int(recipe.get("steps", -1)) >= one.steps


class SweepState:
    """What is known of fits beside their own folders: their settings, times, SLURM's number.

    Args:
        path: The file; it is made by `begin`.

    Raises:
        RecipeError: It is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"format": "equifeat-sweep", "version": 1, "fits": {}}
        if path.exists():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
                self.content["fits"].items()
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise RecipeError(
                    f"{path} is damaged ({error}): remove it or use another --out"
                ) from error

    def fit(self, name: str) -> dict[str, Any]:
        """Return what is known of a fit.

        Args:
            name: Its row and seed.

        Returns:
            settings, seconds and perhaps job; empty for an unknown one.
        """
        return dict(self.content["fits"].get(name, {}))

    def check(self, planned: Sequence[Planned]) -> None:
        """Refuse runs that were made with other settings under the same name.

        Args:
            planned: The fits.

        Raises:
            RecipeError: A setting or a recipe changed.
        """
        for one in planned:
            known = self.fit(one.name).get("settings")
            if known is not None and known != _settings(one):
                raise RecipeError(
                    f"{one.folder} was fitted with other settings than the sweep now has for "
                    f"{one.row.name!r}: give the row another name, or use another --out"
                )

    def begin(self, planned: Sequence[Planned]) -> None:
        """Note what is going to be fitted.

        Args:
            planned: The fits.
        """
        for one in planned:
            self.content["fits"].setdefault(one.name, {"seconds": 0.0})["settings"] = _settings(one)
        self._write()

    def add(self, name: str, seconds: float) -> None:
        """Add to the time that a fit took.

        Args:
            name: Its row and seed.
            seconds: How long it ran in this turn.
        """
        self.content["fits"][name]["seconds"] += seconds
        self._write()

    def submitted(self, names: Sequence[str], job: str) -> None:
        """Note the job of fits.

        Args:
            names: Their rows and seeds.
            job: SLURM's number.
        """
        for name in names:
            self.content["fits"][name]["job"] = job
        self._write()

    def _write(self) -> None:
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def _settings(one: Planned) -> str:
    """Identity of what a fit computes: its recipes' content and its keys."""
    digest = hashlib.sha256()
    for recipe in one.row.recipes:
        digest.update(Path(recipe).read_bytes())
    digest.update(json.dumps(one.row.keys, sort_keys=True).encode())
    return digest.hexdigest()[:16]

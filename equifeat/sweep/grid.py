"""A sweep's file: which fits to make, of which rows and seeds, and what to measure."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from equifeat.errors import RecipeError, suggest
from equifeat.evaluate import SuiteTask, suite_tasks

_KEYS = ("recipe", "set", "runs", "grid", "seeds", "evaluate", "baseline")
# Set by the sweep itself for every fit.
_OWN = ("run.dir", "seed_everything", "ckpt_path")
_NAME = re.compile(r"[\w.+=,-]+")


@dataclass(frozen=True)
class Row:
    """One row of the table: one setting, fitted once a seed.

    Args:
        name: Its name, also of its folder.
        recipes: Recipe files, later ones replacing keys of earlier ones.
        keys: Keys that it sets beyond them.
    """

    name: str
    recipes: tuple[str, ...]
    keys: Mapping[str, Any]

    def arguments(self, seed: int, folder: Path) -> list[str]:
        """Return the arguments of its fit.

        Args:
            seed: The seed.
            folder: Folder of the run.

        Returns:
            Arguments behind ``equifeat fit``.
        """
        words = [word for recipe in self.recipes for word in ("--config", recipe)]
        for key, value in self.keys.items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        own = {"seed_everything": seed, "run.dir": folder, "ckpt_path": "last"}
        return words + [word for key, value in own.items() for word in (f"--{key}", str(value))]


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Args:
        rows: In the order of the table.
        seeds: Seeds of every row.
        splits: What is measured, by name.
        baseline: Row that differences are to; None for the raw ViT.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    splits: Mapping[str, tuple[SuiteTask, ...]]
    baseline: str | None = None


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file.

    Args:
        path: YAML with `recipe` (a file or several, relative to this one), `set` (keys of all
            rows), `runs` (rows by name, each with its keys, and perhaps a `recipe` of its own),
            `grid` (lists of values by key; every combination with every row), `seeds`,
            `evaluate` (by split, a list of tasks as in a suite; their data relative to the folder
            one is in, like every path in a recipe) and `baseline` (the row that differences are
            to, in place of the raw ViT).

    Returns:
        The sweep.

    Raises:
        RecipeError: The file is unreadable or wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: unreadable sweep ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping with the keys {', '.join(_KEYS)}.")
    for key in content:
        if key not in _KEYS:
            raise RecipeError(f"{path} has the unknown key {key!r}.{suggest(str(key), _KEYS)}")
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise RecipeError(f"{path}: seeds must be a list of whole numbers, not {seeds!r}.")
    if len(set(seeds)) < len(seeds):
        raise RecipeError(f"{path}: seeds has a number twice: {seeds}.")
    rows = tuple(_rows(content, path))
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(f"{path}: two rows are named {twice[0]!r}.")
    baseline = content.get("baseline")
    if baseline is not None and baseline not in names:
        hint = suggest(str(baseline), names)
        raise RecipeError(f"{path}: baseline {baseline!r} is no row of this sweep.{hint}")
    splits = _mapping(content, "evaluate", path)
    if not splits:
        raise RecipeError(f"{path} measures nothing: give evaluate with at least one split.")
    tasks = {name: tuple(suite_tasks(value, path)) for name, value in splits.items()}
    return Sweep(rows, tuple(seeds), tasks, baseline)


def _rows(content: Mapping[str, Any], path: Path) -> Iterator[Row]:
    common = _mapping(content, "set", path)
    grid = _mapping(content, "grid", path)
    runs = _mapping(content, "runs", path) or {"": {}}
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{path}: {key} of grid must be a list of values, not {values!r}.")
    for name, own in runs.items():
        if not isinstance(own, dict | None):
            raise RecipeError(f"{path}: {name} of runs must give values by key, not {own!r}.")
        keys = dict(own or {})
        recipes = _recipes(keys.pop("recipe", content.get("recipe")), path)
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            parts = [name] * bool(name) + [
                f"{k.rpartition('.')[2]}={_word(v)}" for k, v in point.items()
            ]
            full = ",".join(parts) or path.stem
            if not _NAME.fullmatch(full):
                raise RecipeError(
                    f"{path}: {full!r} cannot be the name of a folder: name rows with letters, "
                    "digits and . + = , -"
                )
            chosen = {**common, **keys, **point}
            wrong = sorted(set(chosen) & set(_OWN))
            if wrong:
                raise RecipeError(f"{path} sets {wrong[0]}, which the sweep sets itself.")
            yield Row(full, recipes, chosen)


def _recipes(value: Any, path: Path) -> tuple[str, ...]:
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not files or not all(isinstance(f, str) for f in files):
        raise RecipeError(f"{path} needs recipe, a recipe file or a list of them, not {value!r}.")
    return tuple(str(path.parent / file) for file in files)


def _mapping(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {key} must be a mapping, not {value!r}.")
    return {str(name): inner for name, inner in value.items()}


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "_", Path(text).name).strip("_") or "_"

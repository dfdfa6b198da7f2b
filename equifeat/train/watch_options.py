"""Options of held-out watching: run.watch_* and run.patience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equifeat.errors import RecipeError


@dataclass(frozen=True)
class WatchOptions:
    """What is watched, and how often.

    Args:
        views: A view folder of held-out objects or a folder of them, in any layout.
        every: Optimiser steps between two rounds.
        objects: Most objects; they are spread evenly over the folder.
        pairs: Ordered pairs of views of each object.
        points: Most points of each pair.
        patience: Rounds without gain in PCDP@.10 after which the run stops; 0 never stops it.
        cache_mb: Memory for the frozen tokens of the watched views.
    """

    views: Path
    every: int
    objects: int = 16
    pairs: int = 8
    points: int = 200
    patience: int = 0
    cache_mb: int = 256


def add_watch_arguments(parser: Any) -> None:
    """Add run.watch_* and run.patience.

    Args:
        parser: Parser of a sub-command.
    """
    add, d = parser.add_argument, WatchOptions
    add("--run.watch_every", type=int, default=0, help="steps between held-out rounds; 0 is never")
    add("--run.watch_views", type=str | None, default=None, help="views of held-out objects")
    add("--run.watch_objects", type=int, default=d.objects, help="most held-out objects")
    add("--run.watch_pairs", type=int, default=d.pairs, help="pairs of views of each of them")
    add("--run.watch_points", type=int, default=d.points, help="most points of a pair")
    add("--run.watch_cache_mb", type=int, default=d.cache_mb, help="memory for frozen tokens")
    add("--run.patience", type=int, default=0, help="stop after so many rounds without gain")


def watch_options(run: Mapping[str, Any]) -> WatchOptions | None:
    """Read the options.

    Args:
        run: The recipe's section run.

    Returns:
        The options, or None for a run that is not watched.

    Raises:
        RecipeError: They do not fit together.
    """
    every, views, patience = run["watch_every"], run["watch_views"], run["patience"]
    for name in ("watch_every", "watch_cache_mb", "patience"):
        if run[name] < 0:
            raise RecipeError(f"run.{name} is {run[name]}: use 0 or more")
    for name in ("watch_objects", "watch_pairs", "watch_points"):
        if run[name] < 1:
            raise RecipeError(f"run.{name} is {run[name]}: use 1 or more")
    if not every:
        if patience:
            raise RecipeError(
                f"run.patience={patience} counts held-out rounds, but run.watch_every is 0: set "
                "run.watch_every and run.watch_views"
            )
        return None
    if not views:
        raise RecipeError(
            f"run.watch_every={every} needs run.watch_views, a folder of views of held-out objects"
        )
    return WatchOptions(
        Path(views),
        every,
        run["watch_objects"],
        run["watch_pairs"],
        run["watch_points"],
        patience,
        run["watch_cache_mb"],
    )

"""The table of tasks."""

from __future__ import annotations

import importlib

from equifeat.errors import RecipeError, suggest
from equifeat.eval.task import Task

TASKS = {
    "equivariance": "equifeat.eval.task_equivariance:EQUIVARIANCE",
    "pose": "equifeat.eval.pose:POSE",
    "tracking": "equifeat.eval.tracking:TRACKING",
    "semantic": "equifeat.eval.semantic:SEMANTIC",
    "geometric": "equifeat.eval.geometric:GEOMETRIC",
    "probes": "equifeat.eval.probes:PROBES",
}


def find_task(name: str) -> Task:
    """Return a task by name.

    Args:
        name: Key of `TASKS`.

    Returns:
        The task.

    Raises:
        RecipeError: No such task.
    """
    if name not in TASKS:
        raise RecipeError(
            f"there is no task {name!r}, only {', '.join(TASKS)}.{suggest(name, TASKS)}"
        )
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)
    return task

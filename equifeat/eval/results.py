"""What an evaluation found: the results of its tasks, their file, and joining two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from equifeat.errors import RecipeError
from equifeat.eval.task_result import ModelRuns as ModelRuns
from equifeat.eval.task_result import TaskResult as TaskResult
from equifeat.eval.task_result import chosen_items as chosen_items
from equifeat.files import atomic_file


@dataclass(frozen=True)
class Results:
    """All tasks of one evaluation.

    Args:
        tasks: One result a task.
        environment: What it was made with, see equifeat.eval.environment.
    """

    tasks: tuple[TaskResult, ...]
    environment: dict[str, Any]

    def __post_init__(self) -> None:
        ids = [task.protocol.id for task in self.tasks]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            hashes = {t.data_hash for t in self.tasks if t.protocol.id == twice[0]}
            if len(hashes) < ids.count(twice[0]):
                raise RecipeError(f"{twice[0]} on the same data is in the results twice.")

    def to_json(self) -> str:
        """Return everything but the pictures as JSON.

        Returns:
            Text of the format "equifeat-results", see docs/reports.md.
        """
        from equifeat.eval.result_json import to_json

        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what `to_json` wrote.

        Args:
            text: JSON.

        Returns:
            The results, without pictures.

        Raises:
            RecipeError: Not such results, of another version, or altered.
        """
        from equifeat.eval.result_json import from_json

        return from_json(text)

    def save(self, path: str | Path) -> None:
        """Write everything but the pictures as JSON.

        Args:
            path: File to write.
        """
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a results.json.

        Args:
            path: The file.

        Returns:
            The results, without pictures.

        Raises:
            RecipeError: The file is missing, too large or not such results.
        """
        from equifeat.eval.result_json import load

        return load(Path(path))

    def merged(self, *others: Results) -> Results:
        """Join results of other models on the same data under the same protocols.

        Args:
            *others: Results of the same tasks.

        Returns:
            Results with the models of all; the environments of the others under "merged".

        Raises:
            RecipeError: Protocols, data, items or names of models do not fit.
        """
        tasks = {_key(task): task for task in self.tasks}
        for other in others:
            theirs = {_key(task): task for task in other.tasks}
            for mine, yours in ((tasks, theirs), (theirs, tasks)):
                for key in mine.keys() - yours.keys():
                    raise RecipeError(_why_apart(mine[key], list(yours.values())))
            tasks = {key: _joined(task, theirs[key]) for key, task in tasks.items()}
        environment = dict(self.environment)
        if others:
            environment["merged"] = [other.environment for other in others]
        return Results(tuple(tasks.values()), environment)


def _key(task: TaskResult) -> tuple[str, str]:
    return task.protocol.digest(), task.data_hash


def _why_apart(task: TaskResult, others: Sequence[TaskResult]) -> str:
    """Say by name what keeps a task from being joined."""
    mine = task.protocol.record()
    start = f"results of {task.protocol.id}"
    for other in others:
        theirs = other.protocol.record()
        if other.protocol.id == task.protocol.id:
            if other.data_hash != task.data_hash:
                return (
                    f"{start} are on different data (data hash {task.data_hash[:12]} and "
                    f"{other.data_hash[:12]}) and cannot be compared; evaluate both on one folder."
                )
            for path, a, b in _different(mine, theirs):
                return (
                    f"{start} with {path}={a!r} and {path}={b!r} cannot be compared; evaluate "
                    "both with the same options and the same version of equifeat."
                )
    near = [other.protocol.id for other in others if other.protocol.task == task.protocol.task]
    known = ", ".join(near) or "no protocol of its task"
    return (
        f"{start} have no counterpart: the other results hold {known}; evaluate all models under "
        "the same protocols."
    )


def _different(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for key in [*a, *(k for k in b if k not in a)]
            for found in _different(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if a == b else [(path, a, b)]


def _joined(first: TaskResult, second: TaskResult) -> TaskResult:
    if first.caption != second.caption:
        raise RecipeError(
            f"results of {first.protocol.id} are of different items: {first.caption!r} and "
            f"{second.caption!r}; evaluate both on the same ones."
        )
    pictures = {**first.pictures, **second.pictures}
    return replace(first, models=first.models + second.models, pictures=pictures)

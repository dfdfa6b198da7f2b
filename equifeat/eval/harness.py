"""Two passes: predict every item and keep the predictions, then score them without the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from equifeat.errors import RecipeError, suggest
from equifeat.eval.cache import PredictionCache, file_name
from equifeat.eval.features import FeatureSource
from equifeat.eval.models import ModelSpec, OpenModel
from equifeat.eval.protocol import Protocol
from equifeat.eval.ranks import Ranks
from equifeat.eval.results import ModelRuns, TaskResult, chosen_items
from equifeat.eval.task import Row, Task, TaskData

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
_ALONE = Ranks(0, 1, "cpu")


def find_protocol(task: Task, name: str | None, changes: Sequence[str] = ()) -> Protocol:
    """Return a protocol of a task, perhaps with other options.

    Args:
        task: The task.
        name: Its id; the task's first protocol when None.
        changes: Each `option=value`.

    Returns:
        The protocol; with changes its id names them.

    Raises:
        RecipeError: No such protocol or option.
    """
    known = {protocol.id: protocol for protocol in task.protocols}
    name = name or task.protocols[0].id
    if name not in known:
        raise RecipeError(
            f"{task.name} has no protocol {name!r}, only {', '.join(known)}.{suggest(name, known)}"
        )
    pairs = {}
    for change in changes:
        option, equals, value = change.partition("=")
        if not option or not equals:
            raise RecipeError(f"--set {change!r} must be option=value.")
        pairs[option] = value
    return known[name].changed(pairs)


def evaluate(
    task: Task,
    protocol: Protocol,
    data: Path,
    models: Sequence[ModelSpec],
    open_word: Callable[[str], OpenModel],
    *,
    cache: Path | None = None,
    limit: int | None = None,
    pictures: int = 0,
    ranks: Ranks = _ALONE,
    progress: Progress = lambda items, what: items,
) -> TaskResult | None:
    """Score models on one task.

    Args:
        task: The task.
        protocol: One of its protocols.
        data: Folder of the data.
        models: Rows of the table.
        open_word: Opens one word of a model spec.
        cache: Folder for predictions, where an interrupted run goes on and a second one only
            scores; None keeps them in memory.
        limit: Only the first so many items.
        pictures: How many of the best and of the worst items of each model are drawn.
        ranks: The processes that share the items.
        progress: Shows how far it is.

    Returns:
        The scores; None in all processes but the first.

    Raises:
        EvalDataError: The folder does not hold the data.
        RecipeError: Options make no sense, or the cache is of another configuration.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit {limit} must be at least 1.")
    if ranks.world > 1 and cache is None:
        raise RecipeError("several processes need --out or --cache, a folder that all of them see.")
    opened = task.open(data, protocol)
    items = opened.items[:limit]
    if not items:
        raise RecipeError(f"{data} holds no item of {protocol.id}.")
    runs: list[ModelRuns] = []
    caches: dict[str, PredictionCache] = {}
    for spec in models:
        hashes, rows = [], []
        for number, word in enumerate(spec.words):
            name = spec.name if len(spec.words) == 1 else f"{spec.name} {number}"
            model = open_word(word)
            folder = None
            if cache is not None:
                folder = cache / task.name / file_name(protocol.id) / file_name(name)
            key = {
                "task": task.name,
                "protocol": protocol.id,
                "protocol digest": protocol.digest(),
                "model": model.hash,
                "data": opened.data_hash,
            }
            if ranks.rank == 0:
                PredictionCache(folder, key)
            ranks.wait()
            kept = PredictionCache(folder, key)
            source = FeatureSource(model.model, protocol.features, name, ranks.device)
            _predict(opened, items, kept, source, ranks, progress)
            ranks.wait()
            hashes.append(model.hash)
            if ranks.rank == 0:
                what = f"{task.name}: scoring {name}"
                rows.append(_score(opened, kept, progress(range(len(items)), what)))
            caches[spec.name] = kept if number == 0 else caches[spec.name]
        runs.append(ModelRuns(spec.name, tuple(hashes), tuple(rows)))
    if ranks.rank:
        return None
    result = TaskResult(protocol, opened.caption(), opened.data_hash, tuple(runs), {})
    return result.with_pictures(_pictures(opened, result, caches, pictures))


def _predict(
    data: TaskData,
    items: Sequence[str],
    cache: PredictionCache,
    source: FeatureSource,
    ranks: Ranks,
    progress: Progress,
) -> None:
    left = [i for i, item in enumerate(items) if item not in cache]
    # every process counts before anyone writes
    ranks.wait()
    mine = ranks.mine(left)
    if not mine:
        return
    for index in progress(mine, f"{data.protocol.task}: {source.name}"):
        cache.put(items[index], data.predict(index, source))


def _score(data: TaskData, cache: PredictionCache, indices: Iterable[int]) -> tuple[Row, ...]:
    return tuple(row for i in indices for row in data.score(i, cache.get(data.items[i])))


def _pictures(
    data: TaskData, result: TaskResult, caches: dict[str, PredictionCache], count: int
) -> dict[tuple[str, str], Any]:
    """Draw the best and worst items of every model."""
    drawn: dict[tuple[str, str], Any] = {}
    if not count:
        return drawn
    where = {item: index for index, item in enumerate(data.items)}
    for run in result.models:
        worst, best = chosen_items(result, run.name, count)
        for item in dict.fromkeys([*worst, *best]):
            picture = data.picture(where[item], caches[run.name].get(item))
            if picture is not None:
                drawn[run.name, item] = picture
    return drawn

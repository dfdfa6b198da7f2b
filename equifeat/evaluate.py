"""What the evaluate, data and fixtures commands do."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from equifeat.errors import EvalDataError, RecipeError, suggest
from equifeat.eval.data_hash import SUMS, write_sums
from equifeat.eval.environment import environment
from equifeat.eval.harness import evaluate, find_protocol
from equifeat.eval.models import ModelSpec, OpenModel, open_word, parse_models, with_controls
from equifeat.eval.protocol import Protocol
from equifeat.eval.ranks import Ranks, start_ranks
from equifeat.eval.results import Results, TaskResult
from equifeat.eval.task import Task
from equifeat.eval.tasks import TASKS, find_task
from equifeat.eval_report import console_text, write_evaluation
from equifeat.files import atomic_folder
from equifeat.model.precision import Precision
from equifeat.progress import progress

# By family of protocols, the module of data_prep that writes its fixture.
FIXTURES = {
    "views": "data_prep.fixtures.views",
    "onepose": "data_prep.fixtures.onepose",
    "bop": "data_prep.fixtures.bop",
    "tapvid-davis": "data_prep.fixtures.tracking",
    "tapvid-strided": "data_prep.fixtures.tracking",
    "badja": "data_prep.fixtures.tracking",
    "pf-pascal": "data_prep.fixtures.semantic",
    "pf-willow": "data_prep.fixtures.semantic",
    "spair": "data_prep.fixtures.semantic",
    "navi": "data_prep.fixtures.geometric",
    "scannet": "data_prep.fixtures.geometric",
    "hpatches": "data_prep.fixtures.geometric",
    "graf": "data_prep.fixtures.geometric",
    "image-pairs": "data_prep.fixtures.geometric",
}


# What the values of a suite's entry must be.
_FORMS: tuple[tuple[str, type, str], ...] = (
    ("task", str, "a name"),
    ("data", str, "a folder"),
    ("protocol", str, "an id"),
    ("set", dict, "options by name"),
    ("limit", int, "a whole number"),
)


@dataclass(frozen=True)
class SuiteTask:
    """One entry of a suite.

    Args:
        task: Name of the task.
        data: Folder of its data, relative to the suite file.
        protocol: Id; the task's first when None.
        set: Options changed.
        limit: Only the first so many items.
    """

    task: str
    data: str
    protocol: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None


def evaluate_command(
    task: str,
    data: Path,
    model: Sequence[str],
    protocol: str | None = None,
    changes: Sequence[str] = (),
    out: Path | None = None,
    cache: Path | None = None,
    weights: str = "auto",
    limit: int | None = None,
    pictures: int = 3,
    controls: bool = False,
    published: bool = False,
    device: str = "auto",
    devices: int = 1,
    precision: Precision = "float32",
) -> str | None:
    """Score models on one task: predict every item, keep the predictions, score them.

    Args:
        task: Name of the task.
        data: Folder of the data, in the format of its protocol.
        model: Rows of the table; the first one is the baseline.
        protocol: Id of the protocol; the task's first one when left out.
        changes: Options of the protocol to change.
        out: Folder for results.json, results.md and report.html.
        cache: Folder of predictions; OUT/predictions when left out. With neither, an interrupted
            run starts anew.
        weights: Weights of raw models: auto, hub, packaged, random or a file.
        limit: Only the first so many items; the protocol's number needs all.
        pictures: How many of the best and of the worst items are drawn into the report.
        controls: Whether the raw ViT and the untrained model stand before every model folder.
        published: Whether published numbers stand beside the measured ones.
        device: auto, cpu, cuda, cuda:1, …
        devices: How many processes of this machine share the items.
        precision: Type that models compute in: float32, bfloat16 or float16.

    Returns:
        The tables as text; None in all processes but the first.

    Raises:
        EvalDataError: The folder does not hold the data.
        RecipeError: An option makes no sense.
    """
    chosen = find_task(task)
    one = find_protocol(chosen, protocol, changes)
    specs = _rows(model, controls)
    ranks = start_ranks(device, devices)
    result = evaluate(
        chosen,
        one,
        data,
        specs,
        _opener(weights, ranks, precision),
        cache=cache or (out / "predictions" if out else None),
        limit=limit,
        pictures=pictures if out else 0,
        ranks=ranks,
        progress=_progress(ranks),
    )
    return None if result is None else _finish([result], out, published, ranks, precision)


def suite_command(
    suite: Path,
    out: Path,
    model: Sequence[str] = (),
    cache: Path | None = None,
    weights: str = "auto",
    pictures: int = 3,
    controls: bool = False,
    published: bool = False,
    device: str = "auto",
    devices: int = 1,
    precision: Precision = "float32",
) -> str | None:
    """Score models on every task of a suite, into one report.

    Args:
        suite: YAML with models (name: WHAT, or a list of seeds) and tasks (task, data, protocol,
            set, limit).
        out: Folder for results.json, results.md and report.html.
        model: Rows of the table, in place of the suite's models.
        cache: Folder of predictions; OUT/predictions when left out.
        weights: Weights of raw models: auto, hub, packaged, random or a file.
        pictures: How many of the best and of the worst items are drawn into the report.
        controls: Whether the raw ViT and the untrained model stand before every model folder.
        published: Whether published numbers stand beside the measured ones.
        device: auto, cpu, cuda, cuda:1, …
        devices: How many processes of this machine share the items.
        precision: Type that models compute in: float32, bfloat16 or float16.

    Returns:
        The tables as text; None in all processes but the first.

    Raises:
        EvalDataError: A folder does not hold its data.
        RecipeError: The suite is wrong.
    """
    models, entries = read_suite(suite)
    return run_suite(
        entries,
        _rows(list(model) or models, controls),
        suite.parent,
        out,
        cache=cache,
        weights=weights,
        pictures=pictures,
        published=published,
        device=device,
        devices=devices,
        precision=precision,
    )


def run_suite(
    entries: Sequence[SuiteTask],
    specs: Sequence[ModelSpec],
    base: Path,
    out: Path,
    *,
    cache: Path | None = None,
    weights: str = "auto",
    pictures: int = 3,
    published: bool = False,
    device: str = "auto",
    devices: int = 1,
    precision: Precision = "float32",
) -> str | None:
    """Score models on several tasks, into one report.

    Args:
        entries: The tasks.
        specs: Rows of the tables.
        base: Folder that the tasks' data are relative to.
        out: Folder for results.json, results.md and report.html.
        cache: Folder of predictions; OUT/predictions when left out.
        weights: Weights of raw models.
        pictures: How many of the best and of the worst items are drawn into the report.
        published: Whether published numbers stand beside the measured ones.
        device: auto, cpu, cuda, cuda:1, …
        devices: How many processes of this machine share the items.
        precision: Type that models compute in: float32, bfloat16 or float16.

    Returns:
        The tables as text; None in all processes but the first.

    Raises:
        EvalDataError: A folder does not hold its data.
        RecipeError: A task or protocol does not exist.
    """
    # everything that can be wrong is looked at before the first forward pass
    plans = open_suite(entries, base)
    ranks = start_ranks(device, devices)
    opener = _opener(weights, ranks, precision)
    results = [
        evaluate(
            task,
            one,
            data,
            specs,
            opener,
            cache=cache or out / "predictions",
            limit=limit,
            pictures=pictures,
            ranks=ranks,
            progress=_progress(ranks),
        )
        for task, one, data, limit in plans
    ]
    done = [result for result in results if result is not None]
    return _finish(done, out, published, ranks, precision) if done else None


def open_suite(
    entries: Sequence[SuiteTask], base: Path
) -> list[tuple[Task, Protocol, Path, int | None]]:
    """Look at all that can be wrong with the tasks of a suite.

    Args:
        entries: The tasks.
        base: Folder that their data are relative to.

    Returns:
        Task, protocol, folder of the data and limit of each.

    Raises:
        EvalDataError: A folder does not hold its data.
        RecipeError: A task or protocol does not exist.
    """
    plans = []
    for entry in entries:
        task = find_task(entry.task)
        changes = [f"{k}={_plain(v)}" for k, v in entry.set.items()]
        one, data = find_protocol(task, entry.protocol, changes), base / entry.data
        task.open(data, one)
        plans.append((task, one, data, entry.limit))
    return plans


def read_suite(path: Path) -> tuple[list[str], list[SuiteTask]]:
    """Read a suite file.

    Args:
        path: YAML: `models` by name, `tasks` as a list.

    Returns:
        Models as words of --model, and the entries.

    Raises:
        RecipeError: The file is unreadable, or an entry is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: unreadable suite ({' '.join(str(error).split())}).") from error
    keys = {"models", "tasks"}
    if not isinstance(content, dict) or not content.get("tasks") or content.keys() - keys:
        raise RecipeError(f"{path} must have the keys models and tasks, and no other.")
    named = content.get("models") or {}
    if not isinstance(named, dict) or not isinstance(content["tasks"], list):
        raise RecipeError(f"{path}: models must be WHAT by name, and tasks a list.")
    models = []
    for name, what in named.items():
        words = what if isinstance(what, list) else [what]
        models.append(f"{name}={','.join(map(str, words))}")
    return models, suite_tasks(content["tasks"], path)


def suite_tasks(content: Any, path: Path) -> list[SuiteTask]:
    """Check a list of tasks.

    Args:
        content: One mapping a task: task, data, and perhaps protocol, set and limit.
        path: The file it is from, for messages.

    Returns:
        The tasks.

    Raises:
        RecipeError: An entry is wrong.
    """
    if not isinstance(content, list) or not content:
        raise RecipeError(f"{path}: tasks must be a list, not {content!r}.")
    entries = []
    known = set(SuiteTask.__dataclass_fields__)
    for number, entry in enumerate(content):
        wrong = sorted(entry.keys() - known) if isinstance(entry, dict) else ["?"]
        if wrong or not (entry.get("task") and entry.get("data")):
            hint = suggest(wrong[0], known) if wrong else ""
            raise RecipeError(
                f"{path}: entry {number} of tasks needs task and data, and may have protocol, set "
                f"and limit{'; not ' + wrong[0] if wrong else ''}.{hint}"
            )
        for key, kind, form in _FORMS:
            if not isinstance(entry.get(key), kind | None):
                raise RecipeError(f"{path}: {key} of entry {number} must be {form}.")
        entries.append(SuiteTask(**{k: v for k, v in entry.items() if v is not None}))
    return entries


def _rows(words: Sequence[str], controls: bool) -> list[ModelSpec]:
    specs = parse_models(words)
    return with_controls(specs) if controls else specs


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _opener(weights: str, ranks: Ranks, precision: str) -> Any:
    @lru_cache(maxsize=4)
    def opened(word: str) -> OpenModel:
        return open_word(word, weights, ranks.device, precision)

    return opened


def _progress(ranks: Ranks) -> Any:
    return progress if ranks.rank == 0 else lambda items, what: items


def _finish(
    tasks: Sequence[TaskResult], out: Path | None, published: bool, ranks: Ranks, precision: str
) -> str:
    made = environment(sys.argv, ranks.device, ranks.world)
    results = Results(tuple(tasks), {**made, "precision": precision})
    text = console_text(results, published=published)
    if out is None:
        return text
    write_evaluation(results, out, published=published)
    return f"{text}\n\nwrote {out}/results.json, {out}/results.md and {out}/report.html"


def data_command(task: str, check: Path, protocol: str | None = None) -> str:
    """Check that a folder holds a task's data, complete and unaltered.

    Args:
        task: Name of the task.
        check: The folder.
        protocol: Id of the protocol; the task's first one when left out.

    Returns:
        Counts and notes.

    Raises:
        EvalDataError: Something is missing or altered.
        RecipeError: No such task or protocol.
    """
    chosen = find_task(task)
    one = find_protocol(chosen, protocol)
    found = chosen.check(check, one)
    lines = [f"{name}: {count}" for name, count in found.counts.items()]
    if found.problems:
        shown = "; ".join(found.problems[:3])
        more = f"; and {len(found.problems) - 3} more" if len(found.problems) > 3 else ""
        raise EvalDataError(f"{check} is not complete for {one.id}: {shown}{more}.")
    return "\n".join([f"{check} is complete for {one.id}", *lines, *found.notes])


def fixtures_command(
    family: str,
    out: Path,
    meshes: Sequence[Path] = (),
    painted: bool = False,
    seed: int = 0,
) -> str:
    """Write a small data set with known truth in the exact format of a family of protocols.

    Args:
        family: Part of a protocol's id before the slash.
        out: Folder to make.
        meshes: Mesh files to draw; procedural objects when there are none.
        painted: Paint object coordinates instead of textures, for --model oracle.
        seed: Seed of cameras, motions and procedural objects, which start at procedural_SEED; the
            demo trains on procedural_0000.

    Returns:
        What was written.

    Raises:
        RecipeError: No such family, or the folder is there already.
    """
    if family not in FIXTURES:
        known = ", ".join(FIXTURES)
        raise RecipeError(
            f"there is no fixture {family!r}, only {known}.{suggest(family, FIXTURES)}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} is there already: remove it or give another --out.")
    write = importlib.import_module(FIXTURES[family]).FAMILIES[family]
    with atomic_folder(out) as folder:
        said = write(folder, meshes, painted, seed)
        write_sums(folder)
    text = "\n".join(said).replace(str(folder), str(out))
    return f"{text}\nhashes are in {out / SUMS}"


def protocols_command(task: str | None = None) -> str:
    """List the protocols of all tasks, or of one.

    Args:
        task: Name of a task.

    Returns:
        One line a protocol.
    """
    lines = []
    for name in TASKS if task is None else [task]:
        found = find_task(name)
        lines += [f"{name:<13}{p.id:<32}{p.about}" for p in found.protocols]
    return "\n".join(lines)

"""results.json: format "equifeat-results", version 1. The schema is docs/results.schema.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equifeat.errors import RecipeError
from equifeat.eval.protocol import FeatureSpec, Metric, Protocol
from equifeat.eval.results import ModelRuns, Results, TaskResult
from equifeat.eval.task import Row
from equifeat.metrics.unit_sums import Difference, Estimate

FORMAT, VERSION = "equifeat-results", 1
MAX_BYTES = 2**30
_RECORD = ("id", "task", "version", "unit", "seed", "features", "options", "metrics")


def to_json(results: Results) -> str:
    """Return results as JSON.

    Args:
        results: The results.

    Returns:
        Text; NaN is null, infinity is "inf".
    """
    data = {
        "format": FORMAT,
        "version": VERSION,
        "environment": results.environment,
        "tasks": [_task(task) for task in results.tasks],
    }
    return json.dumps(data, indent=None, allow_nan=False, ensure_ascii=False) + "\n"


def load(path: Path) -> Results:
    """Read a results.json.

    Args:
        path: The file.

    Returns:
        The results.

    Raises:
        RecipeError: The file is missing, too large or not such results.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path} is larger than 1 GiB; it is not read.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read ({error}).") from error
    try:
        return from_json(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def from_json(text: str) -> Results:
    """Read results.

    Args:
        text: What `to_json` gave.

    Returns:
        The results, without pictures.

    Raises:
        RecipeError: Not such results, of another version, or altered.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the text is not JSON ({error}).") from error
    _keys(data, "results", ("format", "version", "environment", "tasks"))
    found = (data["format"], data["version"])
    if found != (FORMAT, VERSION):
        raise RecipeError(f"the results are {found}, but {(FORMAT, VERSION)} is needed.")
    _is(data["environment"], dict, "environment")
    _is(data["tasks"], list, "tasks")
    try:
        tasks = tuple(_read_task(t, f"tasks[{i}]") for i, t in enumerate(data["tasks"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RecipeError(
            f"the text is no valid {FORMAT} ({type(error).__name__}: {error}); "
            "`equifeat evaluate … --out` writes it."
        ) from error
    return Results(tasks, data["environment"])


def _task(task: TaskResult) -> dict[str, Any]:
    protocol, first = task.protocol, task.models[0].rows[0]
    return {
        "protocol": protocol.record(),
        "digest": protocol.digest(),
        "about": protocol.about,
        "source": protocol.source,
        "published": {m: dict(v) for m, v in protocol.published.items()},
        "caption": task.caption,
        "data_hash": task.data_hash,
        "rows": {
            "item": [row.item for row in first],
            "part": [row.part for row in first],
            "unit": [row.unit for row in first],
            "labels": {name: [row.labels.get(name) for row in first] for name in task.labels},
        },
        "models": [
            {
                "name": model.name,
                "runs": [
                    {
                        "hash": name,
                        "values": _columns([row.values for row in rows]),
                        "weights": _columns([row.weights for row in rows]),
                    }
                    for name, rows in zip(model.hashes, model.rows, strict=True)
                ],
            }
            for model in task.models
        ],
        "summary": {m.name: _plain_all(task.summary(m.name)) for m in task.models},
        "paired": {
            "baseline": task.models[0].name,
            "models": {name: _plain_all(found) for name, found in task.paired.items()},
        },
        "breakdowns": {
            label: [
                {
                    "value": value,
                    "rows": part.rows,
                    "units": part.units,
                    "summary": {name: _plain_all(found) for name, found in part.summary.items()},
                }
                for value, part in task.breakdown(label).items()
            ]
            for label in task.labels
        },
    }


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float | str | None]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_number(row.get(name, math.nan)) for row in rows] for name in names}


def _number(value: float) -> float | str | None:
    value = float(value)
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _plain_all(
    found: Mapping[str, Estimate] | Mapping[str, Difference],
) -> dict[str, dict[str, Any]]:
    return {
        metric: {
            key: value if isinstance(value, int) else _number(value)
            for key, value in one._asdict().items()
        }
        for metric, one in found.items()
    }


def _read_task(data: Any, where: str) -> TaskResult:
    _keys(
        data,
        where,
        (
            *("protocol", "digest", "about", "source", "published", "caption", "data_hash"),
            *("rows", "models", "summary", "paired", "breakdowns"),
        ),
    )
    for key in ("digest", "about", "source", "caption", "data_hash"):
        _is(data[key], str, f"{where}.{key}")
    protocol = _protocol(data, where)
    if protocol.digest() != data["digest"]:
        raise RecipeError(
            f"{where}: the protocol {protocol.id} has the digest {protocol.digest()[:12]}, but "
            f"{data['digest'][:12]} is written down: the file was altered."
        )
    columns = ("item", "part", "unit")
    _keys(data["rows"], f"{where}.rows", (*columns, "labels"))
    items, parts, units = (_texts(data["rows"][k], f"{where}.rows.{k}") for k in columns)
    labels = {
        name: _texts(column, f"{where}.rows.labels.{name}", optional=True)
        for name, column in data["rows"]["labels"].items()
    }
    for name, column in (("part", parts), ("unit", units), *labels.items()):
        if len(column) != len(items):
            raise RecipeError(f"{where}.rows: {len(items)} items but {len(column)} of {name}.")
    rows = [
        Row(
            str(items[i]),
            str(units[i]),
            {},
            {},
            {k: v[i] for k, v in labels.items() if v[i] is not None},  # type: ignore[misc]
            str(parts[i]),
        )
        for i in range(len(items))
    ]
    models = []
    for number, model in enumerate(data["models"]):
        at = f"{where}.models[{number}]"
        _keys(model, at, ("name", "runs"))
        _is(model["name"], str, f"{at}.name")
        for run in model["runs"]:
            _keys(run, f"{at}.runs", ("hash", "values", "weights"))
            _is(run["hash"], str, f"{at}.runs.hash")
        models.append(
            ModelRuns(
                model["name"],
                tuple(run["hash"] for run in model["runs"]),
                tuple(_rows(rows, run, at) for run in model["runs"]),
            )
        )
    return TaskResult(protocol, data["caption"], data["data_hash"], tuple(models))


def _rows(rows: Sequence[Row], run: dict[str, Any], where: str) -> tuple[Row, ...]:
    columns = []
    for part in ("values", "weights"):
        found = {}
        for name, column in run[part].items():
            if len(column) != len(rows):
                raise RecipeError(f"{where}.{part}: {len(column)} of {name} for {len(rows)} rows.")
            found[name] = [_value(v, f"{where}.{part}.{name}") for v in column]
        columns.append(found)
    values, weights = columns
    return tuple(
        row._replace(
            values={name: column[i] for name, column in values.items()},
            weights={
                name: column[i] for name, column in weights.items() if not math.isnan(column[i])
            },
        )
        for i, row in enumerate(rows)
    )


def _value(value: Any, where: str) -> float:
    if value is None:
        # the one NaN object, so that rows that were read compare as equal
        return math.nan
    if value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f'{where}: {value!r} is neither a number, nor null, nor "inf".')
    return float(value)


def _protocol(data: dict[str, Any], where: str) -> Protocol:
    record = data["protocol"]
    _keys(record, f"{where}.protocol", _RECORD)
    _is(record["options"], dict, f"{where}.protocol.options")
    features = dict(record["features"])
    features["layers"] = tuple(features["layers"])
    published = {
        model: {metric: _value(v, f"{where}.published") for metric, v in values.items()}
        for model, values in data["published"].items()
    }
    return Protocol(
        id=record["id"],
        task=record["task"],
        about=data["about"],
        source=data["source"],
        metrics=tuple(Metric(**metric) for metric in record["metrics"]),
        unit=record["unit"],
        features=FeatureSpec(**features),
        options=record["options"],
        seed=record["seed"],
        published=published,
        version=record["version"],
    )


def _texts(column: Any, where: str, optional: bool = False) -> list[str | None]:
    _is(column, list, where)
    for value in column:
        if not isinstance(value, str) and not (optional and value is None):
            raise RecipeError(f"{where}: {value!r} is no text.")
    return list(column)


def _keys(data: Any, where: str, keys: Sequence[str]) -> None:
    _is(data, dict, where)
    missing, extra = [k for k in keys if k not in data], sorted(set(data) - set(keys))
    if missing or extra:
        wrong = f"lacks {missing[0]!r}" if missing else f"holds the unknown key {extra[0]!r}"
        raise RecipeError(f"{where} {wrong}: it is no {FORMAT} of version {VERSION}.")


def _is(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind):
        raise RecipeError(f"{where} is {type(value).__name__}, but {kind.__name__} is needed.")

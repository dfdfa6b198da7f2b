"""Scores of models on one task: rows in, estimates, comparisons and breakdowns out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from equifeat.errors import RecipeError, suggest
from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.task import Row
from equifeat.metrics.permutation import holm
from equifeat.metrics.unit_sums import (
    Difference,
    Estimate,
    UnitSums,
    area_sums,
    differences,
    estimates,
    unit_sums,
)

Pictures = Mapping[tuple[str, str], bytes | Image.Image]


@dataclass(frozen=True)
class ModelRuns:
    """The scores of one model.

    Args:
        name: Its name in tables.
        hashes: Identity of each checkpoint: several are training seeds of one model.
        rows: Rows of each checkpoint, of the same items in the same order.
    """

    name: str
    hashes: tuple[str, ...]
    rows: tuple[tuple[Row, ...], ...]


class Part(NamedTuple):
    """The rows with one value of a label.

    Attributes:
        rows: How many rows they are.
        units: Of how many units.
        summary: By model, by metric.
    """

    rows: int
    units: int
    summary: dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class TaskResult:
    """Scores of models on the same items under one protocol.

    Args:
        protocol: The protocol.
        caption: What the numbers mean, in one or two sentences.
        data_hash: Identity of the data.
        models: The models; the first one is the baseline of comparisons.
        pictures: By model and item, a drawing or its PNG bytes; not kept in results.json.

    Raises:
        RecipeError: No model, two of one name, or models with different items.
    """

    protocol: Protocol
    caption: str
    data_hash: str
    models: tuple[ModelRuns, ...]
    pictures: Pictures = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise RecipeError(f"{self.protocol.id}: a result needs at least one model.")
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RecipeError(f"two results are named {twice[0]!r}; rename one model.")
        for model in self.models:
            if not model.rows or len(model.rows) != len(model.hashes):
                raise RecipeError(
                    f"{model.name}: {len(model.hashes)} checkpoints but {len(model.rows)} lists "
                    "of rows; give one list a checkpoint, and at least one."
                )
            for number, rows in enumerate(model.rows):
                _same_items(self._first, rows, self.models[0].name, f"{model.name}, seed {number}")

    @property
    def _first(self) -> tuple[Row, ...]:
        return self.models[0].rows[0]

    @property
    def lead(self) -> Metric:
        """The metric that leads."""
        return self.protocol.metrics[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of labels that rows have, in order of appearance."""
        return tuple(dict.fromkeys(name for row in self._first for name in row.labels))

    @cached_property
    def units(self) -> tuple[str, ...]:
        """Names of units, in order of appearance."""
        return tuple(dict.fromkeys(row.unit for row in self._first))

    def label_values(self, label: str) -> list[str]:
        """Return what a label says, in natural order: 9 before 10.

        Args:
            label: One of `labels`.

        Returns:
            Its values.

        Raises:
            RecipeError: No such label.
        """
        if label not in self.labels:
            known = ", ".join(self.labels) or "none"
            raise RecipeError(
                f"rows of {self.protocol.id} have no label {label!r}, only {known}."
                + suggest(label, self.labels)
            )
        return sorted({r.labels[label] for r in self._first if label in r.labels}, key=_natural)

    @cached_property
    def _all(self) -> dict[str, dict[str, Estimate]]:
        return self._estimates(torch.ones(len(self._first), dtype=torch.bool))

    def summary(self, model: str) -> dict[str, Estimate]:
        """Return every metric of a model.

        Args:
            model: Its name.

        Returns:
            By metric.

        Raises:
            RecipeError: No such model.
        """
        self.runs_of(model)
        return self._all[model]

    @cached_property
    def _parts(self) -> dict[str, dict[str, Part]]:
        out: dict[str, dict[str, Part]] = {}
        for label in self.labels:
            said = [row.labels.get(label) for row in self._first]
            out[label] = {}
            for value in self.label_values(label):
                chosen = torch.tensor([one == value for one in said])
                units = len(set(self._unit[chosen].tolist()))
                out[label][value] = Part(int(chosen.sum()), units, self._estimates(chosen))
        return out

    def breakdown(self, label: str) -> dict[str, Part]:
        """Return every metric of every model for each value of a label.

        Args:
            label: One of `labels`.

        Returns:
            By value, in natural order.

        Raises:
            RecipeError: No such label.
        """
        self.label_values(label)
        return self._parts[label]

    @cached_property
    def paired(self) -> dict[str, dict[str, Difference]]:
        """By every model but the first, by metric: what it differs by from the first.

        Bootstrap intervals and permutation tests over the units of both; ``p_holm`` is corrected
        for all models and metrics of the task.
        """
        every = torch.ones(len(self._first), dtype=torch.bool)
        sums = {m.name: self._sums(m.name, every) for m in self.models}
        base, others = self.models[0].name, [m.name for m in self.models[1:]]
        keys = [(name, k) for name in others for k in range(len(self.protocol.metrics))]
        found = differences(
            [(sums[base][k], sums[name][k]) for name, k in keys], seed=self.protocol.seed
        )
        corrected = holm([one.p for one in found])
        out: dict[str, dict[str, Difference]] = {name: {} for name in others}
        for (name, k), one, p in zip(keys, found, corrected, strict=True):
            out[name][self.protocol.metrics[k].name] = one._replace(p_holm=p)
        return out

    def runs_of(self, model: str) -> ModelRuns:
        """Return the scores of one model.

        Args:
            model: Its name.

        Returns:
            Its rows.

        Raises:
            RecipeError: No such model.
        """
        known = {runs.name: runs for runs in self.models}
        if model not in known:
            raise RecipeError(
                f"the result holds no model {model!r}, only {', '.join(known)}."
                + suggest(model, known)
            )
        return known[model]

    def with_pictures(self, pictures: Pictures) -> TaskResult:
        """Return the same result with pictures.

        Args:
            pictures: By model and item.

        Returns:
            Another result.
        """
        return replace(self, pictures=pictures)

    @cached_property
    def _unit(self) -> Tensor:
        index = {unit: i for i, unit in enumerate(self.units)}
        return torch.tensor([index[row.unit] for row in self._first], dtype=torch.int64)

    @cached_property
    def _columns(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """By model, for every metric: (S, R) values and weights."""
        out = {}
        for model in self.models:
            columns = []
            for metric in self.protocol.metrics:
                name = metric.name
                values = [[r.values.get(name, math.nan) for r in rows] for rows in model.rows]
                weights = [[r.weights.get(name, 1.0) for r in rows] for rows in model.rows]
                columns.append(
                    (
                        torch.tensor(values, dtype=torch.float64),
                        torch.tensor(weights, dtype=torch.float64),
                    )
                )
            out[model.name] = columns
        return out

    def _sums(self, model: str, chosen: Tensor) -> list[UnitSums]:
        """Per-unit sums of every metric over the chosen rows."""
        found, unit, n = [], self._unit[chosen], len(self.units)
        for metric, (values, weights) in zip(
            self.protocol.metrics, self._columns[model], strict=True
        ):
            v, w = values[:, chosen], weights[:, chosen] if metric.mean == "weighted" else None
            if metric.mean == "auc":
                found.append(area_sums(v, unit, n, metric.limit))
            else:
                once = metric.mean == "units"
                found.append(unit_sums(v, unit, n, weights=w, each_unit_once=once))
        return found

    def _estimates(self, chosen: Tensor) -> dict[str, dict[str, Estimate]]:
        names = [m.name for m in self.protocol.metrics]
        sums = [one for model in self.models for one in self._sums(model.name, chosen)]
        found = iter(estimates(sums, seed=self.protocol.seed))
        return {model.name: {name: next(found) for name in names} for model in self.models}


def chosen_items(result: TaskResult, model: str, count: int) -> tuple[list[str], list[str]]:
    """Return a model's worst and best items, by the leading metric of its first seed.

    Args:
        result: The scores.
        model: Name of the model.
        count: How many of each.

    Returns:
        Items, the very worst and the very best first; one may be in both where there are few.

    Raises:
        RecipeError: No such model.
    """
    found: dict[str, list[float]] = {}
    for row in result.runs_of(model).rows[0]:
        value = row.values.get(result.lead.name, math.nan)
        if not math.isnan(value):
            found.setdefault(row.item, []).append(value)
    mean = {item: sum(values) / len(values) for item, values in found.items()}
    # rows of an area hold errors
    more_is_better = result.lead.higher and result.lead.mean != "auc"
    best = sorted(mean, key=lambda item: -mean[item] if more_is_better else mean[item])
    return best[::-1][:count], best[:count]


def _same_items(mine: Sequence[Row], theirs: Sequence[Row], first: str, second: str) -> None:
    for number, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        for part in ("item", "part", "unit", "labels"):
            x, y = getattr(a, part), getattr(b, part)
            if x != y:
                raise RecipeError(
                    f"row {number} has {part} {x!r} for {first} but {y!r} for {second}: models "
                    "can only be compared on the same items in the same order."
                )
    if len(mine) != len(theirs):
        longer, name, other = (mine, first, second) if len(mine) > len(theirs) else (
            theirs, second, first,
        )  # fmt: skip
        extra = longer[min(len(mine), len(theirs))].item
        raise RecipeError(
            f"{name} has {len(longer)} rows but {other} {min(len(mine), len(theirs))}: {extra!r} "
            f"is missing from {other}; evaluate both on the same items."
        )


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sort numbers in texts by value."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(p), "") if i % 2 else (1, 0.0, p) for i, p in enumerate(parts) if p or i % 2]

"""The numbers of an evaluation as facts for a model card: raw, untrained and trained rows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from equifeat.errors import ExportError, RecipeError
from equifeat.eval.models import extractor_hash, untrained
from equifeat.eval.result_tables import (
    difference_text,
    estimate_text,
    heading,
    interval_note,
    markdown_table,
    markdown_text,
)
from equifeat.eval.results import ModelRuns, Results, TaskResult
from equifeat.model.card_header import TASK
from equifeat.model.extractor import FeatureExtractor

RAW, UNTRAINED, TRAINED = "raw ViT", "untrained", "trained (this model)"
_TESTED = (
    "p: two-sided permutation test within units, corrected by Holm over all models and metrics of "
    "the evaluation."
)
_UNCHECKED = (
    "config.json does not tell the seed of the run, so the untrained row is the one of that name "
    "and was not checked against this model."
)


def card_facts(path: Path, extractor: FeatureExtractor, folder: Path) -> dict[str, Any]:
    """Read results and turn the rows of one model and of its controls into facts for its card.

    Args:
        path: results.json of ``equifeat evaluate … --controls``.
        extractor: The model.
        folder: Its folder, whose config.json names the seed of the run.

    Returns:
        "tables" and "evaluations" of `equifeat.model.card.model_card`.

    Raises:
        ExportError: The results hold no row of this model, of its raw ViT, or of it untrained.
        RecipeError: The file is missing or holds no results.
    """
    results = Results.load(path)
    if not results.tasks:
        raise ExportError(f"{path} holds no results")
    hashes = {RAW: extractor_hash(extractor.raw()), TRAINED: extractor_hash(extractor)}
    with suppress(RecipeError):  # without a seed, the row is known by its name only
        hashes[UNTRAINED] = extractor_hash(untrained(extractor, folder))
    found = [(task, _rows(task, hashes, path, folder)) for task in results.tasks]
    made = results.environment
    return {
        "tables": [_table(task, rows, made, hashes) for task, rows in found],
        "evaluations": [_evaluation(task, rows[TRAINED].name) for task, rows in found],
    }


def _rows(
    task: TaskResult, hashes: Mapping[str, str], path: Path, folder: Path
) -> dict[str, ModelRuns]:
    """Find the three rows by the hashes of their models."""
    rows: dict[str, ModelRuns] = {}
    for what in (TRAINED, RAW, UNTRAINED):
        if what in hashes:
            fits = [model for model in task.models if hashes[what] in model.hashes]
        else:
            fits = [model for model in task.models if model.name.endswith("untrained")]
        if not fits:
            who = "this model" if what == TRAINED else f"its control, the {what}"
            if what == UNTRAINED:
                who = "its control, the untrained model"
            names = ", ".join(model.name for model in task.models)
            raise ExportError(
                f"{path} has no row of {who} under {task.protocol.id}, only {names}: make it with "
                f"`equifeat evaluate {task.protocol.task} --data DATA --model {folder} --controls "
                "--out OUT` and give OUT/results.json"
            )
        rows[what] = fits[0]
    return rows


def _table(
    task: TaskResult,
    rows: Mapping[str, ModelRuns],
    made: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> tuple[str, str]:
    """Return heading and Markdown of one task."""
    metrics, unit = task.protocol.metrics, task.protocol.unit
    notes = [task.caption, interval_note(task)]
    cells = [["features", *(heading(metric) for metric in metrics)]]
    for what in (RAW, UNTRAINED, TRAINED):
        summary = task.summary(rows[what].name)
        cells.append([what, *(estimate_text(summary[m.name], unit) for m in metrics)])
    if task.models[0].name == rows[RAW].name and rows[TRAINED].name in task.paired:
        paired = task.paired[rows[TRAINED].name]
        cells.append(["trained minus raw", *(difference_text(paired[m.name]) for m in metrics)])
        notes.append(_TESTED)
    if UNTRAINED not in hashes:
        notes.append(_UNCHECKED)
    versions = made.get("versions")
    known = versions.get("equifeat") if isinstance(versions, Mapping) else None
    notes.append(
        f"Protocol {task.protocol.id}, digest {task.protocol.digest()[:12]}; data hash "
        f"{task.data_hash[:12]}; model hash {hashes[TRAINED][:12]}; equifeat {known or '?'}."
    )
    note = " ".join(markdown_text(note) for note in notes if note)
    return markdown_text(task.protocol.id), f"{markdown_table(cells)}\n\n{note}"


def _evaluation(task: TaskResult, trained: str) -> dict[str, Any]:
    """Return an entry of the hub's model-index; what is not known is left out."""
    summary = task.summary(trained)
    metrics = [
        {"type": metric.name, "value": round(value, 4), "name": heading(metric)}
        for metric in task.protocol.metrics
        if math.isfinite(value := summary[metric.name].value)
    ]
    # a name with "/" would be taken for a data set of the hub
    kind = re.sub(r"[^\w.-]+", "-", task.protocol.id)
    return {
        "task": {"type": TASK},
        "dataset": {"name": task.protocol.id, "type": kind},
        "metrics": metrics,
    }

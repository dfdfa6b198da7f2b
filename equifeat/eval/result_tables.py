"""Results as tables of text: every number with its interval, published ones apart."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from equifeat.eval.protocol import Metric
from equifeat.eval.results import Results, TaskResult
from equifeat.metrics.permutation import smallest_p
from equifeat.metrics.unit_sums import Difference, Estimate

Cells = list[list[str]]
# A breakdown by more values than this goes to results.json only.
MAX_VALUES = 100


class ResultTable(NamedTuple):
    """A table of a report.

    Attributes:
        title: Heading.
        cells: Rows of text, the header first.
        note: What the numbers mean.
    """

    title: str
    cells: Cells
    note: str


def heading(metric: Metric, points: bool = False) -> str:
    """Return a metric's name, unit and direction.

    Args:
        metric: The metric.
        points: Whether it is a difference, of percentages in points.

    Returns:
        Such as "PCK@.10 [%] ↑".
    """
    unit = "points" if points and metric.unit == "%" else metric.unit
    return f"{metric.name}{f' [{unit}]' if unit else ''} {'↑' if metric.higher else '↓'}"


def estimate_text(found: Estimate, unit: str = "unit") -> str:
    """Return a number with its interval.

    Args:
        found: The number.
        unit: What intervals are over.

    Returns:
        Such as "56.90 [54.11, 59.32] ± 0.31"; never the number alone.
    """
    if math.isnan(found.value):
        return "–"
    ends = f"[{found.low:.2f}, {found.high:.2f}]"
    if math.isnan(found.low):
        ends = f"(1 {unit})" if found.units == 1 else "(no interval)"
    spread = "" if math.isnan(found.sd) else f" ± {found.sd:.2f}"
    return f"{found.value:.2f} {ends}{spread}"


def p_text(p: float) -> str:
    """Return a p value.

    Args:
        p: The value.

    Returns:
        Two significant digits, "< 0.0001", or "–".
    """
    if math.isnan(p):
        return "–"
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.995 else "1.0"


def difference_text(found: Difference) -> str:
    """Return a difference with its interval and corrected p value.

    Args:
        found: The difference.

    Returns:
        Such as "+3.20 [+1.10, +5.25], p = 0.0042".
    """
    if math.isnan(found.value):
        return "–"
    if math.isnan(found.low):
        return f"{found.value:+.2f} (no interval)"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}], p = " + p_text(found.p_holm)


def main_table(task: TaskResult) -> ResultTable:
    """Return models × metrics.

    Args:
        task: The scores.

    Returns:
        The table.
    """
    rows = [["model", *(heading(m) for m in task.protocol.metrics)]]
    for model in task.models:
        found = task.summary(model.name)
        cells = [estimate_text(found[m.name], task.protocol.unit) for m in task.protocol.metrics]
        rows.append([model.name, *cells])
    return ResultTable("Measured", rows, f"{task.caption} {interval_note(task)}")


def interval_note(task: TaskResult) -> str:
    """Return what stands in brackets and behind ±.

    Args:
        task: The scores.

    Returns:
        Sentences.
    """
    unit, n = task.protocol.unit, len(task.units)
    if n < 2:
        text = f"There is one {unit} only, so there are no intervals and no tests."
    else:
        text = f"Brackets: 95 % bootstrap intervals over {n} {_plural(unit)}."
    seeds = [f"{len(m.rows)} of {m.name}" for m in task.models if len(m.rows) > 1]
    if seeds:
        text += (
            f" Means over training seeds ({', '.join(seeds)}); ± is their standard deviation, and "
            f"their intervals draw {_plural(unit)} and seeds."
        )
    return text


def published_table(task: TaskResult) -> ResultTable | None:
    """Return the protocol's published numbers.

    Args:
        task: The scores.

    Returns:
        The table; None where the protocol names none.
    """
    published = task.protocol.published
    if not published:
        return None
    metrics = [m for m in task.protocol.metrics if any(m.name in v for v in published.values())]
    rows = [["published, not measured here", *(heading(m) for m in metrics)]]
    for name, values in published.items():
        cells = [f"{values[m.name]:.2f}" if m.name in values else "–" for m in metrics]
        rows.append([f"{name} (published)", *cells])
    note = f"Published, {task.protocol.source}. Not measured by equifeat, and without intervals."
    return ResultTable("Published", rows, note)


def paired_table(task: TaskResult) -> ResultTable | None:
    """Return what every other model differs by from the first.

    Args:
        task: The scores.

    Returns:
        The table; None with one model.
    """
    if len(task.models) < 2:
        return None
    base, metrics = task.models[0].name, task.protocol.metrics
    rows = [[f"minus {base}", *(heading(m, points=True) for m in metrics)]]
    for name, found in task.paired.items():
        rows.append([name, *(difference_text(found[m.name]) for m in metrics)])
    tests = [d for by in task.paired.values() for d in by.values() if not math.isnan(d.p)]
    unit = task.protocol.unit
    if not tests:
        note = f"Fewer than two {_plural(unit)}: there is no test."
    else:
        few = min(d.units for d in tests)
        note = (
            f"The same {_plural(unit)} are drawn for both models. p: two-sided permutation test "
            f"that exchanges the two models within {_plural(unit)}, corrected by Holm for the "
            f"{len(tests)} tests of this table."
        )
        if smallest_p(few) * len(tests) > 0.05:
            note += (
                f" {few} {_plural(unit)} are too few for {len(tests)} tests: uncorrected p cannot "
                f"fall below {p_text(smallest_p(few))}."
            )
    return ResultTable(f"Paired differences from {base}", rows, note)


def breakdown_table(task: TaskResult, label: str) -> ResultTable | None:
    """Return the leading metric by the values of a label.

    Args:
        task: The scores.
        label: Name of the label.

    Returns:
        The table; None where there are too many values to read.
    """
    parts = task.breakdown(label)
    if not 1 < len(parts) <= MAX_VALUES:
        return None
    rows = [[label, "rows", _plural(task.protocol.unit), *(m.name for m in task.models)]]
    for value, part in parts.items():
        cells = [
            estimate_text(part.summary[m.name][task.lead.name], task.protocol.unit)
            for m in task.models
        ]
        rows.append([value, str(part.rows), str(part.units), *cells])
    note = f"{heading(task.lead)} with 95 % bootstrap intervals; all metrics are in results.json."
    return ResultTable(f"By {label}", rows, note)


def task_tables(task: TaskResult, published: bool = False) -> list[ResultTable]:
    """Return all tables of a task.

    Args:
        task: The scores.
        published: Whether published numbers are shown.

    Returns:
        Measured, perhaps published, paired differences, breakdowns.
    """
    found = [main_table(task), published_table(task) if published else None, paired_table(task)]
    found += [breakdown_table(task, label) for label in task.labels]
    return [table for table in found if table is not None]


def environment_cells(results: Results) -> Cells:
    """Return what results were made with.

    Args:
        results: The results.

    Returns:
        Rows of a name and a value, the header first.
    """
    rows = [["what", "value"]]
    for number, one in enumerate([results.environment, *results.environment.get("merged", [])]):
        which = f" (part {number + 1})" if results.environment.get("merged") else ""
        for key, value in one.items():
            if key != "merged":
                rows.append([f"{key}{which}", _words(value)])
    for task in results.tasks:
        rows.append([f"{task.protocol.id}: protocol", task.protocol.digest()])
        rows.append([f"{task.protocol.id}: seed", str(task.protocol.seed)])
        rows.append([f"{task.protocol.id}: data", task.data_hash])
        for model in task.models:
            rows.append([f"{task.protocol.id}: {model.name}", ", ".join(model.hashes)])
    return rows


def markdown_table(cells: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Return cells as a Markdown table.

    Args:
        cells: Rows of text, the header first.
        numbers: Whether all columns but the first are aligned to the right.

    Returns:
        Text; what Markdown or HTML would read as markup is escaped.
    """
    header, *rows = [[markdown_text(cell) for cell in row] for row in cells]
    ruler = ["---"] + ["---:" if numbers else "---"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ruler, *rows))


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is.

    Args:
        text: Any text, such as a model's name.

    Returns:
        One line with markup escaped.
    """
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_|~]|\[(?=[^\]]*\]\()|!\[)", r"\\\1", line)


def _plural(unit: str) -> str:
    return f"{unit}s"


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "none"
    return "unknown" if value is None else str(value)

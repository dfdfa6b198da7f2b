"""report.html: one page that needs no other file and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap

from equifeat._version import __version__
from equifeat.eval.result_tables import environment_cells, heading, task_tables
from equifeat.eval.results import Results, TaskResult, chosen_items
from equifeat.eval_report.charts import Axis, bars_chart, lines_chart, radar_chart, scatter_chart
from equifeat.metrics.correlation import Correlation, correlation
from equifeat.report import Chart, Content, Note, Picture, Section, Table, page_html

EQUIVARIANCE = "equivariance"
# Charts of more values than this would be too tall to read.
_MOST_BARS = 40


def report_html(results: Results, *, published: bool = False) -> str:
    """Return the report of an evaluation.

    Args:
        results: The results.
        published: Whether published numbers are shown below measured ones.

    Returns:
        A whole HTML page.
    """
    sections = [_overview(results), *(_task(task, published) for task in results.tasks)]
    how = Section("How this was made", "how", [Table("", environment_cells(results), "")])
    names = ", ".join(dict.fromkeys(m.name for t in results.tasks for m in t.models))
    lead = [
        f"{names} on {', '.join(t.protocol.id for t in results.tasks)}. Arrows say which direction "
        "is better. Every interval is a 95 % bootstrap interval over what the task calls its unit."
    ]
    return page_html("Evaluation", lead, [*sections, how], f"equifeat {__version__}")


def _axis(task: TaskResult) -> Axis:
    better = "higher" if task.lead.higher else "lower"
    unit = f" [{task.lead.unit}]" if task.lead.unit else ""
    return Axis(f"{task.lead.name}{unit}\n{better} is better", task.lead.higher)


def _overview(results: Results) -> Section:
    parts: list[Content] = [*_radar(results.tasks)]
    pairs = [
        (task, other)
        for task in results.tasks
        if task.protocol.task == EQUIVARIANCE
        for other in results.tasks
        if other.protocol.task != EQUIVARIANCE
    ]
    if not pairs:
        parts.append(
            Note(
                "Equivariance against tasks needs results of an equivariance protocol and of "
                "another task, of at least three models; evaluate a suite."
            )
        )
    for task, other in pairs:
        parts += _scatter(task, other)
    return Section("Overview", "overview", parts)


def _radar(tasks: Sequence[TaskResult]) -> list[Content]:
    shared = [
        m.name
        for m in tasks[0].models
        if all(m.name in {one.name for one in t.models} for t in tasks)
    ] if tasks else []  # fmt: skip
    found = [t for t in tasks if all(_finite(t, name) for name in shared)]
    if len(found) < 3 or not shared:
        return [
            Note(
                "A radar plot needs at least three tasks with the same models; here are "
                f"{len(found)}."
            )
        ]
    series = {name: [t.summary(name)[t.lead.name].value for t in found] for name in shared}
    axes = [
        Axis("\n".join([*_id_lines(t), *wrap(heading(t.lead), 16)]), t.lead.higher) for t in found
    ]
    alt = "Radar plot of the leading metrics; the same numbers are in the tables of the tasks."
    caption = (
        f"{shared[0]} against {', '.join(shared[1:]) or 'nothing else'}: the leading metric of "
        "each task. Every axis states its range from the centre to the rim; outwards is better."
    )
    return [Chart("Leading metrics", caption, radar_chart(axes, series, alt))]


def _id_lines(task: TaskResult) -> list[str]:
    """The id without a user's changes, cut behind the slash where it is too long for a chart."""
    name = task.protocol.id.partition("+")[0]
    family, _, rest = name.partition("/")
    return [name] if len(name) <= 18 else [f"{family}/", rest]


def _finite(task: TaskResult, model: str) -> bool:
    value = task.summary(model)[task.lead.name].value
    return math.isfinite(value) and value >= 0


def _scatter(task: TaskResult, other: TaskResult) -> list[Content]:
    title = f"{task.protocol.id} against {other.protocol.id}"
    theirs = {m.name for m in other.models}
    points = {
        m.name: (task.summary(m.name)[task.lead.name], other.summary(m.name)[other.lead.name])
        for m in task.models
        if m.name in theirs
    }
    points = {n: p for n, p in points.items() if all(math.isfinite(e.value) for e in p)}
    if len(points) < 3:
        return [
            Note(f"{title}: a correlation needs at least three models; here are {len(points)}.")
        ]
    x, y = ([p[k].value for p in points.values()] for k in (0, 1))
    pearson, spearman = correlation(x, y, seed=task.protocol.seed)
    caption = (
        f"A point a model. Pearson {_coefficient(pearson)}, Spearman {_coefficient(spearman)}; "
        f"brackets: 95 % bootstrap interval over the {len(points)} models, rough with so few."
        if len(points) < 10
        else f"A point a model. Pearson {_coefficient(pearson)}, Spearman "
        f"{_coefficient(spearman)}; brackets: 95 % bootstrap interval over {len(points)} models."
    )
    if task.lead.higher != other.lead.higher:
        caption += " One measure is better when lower, so a negative coefficient means agreement."
    axes = [
        Axis(f"{t.protocol.id.partition('+')[0]}: {heading(t.lead)}", t.lead.higher)
        for t in (task, other)
    ]
    return [Chart(title, caption, scatter_chart(points, axes[0], axes[1], f"{title}. {caption}"))]


def _coefficient(found: Correlation) -> str:
    if math.isnan(found.value):
        return "undefined (a side is constant)"
    ends = "" if math.isnan(found.low) else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.value:+.2f}{ends}"


def _task(task: TaskResult, published: bool) -> Section:
    protocol = task.protocol
    parts: list[Content] = [Note(f"{protocol.about}. Source: {protocol.source}.")]
    tables = {table.title: table for table in task_tables(task, published)}
    for table in tables.values():
        if not table.title.startswith("By "):
            parts.append(Table(table.title, table.cells, table.note))
    for label in task.labels:
        parts += _by_label(task, label)
        if f"By {label}" in tables:
            by = tables[f"By {label}"]
            parts.append(Table(by.title, by.cells, by.note, folded=True))
    parts += _examples(task)
    anchor = "".join(c if c.isalnum() else "-" for c in protocol.id)
    return Section(f"{protocol.task}: {protocol.id}", f"task-{anchor}", parts)


def _by_label(task: TaskResult, label: str) -> list[Content]:
    parts = task.breakdown(label)
    if len(parts) < 2:
        return []
    if len(parts) > _MOST_BARS:
        return [Note(f"{len(parts)} values of {label} are too many for a chart.")]
    groups = [f"{value} (n={part.units})" for value, part in parts.items()]
    series = {
        m.name: [part.summary[m.name][task.lead.name] for part in parts.values()]
        for m in task.models
    }
    unit = task.protocol.unit
    alt = f"{task.lead.name} by {label} for every model; the table below holds the same numbers."
    if "change" in label:
        caption = f"Bands: 95 % bootstrap intervals over {unit}s."
        drawn = lines_chart(list(parts), series, label, _axis(task), alt)
    else:
        caption = f"Whiskers: 95 % bootstrap intervals over {unit}s; n counts {unit}s."
        drawn = bars_chart(groups, series, _axis(task), alt)
    return [Chart(f"{task.lead.name} by {label}", caption, drawn)]


def _examples(task: TaskResult) -> list[Content]:
    out: list[Content] = []
    for model in task.models:
        count = len({item for name, item in task.pictures if name == model.name})
        if not count:
            continue
        worst, best = chosen_items(task, model.name, count)
        have = [i for i in [*best, *worst] if (model.name, i) in task.pictures]
        have = list(dict.fromkeys(have))
        # as many were drawn from either end; of an odd number the middle one is in both
        half = (len(have) + 1) // 2
        best_shown = [i for i in best if i in have][:half]
        worst_shown = [i for i in worst if i in have and i not in best_shown]
        for what, items in (("Best", best_shown), ("Worst", worst_shown)):
            for number, item in enumerate(items, 1):
                out.append(
                    Picture(
                        f"{what} {number} of {model.name}: {item}",
                        f"{what} by {heading(task.lead)}.",
                        task.pictures[model.name, item],
                    )
                )
    return out

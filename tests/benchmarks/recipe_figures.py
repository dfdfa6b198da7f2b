"""The tables and figures of docs/recipe.md, from the results of sweeps and of the screening.

    python -m tests.benchmarks.recipe_figures --out docs/images \
        --sweep "one object, 300 steps=runs/ablations/one_object/report/results.json" \
        [--sweep "TITLE=FILE" ...] [--screen runs/ablations/screen]

Prints one table a sweep: every row, what it differs by from the sweep's baseline, and the same
within each range of view changes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from equifeat.eval.result_tables import difference_text, estimate_text
from equifeat.eval.results import Results, TaskResult

LABEL = "view change"
METRICS = ("PCDP@.05", "PCDP@.10", "PCDP@.20", "APE")
COLORS = {"raw ViT": "#7f7f7f", "reference": "#d97706", "default": "#2563eb"}
SAME = {"raw": "raw ViT", "base": "default"}  # rows of the screening


def within(task: TaskResult, value: str) -> TaskResult:
    """The rows of one range of view changes, as a result of their own."""
    models = [
        replace(
            m, rows=tuple(tuple(r for r in rows if r.labels[LABEL] == value) for rows in m.rows)
        )
        for m in task.models
    ]
    return replace(task, models=tuple(models), pictures={})


def tables(title: str, task: TaskResult) -> str:
    """Means and differences over all rows, then by view change."""
    lines = [
        f"**{title}**",
        "",
        f"| row | {' | '.join(METRICS)} |",
        "|---|" + "---:|" * len(METRICS),
    ]
    for model in task.models:
        found = task.summary(model.name)
        cells = [estimate_text(found[name], task.protocol.unit) for name in METRICS]
        lines.append(f"| {short(model.name)} | {' | '.join(cells)} |")
    base = task.models[0].name
    lines += ["", f"| minus {base} | {' | '.join(METRICS)} |", "|---|" + "---:|" * len(METRICS)]
    for name, found_by in task.paired.items():
        cells = [difference_text(found_by[metric]) for metric in METRICS]
        lines.append(f"| {short(name)} | {' | '.join(cells)} |")
    values = task.label_values(LABEL)
    head = " | ".join(values)
    lines += ["", f"| PCDP@.10 by {LABEL} | {head} |", "|---|" + "---:|" * len(values)]
    parts = [within(task, value) for value in values]
    for model in task.models:
        cells = [f"{part.summary(model.name)['PCDP@.10'].value:.1f}" for part in parts]
        lines.append(f"| {short(model.name)} | {' | '.join(cells)} |")
    for name in task.paired:
        cells = []
        for part in parts:
            one = part.paired[name]["PCDP@.10"]
            cells.append(f"{one.value:+.1f} [{one.low:+.1f}, {one.high:+.1f}]")
        lines.append(f"| {short(name)} minus {base} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def short(name: str) -> str:
    """A row's name without the backbone."""
    return "raw ViT" if name.endswith(" raw") else name


def by_view_change(sweeps: Sequence[tuple[str, TaskResult]], path: Path) -> None:
    """Draw PCDP@.10 over the view change, with bootstrap intervals over objects (and seeds)."""
    figure = Figure(figsize=(4.6 * len(sweeps), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    for axes, (title, task) in zip(panels, sweeps, strict=True):
        parts = task.breakdown(LABEL)
        for model in task.models:
            name = short(model.name)
            if name not in COLORS:
                continue
            found = [part.summary[model.name]["PCDP@.10"] for part in parts.values()]
            at = range(len(found))
            axes.plot(at, [e.value for e in found], "o-", color=COLORS[name], label=name)
            low, high = [e.low for e in found], [e.high for e in found]
            axes.fill_between(at, low, high, color=COLORS[name], alpha=0.15, lw=0)
        axes.set_xticks(range(len(parts)), list(parts))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("view change")
    panels[0].set_ylabel("PCDP@.10 [%] ↑")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def screening(folder: Path, path: Path) -> None:
    """Draw every screened row: how many points are near, and how far the rest is off."""
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, patches in zip(figure.subplots(1, 2), (16, 32), strict=True):
        rows: dict[str, list[dict[str, float]]] = {}
        for file in sorted(folder.glob(f"*_{patches}_*.json")):
            name = file.name.rsplit("_", 2)[0]
            rows.setdefault(name, []).append(json.loads(file.read_text())["means"])
        draw_rows(axes, rows)
        axes.set_title(
            f"{14 * patches} px, 300 steps on one object, objects of select", fontsize=10
        )
    figure.savefig(path, dpi=150)


def draw_rows(axes: Axes, rows: dict[str, list[dict[str, float]]]) -> None:
    """Draw the seeds of every row as points of one name."""
    for name, means in rows.items():
        x, y = ([one[metric] for one in means] for metric in ("PCDP@.10", "APE"))
        color = COLORS.get(SAME.get(name, name), "#94a3b8")
        axes.scatter(x, y, s=26, color=color)
        axes.annotate(name, (x[0], y[0]), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("PCDP@.10 [%], more is better")
    axes.set_ylabel("APE [%], less is better")
    axes.invert_yaxis()
    axes.margins(0.2, 0.12)


def main() -> None:
    """Print the tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="append", default=[])
    parser.add_argument("--screen", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sweeps = []
    for word in given.sweep:
        title, _, file = word.partition("=")
        (task,) = Results.from_json(Path(file).read_text()).tasks
        sweeps.append((title, task))
        sys.stdout.write(tables(title, task) + "\n")
    given.out.mkdir(parents=True, exist_ok=True)
    if sweeps:
        by_view_change(sweeps, given.out / "recipe_view_change.png")
    if given.screen:
        screening(given.screen, given.out / "recipe_screening.png")


if __name__ == "__main__":
    main()

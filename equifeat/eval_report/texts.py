"""Results as Markdown and for the console, and the files of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from equifeat.eval.result_tables import (
    environment_cells,
    main_table,
    markdown_table,
    markdown_text,
    paired_table,
    published_table,
    task_tables,
)
from equifeat.eval.results import Results
from equifeat.eval_report.page import report_html
from equifeat.files import atomic_file


def write_evaluation(results: Results, out: str | Path, *, published: bool = False) -> None:
    """Write results.json, results.md and report.html.

    Args:
        results: The results.
        out: Folder to write into.
        published: Whether published numbers are shown beside measured ones.
    """
    out = Path(out)
    results.save(out / "results.json")
    for name, text in (
        ("results.md", results_markdown(results, published=published)),
        ("report.html", report_html(results, published=published)),
    ):
        with atomic_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def results_markdown(results: Results, *, published: bool = False) -> str:
    """Return all tables as Markdown.

    Args:
        results: The results.
        published: Whether published numbers are shown below measured ones.

    Returns:
        A page.
    """
    lines = ["# Evaluation", ""]
    for task in results.tasks:
        protocol = task.protocol
        lines += [f"## {markdown_text(protocol.task)}: {markdown_text(protocol.id)}", ""]
        lines += [markdown_text(f"{protocol.about}. Source: {protocol.source}."), ""]
        for table in task_tables(task, published):
            lines += [f"### {markdown_text(table.title)}", "", markdown_table(table.cells), ""]
            lines += [markdown_text(table.note), ""]
    lines += ["## How this was made", "", markdown_table(environment_cells(results), False), ""]
    return "\n".join(lines)


def console_text(results: Results, *, published: bool = False) -> str:
    """Return the main tables for a terminal.

    Args:
        results: The results.
        published: Whether published numbers are shown below measured ones.

    Returns:
        Aligned text.
    """
    parts = []
    for task in results.tasks:
        parts.append(f"{task.protocol.task}: {task.protocol.id}")
        found = (main_table(task), published_table(task) if published else None, paired_table(task))
        for table in found:
            if table is not None:
                parts.append(f"{_aligned(table.cells)}\n{table.note}")
    return "\n\n".join(parts)


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    """One line a model, or one line a metric where that would be wider than a terminal."""
    if sum(max(len(row[k]) for row in cells) + 2 for k in range(len(cells[0]))) > 110:
        cells = list(zip(*cells, strict=True))
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )

"""results.json, results.md and report.html of an evaluation."""

from equifeat.eval_report.page import report_html
from equifeat.eval_report.texts import console_text, results_markdown, write_evaluation

__all__ = ["console_text", "report_html", "results_markdown", "write_evaluation"]

"""The outcome of the equivariance protocol: rows, summaries, intervals, tables, JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from equifeat.errors import RecipeError, suggest
from equifeat.files import atomic_file
from equifeat.metrics import PairedDifference, bootstrap_interval, paired_difference

BIN_EDGES = (0.0, 15.0, 30.0, 60.0, 90.0, 120.0, 180.0)
_FORMAT, _VERSION = "equifeat-equivariance", 1
Bin = tuple[float, float]
TableFormat = Literal["markdown", "html"]


class PairScore(NamedTuple):
    """One pair of views.

    Attributes:
        object_name: Its object.
        view0: Index of the view whose pixels are matched.
        view1: Index of the view they are searched in.
        view_change_deg: Angle of the relative rotation.
        points: Number of pixels matched.
        scores: By model: APE and one PCDP a threshold, in percent.
    """

    object_name: str
    view0: int
    view1: int
    view_change_deg: float
    points: int
    scores: dict[str, tuple[float, ...]]


class Score(NamedTuple):
    """A mean over objects with its 95 % bootstrap interval, in percent.

    Attributes:
        mean: Mean over objects of the mean over their pairs.
        low: Lower end; NaN with fewer than two objects.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class EquivarianceResult:
    """Scores of models on the same pairs of views.

    Args:
        config: Every option that the numbers depend on.
        models: Names of the models, in order.
        rows: One entry a pair.
    """

    config: dict[str, Any]
    models: tuple[str, ...]
    rows: tuple[PairScore, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of every row of values."""
        return ("APE", *(f"PCDP@{t:.2f}".replace("0.", ".") for t in self.config["thresholds"]))

    @property
    def bins(self) -> tuple[Bin, ...]:
        """Bins of view change that hold at least one pair."""
        edges = self.config["bin_edges_deg"]
        every = list(pairwise(edges))
        return tuple(b for b in every if any(_in_bin(r, b) for r in self.rows))

    def object_values(self, model: str, within: Bin | None = None) -> Tensor:
        """Return the means over the pairs of each object.

        Args:
            model: Name of the model.
            within: Only pairs of this bin of view change.

        Returns:
            (n_objects, n_metrics) float64, objects in order of their first row; objects without a
            pair in the bin are left out.

        Raises:
            RecipeError: No such model.
        """
        if model not in self.models:
            raise RecipeError(
                f"the result holds no model {model!r}, only {', '.join(self.models)}."
                + suggest(model, self.models)
            )
        by_object: dict[str, list[tuple[float, ...]]] = {}
        for row in self.rows:
            if within is None or _in_bin(row, within):
                by_object.setdefault(row.object_name, []).append(row.scores[model])
        means = [torch.tensor(v, dtype=torch.float64).mean(0) for v in by_object.values()]
        return torch.stack(means) if means else torch.zeros(0, len(self.metrics)).double()

    def summary(self, model: str, within: Bin | None = None) -> dict[str, Score]:
        """Return every metric of a model with its interval over objects.

        Args:
            model: Name of the model.
            within: Only pairs of this bin of view change.

        Returns:
            By metric.
        """
        values = self.object_values(model, within)
        low, high = bootstrap_interval(values, seed=self.config["seed"])
        ends = zip(values.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
        return {m: Score(*e) for m, e in zip(self.metrics, ends, strict=True)}

    def difference(self, first: str, second: str, within: Bin | None = None) -> dict[str, Score]:
        """Return second minus first, paired over objects.

        Args:
            first: Name of the model that is subtracted.
            second: Name of the other model.
            within: Only pairs of this bin of view change.

        Returns:
            By metric, in percentage points; a gain is negative for APE, positive for PCDP.
        """
        found: PairedDifference = paired_difference(
            self.object_values(first, within),
            self.object_values(second, within),
            seed=self.config["seed"],
        )
        ends = zip(*(part.tolist() for part in found), strict=True)
        return {m: Score(*e) for m, e in zip(self.metrics, ends, strict=True)}

    def merged(self, *others: EquivarianceResult) -> EquivarianceResult:
        """Join results of other models on the same pairs.

        Args:
            *others: Results with the same configuration.

        Returns:
            One result with the models of all.

        Raises:
            RecipeError: The configurations, the pairs or a model's name do not fit.
        """
        models, scores = list(self.models), [dict(row.scores) for row in self.rows]
        for other in others:
            for key in sorted(self.config.keys() | other.config.keys()):
                a, b = self.config.get(key), other.config.get(key)
                if a != b:
                    raise RecipeError(
                        f"results with {key}={a!r} and {key}={b!r} cannot be compared; "
                        "evaluate both models with the same options."
                    )
            if [r[:5] for r in self.rows] != [r[:5] for r in other.rows]:
                raise RecipeError(
                    f"results of {', '.join(self.models)} and {', '.join(other.models)} are on "
                    "different pairs and cannot be compared; evaluate both on the same views."
                )
            twice = set(models) & set(other.models)
            if twice:
                raise RecipeError(f"two results are named {min(twice)!r}; rename one model.")
            models += other.models
            for mine, row in zip(scores, other.rows, strict=True):
                mine.update(row.scores)
        rows = (r._replace(scores=s) for r, s in zip(self.rows, scores, strict=True))
        return EquivarianceResult(dict(self.config), tuple(models), tuple(rows))

    def cells(self, within: Bin | None = None) -> list[list[str]]:
        """Return the summary as text, one row a model below a header.

        Args:
            within: Only pairs of this bin of view change.

        Returns:
            Rows of cells, the header first; its unit and normaliser are in `caption`.
        """
        rows = [["model", *(f"{m} %" for m in self.metrics)]]
        for model in self.models:
            rows.append([model, *(str(s) for s in self.summary(model, within).values())])
        return rows

    def bin_cells(self, metric: str = "PCDP@.10") -> list[list[str]]:
        """Return one metric by view change as text, one row a model below a header.

        Args:
            metric: One of `metrics`.

        Returns:
            Rows of cells, the header first with the number of pairs of each bin.

        Raises:
            RecipeError: No such metric.
        """
        if metric not in self.metrics:
            raise RecipeError(f"metric {metric!r} is unknown." + suggest(metric, self.metrics))
        counts = [sum(_in_bin(r, b) for r in self.rows) for b in self.bins]
        names = [f"{b[0]:g}–{b[1]:g}° (n={n})" for b, n in zip(self.bins, counts, strict=True)]
        rows = [[f"{metric} %", *names]]
        for model in self.models:
            rows.append([model, *(str(self.summary(model, b)[metric]) for b in self.bins)])
        return rows

    def difference_cells(self, baseline: str) -> list[list[str]]:
        """Return what every other model gains over one, paired over objects, as text.

        Args:
            baseline: Name of the model that is subtracted.

        Returns:
            Rows of cells, the header first.
        """
        rows = [[f"minus {baseline}", *(f"{m} points" for m in self.metrics)]]
        for model in self.models:
            if model != baseline:
                gains = self.difference(baseline, model).values()
                rows.append([model, *(_signed(s) for s in gains)])
        return rows

    def caption(self) -> str:
        """Return one sentence that says what the numbers mean.

        Returns:
            Objects, pairs, points, normaliser and interval.
        """
        objects = len({r.object_name for r in self.rows})
        what = {
            "box": "the longer side of the object's box in the target view",
            "image": "the longer side of the target image",
        }[self.config["normalizer"]]
        captured = self.config.get("captured_objects", 0)
        bare = self.config.get("captured_without_masks", 0)
        tracks = f" {captured} objects are captures: their points are tracks." if captured else ""
        if bare:
            tracks += (
                f" {bare} captures have no masks: all pixels are searched, and the box is that of "
                "the points observed in the target view."
            )
        return (
            f"{objects} objects, {len(self.rows)} ordered pairs of views, "
            f"{sum(r.points for r in self.rows)} points; errors relative to {what}; targets are "
            f"the mask pixels at stride {self.config['target_stride']}; brackets: 95 % bootstrap "
            f"intervals over objects.{tracks}"
        )

    def table(
        self, fmt: TableFormat = "markdown", cells: Sequence[Sequence[str]] | None = None
    ) -> str:
        """Return cells as a table.

        Args:
            fmt: "markdown" or "html".
            cells: Rows with the header first; those of `cells` when None.

        Returns:
            The table as text.
        """
        header, *rows = cells or self.cells()
        if fmt == "markdown":
            ruler = ["---"] + ["---:"] * (len(header) - 1)
            return "\n".join("| " + " | ".join(r) + " |" for r in (header, ruler, *rows))
        lines = [_html_row("th", header), *(_html_row("td", row) for row in rows)]
        return "<table>\n" + "\n".join(lines) + "\n</table>"

    def card(self) -> dict[str, Any]:
        """Return the facts for a model card.

        Returns:
            What equifeat.checkpoint.save_model takes as card.
        """
        header, *rows = self.cells()
        return {
            "results": [dict(zip(header, row, strict=True)) for row in rows],
            "note": self.caption(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; the summaries are for readers, not read back.

        Returns:
            A dictionary for JSON; NaN is None.
        """
        parts: dict[str, Bin | None] = {"all": None}
        parts |= {f"{b[0]:g}-{b[1]:g}": b for b in self.bins}
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "config": self.config,
            "models": list(self.models),
            "metrics": list(self.metrics),
            "summary": {
                model: {
                    part: {m: _plain(s) for m, s in self.summary(model, within).items()}
                    for part, within in parts.items()
                }
                for model in self.models
            },
            "rows": [
                {**row._asdict(), "scores": {m: list(v) for m, v in row.scores.items()}}
                for row in self.rows
            ],
        }

    def to_json(self) -> str:
        """Return the result as JSON.

        Returns:
            Text.
        """
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the result as JSON.

        Args:
            path: File to write.
        """
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> EquivarianceResult:
        """Read what `to_json` wrote.

        Args:
            text: JSON.

        Returns:
            The result.

        Raises:
            RecipeError: Not such a result, or of another version.
        """
        try:
            data = json.loads(text)
            found = (data["format"], data["version"])
            if found != (_FORMAT, _VERSION):
                raise RecipeError(f"the result is {found}, but {(_FORMAT, _VERSION)} is needed.")
            rows = tuple(
                PairScore(**{**row, "scores": {m: tuple(v) for m, v in row["scores"].items()}})
                for row in data["rows"]
            )
            return cls(data["config"], tuple(data["models"]), rows)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"the text is not an equivariance result ({type(error).__name__}: {error}); "
                "`equifeat evaluate equivariance --out` writes one."
            ) from error


def _in_bin(row: PairScore, within: Bin) -> bool:
    # Bins are half open; the last one holds its upper end.
    low, high = within
    angle = row.view_change_deg
    return low <= angle < high or (high == BIN_EDGES[-1] and angle >= high)


def _plain(score: Score) -> dict[str, float | None]:
    return {k: None if math.isnan(v) else v for k, v in score._asdict().items()}


def _signed(score: Score) -> str:
    if math.isnan(score.low):
        return f"{score.mean:+.2f}"
    return f"{score.mean:+.2f} [{score.low:+.2f}, {score.high:+.2f}]"


def _html_row(tag: str, row: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

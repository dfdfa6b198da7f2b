"""Results that nobody measured: several tasks, models, seeds, missing values."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.results import ModelRuns, Results, TaskResult, chosen_items
from equifeat.eval.task import Row

ATTACK = '<script>alert("x")</script>'
# |, backticks, dollars and ampersands are markup somewhere
NAMES = ("raw", "untrained | `x`", f"ours {ATTACK}", "$\\frac{1}{0}$ & more")
GAINS = (0.0, 1.0, 5.0, 8.0)


@dataclass(frozen=True)
class Options:
    """Options of a made-up task."""

    alpha: float = 0.1
    radii: tuple[int, ...] = (1, 2)


def made_up_task(
    name: str = "views/made-up",
    task: str = "equivariance",
    metrics: Sequence[Metric] = (Metric("PCDP@.05"), Metric("APE", higher=False)),
    label: str = "view change",
    values: Sequence[str] = ("000-030°", "030-060°", "090-120°"),
    *,
    models: int = 4,
    units: int = 8,
    seeds: int = 1,
    pictures: int = 0,
    options: Options | None = None,
    data_hash: str = "d" * 64,
    first: int = 0,
) -> TaskResult:
    """Rows with a known gain of each model; the last model has the seeds."""
    published = {"vit <b>": {metrics[0].name: 12.5}}
    protocol = Protocol(
        name, task, "all of it", "arXiv 0000.00000", tuple(metrics), "object",
        options=options or Options(), published=published,
    )  # fmt: skip
    runs = []
    for k in range(first, first + models):
        of_seeds = []
        for seed in range(seeds if k == first + models - 1 else 1):
            noise = random.Random(100 * k + seed)
            rows = []
            for unit in range(units):
                hard = random.Random(f"{name} {unit}").gauss(40, 6)
                for part, value in enumerate(values):
                    gain = GAINS[k] + noise.gauss(0, 1) - 2 * part
                    scores = {
                        m.name: abs(noise.gauss(6 - GAINS[k] / 2, 2))
                        if m.mean == "auc"
                        else hard + (gain if m.higher else -gain)
                        for m in metrics
                    }
                    if (unit + part) % 5 == 0:
                        scores[metrics[-1].name] = math.nan
                    if any(m.mean == "auc" for m in metrics) and unit == 3:
                        scores[metrics[0].name] = math.inf
                    weights = {m.name: 1.0 + part for m in metrics if m.mean == "weighted"}
                    labels = {label: value} if label else {}
                    item = f"object {unit}"
                    rows.append(Row(item, item, scores, weights, labels, str(part)))
            of_seeds.append(tuple(rows))
        hashes = tuple(f"{k}{seed}" * 32 for seed in range(len(of_seeds)))
        runs.append(ModelRuns(NAMES[k], hashes, tuple(of_seeds)))
    result = TaskResult(protocol, f"{units} objects.", data_hash, tuple(runs))
    drawn: dict[tuple[str, str], bytes | Image.Image] = {}
    for model in result.models if pictures else ():
        worst, best = chosen_items(result, model.name, pictures)
        drawn |= {(model.name, item): Image.new("RGB", (64, 32)) for item in [*worst, *best]}
    return result.with_pictures(drawn)


def made_up_results(models: int = 4, units: int = 8) -> Results:
    """Three tasks with every kind of mean."""
    areas = (Metric("pose AUC@5°", mean="auc", limit=5.0), Metric("recall", mean="rows"))
    keypoints = (Metric("PCK@.10", mean="rows"), Metric("by class", mean="weighted"))
    categories = ("cat", f"dog {ATTACK}", "bird")
    return Results(
        (
            made_up_task(models=models, units=units, seeds=3, pictures=1),
            made_up_task(
                "scannet/made-up", "geometric", areas, models=models, units=units, pictures=1
            ),
            made_up_task(
                "spair/made-up", "semantic", keypoints, "category", categories,
                models=models, units=units,
            ),
        ),
        {"versions": {"equifeat": "0"}, "command": f"equifeat evaluate {ATTACK}"},
    )  # fmt: skip

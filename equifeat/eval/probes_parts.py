"""A linear probe within one object: which part of its own surface does a patch show?"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from equifeat.errors import EvalDataError
from equifeat.eval.features import FeatureSource
from equifeat.eval.probes_data import ProbeData, ProbeObject, patch_grid
from equifeat.eval.probes_ridge import Moments, fit_probe, is_held_out
from equifeat.eval.probes_truth import at_pixels, object_points, octants
from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.task import Prediction, Row

OCTANTS = 8
_MIN_VIEWS = 4

PART_METRICS = (Metric("mIoU"), Metric("accuracy"))


class PartsProbe(ProbeData):
    """Octants of an object's box, told from a patch in views that the probe has not seen.

    Args:
        root: Folder with train/ and val/.
        protocol: One of the task's, perhaps changed.
    """

    def __init__(self, root: Path, protocol: Protocol) -> None:
        super().__init__(root, protocol)
        for obj in self.val:
            if len(obj.numbers) < _MIN_VIEWS:
                raise EvalDataError(
                    f"{obj.views.where}: {len(obj.numbers)} views are taken, but parts need at "
                    f"least {_MIN_VIEWS}: raise val_views or render more."
                )

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Return what was taken for what in every second view, by patches; see TaskData."""
        obj = self.val[index]
        fitted, tested = obj.numbers[0::2], obj.numbers[1::2]
        kept, held = Moments(), Moments()
        for i, number in enumerate(fitted):
            features, labels = _rows(source, obj, number)
            signs = 2.0 * torch.nn.functional.one_hot(labels, OCTANTS).double() - 1.0
            (held if is_held_out(i, len(fitted)) else kept).add(features, signs)
        probe = fit_probe(kept, held, OCTANTS)
        counts = []
        for number in tested:
            features, labels = _rows(source, obj, number)
            cells = OCTANTS * labels + probe(features).argmax(1)
            counts.append(torch.bincount(cells, minlength=OCTANTS**2).view(OCTANTS, OCTANTS))
        return {"views": torch.tensor(tested), "confusion": torch.stack(counts)}

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Return one row, the object's; see TaskData."""
        name, found = self.items[index], prediction["confusion"].sum(0).double()
        right, true, said = found.diagonal(), found.sum(1), found.sum(0)
        there = true > 0
        values = {metric.name: math.nan for metric in PART_METRICS}
        if bool(there.any()):
            shares = right[there] / (true + said - right)[there]
            values = {
                "mIoU": 100.0 * float(shares.mean()),
                "accuracy": 100.0 * float(right.sum() / true.sum()),
            }
        return [Row(name, name, values)]

    def caption(self) -> str:
        """See TaskData."""
        views = sum(len(obj.numbers) for obj in self.val)
        return (
            f"Octants of the object's own box at the centres of its patches. For each of "
            f"{len(self.items)} objects ridge regression to ±1 is fitted to every second of its "
            f"views ({views} in all) and tested on the others; IoU over these, means over the "
            "octants seen there, then objects; intervals over objects."
        )


def _rows(source: FeatureSource, obj: ProbeObject, number: int) -> tuple[Tensor, Tensor]:
    """(N, D) features of the object's patches and (N,) their octants."""
    view = obj.view(number)
    features, xy = patch_grid(source, view.image)
    keep = at_pixels(view.mask & (view.depth > 0), xy)
    points = at_pixels(object_points(view), xy[keep])
    return features[keep], octants(points, obj.box)

"""Linear probes that are fitted to views of some objects and tested on others."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from equifeat.data.object_views import View
from equifeat.errors import EvalDataError
from equifeat.eval.features import FeatureSource
from equifeat.eval.probes_data import (
    PatchRows,
    ProbeData,
    ProbeObject,
    patch_grid,
)
from equifeat.eval.probes_ridge import Moments, Probe, fit_probe, is_held_out
from equifeat.eval.probes_truth import at_pixels, surface_normals
from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.task import Prediction, Row

_log = logging.getLogger(__name__)
# Views with fewer patches of the object say nothing.
MIN_PATCHES = 10
_ANGLES = (11.25, 22.5, 30.0)

DEPTH_METRICS = (
    Metric("R² aligned"),
    Metric("RMSE aligned", higher=False),
    Metric("RMSE", higher=False),
)
NORMAL_METRICS = (
    Metric("mean angle", "deg", higher=False),
    *(Metric(f"within {angle:g}°") for angle in _ANGLES),
)


class LinearProbe(ProbeData):
    """A linear map from the feature of a patch to what is true of it.

    It is fitted once a model, at the first prediction, from the training objects alone; so it is
    the same in every process and after every interruption.

    Args:
        root: Folder with train/ and val/.
        protocol: One of the task's, perhaps changed.
    """

    targets: int
    """Number of values that are predicted for a patch."""

    def __init__(self, root: Path, protocol: Protocol) -> None:
        super().__init__(root, protocol)
        if len(self.train) < 2:
            raise EvalDataError(
                f"{root}/train: {len(self.train)} object, but at least 2 are needed, since one is "
                "held out to choose the penalty of the probe."
            )
        self._probes: WeakKeyDictionary[FeatureSource, Probe] = WeakKeyDictionary()

    @abstractmethod
    def truth(self, obj: ProbeObject, view: View, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is true of some patches.

        Args:
            obj: The object.
            view: A view of it.
            xy: (N, 2) centres of patches in pixels.

        Returns:
            (N,) which of them count, and (N, targets) what is true of them.
        """

    @abstractmethod
    def values(self, predicted: Tensor, true: Tensor) -> dict[str, float]:
        """Score one view.

        Args:
            predicted: (N, targets).
            true: (N, targets).

        Returns:
            By metric.
        """

    def shown(self, objects: Sequence[ProbeObject], index: int, number: int, view: View) -> Tensor:
        """Return the image that the model sees.

        Args:
            objects: The objects of the split.
            index: Which of them.
            number: Number of the view.
            view: The view.

        Returns:
            (3, H, W) RGB in [0, 1].
        """
        return view.image

    def probe(self, source: FeatureSource) -> Probe:
        """Return the probe of a model, fitted when it is first asked for.

        Args:
            source: The model.

        Returns:
            The probe.
        """
        if source not in self._probes:
            count = sum(len(obj.numbers) for obj in self.train)
            _log.info("%s: fitting to %d views for %s", self.protocol.id, count, source.name)
            kept, held = Moments(), Moments()
            for index, obj in enumerate(self.train):
                into = held if is_held_out(index, len(self.train)) else kept
                for number in obj.numbers:
                    into.add(*self._rows(source, self.train, index, number))
            self._probes[source] = fit_probe(kept, held, self.targets)
        return self._probes[source]

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Return predicted and true values of the patches of every view; see TaskData."""
        probe = self.probe(source)
        rows = [self._rows(source, self.val, index, n) for n in self.val[index].numbers]
        return {
            "views": torch.tensor(self.val[index].numbers),
            "counts": torch.tensor([len(one.targets) for one in rows]),
            "predicted": torch.cat([probe(one.features) for one in rows]).float(),
            "true": torch.cat([one.targets for one in rows]).float(),
        }

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Return one row a view; see TaskData."""
        name, rows = self.items[index], []
        counts = prediction["counts"].tolist()
        pairs = zip(
            torch.split(prediction["predicted"].double(), counts),
            torch.split(prediction["true"].double(), counts),
            strict=True,
        )
        for number, (predicted, true) in zip(prediction["views"].tolist(), pairs, strict=True):
            values: Mapping[str, float] = {m.name: math.nan for m in self.protocol.metrics}
            if len(true) >= MIN_PATCHES:
                values = self.values(predicted, true)
            rows.append(Row(name, name, values, part=str(number)))
        return rows

    def caption(self) -> str:
        """See TaskData."""
        views = sum(len(obj.numbers) for obj in self.train)
        return (
            f"{self.about()} Ridge regression from one patch feature, fitted to {views} views of "
            f"{len(self.train)} objects, tested on {sum(len(o.numbers) for o in self.val)} views "
            f"of {len(self.items)} others; means over the views of an object, then objects; "
            "intervals over objects."
        )

    @abstractmethod
    def about(self) -> str:
        """Return a sentence that says what is predicted and in what unit."""

    def _rows(
        self, source: FeatureSource, objects: Sequence[ProbeObject], index: int, number: int
    ) -> PatchRows:
        view = objects[index].view(number)
        features, xy = patch_grid(source, self.shown(objects, index, number, view))
        keep, true = self.truth(objects[index], view, xy)
        return PatchRows(features[keep], true[keep].double())


class DepthProbe(LinearProbe):
    """z-depth at the centre of a patch, over the object's size."""

    targets = 1

    def truth(self, obj: ProbeObject, view: View, xy: Tensor) -> tuple[Tensor, Tensor]:
        """See LinearProbe."""
        depth = at_pixels(view.depth, xy).double()
        keep = at_pixels(view.mask, xy) & (depth > 0)
        return keep, depth[:, None] / obj.size

    def values(self, predicted: Tensor, true: Tensor) -> dict[str, float]:
        """See LinearProbe."""
        p, t = predicted[:, 0], true[:, 0]
        spread_p, spread_t = p - p.mean(), t - t.mean()
        # Upside down is no depth: the scale is not negative. A constant prediction has scale 0.
        scale = (spread_p @ spread_t).clamp(min=0.0) / (spread_p @ spread_p).clamp(min=1e-12)
        left = spread_t - scale * spread_p
        total = float(spread_t @ spread_t)
        share = 1.0 - float(left @ left) / total if total > 0.0 else math.nan
        return {
            "R² aligned": 100.0 * share,
            "RMSE aligned": 100.0 * float(left.square().mean().sqrt()),
            "RMSE": 100.0 * float((p - t).square().mean().sqrt()),
        }

    def about(self) -> str:
        """See LinearProbe."""
        return (
            "z-depth at the centres of the object's patches; RMSE in percent of the longest side "
            "of the object's box; aligned: after the best scale, at least 0, and shift for each "
            "view; R² is the share of the view's variance of depth that is then explained."
        )


class NormalsProbe(LinearProbe):
    """Surface normal at the centre of a patch."""

    targets = 3

    def truth(self, obj: ProbeObject, view: View, xy: Tensor) -> tuple[Tensor, Tensor]:
        """See LinearProbe."""
        normals, valid = surface_normals(view)
        return at_pixels(valid, xy), at_pixels(normals, xy)

    def values(self, predicted: Tensor, true: Tensor) -> dict[str, float]:
        """See LinearProbe."""
        crossed = torch.linalg.cross(predicted, true).norm(dim=-1)
        angles = torch.rad2deg(torch.atan2(crossed, (predicted * true).sum(-1)))
        shares = {
            f"within {limit:g}°": 100.0 * float((angles <= limit).double().mean())
            for limit in _ANGLES
        }
        return {"mean angle": float(angles.mean()), **shares}

    def about(self) -> str:
        """See LinearProbe."""
        return (
            "Surface normals in camera axes at the centres of the object's patches, without depth "
            "jumps; angles between the predicted direction and the truth."
        )

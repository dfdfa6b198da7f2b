"""Does the model rank whole images as its raw ViT does?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import EvalDataError, RecipeError
from equifeat.eval.features import FeatureSource
from equifeat.eval.models import extractor_hash
from equifeat.eval.probes_data import ProbeData, ViewOptions, patch_grid
from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.shared_trunk import SharedTrunk
from equifeat.eval.task import Prediction, Row
from equifeat.model.extractor import FeatureExtractor

RANKING_METRICS = (
    Metric("overlap"),
    Metric("overlap other objects"),
    Metric("Spearman"),
)


@dataclass(frozen=True)
class RankingOptions(ViewOptions):
    """How many neighbours are compared.

    Args:
        neighbours: Nearest images of an image.
    """

    neighbours: int = 10


class RankingData(ProbeData):
    """Nearest neighbours of every view among all views of the validation objects.

    Args:
        root: Folder with train/ and val/.
        protocol: One of the task's, perhaps changed.
    """

    def __init__(self, root: Path, protocol: Protocol) -> None:
        super().__init__(root, protocol)
        self.neighbours: int = protocol.options.neighbours
        self.of = torch.tensor([i for i, obj in enumerate(self.val) for _ in obj.numbers])
        if len(self.of) < self.neighbours + 2:
            raise EvalDataError(
                f"{root}/val: {len(self.of)} views are taken, too few to compare {self.neighbours} "
                "neighbours of each: take more, or lower neighbours."
            )
        # By hash of the raw ViT, and by model, which is let go with its source.
        self._raw: dict[str, Tensor] = {}
        self._own: WeakKeyDictionary[FeatureSource, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Return similarities of the object's views to all views, both models; see TaskData."""
        if source not in self._own:
            self._own[source] = self._similarities(source)
        own, raw = self._own[source]
        mine = self.of == index
        return {"model": own[mine].float(), "raw": raw[mine].float()}

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Return one row a view; see TaskData."""
        name, rows = self.items[index], []
        places = (self.of == index).nonzero()[:, 0].tolist()
        for place, number, own, raw in zip(
            places,
            self.val[index].numbers,
            prediction["model"].double(),
            prediction["raw"].double(),
            strict=True,
        ):
            rest = torch.arange(len(self.of)) != place
            others = self.of != index
            values = {
                "overlap": overlap(own[rest], raw[rest], self.neighbours),
                "overlap other objects": overlap(own[others], raw[others], self.neighbours),
                "Spearman": 100.0 * spearman(own[rest], raw[rest]),
            }
            rows.append(Row(name, name, values, part=str(number)))
        return rows

    def caption(self) -> str:
        """See TaskData."""
        return (
            f"{len(self.of)} views of {len(self.val)} objects, each described by the mean of its "
            f"L2-normalised patch features; share of the {self.neighbours} nearest other views (or "
            "views of other objects) that the raw ViT names too, and Spearman's correlation of "
            "the similarities to all other views; means over the views of an object, then "
            "objects; intervals over objects."
        )

    def _similarities(self, source: FeatureSource) -> tuple[Tensor, Tensor]:
        """Cosines of all pairs of views: the model's and its raw ViT's."""
        extractor = _extractor(source)
        plain = extractor.raw()
        key = extractor_hash(plain)
        if key not in self._raw:
            raw = FeatureSource(plain, source.spec, f"{source.name} raw", source.device)
            self._raw[key] = self._cosines(raw)
        own = self._raw[key] if extractor_hash(extractor) == key else self._cosines(source)
        return own, self._raw[key]

    def _cosines(self, source: FeatureSource) -> Tensor:
        rows = []
        for obj in self.val:
            for number in obj.numbers:
                features, _ = patch_grid(source, obj.view(number).image)
                rows.append(F.normalize(features, dim=1).mean(0))
        every = F.normalize(torch.stack(rows), dim=1)
        return every @ every.mT


def overlap(own: Float[Tensor, "n"], raw: Float[Tensor, "n"], count: int) -> float:
    """Return how many of the nearest neighbours two models share.

    Args:
        own: (N,) similarities to N candidates.
        raw: (N,) those of another model.
        count: Number of neighbours.

    Returns:
        The share in percent; NaN where there are no more candidates than neighbours.
    """
    if len(own) <= count:
        return math.nan
    named = [set(one.topk(count).indices.tolist()) for one in (own, raw)]
    return 100.0 * len(named[0] & named[1]) / count


def spearman(x: Float[Tensor, "n"], y: Float[Tensor, "n"]) -> float:
    """Return the correlation of ranks.

    Args:
        x: (N,) values.
        y: (N,) other values.

    Returns:
        Between -1 and 1; NaN where one side is constant.
    """
    return float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values.numpy(), return_inverse=True, return_counts=True)
    shared = counts.cumsum() - (counts - 1) / 2.0
    return torch.from_numpy(shared[place])


def _extractor(source: FeatureSource) -> FeatureExtractor:
    model = source.model
    if isinstance(model, SharedTrunk):
        model = model.extractor
    if not isinstance(model, FeatureExtractor):
        raise RecipeError(
            f"{source.name} has no raw ViT whose ranking could be compared: leave it out of "
            "probe/ranking."
        )
    return model

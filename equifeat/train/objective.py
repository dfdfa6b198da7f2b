"""What a step minimises: the loss of the pairs of a batch, and the numbers that are logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from equifeat.data.batch import PairBatch
from equifeat.errors import RecipeError, suggest
from equifeat.loss import (
    ExtraNegatives,
    count_positives,
    info_nce,
    multi_positive_ap,
    smooth_ap_terms,
    soft_labels,
    transport,
)
from equifeat.model.feature_map import FeatureMap
from equifeat.train.distributed import all_sum
from equifeat.train.negatives import NegativesKind, extra_negatives

LossKind = Literal["smooth_ap", "multi_positive_ap", "info_nce", "soft_labels", "transport"]


class Totals(NamedTuple):
    """Sums over pairs, from which means over a step are made, whatever it was split into.

    Attributes:
        loss: Sum of the losses of pairs.
        pairs: Number of pairs.
        ap: Sum of the mean APs of pairs that have a positive; 0 for losses without an AP.
        scored: Number of pairs that have an AP.
        positives: Number of positives.
    """

    loss: Tensor
    pairs: Tensor
    ap: Tensor
    scored: Tensor
    positives: Tensor

    def plus(self, other: Totals | None) -> Totals:
        """Return the sums of two sets of pairs.

        Args:
            other: The other set; None for an empty one.

        Returns:
            The sums.
        """
        return self if other is None else Totals(*(a + b for a, b in zip(self, other, strict=True)))

    def over_ranks(self) -> Totals:
        """Return the sums over all ranks, with one all-reduce.

        Returns:
            The same on every rank.
        """
        return Totals(*all_sum(torch.stack(list(self))).unbind())

    def means(self) -> dict[str, Tensor]:
        """Return what is logged: loss, positives and, for the SmoothAP losses, ap.

        Returns:
            Scalars by name; ap is NaN where no pair has a positive.
        """
        return {
            "loss": self.loss / self.pairs,
            "positives": self.positives / self.pairs,
            "ap": self.ap / self.scored,
        }


class Objective:
    """The mean loss over the pairs of a batch.

    Args:
        loss: "smooth_ap", "multi_positive_ap", "info_nce", "soft_labels" or "transport"
            (docs/losses.md).
        tau: Temperature.
        pos_radius: 3D points nearer than this are positives, in object units.
        neg_radius: 3D points farther than this are negatives.
        negatives: "pair": only those of the pair itself; "batch": also view 1 of the other pairs
            of this rank's batch; "global": also those of all ranks.
        max_negatives: Most negatives of other pairs that a pair is compared with.
        seed: Seed of their choice.
        both_directions: Take the mean of view 0 → view 1 and view 1 → view 0.
        label_radius: Standard deviation of the labels of soft_labels, in object units.

    Attributes:
        has_ap: Whether the loss is an average precision, which is logged then.

    Raises:
        RecipeError: An option that makes no sense.
    """

    def __init__(
        self,
        loss: LossKind,
        tau: float,
        pos_radius: float,
        neg_radius: float,
        negatives: NegativesKind = "pair",
        max_negatives: int = 4096,
        seed: int = 0,
        both_directions: bool = False,
        label_radius: float = 0.02,
    ) -> None:
        for name, value, known in (
            ("loss", loss, get_args(LossKind)),
            ("negatives", negatives, get_args(NegativesKind)),
        ):
            if value not in known:
                raise RecipeError(
                    f"{name} must be one of {', '.join(known)}, not {value!r}."
                    f"{suggest(str(value), known)}"
                )
        if max_negatives < 1:
            raise RecipeError(
                f"max_negatives is {max_negatives}: use 1 or more, or negatives=pair for none"
            )
        if loss == "transport" and negatives != "pair":
            raise RecipeError(
                f"negatives={negatives} does not go with loss=transport, which matches the "
                "keypoints of two views one to one: use negatives=pair"
            )
        self.loss = loss
        self.has_ap = loss in ("smooth_ap", "multi_positive_ap")
        self.tau = tau
        self.pos_radius = pos_radius
        self.neg_radius = neg_radius
        self.negatives: NegativesKind = negatives
        self.max_negatives = max_negatives
        self.seed = seed
        self.both_directions = both_directions
        self.label_radius = label_radius

    def __call__(
        self, maps: FeatureMap, batch: PairBatch, training: bool = True
    ) -> tuple[Tensor, Totals]:
        """Return the mean loss with its graph, and detached sums for the log.

        Args:
            maps: Features of the 2 B views: all views 0, then all views 1.
            batch: The B pairs.
            training: Validation scores every pair alone, so that runs with other batches compare.

        Returns:
            Scalar loss, and the sums over the batch.
        """
        b = len(batch)
        kind = self.negatives if training else "pair"
        d0, d1 = _sample(maps, batch.keypoints0, 0), _sample(maps, batch.keypoints1, b)
        extras = extra_negatives(d1, batch, kind, self.max_negatives, self.seed)
        parts = [
            self._pair(d0[i], d1[i], batch.points3d0[i], batch.points3d1[i], extras[i])
            for i in range(b)
        ]
        losses = torch.stack([loss for loss, _, _ in parts])
        scored = [ap for _, ap, _ in parts if ap is not None]
        count = losses.new_tensor(
            [float(b), float(len(scored)), float(sum(positives for _, _, positives in parts))]
        )
        ap = torch.stack(scored).sum() if scored else losses.new_zeros(())
        totals = Totals(losses.detach().sum(), count[0], ap.to(losses), count[1], count[2])
        return losses.mean(), totals

    def _pair(
        self, d0: Tensor, d1: Tensor, p0: Tensor, p1: Tensor, extra: ExtraNegatives | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """Return the loss, the AP if there is one, and the number of positives."""
        loss, positives = self._one_way(d0, d1, p0, p1, extra)
        if self.both_directions:
            loss = (loss + self._one_way(d1, d0, p1, p0, extra)[0]) / 2.0
        return loss, 1.0 - loss.detach() if self.has_ap and positives else None, positives

    def _one_way(
        self, d0: Tensor, d1: Tensor, p0: Tensor, p1: Tensor, extra: ExtraNegatives | None
    ) -> tuple[Tensor, int]:
        """Return the loss of the rows d0 against the columns d1, and the number of positives."""
        tau = self.tau
        radii: dict[str, Any] = {"pos_radius": self.pos_radius, "neg_radius": self.neg_radius}
        if self.loss == "smooth_ap":
            terms = smooth_ap_terms(d0, d1, p0, p1, tau=tau, extra=extra, **radii)
            return terms.loss, terms.num_positives
        if self.loss == "multi_positive_ap":
            loss = multi_positive_ap(d0, d1, p0, p1, tau=tau, extra=extra, **radii)
        elif self.loss == "info_nce":
            loss = info_nce(d0, d1, p0, p1, temperature=tau, extra=extra, **radii)
        elif self.loss == "soft_labels":
            loss = soft_labels(
                d0, d1, p0, p1, temperature=tau, label_radius=self.label_radius, extra=extra
            )
        else:
            loss = transport(d0, d1, p0, p1, temperature=tau, **radii)
        return loss, count_positives(p0, p1, self.pos_radius)


def _sample(maps: FeatureMap, keypoints: Sequence[Tensor], first: int) -> list[Tensor]:
    """Return the descriptors of each view's own number of keypoints."""
    return [
        FeatureMap(maps.features[j : j + 1], maps.size_hw).sample(xy[None])[0]
        for j, xy in enumerate(keypoints, first)
    ]

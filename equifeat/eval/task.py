"""What a task is: data in its own format, a prediction per item, rows of scores from predictions.

The harness (equifeat/eval/harness.py) runs the two passes: predict every item with a model and
keep the predictions, then score them. Scoring never needs the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from equifeat.eval.features import FeatureSource
from equifeat.eval.protocol import Protocol

Prediction = dict[str, Tensor]


class Row(NamedTuple):
    """Scores of one item, or of a part of it.

    Attributes:
        item: Id of the item.
        unit: What bootstraps draw: name of the object, of the video, …
        values: By name of a metric; NaN where the item says nothing about it.
        weights: By name of a metric, for those whose mean is "weighted".
        labels: What tables break down by: {"category": "chair", "view change": "30-60 deg"}.
        part: Which part of the item, where an item has several rows.
    """

    item: str
    unit: str
    values: Mapping[str, float]
    weights: Mapping[str, float] = {}
    labels: Mapping[str, str] = {}
    part: str = ""


class TaskData(ABC):
    """A data set, opened under one protocol.

    Args:
        root: Its folder.
        protocol: The protocol.
        items: Ids of the items, unique, in an order that never changes.
        data_hash: SHA-256 of what the scores depend on: annotations by content, pictures by
            relative path and size (see equifeat.eval.data_hash).
    """

    def __init__(
        self, root: Path, protocol: Protocol, items: Sequence[str], data_hash: str
    ) -> None:
        self.root = root
        self.protocol = protocol
        self.items = tuple(items)
        self.data_hash = data_hash

    @abstractmethod
    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Run the model on one item.

        Args:
            index: Index into ``items``.
            source: The model, under the protocol's feature options.

        Returns:
            All that scoring needs, as CPU tensors by name: matched points, tracks, poses. Small:
            never features.
        """

    @abstractmethod
    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Score the prediction of one item.

        Args:
            index: Index into ``items``.
            prediction: What `predict` gave, perhaps read from a cache.

        Returns:
            Rows; one for most tasks.
        """

    def picture(self, index: int, prediction: Prediction) -> Image.Image | None:
        """Draw what was predicted beside the truth, for the report's best and worst examples.

        Args:
            index: Index into ``items``.
            prediction: What `predict` gave.

        Returns:
            A picture at most some 1,200 px wide, or None where there is nothing to see.
        """
        return None

    @abstractmethod
    def caption(self) -> str:
        """Return one or two sentences that say what the numbers mean.

        Returns:
            Counts, normaliser or threshold basis, averaging, unit of the intervals.
        """


@dataclass(frozen=True)
class Check:
    """What `equifeat data TASK --check DIR` found.

    Args:
        counts: By what is counted, how many there are.
        problems: One sentence each; empty when the data is complete.
        notes: Sentences that are no fault, such as a missing SHA256SUMS.
    """

    counts: Mapping[str, int]
    problems: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)


class Task(NamedTuple):
    """One task of the harness.

    Attributes:
        name: Word on the command line.
        protocols: Its protocols; the first is the default.
        open: Opens a folder under a protocol; raises EvalDataError with `where` in it when
            the folder does not hold the data.
        check: Counts and verifies a folder under a protocol.
        where: By family of protocols (the part of the id before "/"), one sentence that says where
            to get the data and how the folder must look.
    """

    name: str
    protocols: tuple[Protocol, ...]
    open: Callable[[Path, Protocol], TaskData]
    check: Callable[[Path, Protocol], Check]
    where: Mapping[str, str]

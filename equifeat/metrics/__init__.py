"""Metrics: tensors in, numbers out; one family a module."""

from equifeat.metrics.dense import (
    THRESHOLDS,
    Normalizer,
    ape,
    box_normalizer,
    matching_errors,
    normalizer_px,
    pcdp,
    pck,
)
from equifeat.metrics.statistics import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    paired_difference,
)

__all__ = [
    "THRESHOLDS",
    "Interval",
    "Normalizer",
    "PairedDifference",
    "ape",
    "bootstrap_interval",
    "box_normalizer",
    "matching_errors",
    "normalizer_px",
    "paired_difference",
    "pcdp",
    "pck",
]

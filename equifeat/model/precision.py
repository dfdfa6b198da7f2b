"""Names of the types that a model computes in."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from equifeat.errors import RecipeError, suggest
from equifeat.model.extractor import FeatureExtractor

Precision = Literal["float32", "bfloat16", "float16"]


def set_precision(extractor: FeatureExtractor, precision: str) -> None:
    """Run an extractor in a precision from now on.

    Args:
        extractor: The model; its backbone changes for all that share it.
        precision: "float32" changes nothing; "bfloat16" and "float16" are those of
            `FeatureExtractor.half_precision`.

    Raises:
        RecipeError: There is no such precision.
    """
    known = get_args(Precision)
    if precision not in known:
        raise RecipeError(
            f"precision {precision!r} is not one of {', '.join(known)}.{suggest(precision, known)}"
        )
    if precision != "float32":
        extractor.half_precision(getattr(torch, precision))

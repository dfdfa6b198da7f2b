"""Number formats of training: what may be chosen, the TF32 switch, full float32 for the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from equifeat.errors import RecipeError
from equifeat.model.extractor import FeatureExtractor

# Type of the frozen weights and of matrix products, by Lightning's name.
_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def apply_precision(extractor: FeatureExtractor, precision: str) -> None:
    """Keep the frozen weights in the type in which a precision uses them.

    Args:
        extractor: The model, with float32 weights.
        precision: Lightning's name.

    Raises:
        RecipeError: The precision would train in half precision, or save what is not float32.
    """
    if precision not in _DTYPES:
        raise RecipeError(
            f"trainer.precision is {precision!r}, which would not keep the trained weights in "
            f"float32: use {', '.join(_DTYPES)}"
        )
    dtype = _DTYPES[precision]
    if dtype is not None:
        extractor.compute_in(dtype)


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 matrix products and convolutions on NVIDIA GPUs.

    Args:
        on: True is faster with about 3 significant digits; False is float32 throughout.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute matrix products in full float32 inside the block, whatever `tf32` says."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)

"""A linear probe of object against background, before backgrounds that are not black."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from equifeat.data.augment import check_background
from equifeat.data.object_views import View
from equifeat.errors import EvalDataError
from equifeat.eval.probes_data import BACKGROUNDS, ProbeObject, ProbeOptions
from equifeat.eval.probes_linear import LinearProbe
from equifeat.eval.probes_truth import at_pixels, on_background
from equifeat.eval.protocol import Metric, Protocol
from equifeat.seeding import numpy_generator

_BACKGROUND_STREAM = 73

SEGMENTATION_METRICS = (Metric("mIoU"), Metric("IoU object"), Metric("IoU background"))


@dataclass(frozen=True)
class SegmentationOptions(ProbeOptions):
    """What the objects stand before.

    Args:
        background: "drawn" (noise, a gradient, or a blown-up piece of another object, in turn) or
            "files" (crops of the images in backgrounds/ beside train/ and val/).
    """

    background: Literal["drawn", "files"] = "drawn"


class SegmentationProbe(LinearProbe):
    """Whether a patch shows the object, before backgrounds that are not black."""

    targets = 1

    def __init__(self, root: Path, protocol: Protocol) -> None:
        super().__init__(root, protocol)
        self.files = protocol.options.background == "files"
        if self.files:
            check_background(str(root / BACKGROUNDS))
        elif len(self.val) < 2:
            raise EvalDataError(
                f"{root}/val: {len(self.val)} object, but at least 2 are needed, since pieces of "
                "others are backgrounds; or give images: --set background=files."
            )

    def shown(self, objects: Sequence[ProbeObject], index: int, number: int, view: View) -> Tensor:
        """Return the object before another background; see LinearProbe."""
        obj = objects[index]
        rng = numpy_generator(
            self.protocol.seed, _BACKGROUND_STREAM, zlib.crc32(obj.name.encode()), number
        )
        if self.files:
            return on_background(view, str(self.root / BACKGROUNDS), None, rng)
        kind = ("noise", "gradient", "clutter")[obj.numbers.index(number) % 3]
        other = None
        if kind == "clutter":
            others = [one for i, one in enumerate(objects) if i != index]
            chosen = others[int(rng.integers(len(others)))]
            other = chosen.view(chosen.numbers[int(rng.integers(len(chosen.numbers)))])
        return on_background(view, kind, other, rng)

    def truth(self, obj: ProbeObject, view: View, xy: Tensor) -> tuple[Tensor, Tensor]:
        """See LinearProbe."""
        there = at_pixels(view.mask, xy)
        return torch.ones_like(there), torch.where(there, 1.0, -1.0)[:, None].double()

    def values(self, predicted: Tensor, true: Tensor) -> dict[str, float]:
        """See LinearProbe."""
        said, there = predicted[:, 0] > 0, true[:, 0] > 0
        both = []
        for a, b in ((said, there), (~said, ~there)):
            union = float((a | b).sum())
            both.append(100.0 * float((a & b).sum()) / union if union else math.nan)
        known = [one for one in both if not math.isnan(one)]
        return {
            "mIoU": sum(known) / len(known),
            "IoU object": both[0],
            "IoU background": both[1],
        }

    def about(self) -> str:
        """See LinearProbe."""
        behind = (
            "crops of image files"
            if self.files
            else "noise, gradients and pieces of other objects in turn"
        )
        return (
            f"Object or background at the centres of all patches, by the sign of a fit to ±1, "
            f"before {behind}."
        )

"""Estimate the pose of an object in a region of an image by matching it to templates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from equifeat.eval.bop_detections import Box, Region
from equifeat.eval.bop_models import BopModels
from equifeat.eval.bop_protocols import BopOptions
from equifeat.eval.bop_templates import Bank, Template, TemplateOptions, build_bank
from equifeat.eval.features import FeatureSource
from equifeat.eval.matching import mutual_nearest
from equifeat.eval.object_crop import ObjectCrop, crop_object
from equifeat.eval.pnp import PoseEstimate, estimate_pose
from equifeat.geometry.pixels import SizeHW, inside, pixel_index

# Descriptors of so many objects are kept: a scene has fewer.
_BANKS = 8


class TemplateLocalizer:
    """Matches regions of images to templates of objects.

    Args:
        templates: By object.
        models: Their surfaces.
        options: Of the protocol.
        seed: Of RANSAC.
    """

    def __init__(
        self,
        templates: Mapping[int, list[Template]],
        models: BopModels,
        options: BopOptions,
        seed: int,
    ) -> None:
        self.templates, self.models = templates, models
        self.options, self.seed = options, seed
        self._banks: OrderedDict[int, Bank] = OrderedDict()
        self._source: FeatureSource | None = None

    def locate(
        self, image: Tensor, K: Tensor, obj: int, region: Region, source: FeatureSource
    ) -> PoseEstimate | None:
        """Estimate the pose of an object.

        Args:
            image: (3, H, W) RGB in [0, 1].
            K: (3, 3) intrinsics, corner convention.
            obj: Which object.
            region: Where it is.
            source: The model.

        Returns:
            The estimate, in mm; None where the region is empty or outside the image.
        """
        size_hw = (int(image.shape[-2]), int(image.shape[-1]))
        if clipped(region.box, size_hw) is None:
            return None
        bank = self._bank(obj, source)
        return localize(image, K, region, bank, self.options, self.seed, source)

    def _bank(self, obj: int, source: FeatureSource) -> Bank:
        if self._source is not source:
            self._banks.clear()
            self._source = source
        if obj not in self._banks:
            how = TemplateOptions(
                self.options.crop,
                self.options.margin,
                self.options.stride,
                self.options.background == "black",
                self.options.template_points == "depth",
                self.options.template_pixels,
            )
            self._banks[obj] = build_bank(
                self.templates[obj], self.models[obj].surface, how, source
            )
            while len(self._banks) > _BANKS:
                self._banks.popitem(last=False)
        self._banks.move_to_end(obj)
        return self._banks[obj]


def localize(
    image: Tensor,
    K: Tensor,
    region: Region,
    bank: Bank,
    options: BopOptions,
    seed: int,
    source: FeatureSource,
) -> PoseEstimate | None:
    """Estimate the pose of an object that a bank describes.

    Args:
        image: (3, H, W) RGB in [0, 1].
        K: (3, 3) intrinsics, corner convention.
        region: Where the object is.
        bank: Descriptors of the object's points.
        options: Crop, stride, background and PnP; the rest says nothing here.
        seed: Of RANSAC.
        source: The model.

    Returns:
        The estimate, in the unit of the bank's points; its inliers are of the mutual nearest
        neighbours. None where the region is empty or outside the image.
    """
    black = options.background == "black"
    seen = image * region.mask if black and region.mask is not None else image
    size_hw = (int(image.shape[-2]), int(image.shape[-1]))
    box = clipped(region.box, size_hw)
    if box is None:
        return None
    crop = crop_object(seen, box, options.margin, options.crop)
    xy = _points(crop, options.stride, region, size_hw)
    if not len(xy):
        return None
    features = source(crop.image)
    found = features.sample(xy[None].to(features.features.device))[0]
    to = mutual_nearest(found, bank.descriptors).matches0.cpu()
    matched = to >= 0
    return estimate_pose(
        bank.points[to[matched]],
        xy[matched].double(),
        crop.camera(K),
        threshold_px=options.threshold_px,
        iterations=options.iterations,
        seed=seed,
        method=options.method,
    )


def clipped(box: Box, size_hw: SizeHW) -> Box | None:
    """Return the part of a box in an image.

    Args:
        box: Left, top, right, bottom in pixels.
        size_hw: Height and width of the image.

    Returns:
        The part; None where there is none.
    """
    h, w = size_hw
    left, top, right, bottom = box
    inner = (max(left, 0.0), max(top, 0.0), min(right, float(w)), min(bottom, float(h)))
    return inner if inner[2] > inner[0] and inner[3] > inner[1] else None


def _points(crop: ObjectCrop, stride: int, region: Region, size_hw: SizeHW) -> Tensor:
    """Points of the crop on the object."""
    xy = crop.grid(stride)
    whole = crop.to_image(xy)
    left, top, right, bottom = region.box
    keep = inside(whole, size_hw)
    keep &= (whole >= whole.new_tensor([left, top])).all(dim=1)
    keep &= (whole < whole.new_tensor([right, bottom])).all(dim=1)
    if region.mask is not None:
        x, y = pixel_index(whole).unbind(1)
        h, w = region.mask.shape
        keep &= region.mask[y.clamp(0, h - 1), x.clamp(0, w - 1)]
    return torch.as_tensor(xy[keep])

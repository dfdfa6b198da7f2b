"""The pose of an object that is known from a few posed views: match to them, then PnP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equifeat.data.object_views import View
from equifeat.downstream.posed_views import checked_camera, checked_image, posed_views
from equifeat.errors import RecipeError, ViewsError
from equifeat.eval.bop_detections import Region
from equifeat.eval.bop_localizer import localize
from equifeat.eval.bop_protocols import BopOptions
from equifeat.eval.bop_templates import Bank, TemplateOptions, describe_view
from equifeat.eval.features import Dense, FeatureSource
from equifeat.eval.object_crop import box_of
from equifeat.eval.pnp import PnpMethod
from equifeat.eval.protocol import FeatureSpec
from equifeat.model.inputs import OneImage


@dataclass(frozen=True)
class PoseOptions:
    """How templates and images are looked at, and how the pose is found.

    Args:
        crop: Side of the square around the object that the model sees, pixels.
        margin: Side of that square over the longer side of the object's box.
        stride: Pixels of the crop from one descriptor to the next.
        black: Whether all but the object is painted black, where a mask is given.
        threshold_px: Largest reprojection error of an inlier, in pixels of the crop.
        iterations: Most RANSAC iterations.
        method: "epnp" is OpenCV's EPnP in RANSAC, "poselib" LO-RANSAC over P3P with a refinement
            by all inliers.
        seed: Of RANSAC.
    """

    crop: int = 448
    margin: float = 1.2
    stride: int = 4
    black: bool = True
    threshold_px: float = 8.0
    iterations: int = 10000
    method: PnpMethod = "epnp"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.crop < 16 or self.stride < 1 or not self.margin >= 1.0:
            raise RecipeError(
                f"crop={self.crop}, stride={self.stride} and margin={self.margin:g} must be at "
                "least 16 px, 1 px and 1."
            )


class ObjectPose(NamedTuple):
    """Where an object is.

    Attributes:
        cam_from_world: (4, 4) float64, OpenCV axes; world = the axes and the unit of the templates'
            poses. The identity when ok is False.
        inliers: Matches that agree with the pose.
        matches: Mutual nearest neighbours of the image and the templates.
        confidence: inliers / matches, 0 to 1; not a probability, but comparable between images.
        ok: Whether there is a pose: at least 6 inliers.
    """

    cam_from_world: Tensor
    inliers: int
    matches: int
    confidence: float
    ok: bool


class PoseFromTemplates:
    """Finds an object that a few posed views with depth show, without training.

    Args:
        model: Anything with ``dense(images, resolution)``, such as `equifeat.load` gives.
        options: How.

    Attributes:
        bank: Descriptors and 3D points of the templates, after `fit`.
    """

    def __init__(self, model: Dense, options: PoseOptions | None = None) -> None:
        self.options = options or PoseOptions()
        self.bank: Bank | None = None
        self._source = FeatureSource(model, FeatureSpec())

    def fit(
        self,
        images: Tensor | Sequence[OneImage],
        depths: Tensor | Sequence[Tensor],
        K: Tensor,
        cam_from_world: Tensor,
        masks: Tensor | Sequence[Tensor] | None = None,
    ) -> PoseFromTemplates:
        """Describe the object from posed views with depth.

        Args:
            images: As in `equifeat.downstream.posed_views.posed_views`, like all others.
            depths: z-depth in the unit of the poses.
            K: Intrinsics.
            cam_from_world: Poses.
            masks: Where the object is; None takes all pixels with depth.

        Returns:
            Itself.

        Raises:
            ImageError: An image is none.
            ViewsError: The views do not fit together, or show nothing.
        """
        return self.fit_views(posed_views(images, depths, K, cam_from_world, masks))

    def fit_views(self, views: Sequence[View]) -> PoseFromTemplates:
        """Describe the object from views.

        Args:
            views: For example of `equifeat.downstream.posed_views.views_of_folder`.

        Returns:
            Itself.

        Raises:
            ViewsError: No view has depth on the object.
        """
        options = self.options
        how = TemplateOptions(
            options.crop, options.margin, options.stride, options.black, True, "corner"
        )
        found = [
            describe_view(
                view.image,
                view.depth.double(),
                view.mask,
                view.camera.K.double(),
                view.cam_from_world.double(),
                how,
                self._source,
            )
            for view in views
        ]
        kept = [bank for bank in found if bank is not None]
        if not kept:
            raise ViewsError(
                f"none of {len(found)} views has depth on the object: check that depth is in the "
                "unit of the poses, 0 where unknown, and that masks are not empty."
            )
        self.bank = Bank(
            torch.cat([bank.descriptors for bank in kept]), torch.cat([b.points for b in kept])
        )
        return self

    def estimate(self, image: OneImage, K: Tensor, mask: Tensor | None = None) -> ObjectPose:
        """Find the object in an image.

        Args:
            image: A tensor (3, H, W), an array (H, W, 3), a PIL image or a file.
            K: (3, 3) intrinsics; the first pixel's centre is (0.5, 0.5).
            mask: (H, W) where the object is, from any detector or segmenter; a filled box will do.
                None searches the whole image.

        Returns:
            The pose.

        Raises:
            ImageError: The image is none.
            ViewsError: There are no templates yet, or K or the mask does not fit.
            MissingExtraError: OpenCV or PoseLib is not installed.
        """
        if self.bank is None:
            raise ViewsError("there are no templates yet: call fit() before estimate().")
        pixels = checked_image(image, "the image")
        camera = checked_camera(K, pixels)
        h, w = camera.size_hw
        region = Region((0.0, 0.0, float(w), float(h)), None)
        if mask is not None:
            region = _region(torch.as_tensor(mask).detach().cpu().bool(), (h, w))
        options = self.options
        how = BopOptions(
            crop=options.crop,
            margin=options.margin if mask is not None else 1.0,
            background="black" if options.black else "keep",
            stride=options.stride,
            threshold_px=options.threshold_px,
            iterations=options.iterations,
            method=options.method,
        )
        found = localize(pixels, camera.K, region, self.bank, how, options.seed, self._source)
        if found is None:
            return ObjectPose(torch.eye(4, dtype=torch.float64), 0, 0, 0.0, False)
        inliers, matches = int(found.inliers.sum()), len(found.inliers)
        return ObjectPose(
            found.cam_from_object, inliers, matches, inliers / max(matches, 1), found.ok
        )


def _region(mask: Tensor, size_hw: tuple[int, int]) -> Region:
    """The part of an image that a mask shows; an empty one for an empty mask."""
    if tuple(mask.shape) != size_hw:
        raise ViewsError(
            f"the mask must have the image's size {size_hw} (height, width), not "
            f"{tuple(mask.shape)}."
        )
    return Region(box_of(mask) or (0.0, 0.0, 0.0, 0.0), mask)

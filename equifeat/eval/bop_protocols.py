"""The protocols of BOP data sets, their options, and where the data is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from equifeat.errors import RecipeError
from equifeat.eval.bop_score import METRICS
from equifeat.eval.bop_templates import PixelCenters
from equifeat.eval.protocol import FeatureSpec, Metric, Protocol


@dataclass(frozen=True)
class BopOptions:
    """Options of the BOP protocols.

    Args:
        test_split: Folder of the test images.
        test_pixels: Convention of their K: "integer" where the first pixel's centre is (0, 0).
        template_split: Folder of the images that show the objects in known poses.
        template_pixels: Convention of their K.
        templates: Templates of each object.
        template_visible: Instances less visible than this are no templates.
        template_points: 3D points of templates from their depth images, or from the model.
        detections: Where the object is: "visib_mask" (the true visible mask), "bbox_visib" (its
            box), or a JSON file of detections in the data folder.
        crop: Side of the crops given to the model, pixels.
        margin: Side of the square window over the longer side of the object's box.
        background: "black" paints all but the object black, where its mask is known.
        stride: Pixels of the crop between descriptors.
        threshold_px: Largest reprojection error of inliers, in pixels of the crop.
        iterations: Most RANSAC iterations.
        method: Solver of PnP.
        vsd: Whether VSD is scored; it needs the test images' depth.
        vsd_delta: Tolerance of VSD's visibility test, mm.
    """

    test_split: str = "test"
    test_pixels: PixelCenters = "integer"
    template_split: str = "train_real"
    template_pixels: PixelCenters = "integer"
    templates: int = 16
    template_visible: float = 0.8
    template_points: Literal["depth", "model"] = "depth"
    detections: str = "visib_mask"
    crop: int = 448
    margin: float = 1.2
    background: Literal["keep", "black"] = "keep"
    stride: int = 8
    threshold_px: float = 10.0
    iterations: int = 10000
    method: Literal["epnp", "poselib"] = "epnp"
    vsd: bool = True
    vsd_delta: float = 15.0


_SOURCE = (
    "Errors and average recall: BOP Challenge 2019-2022 (Hodan et al., ECCVW 2020; "
    "github.com/thodan/bop_toolkit). Estimating by templates: this project."
)
_RECALLS = tuple(Metric(name, mean="rows") for name in METRICS)


def _protocol(name: str, about: str, unit: str, options: BopOptions) -> Protocol:
    # 448 px of a patch size of 14; other patch sizes get the same grid
    features = FeatureSpec(resolution=32)
    return Protocol(f"bop/{name}", "pose", about, _SOURCE, _RECALLS, unit, features, options)


PROTOCOLS: tuple[Protocol, ...] = (
    _protocol(
        "ycbv-templates",
        "6D localisation on YCB-V from 16 real templates of each object.",
        "scene",
        BopOptions(),
    ),
    _protocol(
        "lm-templates",
        "6D localisation on LM-O or LINEMOD from 16 rendered templates of each object.",
        # LM-O has one scene only
        "image",
        BopOptions(template_split="train_pbr", template_pixels="corner"),
    ),
)

WHERE: dict[str, str] = {
    "bop": (
        "Get a BOP data set such as YCB-V or LM-O from https://bop.felk.cvut.cz/datasets (or "
        "https://huggingface.co/bop-benchmark): base archive, models, test images and a training "
        "split. The folder holds models/obj_000001.ply … and models/models_info.json (models_eval/ "
        "is preferred), test_targets_bop19.json, and test/ and train_real/ (or train_pbr/) with "
        "000001/scene_camera.json, scene_gt.json, scene_gt_info.json, rgb/, depth/, mask_visib/."
    )
}


def check_options(options: BopOptions) -> None:
    """Refuse options that make no sense.

    Args:
        options: Of the protocol.

    Raises:
        RecipeError: One of them.
    """
    least = {"templates": 1, "crop": 16, "margin": 0.1, "stride": 1, "iterations": 1}
    for name, low in least.items():
        if getattr(options, name) < low:
            raise RecipeError(f"{name}={getattr(options, name)} must be at least {low}.")
    for name in ("threshold_px", "vsd_delta"):
        if not getattr(options, name) > 0:
            raise RecipeError(f"{name}={getattr(options, name)} must be above 0.")
    for name in ("test_split", "template_split"):
        if Path(getattr(options, name)).name != getattr(options, name) or ".." in getattr(
            options, name
        ):
            raise RecipeError(
                f"{name}={getattr(options, name)!r} must be the name of a folder in the data."
            )

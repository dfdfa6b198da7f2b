"""The protocols of OnePose data sets, their options, and where the data is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from equifeat.errors import RecipeError
from equifeat.eval.matching import MatchDtype
from equifeat.eval.pnp import PnpMethod
from equifeat.eval.protocol import Metric, Protocol

THRESHOLDS = (1, 3, 5)
ADD = "ADD-0.1d"


@dataclass(frozen=True)
class OnePoseOptions:
    """Options of the OnePose protocols.

    Args:
        cell: Pixels of the picture a patch stands for: a picture of 512 px gets 512 // 8 patches
            on its longer side. "resolution" of the feature options goes before it.
        templates: Frames of sequence 1 an object is known from, evenly spread; 0 takes all.
        descriptors: Template descriptors of an object at most, a seeded draw of all.
        keypoint_pixels: Where keypoints2d says (0, 0): "integer" at the first pixel's centre, as
            OnePose++ writes them; "corner" samples them as the released code does.
        query_stride: Pixels of the picture between query points.
        frame_step: Every so-manieth frame of sequence 2 is asked for.
        dtype: Type of the matching.
        method: Solver of PnP.
        threshold_px: Largest reprojection error of inliers, pixels of the picture.
        iterations: Most RANSAC iterations.
        min_inliers: With fewer the pose counts as the identity.
    """

    cell: int = 8
    templates: int = 0
    descriptors: int = 120000
    keypoint_pixels: Literal["integer", "corner"] = "integer"
    query_stride: int = 4
    frame_step: int = 10
    dtype: MatchDtype = "float32"
    method: PnpMethod = "epnp"
    threshold_px: float = 8.0
    iterations: int = 10000
    min_inliers: int = 6


def check_options(options: OnePoseOptions) -> None:
    """Refuse options that make no sense.

    Args:
        options: Of the protocol.

    Raises:
        RecipeError: One of them.
    """
    least = {
        **dict.fromkeys(("cell", "query_stride", "frame_step", "iterations", "descriptors"), 1),
        "templates": 0,
        "min_inliers": 4,
    }
    for name, low in least.items():
        if getattr(options, name) < low:
            raise RecipeError(f"{name}={getattr(options, name)} must be at least {low}.")
    if not options.threshold_px > 0:
        raise RecipeError(f"threshold_px={options.threshold_px:g} must be above 0.")


def accuracy_name(k: int) -> str:
    """Return the heading of the share of poses within k cm and k degrees."""
    return f"{k}cm-{k}deg"


def _published() -> dict[str, dict[str, float]]:
    """ArXiv 2411.19458 v1: 1, 3 and 5 cm-deg of plain and finetuned features."""
    rows = {
        "vit_base_patch14_dinov2.lvd142m": (9.43, 48.45, 67.45, 13.58, 58.03, 77.35),
        "vit_base_patch14_reg4_dinov2.lvd142m": (9.95, 52.65, 71.72, 13.41, 59.32, 78.64),
        "vit_base_patch16_224.mae": (4.41, 20.76, 32.27, 10.27, 39.37, 52.97),
        "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k": (
            *(2.85, 19.65, 33.84),
            *(6.72, 35.63, 52.94),
        ),
        "deit3_base_patch16_224.fb_in1k": (2.55, 16.85, 31.67, 7.20, 33.24, 49.43),
    }
    names = [accuracy_name(k) for k in THRESHOLDS]
    out = {}
    for model, values in rows.items():
        out[model] = dict(zip(names, values[:3], strict=True))
        out[f"{model} + 3DCorrEnhance"] = dict(zip(names, values[3:], strict=True))
    return out


_OURS = Protocol(
    "onepose/lowtexture",
    "pose",
    "Pose of objects known from one video in frames of another: nearest descriptors, PnP",
    "arXiv 2411.19458 (ICLR 2025), github.com/qq456cvb/3DCorrEnhance evaluate.py; data: "
    "OnePose++ (NeurIPS 2022), github.com/zju3dv/OnePose_Plus_Plus",
    (*(Metric(accuracy_name(k)) for k in THRESHOLDS), Metric(ADD)),
    "object",
    options=OnePoseOptions(),
)
PROTOCOLS: tuple[Protocol, ...] = (
    _OURS,
    replace(
        _OURS,
        id="onepose/lowtexture-mef",
        about="The same as released, with template keypoints half a pixel off",
        options=OnePoseOptions(keypoint_pixels="corner"),
        published=_published(),
    ),
)

WHERE: dict[str, str] = {
    "onepose": (
        "Get OnePose_LowTexture and its reconstruction by OnePose++ from "
        "https://github.com/zju3dv/OnePose_Plus_Plus. The folder holds "
        "lowtexture_test_data/0700-toyrobot-others/toyrobot-1/ … (id-name-category, name-1 and "
        "name-2) with color/0.png, intrin_ba/0.txt, poses_ba/0.txt and in name-1 anno_loftr/0.json "
        "…, and sfm_output/outputs_softmax_loftr_loftr/0700-toyrobot-others/anno/"
        "anno_3d_average.npz."
    )
}

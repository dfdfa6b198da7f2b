"""The protocols of video tracking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from equifeat.data.tracked_video import QueryMode
from equifeat.eval.protocol import FeatureSpec, Metric, Protocol
from equifeat.eval.tracker import TrackerOptions
from equifeat.metrics.tapvid import PIXELS

TAPVID_METRICS = (
    *(Metric(name) for name in ("AJ", "δ_avg", "OA")),
    *(Metric(f"δ<{p}") for p in PIXELS),
)
BADJA_METRICS = (Metric("δ^seg"), Metric("δ^3px"))
# The longer side of DAVIS at 480p: `radius` is meant there.
REFERENCE_WIDTH = 854


@dataclass(frozen=True)
class TrackingOptions(TrackerOptions):
    """How videos are read, tracked (see TrackerOptions) and scored.

    Args:
        radius: As in TrackerOptions, in pixels of a video whose longer side is 854.
        layout: Format of the folder.
        queries: "strided" asks for every point every few frames, "first" once.
        query_stride: Those few frames.
        frame_hw: Size that frames are resized to (Lanczos) before the model; 0, 0 for their own.
        keep: Floating type in which features wait for their use.
        height: BADJA's 3 px are pixels of the video at this height.
    """

    layout: Literal["davis", "rgb-stacking", "kinetics", "strided", "badja"] = "davis"
    queries: QueryMode = "strided"
    query_stride: int = 5
    frame_hw: tuple[int, int] = (0, 0)
    keep: Literal["float32", "float16"] = "float32"
    height: int = 480


# ArXiv 2411.19458 v1: AJ, δ_avg, OA before and after finetuning.
_PUBLISHED = {
    "vit_base_patch14_dinov2.lvd142m": (40.40, 58.11, 81.46, 46.85, 63.84, 84.15),
    "vit_base_patch14_reg4_dinov2.lvd142m": (37.89, 55.43, 80.77, 44.91, 62.23, 83.85),
    "vit_base_patch16_224.mae": (29.99, 48.16, 77.27, 36.04, 54.97, 77.27),
    "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k": (25.86, 41.17, 79.28, 32.13, 49.31, 79.09),
    "deit3_base_patch16_224.fb_in1k": (26.80, 42.06, 78.45, 32.55, 48.41, 78.49),
}


def _published() -> Mapping[str, Mapping[str, float]]:
    out = {}
    for name, values in _PUBLISHED.items():
        for key, part in ((name, values[:3]), (f"{name} + 3DCorrEnhance", values[3:])):
            out[key] = dict(zip(("AJ", "δ_avg", "OA"), part, strict=True))
    return out


def _protocol(name: str, about: str, norm: bool = True, **options: Any) -> Protocol:
    badja = options["layout"] == "badja"
    mef = name == MEF
    return Protocol(
        id=name,
        task="tracking",
        about=about,
        source=(
            "BADJA (arXiv 1811.05804) as PIPs scores it (arXiv 2204.04153)"
            if badja
            else "TAP-Vid (arXiv 2211.03726)"
        )
        + ("; tracker of arXiv 2411.19458 after arXiv 2403.14548"),
        metrics=BADJA_METRICS if badja else TAPVID_METRICS,
        unit="video",
        features=FeatureSpec(resolution=61, overlap=2, norm=norm),
        options=TrackingOptions(**options),
        published=_published() if mef else {},
    )


MEF = "tapvid-davis/mef-strided-256"
PROTOCOLS = (
    _protocol(
        "tapvid-davis/strided-256",
        "every point asked for in every 5th frame, all other frames count; features as trained",
        layout="davis",
    ),
    _protocol(
        "tapvid-davis/first-256",
        "every point asked for where it is first seen, later frames count",
        layout="davis",
        queries="first",
    ),
    _protocol(
        MEF,
        "the paper's own: frames at 476 x 854, strided pickle, tokens before the final norm",
        norm=False,
        layout="strided",
        frame_hw=(476, 854),
    ),
    _protocol(
        "tapvid-strided/256",
        "the strided pickle with frames of any size; features as trained",
        layout="strided",
    ),
    _protocol(
        "tapvid-kinetics/first-256",
        "every point asked for where it is first seen; features kept in half precision",
        layout="kinetics",
        queries="first",
        keep="float16",
    ),
    _protocol(
        "tapvid-kinetics/strided-256",
        "every point asked for in every 5th frame; features kept in half precision",
        layout="kinetics",
        keep="float16",
    ),
    _protocol(
        "tapvid-rgb-stacking/first-256",
        "every point asked for where it is first seen; features kept in half precision",
        layout="rgb-stacking",
        queries="first",
        keep="float16",
    ),
    _protocol(
        "tapvid-rgb-stacking/strided-256",
        "every point asked for in every 5th frame; features kept in half precision",
        layout="rgb-stacking",
        keep="float16",
    ),
    _protocol(
        "badja/first-480",
        "joints seen in the first annotated frame, found again in the other annotated ones",
        layout="badja",
        occlusion="cosine",
    ),
)
# Videos of the official sets, where they are known for sure (tapnet's README; DAVIS videos that
# BADJA annotates).
OFFICIAL = {"tapvid-davis": 30, "tapvid-strided": 30, "tapvid-rgb-stacking": 50, "badja": 7}
WHERE = {
    "tapvid-davis": (
        "Get tapvid_davis.zip from github.com/google-deepmind/tapnet (tapvid) and put "
        "tapvid_davis.pkl into the folder; mef-strided-256 needs *_strided.pkl and "
        "tapvid-davis/INDEX/video/00000.jpg, see tapvid-strided."
    ),
    "tapvid-strided": (
        "Get tapvid_davis_data_strided.pkl and davis_480.zip as github.com/AssafSinger94/"
        "dino-tracker says; the folder must hold *_strided.pkl and tapvid-davis/INDEX/video/"
        "00000.jpg (or davis_480/INDEX/video, or INDEX/video)."
    ),
    "tapvid-kinetics": (
        "Make the shards 0000_of_0010.pkl with generate_tapvid.py of github.com/google-deepmind/"
        "tapnet (tapvid) from your Kinetics videos and put them into the folder."
    ),
    "tapvid-rgb-stacking": (
        "Get tapvid_rgb_stacking.zip from github.com/google-deepmind/tapnet (tapvid) and put "
        "tapvid_rgb_stacking.pkl into the folder."
    ),
    "badja": (
        "Clone github.com/benjiebob/BADJA and unpack DAVIS-2017-trainval-Full-Resolution.zip to "
        "DAVIS in it; the folder must hold joint_annotations/*.json and what they name."
    ),
}

"""The protocols of semantic correspondence, and what can be changed in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from equifeat.eval.locate import MatchMethod
from equifeat.eval.matching import MatchDtype
from equifeat.eval.protocol import FeatureSpec, Mean, Metric, Protocol
from equifeat.eval.semantic_frame import Fit
from equifeat.metrics.keypoints import Basis, CategoryMean

ALPHAS = (0.10, 0.05, 0.15)


@dataclass(frozen=True)
class SemanticOptions:
    """Which pairs, how the model sees them, how a keypoint is found, when it is right.

    Args:
        pairs: List of PF-PASCAL: "different" or "same" views (3DCorrEnhance), or the "test" split.
        split: Split of SPair-71k.
        annotations: Keypoints of PF-PASCAL from the list ("csv") or the .mat files ("mat").
        unequal: Lines of PF-PASCAL with lists of keypoints of two lengths: "first" entries are
            matched, or the pair is "skip"ped.
        per_category: Only so many pairs of each category, drawn by the seed; 0 = all.
        fit: "pad" centred in a square, at its top-left "corner", "stretch"ed to it, or "own" size.
        side: Side of that square in pixels.
        fill: Grey value of the padding, 0 to 255.
        search_padding: Whether matches may fall into the padding.
        grid: Points the target is searched at along its longer side: its features are upsampled
            bilinearly to so many. 0 searches patch centres only.
        similarity: "cosine", or "dot": the target's features keep their length, as in the
            reference's PF-PASCAL code.
        method: "nearest", the most similar place, or "soft_argmax", see equifeat.eval.locate.
        temperature: Of the softmax of "soft_argmax".
        window: Radius around the most similar place that "soft_argmax" averages over, in pixels of
            what the model sees; 0 = everywhere.
        dtype: "bfloat16" searches with rounded descriptors, for speed.
        basis: What α multiplies: longer side of the target's "image", of its "box", or of the box
            around its keypoints ("box-kp").
    """

    pairs: Literal["different", "same", "test"] = "test"
    split: Literal["test", "val", "trn"] = "test"
    annotations: Literal["csv", "mat"] = "csv"
    unequal: Literal["first", "skip"] = "first"
    per_category: int = 0
    fit: Fit = "pad"
    side: int = 840
    fill: int = 0
    search_padding: bool = True
    grid: int = 840
    similarity: Literal["cosine", "dot"] = "cosine"
    method: MatchMethod = "nearest"
    temperature: float = 0.05
    window: float = 0.0
    dtype: MatchDtype = "float32"
    basis: Basis = "image"


# Headings of the averages: what harness.Metric computes, and what weighs a pair in it.
AVERAGES: Mapping[str, tuple[Mean, CategoryMean | None]] = {
    "per image": ("rows", None),
    "per point": ("weighted", "points"),
    "by class": ("weighted", "categories"),
    "by class, pairs": ("weighted", "pairs"),
}


def metric_name(alpha: float, average: str) -> str:
    """Return a heading such as "PCK@.10 per image"; the reference's average has none.

    Args:
        alpha: Threshold.
        average: Key of `AVERAGES`.

    Returns:
        The heading.
    """
    name = f"PCK@{alpha:.2f}".replace("0.", ".")
    return name if average == "by class, pairs" else f"{name} {average}"


def averages_of(protocol: Protocol) -> dict[str, tuple[float, str]]:
    """Return what the metrics of a protocol are.

    Args:
        protocol: One of `PROTOCOLS`.

    Returns:
        By heading: α and the key of `AVERAGES`.
    """
    known = {metric_name(a, average): (a, average) for a in ALPHAS for average in AVERAGES}
    return {metric.name: known[metric.name] for metric in protocol.metrics}


def _metrics(*averages: str, alphas: tuple[float, ...] = ALPHAS) -> tuple[Metric, ...]:
    return tuple(
        Metric(metric_name(alpha, average), mean=AVERAGES[average][0])
        for average in averages
        for alpha in alphas
    )


def _published_different() -> dict[str, dict[str, float]]:
    """ArXiv 2411.19458 v1, PF-PASCAL with different views: α .05, .10, .15, raw and finetuned."""
    rows = {
        "vit_base_patch14_dinov2.lvd142m": (42.18, 56.90, 65.59, 47.24, 60.76, 67.57),
        "vit_base_patch14_reg4_dinov2.lvd142m": (38.29, 53.74, 61.94, 44.44, 57.27, 65.27),
        "vit_base_patch16_224.mae": (11.98, 20.16, 28.16, 14.45, 23.79, 32.56),
        "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k": (
            *(13.87, 24.85, 35.13),
            *(20.39, 32.36, 42.58),
        ),
        "deit3_base_patch16_224.fb_in1k": (17.73, 31.17, 41.17, 20.24, 33.29, 41.62),
    }
    names = ("PCK@.05", "PCK@.10", "PCK@.15")
    out = {}
    for model, values in rows.items():
        out[model] = dict(zip(names, values[:3], strict=True))
        out[f"{model} + 3DCorrEnhance"] = dict(zip(names, values[3:], strict=True))
    return out


def _protocol(
    name: str,
    about: str,
    source: str,
    metrics: tuple[Metric, ...],
    features: FeatureSpec,
    published: Mapping[str, Mapping[str, float]] | None = None,
    **options: Any,
) -> Protocol:
    return Protocol(
        id=name,
        task="semantic",
        about=about,
        source=source,
        metrics=metrics,
        unit="pair",
        features=features,
        options=SemanticOptions(**options),
        published=published or {},
    )


_MEF = "arXiv 2411.19458 (ICLR 2025), github.com/qq456cvb/3DCorrEnhance evaluate.py"
_HPF = "HPF, DHPF, CATs: github.com/juhongm999/dhpf data/dataset.py, common/evaluation.py"
_SIXTY = FeatureSpec(resolution=60)

PROTOCOLS = (
    _protocol(
        "pf-pascal/mef-840",
        "different views, padded to 840 px, 60 patches, PCK of the image by class",
        _MEF,
        _metrics("by class, pairs"),
        _SIXTY,
        _published_different(),
        pairs="different",
        similarity="dot",
    ),
    _protocol(
        "pf-pascal/mef-840-same",
        "the same for pairs with similar views",
        _MEF,
        _metrics("by class, pairs"),
        _SIXTY,
        pairs="same",
        similarity="dot",
    ),
    _protocol(
        "pf-pascal/image",
        "test split, stretched to a square, PCK of the image per pair",
        _HPF,
        _metrics("per image", "per point"),
        _SIXTY,
        annotations="mat",
        fit="stretch",
    ),
    _protocol(
        "pf-pascal/box",
        "test split, stretched to a square, PCK of the object's box per pair",
        _HPF,
        _metrics("per image", "per point"),
        _SIXTY,
        annotations="mat",
        fit="stretch",
        basis="box",
    ),
    _protocol(
        "pf-willow/box-kp",
        "stretched to a square, PCK of the box around the keypoints per pair",
        _HPF,
        _metrics("per image", "per point"),
        _SIXTY,
        fit="stretch",
        basis="box-kp",
    ),
    _protocol(
        "spair/box",
        "test split, padded to 840 px, PCK of the object's box per pair and per point",
        "arXiv 1908.10543; padding as in github.com/Junyi42/sd-dino",
        _metrics("per image", "per point", alphas=(0.10, 0.05)),
        _SIXTY,
        basis="box",
    ),
    _protocol(
        "spair/probe3d",
        "200 test pairs a class, padded to 800 px at the corner, patch centres, recall by class",
        "arXiv 2404.08636, github.com/mbanani/probe3d evaluate_spair_correspondence.py",
        _metrics("by class", alphas=(0.10,)),
        FeatureSpec(resolution=58, norm=False),
        {"vit_base_patch14_dinov2.lvd142m": {"PCK@.10 by class": 56.8}},
        per_category=200,
        fit="corner",
        side=800,
        fill=255,
        grid=0,
        basis="box",
    ),
)

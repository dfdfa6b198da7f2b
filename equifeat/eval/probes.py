"""What finetuning keeps of a ViT: linear probes of depth, normals and masks, and its ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equifeat.eval.data_hash import SUMS, check_sums
from equifeat.eval.probes_data import SPLITS, WHERE, ProbeData, ProbeOptions, ViewOptions
from equifeat.eval.probes_linear import (
    DEPTH_METRICS,
    NORMAL_METRICS,
    DepthProbe,
    NormalsProbe,
)
from equifeat.eval.probes_parts import PART_METRICS, PartsProbe
from equifeat.eval.probes_ranking import RANKING_METRICS, RankingData, RankingOptions
from equifeat.eval.probes_segmentation import (
    SEGMENTATION_METRICS,
    SegmentationOptions,
    SegmentationProbe,
)
from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.task import Check, Task

_SOURCE = "this project; linear probes as in El Banani et al., CVPR 2024 (arXiv 2404.08636)"
_KINDS: dict[str, type[ProbeData]] = {
    "depth": DepthProbe,
    "normals": NormalsProbe,
    "segmentation": SegmentationProbe,
    "parts": PartsProbe,
    "ranking": RankingData,
}


def _protocol(name: str, about: str, metrics: tuple[Metric, ...], options: Any) -> Protocol:
    return Protocol(f"probe/{name}", "probes", about, _SOURCE, metrics, "object", options=options)


PROTOCOLS = (
    _protocol("depth", "z-depth from one patch feature", DEPTH_METRICS, ProbeOptions()),
    _protocol("normals", "surface normals from one patch feature", NORMAL_METRICS, ProbeOptions()),
    _protocol(
        "segmentation",
        "object or background, before backgrounds that are not black",
        SEGMENTATION_METRICS,
        SegmentationOptions(),
    ),
    _protocol("parts", "octants of an object, in other views of it", PART_METRICS, ViewOptions()),
    _protocol("ranking", "nearest images of the raw ViT", RANKING_METRICS, RankingOptions()),
)


def open_probes(root: Path, protocol: Protocol) -> ProbeData:
    """Open views of training and of validation objects under a protocol.

    Args:
        root: Folder with train/ and val/.
        protocol: One of `PROBES`'s, perhaps changed.

    Returns:
        The data; the validation objects are its items.

    Raises:
        EvalDataError: Views are missing, too few or without depth, or an object is in both.
        RecipeError: An option makes no sense.
    """
    kind = protocol.id.partition("+")[0].partition("/")[2]
    return _KINDS[kind](root, protocol)


def check_probes(root: Path, protocol: Protocol) -> Check:
    """Count objects and views, and compare hashes.

    Args:
        root: Folder with train/ and val/.
        protocol: One of `PROBES`'s, perhaps changed.

    Returns:
        What was found.

    Raises:
        EvalDataError: Views are missing, too few or without depth, or an object is in both.
    """
    data = open_probes(root, protocol)
    compared, problems = check_sums(root)
    counts = {}
    for split, objects in zip(SPLITS, (data.train, data.val), strict=True):
        counts[f"objects of {split} taken"] = len(objects)
        counts[f"views of {split} taken"] = sum(len(obj.numbers) for obj in objects)
    notes = [] if compared else [f"no {SUMS}; data hash {data.data_hash}"]
    return Check({**counts, "files compared": compared}, problems, notes)


PROBES = Task("probes", PROTOCOLS, open_probes, check_probes, {"probe": WHERE})

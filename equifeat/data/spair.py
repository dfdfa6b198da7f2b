"""SPair-71k (Min et al., arXiv 1908.10543): one JSON a pair, listed in Layout/large/SPLIT.txt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from equifeat.data.semantic_pairs import KeypointPair, PairList, points_of
from equifeat.data.text_files import MAX_ANNOTATION_BYTES, MAX_LIST_BYTES, plain_name, read_text
from equifeat.errors import EvalDataError

_SIDES = ("0 none", "1 source", "2 target", "3 both")
_LEVELS = ("0 easy", "1 medium", "2 hard")
# By the annotation's key: heading of the breakdown, and what its numbers mean (paper, section 2).
_LABELS = {
    "viewpoint_variation": ("viewpoint", _LEVELS),
    "scale_variation": ("scale", _LEVELS),
    "truncation": ("truncation", _SIDES),
    "occlusion": ("occlusion", _SIDES),
}


def read_spair(root: Path, split: Literal["test", "val", "trn"] = "test") -> PairList:
    """Read the pairs of a split.

    Args:
        root: SPair-71k, or the folder that holds it.
        split: Which pairs.

    Returns:
        The pairs, with boxes and labels of difficulty.

    Raises:
        EvalDataError: A file is missing or not in its format.
    """
    base = root if (root / "PairAnnotation").is_dir() else root / "SPair-71k"
    path = base / "Layout" / "large" / f"{split}.txt"
    if not path.is_file():
        raise EvalDataError(f"{root} holds no list of pairs Layout/large/{split}.txt")
    found, files = [], [path]
    names = read_text(path, MAX_LIST_BYTES).split("\n")
    for number, line in enumerate(names, 1):
        if line.strip():
            name = plain_name(f"{path}: line {number}", line)
            # archives unpacked on Windows have no colon in file names
            file = base / "PairAnnotation" / split / f"{name}.json"
            if not file.is_file():
                file = file.with_name(f"{name.replace(':', '_')}.json")
            files.append(file)
            found.append(_pair(base, file, name))
    return PairList(found, files)


def _pair(base: Path, file: Path, name: str) -> KeypointPair:
    text = read_text(file, MAX_ANNOTATION_BYTES)
    try:
        content: dict[str, Any] = json.loads(text)
        category = plain_name(str(file), content["category"])
        # 000001-2008_000001-2008_000002:category
        stems = name.partition(":")[0].split("-")[1:]
        pictures = [
            plain_name(str(file), content.get(key) or f"{stem}.jpg")
            for key, stem in zip(("src_imname", "trg_imname"), stems, strict=True)
        ]
        points = [points_of(str(file), *_columns(content[key])) for key in ("src_kps", "trg_kps")]
        box = torch.tensor([float(v) for v in content["trg_bndbox"]], dtype=torch.float64)
        labels = {
            heading: words[int(content[key])]
            for key, (heading, words) in _LABELS.items()
            if key in content
        }
        if len(points[0]) != len(points[1]) or box.shape != (4,):
            raise ValueError("keypoints of the two pictures, or the box, have wrong shapes")
    except (KeyError, TypeError, ValueError, IndexError, RecursionError, AttributeError) as error:
        raise EvalDataError(
            f"{file}: not a pair annotation of SPair-71k ({type(error).__name__}: {error}); "
            "get the data set anew."
        ) from error
    folder = base / "JPEGImages" / category
    source, target = (folder / picture for picture in pictures)
    return KeypointPair(name, source, target, category, points[0], points[1], box, labels)


def _columns(rows: list[list[float]]) -> tuple[list[float], list[float]]:
    return [row[0] for row in rows], [row[1] for row in rows]

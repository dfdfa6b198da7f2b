"""Where in an image an object is: true visible masks, true boxes, or a file of detections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from equifeat.data.bop import BopImage, read_json
from equifeat.data.bop_images import read_mask
from equifeat.errors import EvalDataError
from equifeat.eval.object_crop import box_of

Box = tuple[float, float, float, float]
# By scene, image and object: score and box of each detection.
Detections = dict[tuple[int, int, int], list[tuple[float, Box]]]
TRUE_REGIONS = ("visib_mask", "bbox_visib")


class Region(NamedTuple):
    """Part of an image.

    Attributes:
        box: Left, top, right, bottom in pixels, corner convention.
        mask: (H, W) bool pixels of the object; None where only the box is known.
    """

    box: Box
    mask: Tensor | None


def detections_file(root: Path, word: str) -> Path | None:
    """Return the file that the option `detections` names.

    Args:
        root: Folder of the data.
        word: Value of the option.

    Returns:
        A path in the folder; None for the true regions.

    Raises:
        EvalDataError: It leads out of the folder.
    """
    if word in TRUE_REGIONS:
        return None
    file = root / word
    if not file.resolve().is_relative_to(root.resolve()):
        raise EvalDataError(
            f"detections={word!r} must be visib_mask, bbox_visib, or a JSON file in {root}."
        )
    return file


def read_detections(file: Path) -> Detections:
    """Read detections as BOP distributes them: COCO rows with scene_id.

    Args:
        file: A JSON list of rows with scene_id, image_id, category_id, bbox (left, top, width,
            height) and score; what else there is (segmentation, time) is skipped.

    Returns:
        The detections, best first.

    Raises:
        EvalDataError: The file is missing, damaged or not in the format.
    """
    rows = read_json(file)
    out: Detections = {}
    if not isinstance(rows, list):
        raise EvalDataError(f"{file}: is not a list of detections; get the file again.")
    for i, row in enumerate(rows):
        values = row if isinstance(row, dict) else {}
        key = [values.get(name) for name in ("scene_id", "image_id", "category_id")]
        box, score = values.get("bbox"), values.get("score")
        numbers: list[Any] = [*(box if isinstance(box, list) else []), score]
        if (
            not all(isinstance(k, int) for k in key)
            or len(numbers) != 5
            or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        ):
            raise EvalDataError(
                f"{file}: row {i} has not scene_id, image_id, category_id, bbox of 4 numbers and "
                "score; write it in BOP's format of detections."
            )
        left, top, width, height = map(float, numbers[:4])
        entry = (float(numbers[4]), (left, top, left + width, top + height))
        scene, image, obj = (int(k or 0) for k in key)
        out.setdefault((scene, image, obj), []).append(entry)
    for found in out.values():
        found.sort(key=lambda one: -one[0])
    return out


def regions_of(
    image: BopImage, instances: Sequence[int], detections: Detections | str, target: tuple[int, int]
) -> list[Region]:
    """Return where an object is.

    Args:
        image: The image.
        instances: Its instances that count, for the true regions.
        detections: Of `read_detections`, or one of `TRUE_REGIONS`.
        target: Number of the object, and how many instances are to be found.

    Returns:
        At most so many regions; empty ones are left out.

    Raises:
        EvalDataError: The data does not have what was asked for.
    """
    obj, count = target
    if not isinstance(detections, str):
        found = detections.get((int(image.scene_id), image.im_id, obj), [])[:count]
        return [Region(box, None) for _, box in found]
    out = []
    for i in (i for i in instances if image.objects[i].obj_id == obj):
        if detections == "visib_mask":
            file = image.mask_visib(i)
            if file is None:
                raise EvalDataError(
                    f"{image.folder}: has no mask_visib/{image.im_id:06d}_{i:06d}.png; unpack the "
                    "masks too, or use the boxes: --set detections=bbox_visib."
                )
            mask = read_mask(file)
            box = box_of(mask)
            if box is not None:
                out.append(Region(box, mask))
            continue
        edges = image.objects[i].bbox_visib
        if edges is None:
            raise EvalDataError(
                f"{image.folder / 'scene_gt_info.json'}: image {image.im_id} has no bbox_visib of "
                f"instance {i}; unpack the annotations again."
            )
        x, y, w, h = edges
        # the toolkit's width is last minus first column
        out.append(Region((x, y, x + w + 1.0, y + h + 1.0), None))
    return out

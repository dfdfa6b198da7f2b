"""Read the keypoints of categories: where the same parts lie on different meshes.

    {"up": [0, 0, 1],
     "categories": {"car": {"keypoints": ["front_left_wheel", ...],
                            "objects": {"hatchback": {"front_left_wheel": [x, y, z], ...}, ...}}}}

Coordinates are those of the rendered views: object units, the longest side is 1. An object may lack
keypoints of its category. "up" is the direction of all objects that points upwards in pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equifeat.errors import EvalDataError, suggest

# Names become parts of file names that are split at "-" and ":".
_NAME = re.compile(r"\w[\w.]*")
_Point = tuple[float, float, float]


class Category(NamedTuple):
    """The keypoints of one category.

    Attributes:
        names: All keypoints, in their order.
        objects: By object, the coordinates of those keypoints that it has.
    """

    names: list[str]
    objects: Mapping[str, Mapping[str, _Point]]


class Keypoints(NamedTuple):
    """A read file of keypoints.

    Attributes:
        up: (3,) float64 direction that points upwards in pictures, object coordinates.
        categories: By name.
    """

    up: Tensor
    categories: Mapping[str, Category]


def read_keypoints(file: Path) -> Keypoints:
    """Read a file of keypoints.

    Args:
        file: JSON as above.

    Returns:
        The keypoints.

    Raises:
        EvalDataError: The file is missing, not JSON, or an entry is not as it must be.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvalDataError(f"{file}: not readable JSON ({error}); mend the file.") from error
    whole = _mapping(file, "the file", content)
    categories = {
        name: _category(file, name, given)
        for name, given in _named(file, "categories", whole.get("categories")).items()
    }
    up = torch.tensor(_point(file, "up", whole.get("up")), dtype=torch.float64)
    if not up.any():
        raise EvalDataError(f"{file}: up is [0, 0, 0]; give the direction that is up.")
    return Keypoints(up, categories)


def _category(file: Path, category: str, given: object) -> Category:
    found = _mapping(file, category, given)
    names = found.get("keypoints")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise EvalDataError(f"{file}: keypoints of {category} are {names!r}, not a list of names.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise EvalDataError(f"{file}: {category} names the keypoint {twice[0]!r} twice.")
    objects = {}
    for name, points in _named(file, f"objects of {category}", found.get("objects")).items():
        where = f"{category}/{name}"
        for key in _mapping(file, where, points):
            if key not in names:
                raise EvalDataError(
                    f"{file}: {where} has {key!r}, which is no keypoint of {category}."
                    f"{suggest(key, names)}"
                )
        objects[name] = {key: _point(file, f"{where}/{key}", p) for key, p in points.items()}
    return Category(names, objects)


def _mapping(file: Path, where: str, given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise EvalDataError(f"{file}: {where} holds {given!r:.80}, not a JSON object.")
    return given


def _named(file: Path, where: str, given: object) -> dict[str, Any]:
    found = _mapping(file, where, given)
    for name in found:
        if not _NAME.fullmatch(name):
            raise EvalDataError(
                f"{file}: {where} has the name {name!r}; use letters, digits, _ and . only."
            )
    return found


def _point(file: Path, where: str, given: object) -> _Point:
    if (
        not isinstance(given, list)
        or len(given) != 3
        or not all(type(v) in (int, float) and -1 <= v <= 1 for v in given)
    ):
        raise EvalDataError(f"{file}: {where} is {given!r:.80}, not three numbers from -1 to 1.")
    x, y, z = given
    return float(x), float(y), float(z)

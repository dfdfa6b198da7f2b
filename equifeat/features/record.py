"""What is kept with the features of an image: enough to place them, and to know where they're from.

Every format carries it as one JSON text, so that it is read without the features.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from equifeat.errors import FeaturesError
from equifeat.geometry.pixels import MarginYX, SizeHW

FORMAT = "equifeat-features"
VERSION = 1


@dataclass(frozen=True)
class About:
    """Where the features of one image lie and what made them.

    Args:
        name: What the image is called in the output.
        size_hw: Height and width of the image in pixels.
        grid_hw: Rows and columns of features.
        margin_yx: Pixels of the image left uncovered at top and bottom each, left and right each.
        point_scale: See `equifeat.model.feature_map.FeatureMap`; 1 but for models that
            repeat the reference's fault.
        model: What --model was.
        fingerprint: Identity of model, options and image file.
        time: Seconds from the start of the video; None for an image file.
    """

    name: str
    size_hw: SizeHW
    grid_hw: SizeHW
    margin_yx: MarginYX
    point_scale: float
    model: str
    fingerprint: str
    time: float | None = None

    @property
    def stride_yx(self) -> tuple[float, float]:
        """Pixels of the image from one feature to the next."""
        y, x = ((self.size_hw[i] - 2 * self.margin_yx[i]) / self.grid_hw[i] for i in (0, 1))
        return y, x

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it, with what tells the format."""
        kept = {key: value for key, value in asdict(self).items() if value is not None}
        return {"format": FORMAT, "version": VERSION, **kept, "stride_yx": self.stride_yx}

    def as_json(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(self.as_dict())


def parse_about(content: Any, where: str) -> About:
    """Read what `About.as_dict` gave, strictly.

    Args:
        content: Its JSON text, or the dictionary.
        where: Name of the file for messages.

    Returns:
        The record.

    Raises:
        FeaturesError: It is not ours, from a newer version, or makes no sense.
    """
    try:
        found = json.loads(content) if isinstance(content, str) else content
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise FeaturesError(f"{where} holds no features of `equifeat features`")
        if found["version"] != VERSION:
            raise FeaturesError(
                f"{where} has format version {found['version']!r}, this equifeat reads {VERSION}: "
                "upgrade with pip install -U equifeat"
            )
        time = found.get("time")
        about = About(
            name=str(found["name"]),
            size_hw=_whole_pair(found["size_hw"]),
            grid_hw=_whole_pair(found["grid_hw"]),
            margin_yx=_pair(found["margin_yx"]),
            point_scale=float(found["point_scale"]),
            model=str(found["model"]),
            fingerprint=str(found["fingerprint"]),
            time=None if time is None else float(time),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FeaturesError(f"{where} lacks or garbles {error}: compute it again") from error
    inside = all(0 <= 2 * m < s for m, s in zip(about.margin_yx, about.size_hw, strict=True))
    sizes = min(*about.size_hw, *about.grid_hw) > 0
    if not (inside and sizes and 0 < about.point_scale < math.inf):
        raise FeaturesError(f"{where} has an impossible size or margin: compute it again")
    return about


def _pair(value: Any) -> tuple[float, float]:
    first, second = value
    return float(first), float(second)


def _whole_pair(value: Any) -> tuple[int, int]:
    first, second = value
    if type(first) is not int or type(second) is not int:
        raise TypeError(f"the sizes {value!r}")
    return first, second

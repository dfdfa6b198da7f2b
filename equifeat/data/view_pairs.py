"""Which two views of an object a draw may choose: by view change, and by what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from equifeat.data.views import ObjectViews
from equifeat.errors import RecipeError, ViewsError
from equifeat.geometry.camera import relative, rotation_angle_deg

# The slack keeps views that are exactly on a limit, whatever the rounding.
_SLACK_DEG = 1e-3


@dataclass(frozen=True)
class ViewPairs:
    """Ordered pairs of different views of one object.

    Attributes:
        indices: (P, 2) indices of view 0 and view 1.
        angles_deg: (P,) rotation angles between their cameras.
    """

    indices: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    angles_deg: np.ndarray[tuple[int], np.dtype[np.float64]]

    def __len__(self) -> int:
        return len(self.indices)

    def those(self, chosen: Bool[np.ndarray, "p"]) -> ViewPairs:
        """Return some of the pairs.

        Args:
            chosen: Which.

        Returns:
            They, in the same order.
        """
        return ViewPairs(self.indices[chosen], self.angles_deg[chosen])

    def up_to(self, limit_deg: float) -> ViewPairs:
        """Return the pairs with a small view change.

        Args:
            limit_deg: Largest angle.

        Returns:
            They; where there are none, the narrowest pairs of the object.
        """
        limit_deg = max(limit_deg, float(self.angles_deg.min()))
        return self.those(self.angles_deg <= limit_deg + _SLACK_DEG)


@dataclass(frozen=True)
class Curriculum:
    """View changes that begin small: the largest one grows linearly over the first draws.

    Args:
        draws: How many draws it lasts; 0 for none.
        start_deg: Largest view change of draw 0.
        end_deg: Largest view change of draw `draws` and all later ones.

    Raises:
        RecipeError: A negative number of draws, or a start that is no view change before the end.
    """

    draws: int
    start_deg: float
    end_deg: float

    def __post_init__(self) -> None:
        if self.draws < 0:
            raise RecipeError(f"curriculum_draws is {self.draws}: use 0 (off) or more")
        if self.draws and not 0.0 <= self.start_deg <= self.end_deg:
            raise RecipeError(
                f"curriculum_start_deg is {self.start_deg}: use 0 to max_angle_deg "
                f"({self.end_deg}), to which it grows"
            )

    def limit_deg(self, draw: int) -> float:
        """Return the largest view change of a draw.

        Args:
            draw: Its index.

        Returns:
            Degrees.
        """
        done = min(draw / self.draws, 1.0) if self.draws else 1.0
        return self.start_deg + done * (self.end_deg - self.start_deg)


def pairs_in_range(
    objects: Sequence[ObjectViews], min_deg: float, max_deg: float
) -> list[ViewPairs]:
    """Return the pairs of every object, computed once a set of poses.

    Args:
        objects: The objects.
        min_deg: Smallest rotation angle.
        max_deg: Largest rotation angle.

    Returns:
        At least one pair for each.

    Raises:
        ViewsError: An object has no such pair.
    """
    known: dict[bytes, ViewPairs] = {}
    out = []
    for views in objects:
        poses = views.cam_from_world.double()
        key = poses.numpy().tobytes()
        if key not in known:
            angle = rotation_angle_deg(relative(poses[:, None], poses[None])[..., :3, :3])
            ok = (angle >= min_deg - _SLACK_DEG) & (angle <= max_deg + _SLACK_DEG)
            ok.fill_diagonal_(False)
            indices = np.asarray(ok.nonzero().numpy(), dtype=np.int64)
            known[key] = ViewPairs(indices, np.asarray(angle[ok].numpy(), dtype=np.float64))
        if len(known[key]) == 0:
            raise ViewsError(
                f"{views.where}: no two views are {min_deg} to {max_deg} degrees apart; change "
                "min_angle_deg or max_angle_deg, or render more views"
            )
        out.append(known[key])
    return out


def sharing(views: ObjectViews, pairs: ViewPairs, least: int) -> ViewPairs:
    """Return the pairs whose views share enough points.

    Args:
        views: The object; one without tracks, or with lazy ones, is not asked.
        pairs: Pairs of its views.
        least: Fewest points.

    Returns:
        At least one pair.

    Raises:
        ViewsError: No pair shares enough.
    """
    tracks = views.tracks
    if tracks is None or not isinstance(tracks.point_ids, list):
        return pairs
    shared = tracks.shared_counts().numpy()[pairs.indices[:, 0], pairs.indices[:, 1]]
    enough = pairs.those(shared >= least)
    if len(enough) == 0:
        raise ViewsError(
            f"{views.where}: no two views in the range of angles share {least} points of its "
            "reconstruction; lower min_keypoints, widen the angles or leave the object out"
        )
    return enough

"""Descriptors of the points of a cloud, fused from posed views, and a field of them in space.

As D3Fields (arXiv 2309.16118) and SparseDFF (arXiv 2310.16838) do it without training: a point
takes the features where it is projected to, in the views that see it; a place between the points
takes those of its neighbours, weighted by 1 / distance² (SparseDFF's interpolation, which takes
all points; here the nearest few).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.data.object_views import View
from equifeat.errors import RecipeError, ViewsError, import_extra
from equifeat.eval.features import Dense, FeatureSource
from equifeat.eval.protocol import FeatureSpec
from equifeat.geometry.camera import invert, transform
from equifeat.geometry.covisibility import surface_depth
from equifeat.geometry.pixels import inside, pixel_centers, pixel_index

_PURPOSE = "A field of descriptors"
# A place this close to a point, as a share of the spacing of points, takes that point's value.
_SHORTEST = 1e-3


@dataclass(frozen=True)
class FuseOptions:
    """How views are looked at and joined.

    Args:
        resolution: Patches on the longer side of an image; None for its own size.
        depth_tol: A view sees a point when its depth there differs by no more than this, in the
            unit of the cloud; None takes 2 % of the cloud's longest side.
        angle_power: A view's weight is the cosine between the surface's normal and the direction
            to the camera, to this power; 0 weighs all views alike.
        neighbors: Points that a place in space takes its descriptor from; also those that a normal
            is fitted to (at least 8).
    """

    resolution: int | None = None
    depth_tol: float | None = None
    angle_power: float = 1.0
    neighbors: int = 8

    def __post_init__(self) -> None:
        """Check the options."""
        if self.neighbors < 1 or not self.angle_power >= 0:
            raise RecipeError(
                f"neighbors={self.neighbors} and angle_power={self.angle_power:g} must be at least "
                "1 and 0."
            )
        if self.depth_tol is not None and not self.depth_tol > 0:
            raise RecipeError(f"depth_tol={self.depth_tol:g} must be above 0.")


class PointDescriptors:
    """Points with descriptors: what a robot knows of an object or a scene.

    Args:
        points: (P, 3) in the world's axes and any unit.
        descriptors: (P, D); normalised here.
        seen: (P,) how many views saw each point.
        neighbors: See `FuseOptions`.

    Attributes:
        points: (P, 3) float64, on the CPU.
        descriptors: (P, D) float32 unit vectors, on the CPU.
        seen: (P,) int64.
        spacing: Longest side of the cloud over the square root of P, about the points' distance.
    """

    def __init__(
        self, points: Tensor, descriptors: Tensor, seen: Tensor, neighbors: int = 8
    ) -> None:
        if not len(points) or len(points) != len(descriptors):
            raise ViewsError(
                f"{len(points)} points and {len(descriptors)} descriptors make no field: give one "
                "descriptor a point, and at least one."
            )
        self.points = points.detach().cpu().double()
        self.descriptors = F.normalize(descriptors.detach().cpu().float(), dim=-1)
        self.seen = seen.cpu()
        self.neighbors = min(neighbors, len(points))
        side = float((self.points.amax(dim=0) - self.points.amin(dim=0)).max())
        self.spacing = max(side / len(points) ** 0.5, 1e-12)
        self._tree = import_extra("scipy.spatial", "eval", _PURPOSE).cKDTree(self.points.numpy())

    @classmethod
    def from_views(
        cls,
        model: Dense,
        points: Tensor,
        views: Sequence[View],
        options: FuseOptions | None = None,
    ) -> PointDescriptors:
        """Fuse the features of posed views on the points of a cloud.

        Args:
            model: Anything with ``dense(images, resolution)``, such as `equifeat.load` gives.
            points: (P, 3) in the world's axes, for example of `cloud_of_views`.
            views: From `equifeat.downstream.posed_views.posed_views`. A view without depth
                tests visibility by the cloud's own points, coarsely.
            options: How.

        Returns:
            The points that at least one view sees, with their descriptors.

        Raises:
            ViewsError: The points are no (P, 3), or no view sees any of them.
        """
        options = options or FuseOptions()
        points = checked_points(points)
        side = float((points.amax(dim=0) - points.amin(dim=0)).max())
        tolerance = options.depth_tol or 0.02 * side
        normals = _normals(points, max(8, options.neighbors)) if options.angle_power else None
        source = FeatureSource(model, FeatureSpec(options.resolution))
        fused: Tensor | None = None
        seen = torch.zeros(len(points), dtype=torch.int64)
        for view in views:
            weight, xy = _seen_from(points, normals, view, tolerance, options.angle_power)
            on = weight > 0
            seen += on
            maps = source(view.image)
            found = maps.sample(xy[on].float()[None].to(maps.features.device))[0].cpu()
            if fused is None:
                fused = torch.zeros(len(points), found.shape[1])
            fused[on] += weight[on, None].float() * found
        if fused is None or not bool(seen.any()):
            raise ViewsError(
                f"none of {len(views)} views sees a point of the cloud: check that cloud, poses "
                "and depth share their unit, and that poses are cam_from_world with OpenCV axes."
            )
        # views that disagree altogether leave nothing to say
        kept = (seen > 0) & (fused.norm(dim=-1) > 0)
        return cls(points[kept], fused[kept], seen[kept], options.neighbors)

    def query(self, places: Tensor) -> Tensor:
        """Return the descriptors of places in space.

        Args:
            places: (..., 3) in the world's axes; gradients flow to them.

        Returns:
            (..., D) unit descriptors, on the CPU.
        """
        index, weight = self.weights(places)
        values = (weight.float()[..., None] * self.descriptors[index]).sum(dim=-2)
        return F.normalize(values, dim=-1)

    def distance(self, places: Tensor) -> Tensor:
        """Return how far places are from the nearest point.

        Args:
            places: (..., 3) in the world's axes; gradients flow to them.

        Returns:
            (...) distances in the cloud's unit, float64.
        """
        index = self._nearest(places, 1)
        apart = places.double().unsqueeze(-2) - self.points[index]
        out: Tensor = apart.square().sum(dim=-1).clamp_min(1e-18).sqrt()[..., 0]
        return out

    def weights(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest points of places and their shares, by 1 / distance².

        Args:
            places: (..., 3) in the world's axes; gradients flow to them.

        Returns:
            (..., k) int64 rows of the points and (..., k) float64 shares, of sum 1.
        """
        index = self._nearest(places, self.neighbors)
        apart = places.double().unsqueeze(-2) - self.points[index]
        share = 1.0 / (apart.square().sum(dim=-1) + (_SHORTEST * self.spacing) ** 2)
        return index, share / share.sum(dim=-1, keepdim=True)

    def _nearest(self, places: Tensor, count: int) -> Tensor:
        _, index = self._tree.query(
            places.detach().cpu().double().numpy(), k=[*range(1, count + 1)]
        )
        return torch.from_numpy(np.asarray(index, dtype=np.int64))


def cloud_of_views(views: Sequence[View], spacing: float) -> Tensor:
    """Return the points that posed views with depth show, about evenly spaced.

    Args:
        views: Views with depth; only what their masks show is taken.
        spacing: Side of the cubes of which each keeps the mean of its points, in the unit of the
            poses.

    Returns:
        (P, 3) float64 points in the world's axes.

    Raises:
        ViewsError: No view has depth on its mask.
        RecipeError: spacing is not above 0.
    """
    if not spacing > 0:
        raise RecipeError(f"spacing={spacing:g} must be above 0, in the unit of the poses.")
    found = []
    for view in views:
        on = view.mask & (view.depth > 0)
        xy = pixel_centers(view.camera.size_hw, dtype=torch.float64)[on]
        depth = view.depth[on].double()
        camera = type(view.camera)(view.camera.K.double(), view.camera.size_hw)
        found.append(transform(invert(view.cam_from_world.double()), camera.unproject(xy, depth)))
    points = torch.cat(found) if found else torch.zeros(0, 3)
    if not len(points):
        raise ViewsError("no view has depth on its mask: check that depth is above 0 there.")
    cells = torch.floor(points / spacing).long()
    _, cell, count = torch.unique(cells, dim=0, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(count), 3, dtype=torch.float64).index_add_(0, cell, points)
    out: Tensor = sums / count[:, None]
    return out


def checked_points(points: Tensor) -> Tensor:
    """Return (P, 3) points in float64 on the CPU.

    Args:
        points: Any floats.

    Returns:
        (P, 3).

    Raises:
        ViewsError: The shape is wrong, or a number is not finite.
    """
    points = torch.as_tensor(points).detach().cpu().double()
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not points.isfinite().all():
        raise ViewsError(
            f"points must have the shape (P, 3) with P > 0 and finite numbers, not "
            f"{tuple(points.shape)}: drop points without depth first."
        )
    return points


def _seen_from(
    points: Tensor, normals: Tensor | None, view: View, tolerance: float, power: float
) -> tuple[Tensor, Tensor]:
    """A view's weight for each point, 0 where it does not see it, and where the point projects."""
    camera = type(view.camera)(view.camera.K.double(), view.camera.size_hw)
    local = transform(view.cam_from_world.double(), points)
    xy = camera.project(local)
    z = local[:, 2]
    on = inside(xy, camera.size_hw)
    xy = torch.where(on[:, None], xy, 0.0)
    column, row = pixel_index(xy).unbind(-1)
    on &= view.mask[row, column]
    if bool((view.depth > 0).any()):
        depth, solid = surface_depth(view.depth.double(), xy)
        on &= solid & ((depth - z).abs() <= tolerance)
    else:
        on &= z <= _own_depth(xy, z, on, camera.size_hw) + tolerance
    weight = on.double()
    if normals is not None:
        eye = invert(view.cam_from_world.double())[:3, 3]
        ray = F.normalize(eye - points, dim=-1)
        # the sign of a fitted normal says nothing; what is seen faces the camera
        weight = weight * (ray * normals).sum(dim=-1).abs().pow(power)
    return weight, xy


def _own_depth(xy: Tensor, z: Tensor, on: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Depth of the nearest point in each point's cell, of about four points a cell."""
    side = max(1.0, (4.0 * size_hw[0] * size_hw[1] / max(int(on.sum()), 1)) ** 0.5)
    column, row = pixel_index(xy / side).unbind(-1)
    cell = row * (int(size_hw[1] / side) + 1) + column
    nearest = torch.full((int(cell.max()) + 1,), torch.inf, dtype=z.dtype)
    nearest.scatter_reduce_(0, cell[on], z[on], "amin")
    return nearest[cell]


def _normals(points: Tensor, neighbors: int) -> Tensor:
    """(P, 3) unit normals of planes fitted to each point's neighbours; their sign is arbitrary."""
    tree = import_extra("scipy.spatial", "eval", _PURPOSE).cKDTree(points.numpy())
    count = min(neighbors + 1, len(points))
    _, index = tree.query(points.numpy(), k=[*range(1, count + 1)])
    around = points[torch.from_numpy(np.asarray(index, dtype=np.int64))]
    around = around - around.mean(dim=1, keepdim=True)
    normals: Tensor = torch.linalg.eigh(around.mT @ around).eigenvectors[..., 0]
    return normals

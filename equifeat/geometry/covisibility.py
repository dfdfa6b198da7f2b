"""Dense correspondences of two posed depth maps, with a depth test.

Convention:
    xy of a correspondence is where the surface point at the *centre* of a pixel of view 0 appears
    in view 1. It is exact in the depth of view 0; view 1's depth only decides whether it is seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.geometry.camera import Camera, invert, transform
from equifeat.geometry.pixels import inside, pixel_centers, sample


class Correspondences(NamedTuple):
    """Points of view 0 seen in view 1.

    Attributes:
        xy: (..., 2) pixels of view 1; NaN where view 0 has no surface or it lies behind camera 1.
        covisible: (...) whether the same surface point is visible in view 1.
    """

    xy: Tensor
    covisible: Tensor


def surface_depth(
    depth: Float[Tensor, "*b h w"], xy: Float[Tensor, "*b n 2"]
) -> tuple[Float[Tensor, "*b n"], Bool[Tensor, "*b n"]]:
    """Interpolate depth maps at points, as 1/z: that is exact for planes.

    Args:
        depth: (..., H, W) z-depth, 0 = background.
        xy: (..., N, 2) pixels, may lie outside or be NaN.

    Returns:
        Depth (..., N) and whether all four pixels around the point are surface and inside.
    """
    size_hw = (depth.shape[-2], depth.shape[-1])
    solid = (depth > 0).to(depth.dtype)
    inverse = solid / depth.clamp_min(1e-12)
    ok = inside(xy, size_hw)
    at = torch.where(ok.unsqueeze(-1), xy, 0.0)
    at = at.reshape(-1, at.shape[-2], 2)
    # Two maps rather than one of two channels: joining them costs more than the sampling.
    inverse_at, solid_at = (
        sample(grid.reshape(-1, 1, *size_hw), at, size_hw).reshape(ok.shape)
        for grid in (inverse, solid)
    )
    ok = ok & (solid_at > 1.0 - 1e-4)
    z = 1.0 / inverse_at.clamp_min(1e-12)
    return torch.where(ok, z, 0.0), ok


def limits_of_steps(
    depth_step: float, camera0: Camera, nearest_z: float, exact: tuple[float, float] = (1e-3, 0.05)
) -> tuple[float, float]:
    """Return the two limits of `correspond` for depth that is kept in steps.

    The usual limits, unless the steps are so coarse (the reference's millimetres) that rounding
    alone would fail them: a step moves a point seen from the side by up to f * step / z pixels.

    Args:
        depth_step: Object units of one step of the depth map.
        camera0: Intrinsics of view 0.
        nearest_z: Smallest depth in view 0.
        exact: The limits for exact depth.

    Returns:
        depth_tol in object units and max_error_px in pixels.
    """
    pixels = float(camera0.K[0, 0]) * depth_step / nearest_z
    return max(exact[0], 2 * depth_step), max(exact[1], pixels)


def correspond(
    xy0: Float[Tensor, "*b n 2"],
    z0: Float[Tensor, "*b n"],
    depth1: Float[Tensor, "*b h w"],
    camera0: Camera,
    camera1: Camera,
    cam1_from_cam0: Float[Tensor, "*b 4 4"],
    depth_tol: float = 1e-3,
    max_error_px: float = 0.05,
) -> Correspondences:
    """Find points of view 0 in view 1 and test whether they are visible there.

    A point is covisible when view 1's own surface at the reprojected pixel has the same depth
    (within depth_tol) and, carried back to view 0, lands within max_error_px of where it came
    from. Both are strict on purpose: near creases and silhouettes view 1's interpolated depth is
    not the surface's, and such pixels are dropped rather than trusted.

    Args:
        xy0: (..., N, 2) pixels of view 0.
        z0: (..., N) z-depth there, 0 = background.
        depth1: (..., H, W) z-depth of view 1, 0 = background.
        camera0: Intrinsics of view 0.
        camera1: Intrinsics of view 1.
        cam1_from_cam0: Transform from camera 0 to camera 1.
        depth_tol: Largest depth difference in object units.
        max_error_px: Largest round-trip error in pixels of view 0.

    Returns:
        xy (..., N, 2) in view 1 and covisible (..., N).
    """
    points1 = transform(cam1_from_cam0, camera0.unproject(xy0, z0))
    xy1 = torch.where((z0 > 0).unsqueeze(-1), camera1.project(points1), float("nan"))
    seen, covisible = surface_depth(depth1, xy1)
    covisible = covisible & ((seen - points1[..., 2]).abs() <= depth_tol)
    points0 = transform(invert(cam1_from_cam0), camera1.unproject(xy1, seen))
    dx, dy = (camera0.project(points0) - xy0).unbind(-1)
    error = (dx.square() + dy.square()).sqrt()
    return Correspondences(xy1, covisible & (error <= max_error_px))


def dense_correspondences(
    depth0: Float[Tensor, "*b h0 w0"],
    depth1: Float[Tensor, "*b h1 w1"],
    camera0: Camera,
    camera1: Camera,
    cam1_from_cam0: Float[Tensor, "*b 4 4"],
    depth_tol: float = 1e-3,
    max_error_px: float = 0.05,
) -> Correspondences:
    """For every pixel of view 0: its xy in view 1 and whether it is covisible.

    Args:
        depth0: (..., H0, W0) z-depth of view 0, 0 = background.
        depth1: (..., H1, W1) z-depth of view 1.
        camera0: Intrinsics of view 0.
        camera1: Intrinsics of view 1.
        cam1_from_cam0: Transform from camera 0 to camera 1.
        depth_tol: See `correspond`.
        max_error_px: See `correspond`.

    Returns:
        xy (..., H0, W0, 2) in view 1 and covisible (..., H0, W0).
    """
    batch, (h, w) = depth0.shape[:-2], depth0.shape[-2:]
    xy0 = pixel_centers((h, w), depth0.device, depth0.dtype).reshape(-1, 2)
    found = correspond(
        xy0.expand(*batch, h * w, 2),
        depth0.reshape(*batch, h * w),
        depth1,
        camera0,
        camera1,
        cam1_from_cam0,
        depth_tol,
        max_error_px,
    )
    return Correspondences(found.xy.reshape(*batch, h, w, 2), found.covisible.reshape(*batch, h, w))


def overlap(
    correspondences: Correspondences, depth0: Float[Tensor, "*b h w"]
) -> Float[Tensor, "*b"]:
    """Return the share of view 0's surface pixels that are covisible in view 1.

    Args:
        correspondences: Result of `dense_correspondences`.
        depth0: Depth of view 0.

    Returns:
        (...) numbers from 0 to 1; 0 where view 0 is empty.
    """
    surface = (depth0 > 0).sum((-2, -1))
    return correspondences.covisible.sum((-2, -1)) / surface.clamp_min(1)

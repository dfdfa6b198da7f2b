"""What the views tell about a patch: depth, surface normal, octant; and views on backgrounds."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from equifeat.data.augment import draw_background
from equifeat.data.object_views import View
from equifeat.geometry.camera import Camera, invert, transform
from equifeat.geometry.pixels import crop, pixel_centers, pixel_index, resize

# Of the width of a pixel on the surface: how far a depth may lie off the line of its neighbours.
_MAX_BEND = 0.5
# A window of clutter, relative to the longer side of the object it is cut from.
_WINDOW = 0.5


def at_pixels(values: Shaped[Tensor, "h w *c"], xy: Float[Tensor, "n 2"]) -> Tensor:
    """Return the values of the pixels that hold some points.

    Args:
        values: (H, W, …) one value a pixel.
        xy: (N, 2) points in pixels, inside the image.

    Returns:
        (N, …) values.
    """
    h, w = values.shape[:2]
    x, y = pixel_index(xy).unbind(-1)
    return values[y.clamp(0, h - 1), x.clamp(0, w - 1)]


def object_points(view: View) -> Float[Tensor, "h w 3"]:
    """Return the surface point of every pixel.

    Args:
        view: A view with depth.

    Returns:
        (H, W, 3) object coordinates in float64; without meaning outside the mask.
    """
    points = transform(invert(view.cam_from_world.double()), _camera_points(view).reshape(-1, 3))
    return points.reshape(*view.depth.shape, 3)


def octants(points: Float[Tensor, "n 3"], box: Float[Tensor, "2 3"]) -> Int[Tensor, "n"]:
    """Return in which eighth of the object's box points lie.

    Args:
        points: (N, 3) object coordinates.
        box: (2, 3) its lower and upper corner.

    Returns:
        (N,) numbers from 0 to 7: 1 for the upper half in x, 2 in y, 4 in z.
    """
    upper = points > box.mean(0)
    return (upper * upper.new_tensor([1, 2, 4], dtype=torch.int64)).sum(-1)


def surface_normals(view: View) -> tuple[Float[Tensor, "h w 3"], Bool[Tensor, "h w"]]:
    """Return surface normals by central differences of depth over the next pixels.

    Args:
        view: A view with depth.

    Returns:
        (H, W, 3) unit normals towards the camera, camera axes, float64; and where they hold: the
        pixel and its four neighbours show the object, and its depth lies on the line between
        opposite neighbours within half the width of a pixel on the surface. So depth jumps and
        sharp edges are left out.
    """
    points = _camera_points(view)
    solid = view.mask & (view.depth > 0)
    normals = torch.zeros_like(points)
    valid = torch.zeros_like(solid)
    middle = (slice(1, -1), slice(1, -1))
    left, right = (slice(1, -1), slice(None, -2)), (slice(1, -1), slice(2, None))
    above, below = (slice(None, -2), slice(1, -1)), (slice(2, None), slice(1, -1))
    # In a frontal plane the one points down, the other to the right: their product looks at us.
    across = torch.linalg.cross(points[below] - points[above], points[right] - points[left])
    normals[middle] = torch.nn.functional.normalize(across, dim=-1)
    z = points[..., 2]
    holds = solid[middle]
    K = view.camera.K.double()
    for one, other, focal in ((left, right, K[0, 0]), (above, below, K[1, 1])):
        bend = (z[one] + z[other] - 2.0 * z[middle]).abs()
        holds = holds & solid[one] & solid[other] & (bend <= _MAX_BEND * z[middle] / focal)
    valid[middle] = holds
    return normals, valid


def cut_clutter(view: View, rng: np.random.Generator) -> Float[Tensor, "3 h w"]:
    """Return a window of an object's view, blown up to the size of the view.

    Args:
        view: A view of another object.
        rng: Source of every random number.

    Returns:
        (3, H, W) RGB in [0, 1]: texture and edges of an object, but no object.
    """
    h, w = view.mask.shape
    spans = []
    for axis in (0, 1):
        shown = view.mask.any(axis).nonzero()[:, 0].tolist() or [0, view.mask.shape[1 - axis] - 1]
        spans.append((shown[0], shown[-1] + 1))
    longer = max(end - start for start, end in spans)
    side = min(h, w, max(1, round(_WINDOW * longer)))
    corner = []
    for (start, end), length in zip(spans, (w, h), strict=True):
        first = min(start, length - side)
        last = min(max(first, end - side), length - side)
        corner.append(int(rng.integers(first, last + 1)))
    window = crop(view.image[None], (corner[0], corner[1]), (side, side))
    return resize(window, (h, w))[0].clamp(0.0, 1.0)


def on_background(
    view: View, background: str, other: View | None, rng: np.random.Generator
) -> Float[Tensor, "3 h w"]:
    """Return the object of a view before another background.

    Args:
        view: The view.
        background: "noise", "gradient" or a folder of images; see draw_background.
        other: A view of another object, whose clutter is the background instead.
        rng: Source of every random number.

    Returns:
        (3, H, W) RGB in [0, 1].
    """
    h, w = view.mask.shape
    behind = draw_background(background, (h, w), rng) if other is None else cut_clutter(other, rng)
    if behind.shape[-2:] != (h, w):
        behind = resize(behind[None], (h, w))[0].clamp(0.0, 1.0)
    return torch.where(view.mask, view.image, behind)


def _camera_points(view: View) -> Tensor:
    """(H, W, 3) points in camera coordinates, float64."""
    h, w = view.depth.shape
    camera = Camera(view.camera.K.double(), view.camera.size_hw)
    xy = pixel_centers((h, w), dtype=torch.float64).reshape(-1, 2)
    return camera.unproject(xy, view.depth.double().reshape(-1)).reshape(h, w, 3)

"""Light a view from another side: a smooth Lambert shading from the depth's normals.

Convention:
    Normals are unit vectors in camera axes (x right, y down, z forward) and point to the camera:
    a wall that faces it has (0, 0, -1).

    >>> camera = Camera.from_focal(50.0, (8, 8))
    >>> normals(torch.full((8, 8), 2.0), camera)[4, 4].round(decimals=3) + 0.0
    tensor([ 0.,  0., -1.])
"""

from __future__ import annotations

import kornia
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.geometry.camera import Camera
from equifeat.geometry.pixels import pixel_centers

# Of the shading, as a share of the longer side: it hides the steps of a stored depth.
_SMOOTHING = 0.01


def normals(depth: Float[Tensor, "h w"], camera: Camera) -> Float[Tensor, "h w 3"]:
    """Return the normals of a surface that is given by its depth.

    Along each axis of the image the nearer in depth of a pixel's two neighbours is taken, so that
    an outline does not bend the normals beside it.

    Args:
        depth: (H, W) z-depth, 0 = background.
        camera: Intrinsics.

    Returns:
        (H, W, 3) unit normals; 0 where there is no depth or no neighbour with one.
    """
    h, w = camera.size_hw
    rays = camera.unproject(pixel_centers(camera.size_hw).reshape(-1, 2), torch.ones(h * w))
    points = rays.reshape(h, w, 3) * depth[..., None]
    down, right = (_step(points, depth, axis) for axis in (0, 1))
    # y down × x right points to the camera.
    return F.normalize(torch.linalg.cross(down, right), dim=-1) * (depth > 0)[..., None]


def _step(points: Tensor, depth: Tensor, axis: int) -> Tensor:
    """From each pixel to the next along an axis of the image, in camera coordinates; 0 for none."""
    there = depth > 0
    both = there.narrow(axis, 1, depth.shape[axis] - 1) & there.narrow(
        axis, 0, depth.shape[axis] - 1
    )
    step = points.diff(dim=axis) * both[..., None]
    change = torch.where(both, depth.diff(dim=axis).abs(), torch.inf)
    # Padded so that entry i is the step that ends, or begins, at pixel i.
    pad = (0, 0, 1, 1) if axis == 0 else (1, 1)
    change = F.pad(change, pad, value=torch.inf)
    step = F.pad(step, (0, 0, *pad))
    n = depth.shape[axis]
    before, after = (step.narrow(axis, k, n) for k in (0, 1))
    nearer = change.narrow(axis, 0, n) < change.narrow(axis, 1, n)
    return torch.where(nearer[..., None], before, after)


def relight(
    image: Float[Tensor, "3 h w"],
    mask: Bool[Tensor, "h w"],
    depth: Float[Tensor, "h w"],
    camera: Camera,
    amplitude: float,
    rng: np.random.Generator,
) -> Float[Tensor, "3 h w"]:
    """Brighten the side of an object that a random direction shines on, and darken the other.

    Colours are multiplied by 1 + a n·l: the normal n, a direction l drawn evenly from the sphere,
    and a drawn evenly from 0 to the amplitude. Pixels without depth stay as they are.

    Args:
        image: RGB in [0, 1].
        mask: Where the object is.
        depth: z-depth, 0 = background.
        camera: Intrinsics.
        amplitude: Largest relative change.
        rng: Source of every random number.

    Returns:
        The image, clamped to [0, 1].
    """
    direction = F.normalize(torch.from_numpy(rng.standard_normal(3, dtype=np.float32)), dim=0)
    strength = float(rng.random()) * amplitude
    normal = normals(depth * mask, camera)
    known = normal.square().sum(dim=-1) > 0.5
    sigma = _SMOOTHING * max(camera.size_hw)
    side = 2 * int(np.ceil(3 * sigma)) + 1
    both = torch.stack([normal @ direction, known.float()])[None]
    # The mean over pixels of the object only.
    blurred = kornia.filters.gaussian_blur2d(both, (side, side), (sigma, sigma), "constant")[0]
    shade = torch.where(known, blurred[0] / blurred[1].clamp(min=1e-6), 0.0)
    return (image * (1.0 + strength * shade)).clamp(0.0, 1.0)

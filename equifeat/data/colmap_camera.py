"""Cameras of a COLMAP model: lens models, and undoing their distortion through pycolmap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from equifeat.errors import import_extra
from equifeat.geometry.pixels import SizeHW


class Lens(NamedTuple):
    """A lens model of COLMAP.

    Attributes:
        name: COLMAP's name.
        params: Number of its parameters.
        fx_fy_cx_cy: Which of them are the pinhole's; None where no pinhole picture can be made.
    """

    name: str
    params: int
    fx_fy_cx_cy: tuple[int, int, int, int] | None


# src/colmap/sensor/models.h; the numbers of the binary form.
LENSES = {
    0: Lens("SIMPLE_PINHOLE", 3, (0, 0, 1, 2)),
    1: Lens("PINHOLE", 4, (0, 1, 2, 3)),
    2: Lens("SIMPLE_RADIAL", 4, (0, 0, 1, 2)),
    3: Lens("RADIAL", 5, (0, 0, 1, 2)),
    4: Lens("OPENCV", 8, (0, 1, 2, 3)),
    5: Lens("OPENCV_FISHEYE", 8, None),
    6: Lens("FULL_OPENCV", 12, (0, 1, 2, 3)),
    7: Lens("FOV", 5, None),
    8: Lens("SIMPLE_RADIAL_FISHEYE", 4, None),
    9: Lens("RADIAL_FISHEYE", 5, None),
    10: Lens("THIN_PRISM_FISHEYE", 12, None),
    11: Lens("RAD_TAN_THIN_PRISM_FISHEYE", 16, None),
}


@dataclass(frozen=True, eq=False)
class ColmapCamera:
    """Intrinsics of one camera of a model.

    Args:
        model: COLMAP's name of the lens model.
        K: (3, 3) float64 pinhole part, pixels of the picture as it is stored.
        size_hw: Height and width of the picture.
        params: Every parameter of the lens model, in COLMAP's order.
        distorted: Whether the lens bends straight lines.
    """

    model: str
    K: Float[Tensor, "3 3"]
    size_hw: SizeHW
    params: tuple[float, ...]
    distorted: bool

    def undistort(self, xy: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Carry pixels of the picture to the picture that a pinhole with the same K would take.

        Args:
            xy: (N, 2) pixels of the picture.

        Returns:
            (N, 2) float64 pixels; NaN where the lens model has no inverse.
        """
        xy = xy.double()
        if not self.distorted:
            return xy
        rays = torch.from_numpy(self._lens.cam_from_img(np.ascontiguousarray(xy.numpy())))
        return rays * self.K[[0, 1], [0, 1]] + self.K[:2, 2]

    def distort(self, xy: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Invert `undistort`.

        Args:
            xy: (N, 2) pixels of the pinhole picture.

        Returns:
            (N, 2) float64 pixels of the picture as it is stored; NaN where it shows nothing, as
            the polynomials of wide lenses fold back outside the picture.
        """
        xy = xy.double()
        if not self.distorted:
            return xy
        rays = (xy - self.K[:2, 2]) / self.K[[0, 1], [0, 1]]
        homogeneous = torch.cat([rays, torch.ones_like(rays[:, :1])], dim=1)
        out = torch.from_numpy(self._lens.img_from_cam(homogeneous.numpy()))
        # A fold is where undistorting does not come back.
        folded = ~((self.undistort(out) - xy).abs() < 0.05).all(dim=1)
        out[folded] = float("nan")
        return out

    @cached_property
    def _lens(self) -> Any:
        h, w = self.size_hw
        purpose = f"undoing the lens model {self.model} of COLMAP"
        return import_extra("pycolmap", "captures", purpose).Camera(
            model=self.model, width=w, height=h, params=np.asarray(self.params)
        )

    def __getstate__(self) -> dict[str, Any]:
        # The library's camera stays in this process.
        return {k: v for k, v in self.__dict__.items() if k != "_lens"}

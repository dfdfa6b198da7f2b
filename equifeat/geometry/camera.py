"""Pinhole cameras with OpenCV axes (x right, y down, z forward) and 4x4 transforms.

Convention:
    p_cam = cam_from_world @ p_world, and pixels follow `equifeat.geometry.pixels`, so a
    principal point in the middle of a 512 px image is (256, 256), not (255.5, 255.5).

    >>> camera = Camera.from_focal(560.0, (512, 512))
    >>> camera.project(torch.tensor([[0.0, 0.0, 2.0], [0.1, 0.0, 2.0]]))
    tensor([[256., 256.],
            [284., 256.]])
    >>> camera.unproject(torch.tensor([[284.0, 256.0]]), torch.tensor([2.0]))
    tensor([[0.1000, 0.0000, 2.0000]])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from kornia.geometry.linalg import inverse_transformation
from torch import Tensor

from equifeat.geometry.pixels import SizeHW

# OpenGL cameras look along -z with y up; OpenCV cameras along +z with y down.
_FLIP_YZ = (1.0, -1.0, -1.0, 1.0)


@dataclass(frozen=True)
class Camera:
    """Intrinsics of a pinhole camera.

    Args:
        K: (3, 3) or (..., 3, 3) intrinsics in pixels of an image of this size.
        size_hw: Height and width of the image.
    """

    K: Float[Tensor, "*b 3 3"]
    size_hw: SizeHW

    @classmethod
    def from_focal(cls, focal_px: float, size_hw: SizeHW, device: str = "cpu") -> Camera:
        """Make a camera with square pixels and its principal point in the image's middle.

        Args:
            focal_px: Focal length in pixels.
            size_hw: Height and width of the image.
            device: Device of K.

        Returns:
            The camera.
        """
        h, w = size_hw
        K = torch.tensor(
            [[focal_px, 0.0, w / 2], [0.0, focal_px, h / 2], [0.0, 0.0, 1.0]], device=device
        )
        return cls(K, size_hw)

    def resized(self, size_hw: SizeHW) -> Camera:
        """Return the camera of the resized image.

        Args:
            size_hw: New height and width.

        Returns:
            A camera whose K is scaled; with the corner convention that is a multiplication.
        """
        sy, sx = size_hw[0] / self.size_hw[0], size_hw[1] / self.size_hw[1]
        return Camera(self.K * self.K.new_tensor([[sx], [sy], [1.0]]), size_hw)

    def project(self, points_cam: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 2"]:
        """Project points in camera coordinates to pixels: x = (K p) / p_z.

        Args:
            points_cam: (..., N, 3) points, z > 0 in front of the camera.

        Returns:
            (..., N, 2) pixels. For points at or behind the camera (z ≤ 0) the result is NaN.
        """
        z = points_cam[..., 2:]
        safe = torch.where(z > 0, z, float("nan"))
        return _apply(self.K[..., :2, :], points_cam) / safe

    def unproject(
        self, xy: Float[Tensor, "*b 2"], depth: Float[Tensor, "*b"]
    ) -> Float[Tensor, "*b 3"]:
        """Lift pixels with z-depth to points in camera coordinates: p = z K⁻¹ (x, y, 1).

        Args:
            xy: (..., N, 2) pixels.
            depth: (..., N) z-depth.

        Returns:
            (..., N, 3) points.
        """
        x, y = xy.unbind(-1)
        rays: Tensor = torch.linalg.inv(self.K) @ torch.stack([x, y, torch.ones_like(x)], dim=-2)
        return rays.mT * depth.unsqueeze(-1)


def transform(
    a_from_b: Float[Tensor, "*#b 4 4"], points_b: Float[Tensor, "*#b n 3"]
) -> Float[Tensor, "*c n 3"]:
    """Carry points from frame b to frame a.

    Args:
        a_from_b: (..., 4, 4) rigid or affine transform.
        points_b: (..., N, 3) points.

    Returns:
        (..., N, 3) points in frame a.
    """
    return _apply(a_from_b[..., :3, :3], points_b) + a_from_b[..., None, :3, 3]


def _apply(matrix: Tensor, points: Tensor) -> Tensor:
    """(..., N, 3) points under (..., M, 3) matrices.

    As matrix @ columns: many times faster than rows @ matrix.T, and what follows finds each
    coordinate of all points side by side.
    """
    return (matrix @ points.mT).mT


def invert(a_from_b: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 4 4"]:
    """Invert rigid transforms (rotation and translation, no scale) by kornia.

    Args:
        a_from_b: (..., 4, 4) rigid transforms.

    Returns:
        b_from_a.
    """
    flat = a_from_b.reshape(-1, 4, 4)
    return inverse_transformation(flat).reshape(a_from_b.shape)


def relative(
    cam0_from_world: Float[Tensor, "*#b 4 4"], cam1_from_world: Float[Tensor, "*#b 4 4"]
) -> Float[Tensor, "*c 4 4"]:
    """Return cam1_from_cam0 of two views.

    Args:
        cam0_from_world: Pose of view 0.
        cam1_from_world: Pose of view 1.

    Returns:
        The transform from camera 0 to camera 1.
    """
    return cam1_from_world @ invert(cam0_from_world)


def rotation_angle_deg(R: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b"]:
    """Return the angle of rotations, by atan2 so that small angles stay exact.

    Args:
        R: (..., 3, 3) rotations.

    Returns:
        Angles in degrees, 0 to 180.
    """
    axis = torch.stack(
        [
            R[..., 2, 1] - R[..., 1, 2],
            R[..., 0, 2] - R[..., 2, 0],
            R[..., 1, 0] - R[..., 0, 1],
        ],
        dim=-1,
    )
    trace = R.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.atan2(axis.norm(dim=-1), trace - 1.0))


def opencv_from_opengl(world_from_gl: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 4 4"]:
    """Turn an OpenGL camera-to-world pose into cam_from_world with OpenCV axes.

    Args:
        world_from_gl: (..., 4, 4) pose of a camera that looks along -z with y up.

    Returns:
        cam_from_world, OpenCV axes.
    """
    return invert(world_from_gl @ torch.diag(world_from_gl.new_tensor(_FLIP_YZ)))


def opengl_from_opencv(cam_from_world: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 4 4"]:
    """Turn cam_from_world with OpenCV axes into an OpenGL camera-to-world pose.

    Args:
        cam_from_world: (..., 4, 4).

    Returns:
        world_from_gl: the pose that OpenGL, glTF, Blender and pyrender expect.
    """
    return invert(cam_from_world) @ torch.diag(cam_from_world.new_tensor(_FLIP_YZ))


def look_at(
    eye: Float[Tensor, "*b 3"], target: Float[Tensor, "*#b 3"], up: Float[Tensor, "*#b 3"]
) -> Float[Tensor, "*b 4 4"]:
    """Return cam_from_world of a camera at eye that looks at target, with up upwards in the image.

    When the view direction is parallel to up, another axis stands in for it.

    Args:
        eye: (..., 3) position of the camera.
        target: (..., 3) point on the optical axis.
        up: (..., 3) direction that appears upwards.

    Returns:
        (..., 4, 4) cam_from_world, OpenCV axes.
    """
    z = torch.nn.functional.normalize(target - eye, dim=-1)
    up = up.expand_as(z)
    x = torch.linalg.cross(z, up)
    spare = z.new_tensor([0.0, 1.0, 0.0]).expand_as(z)
    parallel = x.norm(dim=-1, keepdim=True) < 1e-6 * up.norm(dim=-1, keepdim=True)
    x = torch.where(parallel, torch.linalg.cross(z, spare), x)
    # up itself may be the spare axis
    x = torch.where(
        x.norm(dim=-1, keepdim=True) < 1e-6,
        torch.linalg.cross(z, z.new_tensor([1.0, 0.0, 0.0]).expand_as(z)),
        x,
    )
    x = torch.nn.functional.normalize(x, dim=-1)
    y = torch.linalg.cross(z, x)
    out = torch.zeros(*eye.shape[:-1], 4, 4, dtype=eye.dtype, device=eye.device)
    out[..., :3, :3] = torch.stack([x, y, z], dim=-2)
    out[..., :3, 3] = -(out[..., :3, :3] @ eye.unsqueeze(-1)).squeeze(-1)
    out[..., 3, 3] = 1.0
    return out

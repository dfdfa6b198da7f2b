"""Posed views from a user's own arrays, checked before a model runs on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from equifeat.data.object_views import View, check_intrinsics, check_poses
from equifeat.data.views import open_views
from equifeat.errors import ImageError, ViewsError
from equifeat.geometry.camera import Camera
from equifeat.model.inputs import OneImage, gather, unit_floats


def posed_views(
    images: Tensor | Sequence[OneImage],
    depths: Tensor | Sequence[Tensor] | None,
    K: Tensor,
    cam_from_world: Tensor,
    masks: Tensor | Sequence[Tensor] | None = None,
) -> list[View]:
    """Join pictures and cameras to views.

    Args:
        images: V images: tensors (3, H, W), arrays (H, W, 3), PIL images or files (see
            docs/images.md), or a stack (V, 3, H, W) of them if they have one size.
        depths: V z-depth maps (H, W) in the unit of the poses (metres, say), 0 = unknown; None
            where there is no depth.
        K: (V, 3, 3) intrinsics, or (3, 3) of all views; the first pixel's centre is (0.5, 0.5).
        cam_from_world: (V, 4, 4) poses, OpenCV axes (x right, y down, z forward).
        masks: V masks (H, W) of the object; None takes all pixels with depth, or all pixels.

    Returns:
        The views, on the CPU, cameras and depth in float64.

    Raises:
        ImageError: An image is none.
        ViewsError: Numbers or sizes differ, or a matrix is no camera.
    """
    count = len(images)
    poses = torch.as_tensor(cam_from_world).detach().cpu().double()
    intrinsics = torch.as_tensor(K).detach().cpu().double()
    if intrinsics.ndim == 2:
        intrinsics = intrinsics.expand(count, -1, -1)
    for what, values in (
        ("K", intrinsics),
        ("cam_from_world", poses),
        ("depths", depths),
        ("masks", masks),
    ):
        if values is not None and len(values) != count:
            raise ViewsError(f"{what} has {len(values)} entries for {count} images: give one each.")
    _check_cameras(intrinsics, poses)
    out = []
    for i in range(count):
        image = checked_image(images[i], f"image {i}")
        size_hw = (int(image.shape[-2]), int(image.shape[-1]))
        depth = torch.zeros(size_hw, dtype=torch.float64)
        if depths is not None:
            depth = torch.as_tensor(depths[i]).detach().cpu().double()
            _check_size(depth, size_hw, f"depth {i}")
            depth = torch.where(depth.isfinite() & (depth > 0), depth, 0.0)
        mask = depth > 0 if depths is not None else torch.ones(size_hw, dtype=torch.bool)
        if masks is not None:
            mask = torch.as_tensor(masks[i]).detach().cpu().bool()
            _check_size(mask, size_hw, f"mask {i}")
        out.append(View(image, depth, mask, Camera(intrinsics[i], size_hw), poses[i]))
    return out


def views_of_folder(folder: str | Path, indices: Sequence[int] | None = None) -> list[View]:
    """Read the views of one object, in any layout of `equifeat.data.views.open_views`.

    Args:
        folder: The folder of one object, for example what `equifeat render` wrote.
        indices: Which views; None for all.

    Returns:
        The views.

    Raises:
        ViewsError: There is no such folder, it holds several objects, or no such view.
    """
    objects = open_views(folder)
    if len(objects) != 1:
        names = ", ".join(one.name for one in objects[:3])
        raise ViewsError(f"{folder} holds {len(objects)} objects ({names} …): name one's folder.")
    found = objects[0]
    wanted = range(len(found)) if indices is None else indices
    wrong = [i for i in wanted if not 0 <= i < len(found)]
    if wrong:
        raise ViewsError(f"{folder} has the views 0 to {len(found) - 1}, not {wrong[0]}.")
    return [found.view(i) for i in wanted]


def checked_image(image: OneImage, name: str) -> Tensor:
    """Return an image on the CPU, if it is one.

    Args:
        image: A tensor (3, H, W), RGB in [0, 1] or bytes, an array (H, W, 3), a PIL image, a file.
        name: What the message calls it.

    Returns:
        (3, H, W) float32 RGB in [0, 1].

    Raises:
        ImageError: It is not.
    """
    try:
        batch = gather(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    if len(batch) != 1:
        raise ImageError(f"{name} must be one image, not {len(batch)}.")
    return unit_floats(batch.detach().cpu(), torch.device("cpu"))[0].float()


def checked_camera(K: Tensor, image: Tensor) -> Camera:
    """Return the camera of an image.

    Args:
        K: (3, 3) intrinsics.
        image: (3, H, W).

    Returns:
        The camera, float64 on the CPU.

    Raises:
        ViewsError: K is no matrix of intrinsics.
    """
    K = torch.as_tensor(K).detach().cpu().double()
    _check_cameras(K[None], torch.eye(4, dtype=torch.float64)[None])
    return Camera(K, (int(image.shape[-2]), int(image.shape[-1])))


def _check_cameras(K: Tensor, poses: Tensor) -> None:
    try:
        check_intrinsics(K, "K")
    except ViewsError as error:
        raise ViewsError(
            "K must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels with fx, fy > 0, for every "
            "view: take it from the camera's calibration."
        ) from error
    try:
        check_poses(poses, "cam_from_world")
    except ViewsError as error:
        raise ViewsError(
            "cam_from_world must be 4x4 rotations with translations (last row 0 0 0 1, no scale), "
            "one a view: p_cam = cam_from_world @ p_world; invert a camera's pose in the world."
        ) from error


def _check_size(values: Tensor, size_hw: tuple[int, int], name: str) -> None:
    if tuple(values.shape) != size_hw:
        raise ViewsError(
            f"{name} must have its image's size {size_hw} (height, width), not "
            f"{tuple(values.shape)}: align depth and masks to the colour camera first."
        )

"""Write a checked capture as a view folder that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.capture import CaptureViews
from data_prep.renderers import Rendered
from data_prep.view_folder import ViewFolderWriter
from equifeat.errors import ViewsError
from equifeat.geometry.camera import invert, transform
from equifeat.geometry.pixels import pixel_centers
from equifeat.progress import progress

_MAX_STEP = 1e-4
_POINTS_A_VIEW = 20_000
_TAIL = 0.1  # percent of the points on each side that may be outliers


def write_views(capture: CaptureViews, out: Path) -> Path:
    """Write a capture as a view folder, centred and with its longest side 1.

    Args:
        capture: A capture whose geometry is right.
        out: The parent of the new folder.

    Returns:
        The folder.

    Raises:
        ViewsError: Views of several sizes, no depth, or a folder of that name is there.
    """
    folder = Path(out) / capture.name
    if folder.exists():
        raise ViewsError(f"{folder}: exists already; give another --write or move it away")
    sizes = {tuple(capture.camera(i).size_hw) for i in range(len(capture))}
    if len(sizes) > 1:
        shown = ", ".join(f"{w}x{h}" for h, w in sorted(sizes)[:4])
        raise ViewsError(
            f"{capture.where}: its pictures have the sizes {shown}, and all views of an object "
            "have one; bring them to one size (and scale K) first"
        )
    center, scale, farthest = _placement(capture)
    step = farthest * scale / 65535
    if step > _MAX_STEP:
        raise ViewsError(
            f"{capture.where}: depth up to {farthest * scale:.1f} object sizes does not fit 16 "
            f"bits in steps of {_MAX_STEP}; give masks, so that only the object counts"
        )
    h, w = sizes.pop()
    with ViewFolderWriter(folder, step) as writer:
        for i in progress(range(len(capture)), f"write {capture.name}"):
            view = capture.view(i)
            there = (view.mask & (view.depth > 0)).numpy()
            color = (view.image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            # Silhouettes are those of the mask; the background is black as in rendered views.
            color = np.where(view.mask.numpy()[..., None], color, 0).astype(np.uint8)
            depth = np.where(there, view.depth.numpy() * scale, 0).astype(np.float32)
            pose = view.cam_from_world.double().numpy().copy()
            # p_object = (p - center) scale; the camera's frame is scaled alike.
            pose[:3, 3] = (pose[:3, 3] + pose[:3, :3] @ center) * scale
            writer.add(Rendered(color, depth, there, None), capture.K_exact[i], pose)
        writer.finish(
            {
                "object": capture.name,
                "size_hw": [h, w],
                "object_scale": scale,
                "object_center": [float(v) for v in center],
                "renderer": {"name": "capture", "version": "1", "device": "camera"},
                "source": {"file": capture.name, "sha256": None},
                "options": {
                    "axes": capture.convention.axes,
                    "pose": capture.convention.pose,
                    "depth_unit": capture.unit,
                    "depth": capture.options.depth,
                    "pixels": capture.options.pixels,
                },
            }
        )
    return folder


def _placement(capture: CaptureViews) -> tuple[NDArray[Any], float, float]:
    """Centre and scale of the object from all its depth, and the largest depth."""
    points, farthest = [], 0.0
    for i in range(len(capture)):
        view = capture.view(i)
        there = view.mask & (view.depth > 0)
        if not there.any():
            continue
        farthest = max(farthest, float(view.depth[there].max()))
        xy, z = pixel_centers(view.camera.size_hw)[there], view.depth[there]
        step = max(len(xy) // _POINTS_A_VIEW, 1)
        lifted = view.camera.unproject(xy[::step], z[::step])
        points.append(transform(invert(view.cam_from_world), lifted).double().numpy())
    if not points:
        raise ViewsError(f"{capture.where}: no view has depth inside its mask")
    low, high = np.percentile(np.concatenate(points), [_TAIL, 100 - _TAIL], axis=0)
    side = float((high - low).max())
    if not side > 0:
        raise ViewsError(f"{capture.where}: the object has no size; check the depth")
    return (low + high) / 2, 1.0 / side, farthest

"""COLMAP captures as views with tracks: MVImgNet's layout, and any folder with images and sparse/0.

An object is a folder with ``images/`` and a model in ``sparse/0/`` (or ``sparse/``). Masks are
looked for in ``masks/`` or ``mask/`` beside ``images/`` (MVImgNet 2.0, COLMAP's own mask folders)
and in MVImgNet's sister tree ``mask/<class>/<instance>/``, named ``001.jpg.png`` or ``001.png``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from equifeat.data.colmap import ColmapImage, ColmapModel, is_colmap, read_colmap
from equifeat.data.object_views import check_poses
from equifeat.data.sparse_views import (
    CaptureOptions,
    Frame,
    SparseViews,
    at_pixels,
    box_of,
    read_mask,
)
from equifeat.data.tracks import Tracks
from equifeat.errors import ViewsError
from equifeat.geometry.pixels import inside

_MODELS = ("sparse/0", "sparse")
_LOOKED_AT = 12  # masks that are read to tell the object's points from the background's


def is_capture(folder: Path) -> bool:
    """Whether this is the folder of a COLMAP capture.

    Args:
        folder: Any folder.

    Returns:
        True where images/ and a sparse model are.
    """
    return (folder / "images").is_dir() and any(is_colmap(folder / at) for at in _MODELS)


def open_capture(folder: Path, root: Path, options: CaptureOptions) -> SparseViews:
    """Open the folder of one captured object.

    Args:
        folder: The folder with images/ and sparse/0/.
        root: The folder the user named; the object is named by its way from there.
        options: How captures are read.

    Returns:
        Its object; photographs that are missing, or have no mask where others have one, are left
        out.

    Raises:
        ViewsError: The model is damaged, or too little of the object is there.
        MissingExtraError: A lens or a text model needs pycolmap.
    """
    model = read_colmap(folder / next(at for at in _MODELS if is_colmap(folder / at)))
    images = [image for image in model.images if (folder / "images" / image.name).is_file()]
    masks = {image.name: _mask_of(folder, image.name) for image in images}
    if any(masks.values()):
        images = [image for image in images if masks[image.name]]
    if len(images) < 2:
        raise ViewsError(
            f"{folder}: {len(images)} of the {len(model.images)} photographs of its model are in "
            "images/, at least 2 are needed; get them again or leave the object out"
        )
    frames = [
        Frame(
            folder / "images" / image.name,
            camera.size_hw,
            camera.K,
            masks[image.name],
            camera if camera.distorted else None,
        )
        for image in images
        for camera in (model.cameras[image.camera_id],)
    ]
    keep = _chosen(model, images, frames, options)
    box = box_of(model.points3d[keep], str(folder))
    poses = box.poses(torch.stack([image.cam_from_world for image in images]))
    check_poses(poses, folder)
    tracks = _tracks(images, frames, box.points(model.points3d), keep, options)
    name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
    return SparseViews(name, str(folder), frames, poses, tracks, options)


def _mask_of(folder: Path, name: str) -> Path | None:
    """The mask of a photograph, wherever the known layouts put it."""
    kinds, stem = ("masks", "mask"), name.rpartition(".")[0]
    own = [folder / kind for kind in kinds]
    # <root>/mask/<class>/<instance>, or beside the folder of classes.
    above = folder.absolute().parents[1:3]
    tree = [at / kind / folder.parent.name / folder.name for at in above for kind in kinds]
    files = (at / f"{known}.png" for at in (*own, *tree) for known in (name, stem) if known)
    return next((file for file in files if file.is_file()), None)


def _chosen(
    model: ColmapModel, images: list[ColmapImage], frames: list[Frame], options: CaptureOptions
) -> Bool[Tensor, "p"]:
    """Points that are exact, seen often enough and on the object."""
    count = len(model.points3d)
    # A negative error is one that COLMAP did not compute.
    keep = model.errors <= options.max_reprojection_px
    seen = [torch.from_numpy(np.unique(image.point_ids.numpy())) for image in images]
    keep &= torch.bincount(torch.cat(seen), minlength=count) >= options.min_track_length
    if not frames[0].mask:
        return keep
    on, looked = torch.zeros(count), torch.zeros(count)
    spread = np.linspace(0, len(frames) - 1, min(len(frames), _LOOKED_AT)).round().astype(int)
    for i in spread.tolist():
        mask = frames[i].mask
        assert mask is not None
        alpha = at_pixels(read_mask(mask), images[i].xy.float(), frames[i].size_hw)
        looked.index_add_(0, images[i].point_ids, torch.ones(len(alpha)))
        on.index_add_(0, images[i].point_ids, (alpha > 0.5).float())
    return keep & (on > 0.5 * looked)


def _tracks(
    images: list[ColmapImage],
    frames: list[Frame],
    points: Tensor,
    keep: Bool[Tensor, "p"],
    options: CaptureOptions,
) -> Tracks:
    """The observations of the kept points, in pixels of the views."""
    row = torch.cumsum(keep, 0) - 1
    xys: list[Tensor] = []
    ids: list[Tensor] = []
    for image, frame in zip(images, frames, strict=True):
        # COLMAP may join two keypoints of one photograph to one point: the first stands for it.
        _, rows = np.unique(image.point_ids.numpy(), return_index=True)
        first = torch.from_numpy(rows)
        first = first[keep[image.point_ids[first]]]
        xy = frame.to_view(image.xy[first], options)
        there = inside(xy, frame.shrunk_hw(options))  # NaN is not
        xys.append(xy[there].float())
        ids.append(row[image.point_ids[first[there]]])
    return Tracks(xys, ids, points[keep].float())

"""The reference's BlenderProc layout (3DCorrEnhance): the same three pictures, poses beside them.

Nothing in such a folder says its intrinsics or its depth step; they are the reference's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from equifeat.data.folder_views import FolderViews, require_files
from equifeat.data.object_views import check_poses
from equifeat.errors import ImageError, ViewsError
from equifeat.geometry.camera import look_at, relative, transform
from equifeat.geometry.pixels import from_integer_centers, inside, pixel_centers, pixel_index

# The reference: focal length 560 at 512 px, millimetres, cameras at distance 2.
_FOCAL, _SIZE, _STEP = 560.0, 512, 1e-3
_DISTANCE = 2.0
_POSE_FILES = ("obj_poses.npy", "poses.npy")


def is_reference(folder: Path) -> bool:
    """Whether this is an object's folder of the reference.

    Args:
        folder: Any folder.

    Returns:
        True where color_000000.png is.
    """
    return (folder / "color_000000.png").is_file()


def open_reference(folder: Path, root: Path) -> FolderViews:
    """Open an object's folder of the reference.

    Args:
        folder: The folder with color_000000.png.
        root: The folder the user named; the object is named by its way from there.

    Returns:
        Its object.

    Raises:
        ViewsError: A file is missing, or the poses are none.
        ImageError: The first picture is none.
    """
    views = sum(1 for file in folder.glob("color_*.png"))
    candidates = [at / name for at in (folder, *folder.parents) for name in _POSE_FILES]
    above = len(folder.relative_to(root).parts) + 2  # the folder up to root's own parent
    file = next((f for f in candidates[: above * len(_POSE_FILES)] if f.is_file()), None)
    poses = _read_poses(file) if file else reference_poses()
    if views > len(poses):
        raise ViewsError(
            f"{folder}: {views} views but {len(poses)} poses; put the obj_poses.npy that was "
            "rendered beside the pictures"
        )
    require_files(folder, views)
    try:
        with Image.open(folder / "color_000000.png") as image:
            w, h = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{folder / 'color_000000.png'}: not an image ({error})") from error
    # BlenderProc puts a principal point of (w - 1) / 2 in the middle: its pixels are
    # integer-centred, and the reference asked it for 256 of 512.
    scale = w / _SIZE
    middle = from_integer_centers(torch.tensor([256.0, 256.0])) * scale
    K = torch.diag(torch.tensor([_FOCAL * scale, _FOCAL * scale, 1.0]))
    K[:2, 2] = middle
    name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
    return FolderViews(name, folder, K.expand(views, 3, 3).clone(), poses[:views], (h, w), _STEP)


def reference_poses() -> Float[Tensor, "v 4 4"]:
    """Return the 42 icosphere poses, for a reference folder without its obj_poses.npy.

    Eyes are the vertices of an icosahedron subdivided once (its 12 vertices, then the midpoints of
    its edges in order of their larger, then smaller vertex) at distance 2, with +z upwards.

    Returns:
        (42, 4, 4) cam_from_world.
    """
    a, b = np.sqrt((5 - 5**0.5) / 10), np.sqrt((5 + 5**0.5) / 10)
    signs = [(-1, 1), (1, 1), (-1, -1), (1, -1)]
    corners = [(s * a, t * b, 0.0) for s, t in signs]
    corners += [(0.0, s * a, t * b) for s, t in signs]
    corners += [(t * b, 0.0, s * a) for t, s in [(1, -1), (1, 1), (-1, -1), (-1, 1)]]
    v = np.asarray(corners)
    apart = np.linalg.norm(v[:, None] - v[None], axis=-1)
    edges = [(i, j) for j in range(12) for i in range(j) if apart[i, j] < 1.2 * 2 * a]
    middle = np.asarray([v[i] + v[j] for i, j in edges])
    eyes = np.concatenate([v, middle / np.linalg.norm(middle, axis=1, keepdims=True)])
    eye = torch.from_numpy(_DISTANCE * eyes)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return look_at(eye, torch.zeros(3, dtype=torch.float64), up).float()


def check_poses_fit(views: FolderViews) -> None:
    """Check that the surface of view 0 falls inside the silhouettes of a few other views.

    Nothing in the reference's folders says which poses they were rendered with.

    Args:
        views: An object of the reference.

    Raises:
        ViewsError: The poses are not those of the pictures.
    """
    first = views.view(0)
    xy = pixel_centers(views.size_hw)[first.mask]
    z = first.depth[first.mask]
    if len(xy) == 0:
        return
    keep = torch.linspace(0, len(xy) - 1, min(len(xy), 2000)).long()
    points = first.camera.unproject(xy[keep], z[keep])
    for i in range(1, min(len(views), 6)):
        other = views.view(i)
        there = relative(first.cam_from_world, other.cam_from_world)
        at = other.camera.project(transform(there, points))
        at = at[inside(at, views.size_hw)]
        column, row = pixel_index(at).unbind(-1)
        # One pixel of slack for rounding at the silhouette.
        grown = torch.nn.functional.max_pool2d(other.mask[None].float(), 5, 1, 2)[0] > 0
        if len(at) and float(grown[row, column].float().mean()) < 0.98:
            raise ViewsError(
                f"{views.where}: the poses do not fit the pictures (view 0 against view {i}); put "
                "the obj_poses.npy they were rendered with into the folder or the one above"
            )


def _read_poses(file: Path) -> Tensor:
    try:
        array = np.load(file, allow_pickle=False)
        poses = torch.from_numpy(np.asarray(array, dtype=np.float64))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ViewsError(f"{file}: not a NumPy array of (V, 4, 4) poses ({error})") from error
    check_poses(poses, file)
    return poses.float()

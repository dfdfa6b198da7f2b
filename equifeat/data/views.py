"""Read rendered views: the project's own folder layout and the reference's BlenderProc layout.

A view folder holds color_%06d.png, depth_%06d.png (16 bit) and mask_%06d.png, one triple a view.
File names are made from the view's number only, so nothing in views.json can point elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from equifeat.errors import ImageError, ViewsError
from equifeat.geometry.camera import Camera, look_at, relative, transform
from equifeat.geometry.pixels import (
    SizeHW,
    from_integer_centers,
    inside,
    pixel_centers,
    pixel_index,
)

Layout = Literal["auto", "equifeat", "reference"]
FORMAT, VERSION = "equifeat-views", 1
CACHED_VIEWS = 64  # decoded views kept by a process: 64 of 512 px are 96 MB
_PREFIXES = ("color", "depth", "mask")
_MAX_SIDE = 16384
_SEARCH_DEPTH = 3  # the reference nests its objects two folders deep
# The reference: focal length 560 at 512 px, millimetres, cameras at distance 2.
_REFERENCE_FOCAL, _REFERENCE_SIZE, _REFERENCE_STEP = 560.0, 512, 1e-3
_REFERENCE_DISTANCE, _REFERENCE_VIEWS = 2.0, 42
_POSE_FILES = ("obj_poses.npy", "poses.npy")


class View(NamedTuple):
    """One rendered view.

    Attributes:
        image: (3, H, W) RGB in [0, 1].
        depth: (H, W) z-depth in object units, 0 = background.
        mask: (H, W) whether the object is there.
        camera: Intrinsics.
        cam_from_world: (4, 4); world = object coordinates.
    """

    image: Tensor
    depth: Tensor
    mask: Tensor
    camera: Camera
    cam_from_world: Tensor


class ObjectViews:
    """The posed views of one object; pictures are read when asked for.

    Args:
        name: Identity of the object.
        folder: Where the pictures are.
        K: (V, 3, 3) intrinsics, corner pixel convention.
        cam_from_world: (V, 4, 4) poses.
        size_hw: Height and width of every view.
        depth_step: Object units of one step of the depth pictures.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        K: Float[Tensor, "v 3 3"],
        cam_from_world: Float[Tensor, "v 4 4"],
        size_hw: SizeHW,
        depth_step: float,
    ) -> None:
        self.name = name
        self.folder = Path(folder)
        self.K = K
        self.cam_from_world = cam_from_world
        self.size_hw = size_hw
        self.depth_step = depth_step
        # A folder that was rendered anew must not be answered from the cache of decoded pictures.
        self._stamp = self.folder.stat().st_mtime_ns

    def __len__(self) -> int:
        return len(self.cam_from_world)

    def __repr__(self) -> str:
        return f"ObjectViews({self.name!r}, {len(self)} views, {self.folder})"

    def camera(self, i: int) -> Camera:
        """Return the intrinsics of view i without reading its pictures.

        Args:
            i: Index of the view.

        Returns:
            The camera.
        """
        return Camera(self.K[i], self.size_hw)

    def view(self, i: int) -> View:
        """Read view i.

        Args:
            i: Index of the view, 0 ≤ i < len(self).

        Returns:
            The view; its tensors are the caller's own.

        Raises:
            IndexError: No such view.
            ImageError: A picture is not a picture or has another size.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} views, there is no view {i}")
        color, depth, mask = _decode(self.folder, i, self.size_hw, self._stamp)
        return View(
            torch.from_numpy(color.astype(np.float32) / 255.0).permute(2, 0, 1).contiguous(),
            torch.from_numpy(depth.astype(np.float32) * np.float32(self.depth_step)),
            torch.from_numpy(mask > 127),
            self.camera(i),
            self.cam_from_world[i].clone(),
        )


def open_views(path: str | Path, layout: Layout = "auto") -> list[ObjectViews]:
    """Open one object's view folder, or every object in a folder of them.

    Args:
        path: A view folder, or a folder that holds view folders (up to three levels deep).
        layout: "equifeat" (views.json), "reference" (BlenderProc pictures of 3DCorrEnhance; its
            poses are read from obj_poses.npy in the folder or above it), or "auto" for either.

    Returns:
        The objects, sorted by folder.

    Raises:
        ViewsError: Nothing to read, a file is missing, or the metadata is of another format.
    """
    if layout not in ("auto", "equifeat", "reference"):
        raise ViewsError(f"layout {layout!r} is unknown: use auto, equifeat or reference")
    root = Path(path)
    if not root.is_dir():
        raise ViewsError(f"{root}: no such folder of views; `equifeat render` makes one")
    objects: list[ObjectViews] = []
    checked = False
    for folder, kind in _find(root, layout):
        objects.append(
            _open_equifeat(folder) if kind == "equifeat" else _open_reference(folder, root)
        )
        if kind == "reference" and not checked:
            # One set of poses serves every object of a reference folder: one look is enough.
            _check_poses_fit(objects[-1])
            checked = True
    if not objects:
        wanted = {"equifeat": "views.json", "reference": "color_000000.png"}.get(
            layout, "views.json or color_000000.png"
        )
        raise ViewsError(f"{root}: no folder with {wanted} in it; `equifeat render` makes one")
    by_name: dict[str, Path] = {}
    for found in objects:
        if found.name in by_name:
            raise ViewsError(
                f"{by_name[found.name]} and {found.folder} are both named {found.name!r}: "
                "give one another name in its views.json"
            )
        by_name[found.name] = found.folder
    return objects


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
    eye = torch.from_numpy(_REFERENCE_DISTANCE * eyes)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    return look_at(eye, torch.zeros(3, dtype=torch.float64), up).float()


def _find(root: Path, layout: Layout) -> Iterator[tuple[Path, str]]:
    """Yield the view folders at or below root; a view folder is not searched further."""
    pending = [(root, 0)]
    while pending:
        folder, depth = pending.pop(0)
        if layout != "reference" and (folder / "views.json").is_file():
            yield folder, "equifeat"
        elif layout != "equifeat" and (folder / "color_000000.png").is_file():
            yield folder, "reference"
        elif depth < _SEARCH_DEPTH:
            # Hidden folders are half-written renders.
            below = sorted(f for f in folder.iterdir() if f.is_dir() and f.name[0] != ".")
            pending = [(f, depth + 1) for f in below] + pending


def _require_files(folder: Path, views: int) -> None:
    there = {file.name for file in folder.iterdir()}
    wanted = [f"{prefix}_{i:06d}.png" for i in range(views) for prefix in _PREFIXES]
    missing = [name for name in wanted if name not in there]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ViewsError(
            f"{folder}: {', '.join(missing[:3])}{more} missing; render the object again"
        )


def _open_equifeat(folder: Path) -> ObjectViews:
    file = folder / "views.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ViewsError(f"{file}: not readable JSON ({error}); render again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ViewsError(f"{file}: not an {FORMAT} file; render the object again")
    if meta.get("version") != VERSION:
        raise ViewsError(
            f"{file}: format version {meta.get('version')!r}, this release reads {VERSION}; "
            "install the equifeat that wrote it or render the object again"
        )
    try:
        name, step, views = meta["object"], float(meta["depth_step"]), meta["views"]
        h, w = (int(side) for side in meta["size_hw"])
        K = torch.tensor([view["K"] for view in views], dtype=torch.float64)
        poses = torch.tensor([view["cam_from_world"] for view in views], dtype=torch.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ViewsError(f"{file}: a field is missing or wrong ({error!r})") from error
    if not isinstance(name, str) or not name:
        raise ViewsError(f"{file}: object is {name!r}, not a name; render the object again")
    if not (0 < h <= _MAX_SIDE and 0 < w <= _MAX_SIDE):
        raise ViewsError(f"{file}: size_hw is {[h, w]}, not a picture's size; render again")
    if not (0 < step < 1):
        raise ViewsError(f"{file}: depth_step is {step}, not between 0 and 1; render again")
    if K.shape[1:] != (3, 3) or not _are_intrinsics(K):
        raise ViewsError(f"{file}: a K is not a 3x3 matrix of intrinsics; render again")
    _check_poses(poses, file)
    _require_files(folder, len(views))
    return ObjectViews(name, folder, K.float(), poses.float(), (h, w), step)


def _open_reference(folder: Path, root: Path) -> ObjectViews:
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
    _require_files(folder, views)
    try:
        with Image.open(folder / "color_000000.png") as image:
            w, h = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{folder / 'color_000000.png'}: not an image ({error})") from error
    # BlenderProc puts a principal point of (w - 1) / 2 in the middle: its pixels are
    # integer-centred, and the reference asked it for 256 of 512.
    scale = w / _REFERENCE_SIZE
    middle = from_integer_centers(torch.tensor([256.0, 256.0])) * scale
    K = torch.diag(torch.tensor([_REFERENCE_FOCAL * scale, _REFERENCE_FOCAL * scale, 1.0]))
    K[:2, 2] = middle
    name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
    return ObjectViews(
        name, folder, K.expand(views, 3, 3).clone(), poses[:views], (h, w), _REFERENCE_STEP
    )


def _read_poses(file: Path) -> Tensor:
    try:
        array = np.load(file, allow_pickle=False)
        poses = torch.from_numpy(np.asarray(array, dtype=np.float64))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ViewsError(f"{file}: not a NumPy array of (V, 4, 4) poses ({error})") from error
    _check_poses(poses, file)
    return poses.float()


def _are_intrinsics(K: Tensor) -> bool:
    bottom = torch.tensor([0.0, 0.0, 1.0], dtype=K.dtype)
    usable = bool(K.isfinite().all()) and bool((K[:, [0, 1], [0, 1]] > 0).all())
    return usable and torch.equal(K[:, 2], bottom.expand(len(K), 3))


def _check_poses(poses: Tensor, file: Path) -> None:
    if poses.ndim != 3 or poses.shape[0] == 0 or poses.shape[1:] != (4, 4):
        shape = tuple(poses.shape)
        raise ViewsError(f"{file}: poses of shape {shape}, expected (views, 4, 4), views > 0")
    R = poses[:, :3, :3]
    eye = torch.eye(3, dtype=poses.dtype)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=poses.dtype)
    rigid = bool(poses.isfinite().all()) and bool(((R @ R.mT - eye).abs() < 1e-3).all())
    rigid = rigid and bool((torch.linalg.det(R) > 0).all())
    if not rigid or bool(((poses[:, 3] - bottom).abs() > 1e-6).any()):
        raise ViewsError(f"{file}: a pose is not a rotation with a translation; render again")


def _check_poses_fit(views: ObjectViews) -> None:
    """Check that the surface of view 0 falls inside the silhouettes of a few other views.

    Nothing in the reference's folders says which poses they were rendered with.
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
                f"{views.folder}: the poses do not fit the pictures (view 0 against view {i}); put "
                "the obj_poses.npy they were rendered with into the folder or the one above"
            )


@lru_cache(maxsize=CACHED_VIEWS)
def _decode(folder: Path, i: int, size_hw: SizeHW, stamp: int) -> tuple[Any, Any, Any]:
    color = _read_image(folder / f"color_{i:06d}.png", size_hw, ("RGB", "RGBA"))
    depth = _read_image(folder / f"depth_{i:06d}.png", size_hw, ("I;16", "I;16B", "I"))
    mask = _read_image(folder / f"mask_{i:06d}.png", size_hw, ("L", "1"))
    return color[..., :3], depth, mask


def _read_image(file: Path, size_hw: SizeHW, modes: tuple[str, ...]) -> Any:
    try:
        with Image.open(file) as image:
            if image.mode not in modes:
                raise ImageError(f"{file}: mode {image.mode}, expected {' or '.join(modes)}")
            if (image.height, image.width) != size_hw:
                raise ImageError(
                    f"{file}: {image.height}x{image.width} pixels (height x width), the views are "
                    f"{size_hw[0]}x{size_hw[1]}; render the object again"
                )
            array = np.asarray(image)
    except FileNotFoundError as error:
        raise ImageError(f"{file}: no such image; render the object again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{file}: not a readable image ({error}); render again") from error
    return array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array

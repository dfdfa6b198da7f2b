"""Pairs of rendered views of different objects of one category, in the layout of SPair-71k.

A file of keypoints says where the same parts lie on different meshes, in object coordinates; poses
and depth say where and whether a view shows them. What is written is read by
`equifeat evaluate semantic --protocol spair/box`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from data_prep.category_keypoints import Keypoints, read_keypoints
from equifeat.data.image_pairs import turned_camera, turned_K
from equifeat.data.views import ObjectViews, View, open_views
from equifeat.errors import EvalDataError
from equifeat.files import atomic_folder
from equifeat.geometry.camera import Camera, rotation_angle_deg, transform
from equifeat.geometry.pixels import inside, pixel_index
from equifeat.progress import progress
from equifeat.seeding import torch_generator

# Fewer than three points fix no rotation between two objects, and make a coarse PCK.
_FEWEST = 3
# A point picked by hand lies this near to the surface, in object units.
_DEPTH_TOL = 0.02
# SPair's easy, medium and hard.
_BANDS = 3


class _Seen(NamedTuple):
    """What the upright views of one object show of its category's keypoints.

    Attributes:
        views: The object.
        turns: Quarter turns counter-clockwise of each view.
        R: (V, 3, 3) rotations of the turned cameras.
        points: (N, 3) float64 keypoints, NaN where the object has none.
        xy: (V, N, 2) pixels of the turned views.
        visible: (V, N) whether the view shows the keypoint.
    """

    views: ObjectViews
    turns: list[int]
    R: Tensor
    points: Tensor
    xy: Tensor
    visible: Tensor


class _Pair(NamedTuple):
    """One pair: two objects, a view of each, the rotation between them and its band."""

    source: str
    target: str
    i: int
    j: int
    angle: float
    band: int


def category_pairs_command(
    views: Sequence[Path],
    keypoints: Path,
    out: Path,
    pairs: int = 20,
    view_change: tuple[float, float] = (0.0, 90.0),
    seed: int = 0,
) -> str:
    """Write pairs of views of different objects of one category, with common keypoints.

    Args:
        views: Folders of rendered views; objects that the keypoints do not name are left out.
        keypoints: JSON with the keypoints of each object.
        out: Folder to write; an older one is replaced.
        pairs: How many of each category, a third in each third of the view changes.
        view_change: Smallest and largest rotation between the two upright views, in degrees.
        seed: Seed of the draw.

    Returns:
        What was written, in sentences.

    Raises:
        EvalDataError: The keypoints are wrong or do not fit the views, or an option makes no sense.
        ViewsError: The views cannot be read.
    """
    low, high = view_change
    if pairs < 1 or not 0.0 <= low < high <= 180.0:
        raise EvalDataError(
            f"pairs = {pairs}, view_change = {low} {high}: give at least 1 pair, and degrees with "
            "0 ≤ LOW < HIGH ≤ 180."
        )
    known = read_keypoints(keypoints)
    opened = _open(views)
    names: list[str] = []
    said = []
    with atomic_folder(out) as folder:
        for number, (category, wanted) in enumerate(known.categories.items()):
            here = {name: opened[name] for name in wanted.objects if name in opened}
            if len(here) < 2:
                continue
            seen = {
                name: _look(one, known, category)
                for name, one in progress(list(here.items()), f"look at {category}")
            }
            found = [
                pair for a, b in permutations(seen, 2) for pair in _pairs(seen, a, b, low, high)
            ]
            drawn = _draw(found, pairs, torch_generator(seed, number))
            for pair in drawn:
                names.append(_write(folder, len(names) + 1, category, wanted.names, seen, pair))
            said.append(f"{category}: {len(drawn)} pairs of {', '.join(here)}")
        if not names:
            raise EvalDataError(
                f"{keypoints}: no two objects of one category show {_FEWEST} common keypoints in "
                "the views; render more of its objects, or allow larger view changes."
            )
        layout = folder / "Layout" / "large" / "test.txt"
        layout.parent.mkdir(parents=True)
        layout.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return "\n".join([*said, f"{len(names)} pairs in {out}"])


def _open(folders: Sequence[Path]) -> dict[str, ObjectViews]:
    opened: dict[str, ObjectViews] = {}
    for folder in folders:
        for one in open_views(folder):
            if one.name in opened:
                raise EvalDataError(
                    f"{one.where}: an object {one.name!r} is also at {opened[one.name].where}; "
                    "name each folder once."
                )
            opened[one.name] = one
    return opened


def _look(views: ObjectViews, known: Keypoints, category: str) -> _Seen:
    """Find an object's keypoints in all of its views, turned so that up is upwards."""
    names = known.categories[category].names
    own = known.categories[category].objects[views.name]
    points = torch.tensor([own.get(n, (torch.nan,) * 3) for n in names], dtype=torch.float64)
    turns, rotations, places, shown = [], [], [], []
    for v in range(len(views)):
        view, k = _upright(views, v, known.up)
        pose = view.cam_from_world.double()
        local = transform(pose, points)
        xy = view.camera.project(local)
        turns.append(k)
        rotations.append(pose[:3, :3])
        places.append(xy)
        shown.append(_visible(xy, local[:, 2], view.depth.double()))
    visible = torch.stack(shown)
    for n, name in enumerate(names):
        if name in own and not visible[:, n].any():
            raise EvalDataError(
                f"{name} of {views.name} at {list(own[name])} is seen in no view of {views.where}: "
                "pick it anew in the coordinates of these views."
            )
    return _Seen(views, turns, torch.stack(rotations), points, torch.stack(places), visible)


def _upright(views: ObjectViews, i: int, up: Tensor) -> tuple[View, int]:
    """Read a view and turn it by quarters, so that up points as far upwards as it can."""
    view = views.view(i)
    x, y, _ = (view.cam_from_world[:3, :3].double() @ up).tolist()
    sides = [-y, x, y, -x]
    k = sides.index(max(sides))
    image, depth, mask = (
        torch.rot90(map_, k, dims=(-2, -1)) for map_ in (view.image, view.depth, view.mask)
    )
    camera = Camera(
        turned_K(view.camera.K.double(), view.camera.size_hw, k), (depth.shape[0], depth.shape[1])
    )
    return View(image, depth, mask, camera, turned_camera(k) @ view.cam_from_world.double()), k


def _visible(xy: Tensor, z: Tensor, depth: Tensor) -> Tensor:
    """(N,) whether a pixel at the point or beside it has the point's depth."""
    padded = torch.nn.functional.pad(depth, (1, 1, 1, 1))
    there = inside(xy, (depth.shape[0], depth.shape[1]))
    column, row = pixel_index(torch.where(there[:, None], xy, 0.0)).unbind(-1)
    around = [padded[row + dy, column + dx] for dy, dx in product(range(3), repeat=2)]
    near: Tensor = (torch.stack(around) - z).abs().amin(dim=0) <= _DEPTH_TOL
    return there & near


def _pairs(seen: dict[str, _Seen], a: str, b: str, low: float, high: float) -> Iterator[_Pair]:
    """Pairs of views of two objects that have enough keypoints and a view change in the limits."""
    source, target = seen[a], seen[b]
    R = _alignment(a, source.points, b, target.points)
    angles = rotation_angle_deg((target.R @ R)[None] @ source.R[:, None].mT)
    common = (source.visible[:, None] & target.visible[None]).sum(dim=-1)
    for i, j in torch.nonzero((common >= _FEWEST) & (angles >= low) & (angles <= high)).tolist():
        angle = float(angles[i, j])
        band = min(_BANDS - 1, int(_BANDS * (angle - low) / (high - low)))
        yield _Pair(a, b, i, j, angle, band)


def _alignment(a: str, points_a: Tensor, b: str, points_b: Tensor) -> Tensor:
    """(3, 3) rotation from object a to b: meshes of one category may face different ways.

    Kabsch's algorithm on the keypoints that both have.
    """
    both = (points_a + points_b).isfinite().all(dim=-1)
    if int(both.sum()) < _FEWEST:
        raise EvalDataError(
            f"{a} and {b} have {int(both.sum())} keypoints in common; pick at least {_FEWEST}."
        )
    centred = [points[both] - points[both].mean(dim=0) for points in (points_a, points_b)]
    U, _, Vt = torch.linalg.svd(centred[0].mT @ centred[1])
    mirror = torch.ones(3, dtype=torch.float64)
    mirror[2] = torch.sign(torch.linalg.det(Vt.mT @ U.mT))
    R: Tensor = Vt.mT @ torch.diag(mirror) @ U.mT
    return R


def _draw(found: list[_Pair], count: int, generator: torch.Generator) -> list[_Pair]:
    """Take pairs in turn from each band, and within it from each two objects."""
    bands: list[list[tuple[int, int, _Pair]]] = [[] for _ in range(_BANDS)]
    taken: Counter[tuple[int, str, str]] = Counter()
    for place, index in enumerate(torch.randperm(len(found), generator=generator).tolist()):
        pair = found[index]
        group = (pair.band, pair.source, pair.target)
        bands[pair.band].append((taken[group], place, pair))
        taken[group] += 1
    ranked = [
        (rank, band, pair)
        for band, members in enumerate(bands)
        for rank, (_, _, pair) in enumerate(sorted(members, key=lambda member: member[:2]))
    ]
    return [pair for _, _, pair in sorted(ranked, key=lambda member: member[:2])[:count]]


def _write(
    root: Path,
    number: int,
    category: str,
    names: Sequence[str],
    seen: dict[str, _Seen],
    pair: _Pair,
) -> str:
    """Write the annotation of a pair, and its pictures where they are not there yet."""
    source, target = seen[pair.source], seen[pair.target]
    both = source.visible[pair.i] & target.visible[pair.j]
    stems: list[str] = []
    content: dict[str, Any] = {"pair_id": number, "category": category}
    for side, one, i in (("src", source, pair.i), ("trg", target, pair.j)):
        stem = f"{one.views.name}_{i:06d}"
        file = root / "JPEGImages" / category / f"{stem}.png"
        view = one.views.view(i)
        color, mask = (torch.rot90(m, one.turns[i], dims=(-2, -1)) for m in (view.image, view.mask))
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = (color * 255.0).round().to(torch.uint8).permute(1, 2, 0)
            Image.fromarray(pixels.contiguous().numpy()).save(file)
        stems.append(stem)
        content |= {
            f"{side}_imname": file.name,
            f"{side}_imsize": [mask.shape[1], mask.shape[0], 3],
            f"{side}_bndbox": _box(mask),
            f"{side}_kps": [[round(v, 3) for v in xy] for xy in one.xy[i][both].tolist()],
        }
    name = f"{number:06d}-{stems[0]}-{stems[1]}:{category}"
    content |= {
        "filename": name,
        "kps_ids": [names[n] for n in torch.nonzero(both)[:, 0].tolist()],
        "viewpoint_variation": pair.band,
        "view_change_deg": round(pair.angle, 2),
    }
    _write_json(root / "PairAnnotation" / "test" / f"{name}.json", content)
    return name


def _box(mask: Tensor) -> list[int]:
    """Left, top, right, bottom of an object."""
    rows, columns = (torch.nonzero(mask.any(dim=d))[:, 0] for d in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")

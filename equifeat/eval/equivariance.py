"""Equivariance: does the nearest feature in another view belong to the same surface point?

For pixel centres of view 0 that are covisible in view 1, the descriptor there (bilinear sample of
the feature map, then L2-normalised) is matched to the nearest among the descriptors of the mask
pixels of view 1. The distance from the match to the true point, over the normaliser, is the error.
APE and PCDP are means over the pixels of a pair, then over the pairs of an object, then over
objects; intervals are bootstraps over objects. Captured objects have tracks of a reconstruction in
place of depth: their points are those that both views observe, and the truth is the observation in
view 1. Where a capture has no masks, every pixel of view 1 is searched, and the box is that of the
points observed there. The protocol is that of arXiv 2411.19458, whose
paper names neither its normaliser nor its code: both are recorded in every result here.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.errors import CorrespondenceError, RecipeError
from equifeat.eval.equivariance_result import BIN_EDGES, EquivarianceResult, PairScore
from equifeat.eval.features import device_of
from equifeat.eval.matching import DEFAULT_BUDGET, nearest
from equifeat.geometry.camera import Camera, relative, rotation_angle_deg
from equifeat.geometry.covisibility import dense_correspondences, limits_of_steps
from equifeat.geometry.pixels import pixel_centers
from equifeat.metrics import THRESHOLDS, Normalizer, ape, matching_errors, normalizer_px, pcdp
from equifeat.seeding import torch_generator

# Streams of the seed.
_PAIRS, _POINTS = 0, 1


@runtime_checkable
class SampledMap(Protocol):
    """A feature map that can be read at points."""

    def sample(self, keypoints: Tensor) -> Tensor:
        """Return (B, N, D) features at (B, N, 2) xy pixels of the input image."""
        ...


@runtime_checkable
class HasDense(Protocol):
    """Whatever turns images into a feature map: an extractor, a raw ViT, a fake of a test."""

    def dense(self, images: Tensor, resolution: int | None = None) -> SampledMap:
        """Return the map of (B, 3, H, W) images in [0, 1]."""
        ...


@runtime_checkable
class PosedView(Protocol):
    """One rendered view: image (3, H, W), depth (H, W), mask (H, W), camera."""

    @property
    def image(self) -> Tensor:
        """(3, H, W) RGB in [0, 1]."""
        ...

    @property
    def depth(self) -> Tensor:
        """(H, W) z-depth, 0 = background."""
        ...

    @property
    def mask(self) -> Tensor:
        """(H, W) bool."""
        ...

    @property
    def camera(self) -> Camera:
        """Intrinsics."""
        ...


@runtime_checkable
class PosedObject(Protocol):
    """The views of one object."""

    @property
    def name(self) -> str:
        """Identity of the object."""
        ...

    @property
    def cam_from_world(self) -> Tensor:
        """(V, 4, 4) poses."""
        ...

    def __len__(self) -> int: ...

    def view(self, i: int) -> PosedView:
        """Return view i."""
        ...


@runtime_checkable
class HasTracks(Protocol):
    """What the views of a captured object see, like equifeat.data.tracks.Tracks."""

    @property
    def xy(self) -> Sequence[Tensor]:
        """For every view (N_i, 2) pixels."""
        ...

    def shared(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Return the rows of views i and j that are of the same points."""
        ...

    def seen_on(self, i: int, mask: Tensor) -> Tensor:
        """Return which observations of view i lie on a mask."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Wraps an iteration to show how far it is, like equifeat.progress.progress."""

    def __call__(self, items: Sequence[PosedObject], what: str) -> Iterable[PosedObject]:
        """Yield the items."""
        ...


class _Points(NamedTuple):
    """Covisible points of a pair: pixels of both views."""

    view0: int
    view1: int
    xy0: Tensor
    xy1: Tensor


def evaluate_equivariance(
    models: Mapping[str, HasDense] | HasDense,
    objects: Sequence[PosedObject],
    *,
    name: str = "model",
    pairs: int | str = "all",
    points: int | str = 500,
    min_angle_deg: float = 0.0,
    max_angle_deg: float = 180.0,
    min_points: int = 10,
    target_stride: int = 2,
    normalizer: Normalizer = "box",
    resolution: int | None = None,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> EquivarianceResult:
    """Score models on pairs of rendered views.

    All models see the same pairs and points, which depend on the seed and the object's name only.
    Features of a view are computed once a model.

    Args:
        models: One model, or several by name. They are used as they are: put them in eval mode.
        objects: Objects with at least two views; their names differ.
        name: Name of a single model in the result.
        pairs: "all" ordered pairs, or a number drawn per object.
        points: "dense" for every covisible pixel, or a number drawn per pair.
        min_angle_deg: Smallest view change (angle of the relative rotation, roll included).
        max_angle_deg: Largest view change.
        min_points: Pairs with fewer covisible pixels are left out.
        target_stride: Match against every n-th mask pixel of view 1 in x and y; 1 is the full
            protocol, 2 costs a quarter and adds at most one pixel of error.
        normalizer: "box", the longer side of the object's box in view 1 (of the points observed
            there for captures without masks), or "image".
        resolution: Passed to the models: patches on the longer side, or None for the image's own.
        seed: Seed of the drawn pairs and points, and of the bootstrap.
        budget_bytes: Largest block of similarities held at once.
        device: Where images go and matching runs; None for the device of the (first) model.
        progress: Wraps the iteration over objects.

    Returns:
        Scores of every pair, and their summaries.

    Raises:
        CorrespondenceError: No pair of views has enough covisible pixels.
        RecipeError: An option makes no sense.
    """
    named = dict(models) if isinstance(models, Mapping) else {name: models}
    _check(named, objects, pairs, points, min_angle_deg, max_angle_deg, min_points, target_stride)
    device = device or device_of(next(iter(named.values())))
    rows: list[PairScore] = []
    iterate = progress(objects, "equivariance") if progress else objects
    with torch.no_grad():
        for obj in iterate:
            scorer = _ObjectScorer(obj, named, resolution, normalizer, budget_bytes, device)
            found = _covisible_pairs(
                scorer, pairs, points, (min_angle_deg, max_angle_deg), min_points, seed
            )
            rows += scorer.score(found, target_stride)
    if not rows:
        raise CorrespondenceError(
            f"no pair of views of {', '.join(o.name for o in objects[:3])} between "
            f"{min_angle_deg:g} and {max_angle_deg:g} degrees has {min_points} covisible pixels: "
            "render more views or widen the angles."
        )
    config: dict[str, Any] = {
        "normalizer": normalizer,
        "pairs": pairs,
        "points": points,
        "min_angle_deg": min_angle_deg,
        "max_angle_deg": max_angle_deg,
        "min_points": min_points,
        "target_stride": target_stride,
        "resolution": resolution,
        "seed": seed,
        "thresholds": list(THRESHOLDS),
        "bin_edges_deg": list(BIN_EDGES),
    }
    captured = [o for o in objects if getattr(o, "tracks", None) is not None]
    if captured:
        config["captured_objects"] = len(captured)
        config["captured_without_masks"] = sum(not has_masks(o) for o in captured)
    return EquivarianceResult(config, tuple(named), tuple(rows))


class PairErrors(NamedTuple):
    """How far a model's matches of a pair are from the truth.

    Attributes:
        view0: Index of the view whose pixels are matched.
        view1: Index of the view they are searched in.
        view_change_deg: Angle of the relative rotation.
        box_px: Longer side of the object's box in view 1.
        image_px: Longer side of view 1.
        errors_px: (N,) distances in pixels of view 1.
        drawn: (n, 6) some of the matches: xy in view 0, found and true xy in view 1.
    """

    view0: int
    view1: int
    view_change_deg: float
    box_px: float
    image_px: float
    errors_px: Tensor
    drawn: Tensor


_DRAWN = 24  # matches a pair that are kept for pictures


@torch.no_grad()
def object_errors(
    model: HasDense,
    obj: PosedObject,
    *,
    pairs: int | str = "all",
    points: int | str = 500,
    angles_deg: tuple[float, float] = (0.0, 180.0),
    min_points: int = 10,
    target_stride: int = 1,
    resolution: int | None = None,
    seed: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
    device: torch.device | str | None = None,
) -> list[PairErrors]:
    """Match all pairs of one object, as `evaluate_equivariance` does.

    Args:
        model: The model.
        obj: The object.
        pairs: See `evaluate_equivariance`.
        points: See `evaluate_equivariance`.
        angles_deg: Smallest and largest view change.
        min_points: See `evaluate_equivariance`.
        target_stride: See `evaluate_equivariance`.
        resolution: See `evaluate_equivariance`.
        seed: Seed of the drawn pairs and points.
        budget_bytes: See `evaluate_equivariance`.
        device: See `evaluate_equivariance`.

    Returns:
        One entry a pair with enough covisible pixels, on the CPU; none for an object without.

    Raises:
        RecipeError: An option makes no sense.
    """
    _check({"model": model}, [obj], pairs, points, *angles_deg, min_points, target_stride)
    device = device or device_of(model)
    scorer = _ObjectScorer(obj, {"model": model}, resolution, "box", budget_bytes, device)
    found = _covisible_pairs(scorer, pairs, points, angles_deg, min_points, seed)
    return [
        PairErrors(
            pair.view0,
            pair.view1,
            scorer.view_change_deg(pair),
            scorer.length(pair.view1, "box"),
            scorer.length(pair.view1, "image"),
            (to - pair.xy1).norm(dim=-1).cpu(),
            _some(torch.cat([pair.xy0, to, pair.xy1], dim=-1), _DRAWN),
        )
        for pair, found_xy in scorer.matches(found, target_stride)
        for to in found_xy.values()
    ]


class PairMatches(NamedTuple):
    """What a model finds for points of view 0 in view 1.

    Attributes:
        xy0: (N, 2) pixels of view 0.
        found: (N, 2) pixels of view 1 with the nearest descriptors.
        true: (N, 2) pixels of view 1 where the points are.
        errors: (N,) distances of found from true over the normaliser.
    """

    xy0: Tensor
    found: Tensor
    true: Tensor
    errors: Tensor


def match_points(
    models: Mapping[str, HasDense],
    obj: PosedObject,
    pair: tuple[int, int],
    *,
    points: int = 60,
    target_stride: int = 2,
    normalizer: Normalizer = "box",
    resolution: int | None = None,
    budget_bytes: int = DEFAULT_BUDGET,
    device: torch.device | str | None = None,
) -> dict[str, PairMatches]:
    """Match points of a pair as `evaluate_equivariance` does, to draw them.

    Args:
        models: Models by name.
        obj: The object.
        pair: Indices of view 0 and view 1.
        points: Most points; they are spread evenly over the covisible ones, the same every time.
        target_stride: See `evaluate_equivariance`.
        normalizer: See `evaluate_equivariance`.
        resolution: See `evaluate_equivariance`.
        budget_bytes: See `evaluate_equivariance`.
        device: See `evaluate_equivariance`.

    Returns:
        Matches by model, on the CPU.
    """
    device = device or device_of(next(iter(models.values())))
    scorer = _ObjectScorer(obj, models, resolution, normalizer, budget_bytes, device)
    every = scorer.points(*pair)
    some = _some(torch.cat([every.xy0, every.xy1], dim=-1), points)
    xy0, true = some[:, :2], some[:, 2:]
    targets = _target_pixels(scorer.view(pair[1]).mask, target_stride)
    found = {}
    with torch.no_grad():
        for model in models:
            ours = scorer.descriptors(model, pair[0], xy0)
            theirs = scorer.descriptors(model, pair[1], targets)
            to = targets[nearest(ours, theirs, budget_bytes).matches0.to(targets.device)]
            errors = matching_errors(to, true, scorer.length(pair[1]))
            found[model] = PairMatches(xy0, to, true, errors)
    return found


def has_masks(obj: PosedObject) -> bool:
    """Say whether the masks of an object's views are silhouettes.

    Args:
        obj: An object.

    Returns:
        False for photographs without masks, whose views are all mask.
    """
    return bool(getattr(obj, "has_masks", True))


def _check(
    models: Mapping[str, HasDense],
    objects: Sequence[PosedObject],
    pairs: int | str,
    points: int | str,
    low: float,
    high: float,
    min_points: int,
    stride: int,
) -> None:
    if not models or not len(objects):
        raise RecipeError(
            f"there are {len(models)} models and {len(objects)} objects to evaluate; "
            "give at least one of each."
        )
    names = [o.name for o in objects]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise RecipeError(f"two objects are named {twice[0]!r}; give them different names.")
    counts = (("pairs", pairs, "all"), ("points", points, "dense"))
    for option, value, word in counts:
        if value != word and (isinstance(value, str) or value < 1):
            raise RecipeError(f"{option}={value!r} must be {word!r} or a number of at least 1.")
    for option, number in (("min_points", min_points), ("target_stride", stride)):
        if number < 1:
            raise RecipeError(f"{option}={number} must be at least 1.")
    if not 0.0 <= low <= high:
        raise RecipeError(f"min_angle_deg={low} and max_angle_deg={high} leave no view change.")


class _ObjectScorer:
    """Views and features of one object, each read or computed once."""

    def __init__(
        self,
        obj: PosedObject,
        models: Mapping[str, HasDense],
        resolution: int | None,
        normalizer: Normalizer,
        budget_bytes: int,
        device: torch.device | str,
    ) -> None:
        self.obj = obj
        self.models = models
        self.resolution = resolution
        self.normalizer = normalizer
        self.budget_bytes = budget_bytes
        self.device = device
        self._views: dict[int, PosedView] = {}
        self._maps: dict[tuple[str, int], SampledMap] = {}

    def view(self, i: int) -> PosedView:
        if i not in self._views:
            self._views[i] = self.obj.view(i)
        return self._views[i]

    def descriptors(self, model: str, i: int, xy: Tensor) -> Tensor:
        if (model, i) not in self._maps:
            image = self.view(i).image[None].to(self.device)
            self._maps[model, i] = self.models[model].dense(image, resolution=self.resolution)
        raw = self._maps[model, i].sample(xy[None].to(self.device))[0]
        return F.normalize(raw, dim=-1)

    @property
    def tracks(self) -> HasTracks | None:
        return getattr(self.obj, "tracks", None)

    def points(self, i: int, j: int) -> _Points:
        if (tracks := self.tracks) is not None:
            rows0, rows1 = tracks.shared(i, j)
            on = tracks.seen_on(i, self.view(i).mask)[rows0]
            on &= tracks.seen_on(j, self.view(j).mask)[rows1]
            return _Points(i, j, tracks.xy[i][rows0[on]], tracks.xy[j][rows1[on]])
        view0, view1 = self.view(i), self.view(j)
        poses = self.obj.cam_from_world
        nearest_z = float(view0.depth[view0.depth > 0].min()) if view0.depth.any() else 1.0
        step = float(getattr(self.obj, "depth_step", 0.0))
        found = dense_correspondences(
            view0.depth,
            view1.depth,
            view0.camera,
            view1.camera,
            relative(poses[i], poses[j]),
            *limits_of_steps(step, view0.camera, nearest_z),
        )
        xy0 = pixel_centers(_size_hw(view0.mask), dtype=torch.float32)
        keep = found.covisible & view0.mask
        return _Points(i, j, xy0[keep], found.xy[keep].float())

    def length(self, j: int, normalizer: Normalizer | None = None) -> float:
        """Pixels of view j that errors are divided by."""
        tracks, normalizer = self.tracks, normalizer or self.normalizer
        if normalizer == "box" and tracks is not None and not has_masks(self.obj):
            xy = tracks.xy[j]
            return float((xy.amax(0) - xy.amin(0)).max())
        return normalizer_px(self.view(j).mask, normalizer)

    def matches(
        self, found: Iterable[list[_Points]], stride: int
    ) -> Iterator[tuple[_Points, dict[str, Tensor]]]:
        """The pixels of view 1 that each model finds, pair after pair."""
        for group in found:
            j = group[0].view1
            targets = _target_pixels(self.view(j).mask, stride)
            to: list[dict[str, Tensor]] = [{} for _ in group]
            for model in self.models:
                theirs = self.descriptors(model, j, targets)
                for pair, row in zip(group, to, strict=True):
                    ours = self.descriptors(model, pair.view0, pair.xy0)
                    index = nearest(ours, theirs, self.budget_bytes).matches0
                    row[model] = targets[index.to(targets.device)]
            yield from zip(group, to, strict=True)

    def score(self, found: Iterable[list[_Points]], stride: int) -> Iterator[PairScore]:
        for pair, to in self.matches(found, stride):
            length = self.length(pair.view1)
            errors = {m: matching_errors(xy, pair.xy1, length) for m, xy in to.items()}
            scores = {m: (ape(e), *pcdp(e)) for m, e in errors.items()}
            change = self.view_change_deg(pair)
            points = len(pair.xy0)
            yield PairScore(self.obj.name, pair.view0, pair.view1, change, points, scores)

    def view_change_deg(self, pair: _Points) -> float:
        return float(_angles(self.obj.cam_from_world[[pair.view0, pair.view1]])[0, 1])


def _covisible_pairs(
    scorer: _ObjectScorer,
    pairs: int | str,
    points: int | str,
    angles_deg: tuple[float, float],
    min_points: int,
    seed: int,
) -> Iterator[list[_Points]]:
    """Groups of pairs with a common view 1, so that its descriptors are made once."""
    identity = zlib.crc32(scorer.obj.name.encode())
    angle = _angles(scorer.obj.cam_from_world)
    allowed = (angle >= angles_deg[0] - 1e-4) & (angle <= angles_deg[1] + 1e-4)
    allowed.fill_diagonal_(False)
    candidates: list[tuple[int, int]] = [(i, j) for j, i in allowed.T.nonzero().tolist()]

    def found(i: int, j: int) -> _Points | None:
        pair = scorer.points(i, j)
        if len(pair.xy0) < min_points:
            return None
        if isinstance(points, str) or len(pair.xy0) <= points:
            return pair
        drawn = torch.randperm(
            len(pair.xy0), generator=torch_generator(seed, _POINTS, identity, i, j)
        )[:points]
        return pair._replace(xy0=pair.xy0[drawn], xy1=pair.xy1[drawn])

    if isinstance(pairs, str):
        for j in range(len(scorer.obj)):
            group = [p for i, to in candidates if to == j and (p := found(i, j))]
            if group:
                yield group
        return
    order = torch.randperm(len(candidates), generator=torch_generator(seed, _PAIRS, identity))
    taken: dict[int, list[_Points]] = {}
    left = pairs
    for k in order.tolist():
        if left and (pair := found(*candidates[k])):
            taken.setdefault(pair.view1, []).append(pair)
            left -= 1
    yield from taken.values()


def _angles(cam_from_world: Tensor) -> Tensor:
    """(V, V) angles in degrees of the relative rotations."""
    R = cam_from_world[:, :3, :3].double()
    return rotation_angle_deg(R[:, None] @ R[None].mT)


def _some(rows: Tensor, count: int) -> Tensor:
    """Evenly chosen rows, the same every time."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()].cpu()


def _size_hw(mask: Tensor) -> tuple[int, int]:
    return int(mask.shape[-2]), int(mask.shape[-1])


def _target_pixels(mask: Tensor, stride: int) -> Tensor:
    """(T, 2) centres of every n-th mask pixel; all of them where the stride misses a thin mask."""
    centers = pixel_centers(_size_hw(mask), dtype=torch.float32)
    at = slice(stride // 2, None, stride)
    some = centers[at, at][mask[at, at]]
    return some if len(some) else centers[mask]

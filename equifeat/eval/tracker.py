"""Track points by matching every frame alone: no motion, no training (DINO-Tracker's baseline).

A point's descriptor is compared with every feature of a frame; the place is the soft-argmax of the
similarities in a circle around the best one. A point is hidden where its similarity is low, or
where tracking it back to the frames in which it is surely seen ("anchors") does not return.
Source: arXiv 2403.14548 and arXiv 2411.19458 (utils/tracking_model.py of its repository).

Equal to tracking one point at a time, but for rounding; what makes it fast:
    all queries are matched with a frame in one product, and each frame's features are made once;
    the softmax runs over the circle only, as the rest of the map cancels out;
    cycles run only where they can change the result: anchors never exceed their own largest error,
    and a similarity below the threshold hides a point anyway, so that only queries with a frame
    between both thresholds need them, and only from frames that are not hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.geometry.pixels import resize
from equifeat.model.feature_map import FeatureMap


@dataclass(frozen=True)
class TrackerOptions:
    """How points are found and judged.

    Args:
        radius: Radius of the circle of the soft-argmax, in pixels of the video.
        temperature: Of the soft-argmax; the reference has none, that is 1.
        anchor_threshold: Cosine from which a frame is an anchor.
        cosine_threshold: Cosine below which a point is hidden.
        occlusion: "cycle" also tracks back to the anchors; "cosine" only compares.
        upsample: Factor by which similarities are bilinearly upsampled before the argmax.
    """

    radius: float = 35.0
    temperature: float = 1.0
    anchor_threshold: float = 0.7
    cosine_threshold: float = 0.6
    occlusion: Literal["cycle", "cosine"] = "cycle"
    upsample: int = 1


class Tracks(NamedTuple):
    """Where points are predicted.

    Attributes:
        xy: (N, T, 2) in pixels of the video.
        occluded: (N, T) whether they are hidden.
        similarity: (N, T) cosine with the point in its query's frame.
    """

    xy: Float[Tensor, "n t 2"]
    occluded: Bool[Tensor, "n t"]
    similarity: Float[Tensor, "n t"]


@torch.no_grad()
def track(
    maps: FeatureMap,
    queries_xyt: Float[Tensor, "n 3"],
    options: TrackerOptions | None = None,
    memory_mb: int = 512,
    device: torch.device | str | None = None,
) -> Tracks:
    """Track points through a video.

    Args:
        maps: Features of its T frames, of any floating type; products are in float32.
        queries_xyt: x and y in pixels, and the frame, of every point.
        options: How.
        memory_mb: Memory for similarities and descriptors beside the features themselves.
        device: Where matching runs, frame by frame, when the features wait elsewhere; with the
            features when None.

    Returns:
        The tracks, on the CPU. No query depends on another one.
    """
    options = options or TrackerOptions()
    matcher = _Matcher(maps, options, memory_mb, device)
    queries = queries_xyt.to(matcher.device, torch.float32)
    frames, dim = maps.features.shape[:2]
    at_once = max(1, memory_mb * 2**19 // (4 * frames * (dim + frames)))
    parts = [_track(matcher, some, options) for some in torch.split(queries, at_once)]
    xy, occluded, similarity = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Tracks(xy, occluded, similarity)


def _track(matcher: _Matcher, queries: Tensor, options: TrackerOptions) -> Tracks:
    at = queries[:, 2].round().long()
    start = queries.new_empty(len(queries), matcher.dim)
    for frame in sorted(set(at.tolist())):
        here = at == frame
        start[here] = matcher.describe(frame, queries[here, :2])
    xy = torch.stack([matcher.match(start, t) for t in range(matcher.frames)], dim=1)
    found = torch.stack([matcher.describe(t, xy[:, t]) for t in range(matcher.frames)], dim=1)
    # the reference compares with the place found in the query's frame, not with the query itself
    own = found[torch.arange(len(at), device=at.device), at]
    similarity = torch.einsum("ntd,nd->nt", found, own)
    hidden = similarity < options.cosine_threshold
    if options.occlusion == "cycle":
        hidden = _with_cycles(matcher, xy, found, similarity >= options.anchor_threshold, hidden)
    return Tracks(xy, hidden, similarity)


def _with_cycles(
    matcher: _Matcher, xy: Tensor, found: Tensor, anchors: Tensor, hidden: Tensor
) -> Tensor:
    """Add what does not return: its median error over the anchors exceeds each anchor's own."""
    doubtful = ~hidden & ~anchors
    asked = doubtful.any(dim=1) & anchors.any(dim=1)
    sources = (doubtful | anchors) & asked[:, None]
    errors = xy.new_full((len(xy), matcher.frames, matcher.frames), torch.nan)
    for t in range(matcher.frames):
        query, source = (sources & anchors[:, t : t + 1]).nonzero(as_tuple=True)
        if len(query):
            back = matcher.match(found[query, source], t)
            errors[query, t, source] = (back - xy[query, t]).norm(dim=-1)
    median = errors.nanmedian(dim=1).values
    largest = torch.where(anchors, median, -torch.inf).amax(dim=1, keepdim=True)
    return hidden | (doubtful & asked[:, None] & (median > largest))


class _Matcher:
    """The frames' features, and where descriptors are found in them."""

    def __init__(
        self,
        maps: FeatureMap,
        options: TrackerOptions,
        memory_mb: int,
        device: torch.device | str | None,
    ) -> None:
        self.maps = maps
        self.device = maps.features.device if device is None else torch.device(device)
        self.frames, self.dim = int(maps.features.shape[0]), int(maps.features.shape[1])
        self.temperature, self.upsample = options.temperature, options.upsample
        h, w = (n * options.upsample for n in maps.grid_hw)
        one = torch.empty(1, 1, h, w, device=self.device)
        grid = FeatureMap(one, maps.size_hw, maps.margin_yx)
        self.grid_hw = (h, w)
        self.centers = grid.centers().reshape(-1, 2)
        self.steps = _circle(grid.stride, options.radius).to(self.device)
        stride = self.centers.new_tensor(grid.stride[::-1])
        self.offsets = self.steps.flip(-1) * stride
        # similarities, and some ten values for each place in the circle
        self.rows = max(1, memory_mb * 2**19 // (4 * (h * w + 10 * len(self.steps))))

    def describe(self, frame: int, xy: Tensor) -> Tensor:
        """Return the unit descriptors (M, D) of points (M, 2) of a frame."""
        one = self.maps.features[frame : frame + 1].to(self.device)
        return FeatureMap(one, self.maps.size_hw, self.maps.margin_yx).sample(xy[None])[0]

    def match(self, descriptors: Tensor, frame: int) -> Tensor:
        """Return where (M, D) unit descriptors are found in a frame, (M, 2) in pixels."""
        features = self.maps.features[frame].to(self.device).flatten(1).float()
        features = F.normalize(features, dim=0, eps=1e-8)
        return torch.cat(
            [self._match(some, features) for some in torch.split(descriptors, self.rows)]
        )

    def _match(self, descriptors: Tensor, features: Tensor) -> Tensor:
        cosines = descriptors @ features
        if self.upsample > 1:
            maps = resize(cosines.reshape(-1, 1, *self.maps.grid_hw), self.grid_hw)
            cosines = maps.flatten(1)
        best, place = cosines.max(dim=1)
        # the reference takes the argmax after the ReLU: the first one where nothing is similar
        place = torch.where(best > 0, place, 0)
        h, w = self.grid_hw
        row = place[:, None] // w + self.steps[:, 0]
        column = place[:, None] % w + self.steps[:, 1]
        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        index = row.clamp(0, h - 1) * w + column.clamp(0, w - 1)
        values = cosines.gather(1, index).relu()
        weights = ((values - best.relu()[:, None]) / self.temperature).exp() * inside
        shift = weights @ self.offsets / weights.sum(dim=1, keepdim=True)
        return self.centers[place] + shift


def _circle(stride_yx: tuple[float, float], radius: float) -> Tensor:
    """Return the (K, 2) steps of (rows, columns) that stay in a circle."""
    reach = [int(radius / s + 1e-6) for s in stride_yx]
    y, x = (torch.arange(-n, n + 1) for n in reach)
    steps = torch.cartesian_prod(y, x)
    length = (steps * torch.tensor(stride_yx, dtype=torch.float64)).norm(dim=1)
    return steps[length <= radius * (1 + 1e-6)]

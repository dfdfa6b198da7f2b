"""Find descriptors in a feature map upsampled bilinearly, without ever making the upsampled map.

A dot product with a mean of features is the mean of the dot products, so similarities with the
map's own features are interpolated: N values a place instead of D. They are divided by the length
of the interpolated feature, which follows from the dot products of neighbouring features:
|Σ wᵢ fᵢ|² = Σ wᵢ wⱼ fᵢ·fⱼ. The result is that of interpolating first and normalising then. (The
reference implementation does not normalise at all on PF-PASCAL: equifeat.eval.locate_dot.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equifeat.errors import CorrespondenceError, RecipeError
from equifeat.eval.matching import DEFAULT_BUDGET, MatchDtype, factor, max_of_rows, product
from equifeat.geometry.pixels import LinearTaps, SizeHW, linear_taps, patch_centers
from equifeat.model.feature_map import FeatureMap

MatchMethod = Literal["nearest", "soft_argmax"]
# As F.normalize: shorter features are taken for zero.
_SHORTEST = 1e-12
# A mean of features shorter than this share of the longest of them is taken for zero.
_CANCELLED = 1e-5
# A block's share of the budget: interpolating needs a few tensors of its size.
_SHARE = 4
_CPU_ENTRIES = 2**20
_FEW_ROWS = 8


@dataclass(frozen=True)
class MatchSpec:
    """How the place of a descriptor is found.

    Args:
        method: "nearest" takes the most similar place; "soft_argmax" the mean of places, weighted
            by softmax(similarity / temperature).
        temperature: Of soft_argmax.
        window: soft_argmax averages places no farther than this from the most similar one, in
            pixels of the target image; 0 or None averages all.
        dtype: "bfloat16" searches with descriptors rounded to bfloat16, see nearest().
    """

    method: MatchMethod = "nearest"
    temperature: float = 1.0
    window: float | None = 0.0
    dtype: MatchDtype = "float32"

    def __post_init__(self) -> None:
        """Check the options."""
        for name, kinds in (("method", MatchMethod), ("dtype", MatchDtype)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise RecipeError(f"{name} must be one of {', '.join(get_args(kinds))}: {value!r}.")
        if not self.temperature > 0:
            raise RecipeError(f"temperature must be above 0, not {self.temperature:g}.")
        if self.window is not None and not self.window >= 0:
            raise RecipeError(f"window must be 0 (everywhere) or a radius, not {self.window:g}.")


class Located(NamedTuple):
    """Where descriptors were found.

    Attributes:
        xy: (N, 2) places in pixels of the target image.
        similarity: (N,) cosine at the most similar place.
    """

    xy: Tensor
    similarity: Tensor


@torch.no_grad()
def locate(
    descriptors: Float[Tensor, "n d"],
    target: FeatureMap,
    spec: MatchSpec = MatchSpec(),
    grid_hw: SizeHW | None = None,
    mask: Bool[Tensor, "h w"] | None = None,
    budget_bytes: int = DEFAULT_BUDGET,
) -> Located:
    """Find the place of each descriptor in a target image.

    Args:
        descriptors: (N, D) L2-normalised descriptors.
        target: The target's features, batch 1, not normalised.
        spec: The method.
        grid_hw: Candidates are the centres of a grid of this size that covers the image; the map
            is interpolated there bilinearly. None, or the map's own size, takes its own features.
        mask: True for the candidates that may be taken, of the grid's size; None takes all.
        budget_bytes: Largest memory of similarities held at once.

    Returns:
        Places and similarities, on the target's device; of equally similar places the first.

    Raises:
        CorrespondenceError: Shapes do not fit, or the mask leaves no candidate.
        RecipeError: The budget does not hold similarities of one row of the grid.
    """
    search = _Search(target, grid_hw, mask, spec, budget_bytes)
    descriptors = descriptors.to(search.features.device)
    if descriptors.ndim != 2 or descriptors.shape[1] != len(search.features):
        raise CorrespondenceError(
            f"descriptors must have the shape (N, {len(search.features)}) to be found in this "
            f"map, not {tuple(descriptors.shape)}."
        )
    count = search.descriptors_at_once(len(descriptors))
    starts = range(0, max(1, len(descriptors)), count)
    parts = [search.find(descriptors[i : i + count]) for i in starts]
    return Located(*(torch.cat(both) for both in zip(*parts, strict=True)))


class _Search:
    """A target prepared for being searched."""

    def __init__(
        self,
        target: FeatureMap,
        grid_hw: SizeHW | None,
        mask: Tensor | None,
        spec: MatchSpec,
        budget_bytes: int,
    ) -> None:
        if len(target.features) != 1:
            raise CorrespondenceError(
                f"the target must be one image, not a batch of {len(target.features)}."
            )
        self.target, self.spec = target, spec
        self.features = target.features[0]
        self.wide = torch.promote_types(self.features.dtype, torch.float32)
        own = grid_hw is None or tuple(grid_hw) == target.grid_hw
        self.grid_hw = target.grid_hw if grid_hw is None else grid_hw
        if min(self.grid_hw) < 1:
            raise CorrespondenceError(f"grid_hw={self.grid_hw} has no place to search.")
        device = self.features.device
        size_hw = target.size_hw
        centers = target.centers() if own else patch_centers(self.grid_hw, size_hw, device)
        self.x, self.y = centers[0, :, 0].contiguous(), centers[:, 0, 1].contiguous()
        self.allowed = None if mask is None else self._checked(mask).to(device)
        self.entries = budget_bytes // (self.wide.itemsize * _SHARE)
        if self.entries < self.grid_hw[1]:
            raise RecipeError(
                f"budget_bytes={budget_bytes} is too small for the similarities of one row of "
                f"{self.grid_hw[1]} places: give at least a few megabytes."
            )
        self.budget_entries = self.entries
        if device.type == "cpu":  # what does not fit into caches is slower
            self.entries = max(self.grid_hw[1], min(self.entries, _CPU_ENTRIES))
        self.taps_y: LinearTaps | None = None
        self.taps_x: LinearTaps | None = None
        if own:
            self.lengths = torch.linalg.vector_norm(self.features, dim=0, dtype=self.wide)
        else:
            (h, w), margin = target.grid_hw, target.margin_yx
            self.taps_y = linear_taps(self.y.double(), h, size_hw[0], margin[0])
            self.taps_x = linear_taps(self.x.double(), w, size_hw[1], margin[1])
            self.lengths = self._interpolated_lengths(self.taps_y, self.taps_x)
        self.lengths.clamp_(min=_SHORTEST)

    def _checked(self, mask: Tensor) -> Tensor:
        if tuple(mask.shape) != tuple(self.grid_hw):
            raise CorrespondenceError(
                f"the mask must have the grid's size {tuple(self.grid_hw)}, "
                f"not {tuple(mask.shape)}."
            )
        if not mask.any():
            raise CorrespondenceError("the mask leaves no place of the target to be found.")
        return mask.bool()

    def _interpolated_lengths(self, taps_y: LinearTaps, taps_x: LinearTaps) -> Tensor:
        """|interpolated feature| at each candidate, (H, W), from dot products of neighbours."""
        square, right, below, diagonal = self._neighbours()
        (y0, y1, v), (x0, x1, u) = taps_y, taps_x
        v, s = v[:, None], (1.0 - v)[:, None]
        # g = s f[y0] + v f[y1]: its square and its product with the one to its right
        squares = s * s * square[y0] + 2.0 * s * v * below[y0] + v * v * square[y1]
        rights = s * s * right[y0] + s * v * diagonal[y0] + v * v * right[y1]
        t = 1.0 - u
        out = t * t * squares[:, x0] + 2.0 * t * u * rights[:, x0] + u * u * squares[:, x1]
        # Features that cancel each other leave rounding errors: no direction, so no similarity.
        rows = torch.maximum(square[y0], square[y1])
        largest = torch.maximum(rows[:, x0], rows[:, x1])
        out = torch.where(out > _CANCELLED**2 * largest, out, torch.inf)
        return out.sqrt_().to(self.wide)

    def _neighbours(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Dot products of features, (h, w) each, in float64, where cancellation does no harm.

        With itself, with the one to the right, with the one below, and the sum of the products of
        both diagonals of the square that lies to the right and below. At the border, where the
        other has the weight 0, they are anything.
        """
        d, h, w = self.features.shape
        out = torch.zeros(4, h, w, dtype=torch.float64, device=self.features.device)
        step = max(1, self.budget_entries // (2 * d * w))
        for i in range(0, h, step):
            f = self.features[:, i : i + step + 1].double()
            n = min(step, h - i)
            up, down = f[:, :n], f[:, 1:]
            out[0, i : i + n] = (up * up).sum(0)
            out[1, i : i + n, :-1] = (up[..., :-1] * up[..., 1:]).sum(0)
            m = down.shape[1]
            out[2, i : i + m] = (up[:, :m] * down).sum(0)
            cross = up[:, :m, :-1] * down[..., 1:] + up[:, :m, 1:] * down[..., :-1]
            out[3, i : i + m, :-1] = cross.sum(0)
        square, right, below, diagonal = out.unbind()
        return square, right, below, diagonal

    def descriptors_at_once(self, n: int) -> int:
        """How many descriptors are searched for together, so that a few rows of places fit."""
        rows = min(_FEW_ROWS, self.grid_hw[0])
        return max(1, min(n, self.entries // (rows * self.grid_hw[1])))

    def find(self, descriptors: Tensor) -> Located:
        """Locate as many descriptors as fit."""
        blocks = self._blocks(len(descriptors))
        best = torch.full((len(descriptors),), -torch.inf, dtype=self.wide, device=self.x.device)
        index = torch.zeros(len(descriptors), dtype=torch.int64, device=self.x.device)
        similarity = torch.empty(0)
        for rows in blocks:
            similarity = self._similarities(descriptors, rows)
            value, at = max_of_rows(similarity.flatten(1))
            better = value > best
            best = torch.where(better, value, best)
            index = torch.where(better, at + rows.start * self.grid_hw[1], index)
        column, row = index % self.grid_hw[1], index // self.grid_hw[1]
        place = torch.stack([self.x[column], self.y[row]], dim=-1)
        xy = place
        if self.spec.method == "soft_argmax":
            again = (
                (rows, similarity if len(blocks) == 1 else self._similarities(descriptors, rows))
                for rows in blocks
            )
            xy = self._mean(place, best, again)
        if self.spec.dtype != "float32":
            there = self.target.sample(place[None])[0]
            best = torch.linalg.vecdot(descriptors.to(self.wide), there.to(self.wide))
        return Located(xy, best)

    def _blocks(self, n: int) -> list[slice]:
        """Rows of candidates whose similarities are computed together."""
        height, width = self.grid_hw
        d, h, w = self.features.shape
        # where the map is finer than the grid, its own similarities need more
        source = -(-h // height) * w
        step = self.entries // (max(n, 1) * max(width, source))
        if self.features.dtype != self.wide or self.spec.dtype != "float32":
            step = min(step, self.budget_entries // (d * source))  # a wider copy of features
        step = max(1, min(height, step))
        return [slice(i, min(i + step, height)) for i in range(0, height, step)]

    def _similarities(self, descriptors: Tensor, rows: slice) -> Tensor:
        """Cosines of (n, D) descriptors with some rows of candidates: (n, rows, W)."""
        if self.taps_y is None or self.taps_x is None:
            out = self._products(descriptors, rows)
        else:
            low, high, v = (part[rows] for part in self.taps_y)
            x0, x1, u = self.taps_x
            first = int(low[0])
            own = self._products(descriptors, slice(first, int(high[-1]) + 1))
            v, u = v.to(self.wide)[:, None], u.to(self.wide)
            lines = torch.lerp(own[:, low - first], own[:, high - first], v)
            out = torch.lerp(lines[..., x0], lines[..., x1], u)
        out /= self.lengths[rows]
        if self.allowed is not None:
            out.masked_fill_(~self.allowed[rows], -torch.inf)
        return out

    def _products(self, descriptors: Tensor, rows: slice) -> Tensor:
        """Dot products with some rows of the map's own features, (n, rows, w)."""
        dtype, features = self.spec.dtype, self.features[:, rows]
        own = factor(features.flatten(1).mT, self.wide, dtype)
        out = torch.empty(len(descriptors), len(own), dtype=self.wide, device=own.device)
        product(factor(descriptors, self.wide, dtype), own, out)
        return out.view(len(descriptors), *features.shape[1:])

    def _mean(self, place: Tensor, best: Tensor, blocks: Iterable[tuple[slice, Tensor]]) -> Tensor:
        """Mean place, weighted by softmax(similarity / temperature) within the window."""
        weight = torch.zeros(len(place), dtype=torch.float64, device=place.device)
        sums = torch.zeros(len(place), 2, dtype=torch.float64, device=place.device)
        across = (self.x - place[:, :1]).square()
        for rows, similarity in blocks:
            share = ((similarity - best[:, None, None]) / self.spec.temperature).exp_()
            if self.spec.window:
                down = (self.y[rows] - place[:, 1:]).square()
                radius = self.spec.window * (1.0 + 1e-6)  # a place on the circle is inside
                share *= across[:, None] + down[:, :, None] <= radius**2
            columns = share.sum(1).double()
            weight += columns.sum(1)
            sums[:, 0] += columns @ self.x.double()
            sums[:, 1] += share.sum(2).double() @ self.y[rows].double()
        return (sums / weight[:, None]).to(place.dtype)

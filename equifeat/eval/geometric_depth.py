"""Correspondence recall from depth, by view change, as Probe3D: NAVI objects and ScanNet rooms.

Features are carried to a coarse grid of points with known depth; each point of view 0 is matched to
its nearest in view 1, the best by the ratio test count, and a match is right when view 0's point,
carried to camera 1, lies close to view 1's: in metres for NAVI, after projection for ScanNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from equifeat.data.image_pairs import PixelCenters
from equifeat.data.navi import Collection, NaviPair, navi_pairs, read_navi
from equifeat.data.scannet_pairs import ScanNetPair, read_scannet_pairs
from equifeat.draw_matches import match_picture
from equifeat.errors import EvalDataError, RecipeError
from equifeat.eval.data_hash import data_hash
from equifeat.eval.features import FeatureSource
from equifeat.eval.posed_grid import PosedGrid, navi_grid, scannet_grid
from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.ratio import best_matches
from equifeat.eval.task import Prediction, Row, TaskData
from equifeat.geometry.camera import invert, rotation_angle_deg, transform
from equifeat.geometry.pixels import resize
from equifeat.model.feature_map import FeatureMap

_SOURCE = "El Banani et al., CVPR 2024 (arXiv 2404.08636); github.com/mbanani/probe3d"
_DINOV2_B = "vit_base_patch14_dinov2.lvd142m"


@dataclass(frozen=True)
class MatchOptions:
    """What both have in common.

    Args:
        shrink: The grid of points has one point in every square of so many pixels.
        matches: How many matches of a pair count; 0 takes all.
        ratio: Choose them by the ratio test; otherwise by similarity.
        upsampling: How features are carried from patches to the grid.
    """

    shrink: int = 4
    matches: int = 1000
    ratio: bool = True
    upsampling: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True)
class NaviOptions(MatchOptions):
    """How NAVI is read.

    Args:
        collection: "wild_set", photographs in the wild, or "multiview".
        every: Every so manieth photograph begins a pair.
        max_angle: Largest rotation between the two, in degrees.
        side: Height and width of the images in pixels.
        box: Cut a square around the object before.
    """

    collection: Collection = "wild_set"
    every: int = 4
    max_angle: float = 120.0
    side: int = 512
    box: bool = True


@dataclass(frozen=True)
class ScanNetOptions(MatchOptions):
    """How ScanNet is read.

    Args:
        size_hw: Height and width of the images.
        error: Pixels of errors: of the "grid", as in Probe3D's code, or of the "image".
        pixels: Convention of K; Probe3D uses it as if it were "corner".
    """

    upsampling: Literal["bicubic", "bilinear"] = "bilinear"
    size_hw: tuple[int, int] = (480, 640)
    error: Literal["grid", "image"] = "grid"
    pixels: PixelCenters = "corner"


def _bins(name: str, edges: Sequence[int]) -> tuple[Metric, ...]:
    return tuple(Metric(f"{name} {a}-{b}°", mean="rows") for a, b in pairwise(edges))


_NAVI_EDGES, _SCANNET_EDGES = (0, 30, 60, 90, 120), (0, 15, 30, 60, 180)
_CENTIMETRES, _PIXELS = (2, 1, 5), (10, 5, 20)
_NAVI_METRICS = (
    *(Metric(f"recall@{cm}cm", mean="rows") for cm in _CENTIMETRES),
    *_bins("recall@2cm", _NAVI_EDGES),
)
_SCANNET_METRICS = (
    *(Metric(f"recall@{px}px", mean="rows") for px in _PIXELS),
    *_bins("recall@10px", _SCANNET_EDGES),
)


def _scannet(name: str, about: str, options: ScanNetOptions) -> Protocol:
    return Protocol(name, "geometric", about, _SOURCE, _SCANNET_METRICS, "scene", options=options)


PROTOCOLS = (
    Protocol(
        "navi/probe3d",
        "geometric",
        "pairs of photographs in the wild up to 120° apart, 1,000 best matches by the ratio test",
        _SOURCE,
        _NAVI_METRICS,
        "object",
        options=NaviOptions(),
        # Probe3D's own
        seed=8,
        published={
            _DINOV2_B: {
                "recall@2cm 0-30°": 90.6,
                "recall@2cm 30-60°": 69.3,
                "recall@2cm 60-90°": 45.9,
                "recall@2cm 90-120°": 32.0,
            }
        },
    ),
    _scannet(
        "scannet/probe3d-10px",
        "SuperGlue's 1,500 pairs, errors in pixels of the 120x160 grid as in Probe3D's code",
        ScanNetOptions(),
    ),
    _scannet(
        "scannet/image-10px",
        "SuperGlue's 1,500 pairs, errors in pixels of the 480x640 images",
        ScanNetOptions(error="image"),
    ),
)


class DepthPairs(TaskData):
    """Pairs of posed views with depth.

    Args:
        root: Folder of the data set.
        protocol: One of `PROTOCOLS`, perhaps changed.
    """

    def __init__(self, root: Path, protocol: Protocol) -> None:
        self.options: NaviOptions | ScanNetOptions = protocol.options
        if self.options.shrink < 1 or self.options.matches < 0:
            raise RecipeError(
                f"shrink={self.options.shrink} must be at least 1, "
                f"matches={self.options.matches} at least 0."
            )
        self.pairs: list[Any] = []
        files: list[Path] = []
        if isinstance(self.options, NaviOptions):
            if self.options.every < 1 or self.options.side < 1:
                raise RecipeError("every and side must be at least 1.")
            sets = read_navi(root, self.options.collection)
            self.pairs += navi_pairs(
                sets, self.options.max_angle, self.options.every, protocol.seed
            )
            files += [root / obj / name / "annotations.json" for obj, name in sets]
            if not self.pairs:
                raise EvalDataError(
                    f"{root}: no two photographs are within {self.options.max_angle:g}°."
                )
        else:
            pairs, files = read_scannet_pairs(root, self.options.pixels)
            self.pairs += pairs
        names = [pair.name for pair in self.pairs]
        super().__init__(
            root, protocol, names, data_hash(root, files, filter(Path.is_file, self.pictures()))
        )

    def pictures(self) -> list[Path]:
        """Return all images and depth images that the pairs need.

        Returns:
            The files, each once, sorted; they need not exist.
        """
        found: set[Path] = set()
        for pair in self.pairs:
            if isinstance(pair, NaviPair):
                for view in (pair.view0, pair.view1):
                    found |= {view.image, view.depth}
            else:
                found |= {*pair.images, *pair.depths}
        return sorted(found)

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Return the best matches with their points in both cameras, metres; see TaskData."""
        grids = [self._grid(index, side) for side in (0, 1)]
        found = []
        for grid in grids:
            features = self._on_grid(source(grid.image), grid)
            found.append(features[grid.seen.to(features.device)])
        best = best_matches(found[0], found[1], self.options.matches, self.options.ratio)
        rows = (best.rows0.cpu(), best.rows1.cpu())
        xy = [grid.centers()[grid.seen][row] for grid, row in zip(grids, rows, strict=True)]
        points = [grid.points[grid.seen][row] for grid, row in zip(grids, rows, strict=True)]
        return {
            "xy0": xy[0].float(),
            "xy1": xy[1].float(),
            "score": best.score.float().cpu(),
            "points0": points[0].float(),
            "points1": points[1].float(),
            "K1": grids[1].K,
        }

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Return one row, the pair's recalls; see TaskData."""
        pair, pose = self.pairs[index], self._pose(index)
        errors = self._errors(index, prediction)
        change = float(rotation_angle_deg(pose[:3, :3]))
        if isinstance(self.options, NaviOptions):
            values = {f"recall@{cm}cm": _recall(errors, cm / 100.0) for cm in _CENTIMETRES}
            lead, edges, unit = "recall@2cm", _NAVI_EDGES, pair.view0.obj
        else:
            values = {f"recall@{px}px": _recall(errors, float(px)) for px in _PIXELS}
            lead, edges, unit = "recall@10px", _SCANNET_EDGES, pair.scene
        label = ""
        for low, high in pairwise(edges):
            # the last bin of all turns is closed
            inside = low <= change < high or change == high == 180
            values[f"{lead} {low}-{high}°"] = values[lead] if inside else float("nan")
            label = f"{low:03d}-{high:03d}°" if inside else label
        labels = {"view change": label or f"{edges[-1]:03d}-180°"}
        return [Row(pair.name, unit, values, {}, labels)]

    def picture(self, index: int, prediction: Prediction) -> Image.Image | None:
        """Draw the matches, coloured by error; see TaskData."""
        navi = isinstance(self.options, NaviOptions)
        grids = [self._grid(index, side) for side in (0, 1)]
        row = self.score(index, prediction)[0]
        errors = self._errors(index, prediction) * (100.0 if navi else 1.0)
        lead = "recall@2cm" if navi else "recall@10px"
        return match_picture(
            grids[0].image,
            grids[1].image,
            prediction["xy0"],
            prediction["xy1"],
            errors,
            value_range=(0.0, 4.0 if navi else 20.0),
            label="error / cm" if navi else "error / px",
            title=f"{row.unit}, {row.labels['view change']}: {lead} {row.values[lead]:.0f} %",
            height=360,
        )

    def caption(self) -> str:
        """See TaskData."""
        options = self.options
        chosen = f"the {options.matches:,} best matches of a pair" if options.matches else "matches"
        how = "by the ratio test" if options.ratio else "by similarity"
        if isinstance(options, NaviOptions):
            what, unit = "points within 1, 2 and 5 cm in space", "objects"
        else:
            pixels = (
                f"of the {options.size_hw[0] // options.shrink}x"
                f"{options.size_hw[1] // options.shrink} grid"
                if options.error == "grid"
                else "of the images"
            )
            what, unit = f"points within 5, 10 and 20 px {pixels} after projection", "scenes"
        return (
            f"{len(self.items)} pairs; recall is the share of {chosen} {how} that join {what}; "
            f"means over pairs, intervals over {unit}."
        )

    def _grid(self, index: int, side: int) -> PosedGrid:
        pair, options = self.pairs[index], self.options
        if isinstance(options, NaviOptions):
            view = pair.view0 if side == 0 else pair.view1
            return navi_grid(view, options.side, options.box, options.shrink)
        files = (pair.images[side], pair.depths[side])
        return scannet_grid(*files, pair.K[side], pair.K_hw, options.size_hw, options.shrink)

    def _pose(self, index: int) -> Tensor:
        pair: NaviPair | ScanNetPair = self.pairs[index]
        if isinstance(pair, NaviPair):
            return pair.view1.cam_from_object @ invert(pair.view0.cam_from_object)
        return pair.cam1_from_cam0

    def _errors(self, index: int, prediction: Prediction) -> Tensor:
        """Metres, or pixels; infinite where a point lies behind camera 1."""
        points1 = prediction["points1"].double()
        carried = transform(self._pose(index), prediction["points0"].double())
        if isinstance(self.options, NaviOptions):
            return _length(carried - points1)
        K = prediction["K1"].double()
        if self.options.error == "grid":
            K = K * K.new_tensor([[1.0 / self.options.shrink]] * 2 + [[1.0]])
        image = [points @ K.mT for points in (carried, points1)]
        # as Probe3D: what is behind the camera lands far outside
        xy = [one[:, :2] / one[:, 2:].clamp(min=1e-9) for one in image]
        return _length(xy[0] - xy[1])

    def _on_grid(self, features: FeatureMap, grid: PosedGrid) -> Tensor:
        """(h, w, D) descriptors of the grid's points."""
        h, w = grid.seen.shape
        if self.options.upsampling == "bilinear" or any(features.margin_yx):
            xy = grid.centers().reshape(1, -1, 2).float().to(features.features.device)
            return features.sample(xy)[0].reshape(h, w, -1)
        wide = features.features.float()
        values = resize(wide, (h, w), "bicubic", antialias=False)
        return torch.nn.functional.normalize(values, dim=1)[0].permute(1, 2, 0)


def _length(vectors: Tensor) -> Tensor:
    out: Tensor = vectors.norm(dim=-1)
    return out


def _recall(errors: Tensor, limit: float) -> float:
    return 100.0 * float((errors < limit).double().mean())

"""Matches between pictures related by homographies: matching accuracy, and homographies by RANSAC.

Mean matching accuracy (MMA) as in D2-Net (Dusmanu et al., CVPR 2019; its repository
mihaidusmanu/d2-net, hpatches_sequences): mutual nearest neighbours, share of matches within a
threshold, mean over pairs. There keypoints are detected; here they are a grid in both pictures, so
a match can be off by up to stride / √2 even for perfect features. Homographies as in glue-factory
(github.com/cvg/glue-factory, eval/hpatches.py): mean error of the four corners, area under its
recall curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equifeat.data.hpatches import Layout, read_planes
from equifeat.data.image_pairs import read_picture
from equifeat.draw_matches import match_picture
from equifeat.errors import RecipeError, import_extra
from equifeat.eval.data_hash import data_hash
from equifeat.eval.features import FeatureSource
from equifeat.eval.grid_matches import GridMatcher, at_most, scaling, size_of
from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.task import Prediction, Row, TaskData
from equifeat.metrics.curves import matching_accuracy
from equifeat.metrics.two_view import homography_corner_error, warp

_THRESHOLDS = (3, 1, 2, 4, 5, 6, 7, 8, 9, 10)
_LIMITS = (1, 3, 5, 10)
_LEAST_MATCHES = 4


@dataclass(frozen=True)
class HomographyOptions:
    """How pictures are matched and homographies estimated.

    Args:
        layout: Names of the files.
        large: Whether the 8 sequences of HPatches with the largest pictures are taken.
        side: Pictures whose shorter side has more pixels are shrunk; 0 keeps all. Errors are in
            pixels of the shrunk pictures.
        stride: Pixels from one keypoint to the next; 0 takes the centres of the model's patches.
        estimator: "opencv" is USAC with MAGSAC++, "poselib" is LO-RANSAC.
        ransac_px: Largest error of an inlier, in pixels.
        iterations: Most iterations.
    """

    layout: Layout = "hpatches"
    large: bool = True
    side: int = 480
    stride: int = 4
    estimator: Literal["opencv", "poselib"] = "opencv"
    ransac_px: float = 3.0
    iterations: int = 10_000


_METRICS = (
    *(Metric(f"MMA@{px}px") for px in _THRESHOLDS),
    *(Metric(f"homography AUC@{px}px", mean="auc", limit=float(px)) for px in _LIMITS),
)


def _protocol(name: str, about: str, options: HomographyOptions) -> Protocol:
    source = (
        "MMA: Dusmanu et al., CVPR 2019 (arXiv 1905.03561); homographies: DeTone et al., CVPRW "
        "2018 (arXiv 1712.07629), github.com/cvg/glue-factory; keypoints on a grid are our own"
    )
    return Protocol(name, "geometric", about, source, _METRICS, "sequence", options=options)


PROTOCOLS = (
    _protocol("hpatches/mma", "all 116 sequences, keypoints every 4 px", HomographyOptions()),
    _protocol(
        "hpatches/mma-108",
        "without the 8 sequences of large pictures, as since D2-Net",
        HomographyOptions(large=False),
    ),
    _protocol("graf/mma", "the Oxford affine set", HomographyOptions(layout="oxford")),
)


class PlanePairs(TaskData):
    """Pairs of pictures with homographies.

    Args:
        root: Folder of the sequences.
        protocol: One of `PROTOCOLS`, perhaps changed.
    """

    def __init__(self, root: Path, protocol: Protocol) -> None:
        self.options: HomographyOptions = protocol.options
        if not self.options.ransac_px > 0 or self.options.iterations < 1:
            raise RecipeError("ransac_px must be above 0 and iterations at least 1.")
        self.pairs = read_planes(root, self.options.layout, self.options.large)
        self._matcher = GridMatcher(self.options.stride)
        names, files = [pair.name for pair in self.pairs], [pair.file for pair in self.pairs]
        pictures = filter(Path.is_file, self.pictures())
        super().__init__(root, protocol, names, data_hash(root, files, pictures))

    def pictures(self) -> list[Path]:
        """Return all pictures of the pairs.

        Returns:
            The files, each once, sorted; they need not exist.
        """
        return sorted({p for pair in self.pairs for p in (pair.image0, pair.image1)})

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Return mutual nearest neighbours, in pixels of the shrunk pictures; see TaskData."""
        full = self._read(index)
        shown = [at_most(image, self.options.side, shorter=True) for image in full]
        sizes = [size_of(image) for image in (*full, *shown)]
        found = self._matcher.match(shown[0], shown[1], source, self.pairs[index].image0)
        return {**found, "sizes_hw": torch.tensor(sizes)}

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Return one row: matching accuracies, and the corner error in px; see TaskData."""
        pair = self.pairs[index]
        errors, H = self._errors(index, prediction)
        shares = matching_accuracy(errors, _THRESHOLDS)
        values = {f"MMA@{px}px": v for px, v in zip(_THRESHOLDS, shares, strict=True)}
        estimate = find_homography(
            prediction["xy0"].double(), prediction["xy1"].double(), self.options, self.protocol.seed
        )
        height, width = prediction["sizes_hw"][2].tolist()
        error = float("inf")
        if estimate is not None:
            error = homography_corner_error(estimate, H, (height, width))
        values |= {f"homography AUC@{px}px": error for px in _LIMITS}
        labels = {"change": pair.change} if pair.change else {}
        return [Row(pair.name, pair.sequence, values, {}, labels)]

    def picture(self, index: int, prediction: Prediction) -> Image.Image | None:
        """Draw the matches, coloured by error; see TaskData."""
        errors, _ = self._errors(index, prediction)
        image0, image1 = self._read(index)
        sizes = prediction["sizes_hw"].double()
        xy = [prediction[f"xy{i}"] * (sizes[i] / sizes[2 + i]).flip(0).float() for i in (0, 1)]
        share = matching_accuracy(errors, (3,))[0]
        return match_picture(
            image0,
            image1,
            xy[0],
            xy[1],
            errors.nan_to_num(torch.inf),
            value_range=(0.0, 10.0),
            label="error / px",
            title=f"{self.pairs[index].name}: {len(errors)} matches, MMA@3px {share:.0f} %",
            height=360,
        )

    def caption(self) -> str:
        """See TaskData."""
        options = self.options
        grid = f"every {options.stride} px" if options.stride else "at the model's patches"
        pictures = f"shrunk to {options.side} px on the shorter side" if options.side else "as is"
        return (
            f"{len(self.items)} pairs of {len({p.sequence for p in self.pairs})} sequences, "
            f"pictures {pictures}; mutual nearest neighbours of keypoints {grid}; MMA is the share "
            f"of matches within a threshold, AUC the area under the recall curve of the corner "
            f"error of {options.estimator}'s homography; intervals over sequences."
        )

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        return read_picture(pair.image0), read_picture(pair.image1)

    def _errors(self, index: int, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Distances of matches to the truth, and the homography between the shrunk pictures."""
        full0, full1, shown0, shown1 = (tuple(one) for one in prediction["sizes_hw"].tolist())
        H = scaling(full1, shown1) @ self.pairs[index].H @ scaling(shown0, full0)
        xy0, xy1 = prediction["xy0"].double(), prediction["xy1"].double()
        if not len(xy0):
            return torch.zeros(0, dtype=torch.float64), H
        return (warp(H, xy0) - xy1).norm(dim=1), H


def find_homography(
    xy0: Tensor, xy1: Tensor, options: HomographyOptions, seed: int
) -> Tensor | None:
    """Estimate a homography from matches.

    Args:
        xy0: (N, 2) float64 points of image 0.
        xy1: (N, 2) their matches.
        options: Estimator and thresholds.
        seed: Seed of the estimator.

    Returns:
        (3, 3) float64, corner convention; None when there is none.
    """
    if len(xy0) < _LEAST_MATCHES:
        return None
    points0, points1 = xy0.numpy(), xy1.numpy()
    if options.estimator == "poselib":
        poselib = import_extra("poselib", "eval", "Homography estimation")
        ransac = {
            "max_reproj_error": options.ransac_px,
            "max_iterations": options.iterations,
            "seed": seed,
        }
        H, info = poselib.estimate_homography(points0, points1, ransac, {})
        found = H if info["num_inliers"] >= _LEAST_MATCHES else None
    else:
        cv2 = import_extra("cv2", "eval", "Homography estimation")
        cv2.setRNGSeed(seed)
        try:
            found, _ = cv2.findHomography(
                points0,
                points1,
                cv2.USAC_MAGSAC,
                options.ransac_px,
                maxIters=options.iterations,
                confidence=0.9999,
            )
        except cv2.error:
            # degenerate matches, such as all in one place
            found = None
    if found is None or not np.isfinite(found).all() or not abs(np.linalg.det(found)) > 0:
        return None
    return torch.from_numpy(np.asarray(found, np.float64))

"""Relative pose from matches of two calibrated pictures, as SuperGlue evaluates it.

Sarlin et al., CVPR 2020; github.com/magicleap/SuperGluePretrainedNetwork, match_pairs.py: the error
of a pair is the larger of the errors of rotation and of the direction of translation, the result
the area under its recall curve up to 5, 10 and 20 degrees. There RANSAC is OpenCV's; here PoseLib's
(github.com/PoseLib/PoseLib) or OpenCV's USAC.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equifeat.data.image_pairs import (
    PixelCenters,
    find_list,
    read_pair_list,
    read_picture,
    turned_camera,
    turned_K,
)
from equifeat.draw_matches import match_picture
from equifeat.errors import RecipeError, import_extra
from equifeat.eval.data_hash import data_hash
from equifeat.eval.features import FeatureSource
from equifeat.eval.grid_matches import GridMatcher, at_most, scaling, size_of
from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.task import Prediction, Row, TaskData
from equifeat.geometry.camera import invert, rotation_angle_deg
from equifeat.geometry.pixels import SizeHW
from equifeat.metrics.two_view import Sign, relative_pose_error

_LIMITS = (20, 5, 10)
_LEAST_MATCHES = 5
_VIEW_CHANGE = (0, 15, 30, 60, 180)


@dataclass(frozen=True)
class PoseOptions:
    """How pictures are matched and poses estimated.

    Args:
        pairs: File name of the list; the only *pairs*.txt of the folder when empty.
        side: Pictures whose longer side has more pixels are shrunk; 0 keeps all.
        stride: Pixels from one point to the next; 0 takes the centres of the model's patches.
        estimator: "poselib" is LO-RANSAC with refinement, "opencv" is USAC with MAGSAC++.
        ransac_px: Largest epipolar error of an inlier, in pixels of the shrunk pictures. Points on
            a grid are off by up to stride / √2; SuperGlue's detected ones get 1.
        iterations: Most iterations.
        sign: Whether t and -t count as one direction.
        pixels: Convention of K in the list.
    """

    pairs: str = ""
    side: int = 640
    stride: int = 4
    estimator: Literal["poselib", "opencv"] = "poselib"
    ransac_px: float = 3.0
    iterations: int = 10_000
    sign: Sign = "either"
    pixels: PixelCenters = "integer"


_SOURCE = "Sarlin et al., CVPR 2020 (arXiv 1911.11763); dense points in place of detected ones"
PROTOCOLS = (
    Protocol(
        "image-pairs/pose-auc",
        "geometric",
        "a list of pairs with K and relative pose, points every 4 px, mutual nearest neighbours",
        _SOURCE,
        tuple(Metric(f"pose AUC@{x}°", mean="auc", limit=float(x)) for x in _LIMITS),
        "scene",
        options=PoseOptions(),
    ),
)


class PosePairs(TaskData):
    """Pairs of calibrated pictures.

    Args:
        root: Folder with a list of pairs.
        protocol: One of `PROTOCOLS`, perhaps changed.
    """

    def __init__(self, root: Path, protocol: Protocol) -> None:
        self.options: PoseOptions = protocol.options
        if not self.options.ransac_px > 0 or self.options.iterations < 1:
            raise RecipeError("ransac_px must be above 0 and iterations at least 1.")
        file = find_list(root, self.options.pairs)
        self.pairs = read_pair_list(file, self.options.pixels)
        self._matcher = GridMatcher(self.options.stride)
        names = [pair.name for pair in self.pairs]
        pictures = filter(Path.is_file, self.pictures())
        super().__init__(root, protocol, names, data_hash(root, [file], pictures))

    def pictures(self) -> list[Path]:
        """Return all pictures of the pairs.

        Returns:
            The files, each once, sorted; they need not exist.
        """
        return sorted({p for pair in self.pairs for p in (pair.image0, pair.image1)})

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Return mutual nearest neighbours, in pixels of the shrunk pictures; see TaskData."""
        full = self._read(index)
        shown = [at_most(image, self.options.side, shorter=False) for image in full]
        sizes = [size_of(image) for image in (*full, *shown)]
        pair = self.pairs[index]
        key = (pair.image0, pair.turns[0])
        found = self._matcher.match(shown[0], shown[1], source, key)
        return {**found, "sizes_hw": torch.tensor(sizes)}

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Return one row, the pair's error in degrees; see TaskData."""
        pair = self.pairs[index]
        K0, K1, truth, sizes = self._cameras(index, prediction)
        estimate = find_pose(
            prediction["xy0"].double(),
            prediction["xy1"].double(),
            (K0, K1),
            sizes,
            self.options,
            self.protocol.seed,
        )
        error = float("inf")
        if estimate is not None:
            error = max(relative_pose_error(estimate, truth, self.options.sign))
        values = {f"pose AUC@{limit}°": error for limit in _LIMITS}
        change = float(rotation_angle_deg(truth[:3, :3]))
        low = max(edge for edge in _VIEW_CHANGE[:-1] if change >= edge)
        high = _VIEW_CHANGE[_VIEW_CHANGE.index(low) + 1]
        labels = {"view change": f"{low:03d}-{high:03d}°"}
        return [Row(pair.name, pair.scene, values, {}, labels)]

    def picture(self, index: int, prediction: Prediction) -> Image.Image | None:
        """Draw the matches, coloured by their distance to the true epipolar lines; see TaskData."""
        K0, K1, truth, _ = self._cameras(index, prediction)
        image0, image1 = self._read(index)
        sizes = prediction["sizes_hw"].double()
        xy = [prediction[f"xy{i}"] * (sizes[i] / sizes[2 + i]).flip(0).float() for i in (0, 1)]
        errors = _epipolar(prediction["xy0"].double(), prediction["xy1"].double(), K0, K1, truth)
        error = self.score(index, prediction)[0].values[f"pose AUC@{_LIMITS[0]}°"]
        said = f"pose error {error:.1f}°" if np.isfinite(error) else "no pose found"
        return match_picture(
            image0,
            image1,
            xy[0],
            xy[1],
            errors,
            value_range=(0.0, 10.0),
            label="epipolar error / px",
            title=f"{self.pairs[index].scene}: {len(errors)} matches, {said}",
            height=360,
        )

    def caption(self) -> str:
        """See TaskData."""
        options = self.options
        points = f"every {options.stride} px" if options.stride else "at the model's patches"
        return (
            f"{len(self.items)} pairs of {len({p.scene for p in self.pairs})} scenes; mutual "
            f"nearest neighbours of points {points}, pose by {options.estimator} with inliers "
            f"within {options.ransac_px:g} px; AUC is the area under the recall curve of the "
            "larger of the errors of rotation and direction of translation; intervals over scenes."
        )

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        return (
            read_picture(pair.image0, pair.turns[0]),
            read_picture(pair.image1, pair.turns[1]),
        )

    def _cameras(
        self, index: int, prediction: Prediction
    ) -> tuple[Tensor, Tensor, Tensor, tuple[SizeHW, SizeHW]]:
        """Intrinsics and true pose of the pictures as matched, and their sizes."""
        pair = self.pairs[index]
        full0, full1, shown0, shown1 = (tuple(one) for one in prediction["sizes_hw"].tolist())
        K = []
        for K_file, turns, full, shown in (
            (pair.K0, pair.turns[0], full0, shown0),
            (pair.K1, pair.turns[1], full1, shown1),
        ):
            before = full if turns % 2 == 0 else full[::-1]
            K.append(scaling(full, shown) @ turned_K(K_file, before, turns))
        turn0, turn1 = (turned_camera(turns) for turns in pair.turns)
        return K[0], K[1], turn1 @ pair.cam1_from_cam0 @ invert(turn0), (shown0, shown1)


def find_pose(
    xy0: Tensor,
    xy1: Tensor,
    K: tuple[Tensor, Tensor],
    sizes: tuple[SizeHW, SizeHW],
    options: PoseOptions,
    seed: int,
) -> Tensor | None:
    """Estimate a relative pose from matches.

    Args:
        xy0: (N, 2) float64 points of image 0.
        xy1: (N, 2) their matches.
        K: Intrinsics of both images, corner convention like the points.
        sizes: Heights and widths of both images.
        options: Estimator and thresholds.
        seed: Seed of the estimator.

    Returns:
        (4, 4) float64 cam1_from_cam0 with a translation of length 1; None when there is none.
    """
    if len(xy0) < _LEAST_MATCHES:
        return None
    out = torch.eye(4, dtype=torch.float64)
    if options.estimator == "poselib":
        poselib = import_extra("poselib", "eval", "Pose estimation")
        cameras = [
            {
                "model": "PINHOLE",
                "width": size[1],
                "height": size[0],
                "params": [float(k[0, 0]), float(k[1, 1]), float(k[0, 2]), float(k[1, 2])],
            }
            for k, size in zip(K, sizes, strict=True)
        ]
        ransac = {
            "max_epipolar_error": options.ransac_px,
            "max_iterations": options.iterations,
            "seed": seed,
        }
        pose, info = poselib.estimate_relative_pose(
            xy0.numpy(), xy1.numpy(), cameras[0], cameras[1], ransac, {}
        )
        if info["num_inliers"] < _LEAST_MATCHES:
            return None
        out[:3, :3], out[:3, 3] = torch.tensor(pose.R), torch.tensor(pose.t)
    else:
        found = _by_opencv(xy0, xy1, K, options, seed)
        if found is None:
            return None
        out[:3, :3], out[:3, 3] = torch.tensor(found[0]), torch.tensor(found[1])
    return out if bool(out.isfinite().all()) and float(out[:3, 3].norm()) > 0 else None


def _by_opencv(
    xy0: Tensor, xy1: Tensor, K: tuple[Tensor, Tensor], options: PoseOptions, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    cv2 = import_extra("cv2", "eval", "Pose estimation")
    cv2.setRNGSeed(seed)
    rays = [_rays(xy, k)[:, :2].numpy() for xy, k in zip((xy0, xy1), K, strict=True)]
    focal = float(torch.stack([K[0][0, 0], K[0][1, 1], K[1][0, 0], K[1][1, 1]]).mean())
    try:
        E, mask = cv2.findEssentialMat(
            rays[0],
            rays[1],
            np.eye(3),
            method=cv2.USAC_MAGSAC,
            prob=0.9999,
            threshold=options.ransac_px / focal,
            maxIters=options.iterations,
        )
    except cv2.error:
        # degenerate matches, such as all in one place
        return None
    best, found = 0, None
    for one in [] if E is None else np.split(E, len(E) // 3):
        # points at any distance count, as in SuperGlue
        count, R, t, _ = cv2.recoverPose(one, rays[0], rays[1], np.eye(3), 1e9, mask=mask.copy())
        if count > best:
            best, found = count, (R, t[:, 0])
    return found


def _rays(xy: Tensor, K: Tensor) -> Tensor:
    out: Tensor = torch.cat([xy, torch.ones_like(xy[:, :1])], dim=1) @ torch.linalg.inv(K).mT
    return out


def _epipolar(xy0: Tensor, xy1: Tensor, K0: Tensor, K1: Tensor, pose: Tensor) -> Tensor:
    """Pixels from the points of image 1 to the epipolar lines of their matches."""
    t, zero = pose[:3, 3], torch.zeros((), dtype=torch.float64)
    cross = torch.stack([zero, -t[2], t[1], t[2], zero, -t[0], -t[1], t[0], zero]).reshape(3, 3)
    # lines in pixels: K1^-T E K0^-1
    lines = _rays(xy0, K0) @ (torch.linalg.inv(K1).mT @ cross @ pose[:3, :3]).mT
    points = torch.cat([xy1, torch.ones_like(xy1[:, :1])], dim=1)
    out: Tensor = (lines * points).sum(dim=1).abs() / lines[:, :2].norm(dim=1).clamp(min=1e-12)
    return out

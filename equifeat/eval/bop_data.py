"""Test images of a BOP data set, predicted and scored one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from equifeat.data.bop import BopImage
from equifeat.data.bop_images import read_depth
from equifeat.errors import EvalDataError
from equifeat.eval.bop_detections import Detections, detections_file, read_detections, regions_of
from equifeat.eval.bop_localizer import TemplateLocalizer
from equifeat.eval.bop_models import BopModels
from equifeat.eval.bop_picture import pose_picture
from equifeat.eval.bop_protocols import BopOptions
from equifeat.eval.bop_score import SceneDepth, score_object, valid_instances
from equifeat.eval.bop_templates import Template, corner_K
from equifeat.eval.features import FeatureSource
from equifeat.eval.protocol import Protocol
from equifeat.eval.task import Prediction, Row, TaskData
from equifeat.image_files import read_image

_BINS = (0.0, 0.25, 0.5, 0.75, 1.0)


class BopItem(NamedTuple):
    """A test image.

    Attributes:
        image: The image.
        targets: By object, how many instances are to be found.
        instances: Which of the annotated instances count.
    """

    image: BopImage
    targets: dict[int, int]
    instances: list[int]


class BopData(TaskData):
    """Test images of a BOP data set.

    Args:
        root: Folder of the data.
        protocol: One of `PROTOCOLS`, perhaps changed.
        found: By id, the images with the number of instances of each object to be found.
        templates: By object, its templates.
        models: Surfaces, diameters and symmetries.
        data_hash: Identity of the data.

    Raises:
        EvalDataError: The file of detections is missing or damaged.
    """

    def __init__(
        self,
        root: Path,
        protocol: Protocol,
        found: Mapping[str, tuple[BopImage, dict[int, int]]],
        templates: Mapping[int, list[Template]],
        models: BopModels,
        data_hash: str,
    ) -> None:
        super().__init__(root, protocol, list(found), data_hash)
        self.options: BopOptions = protocol.options
        self.images = [
            BopItem(image, targets, valid_instances(image, targets))
            for image, targets in found.values()
        ]
        self._models = models
        self.localizer = TemplateLocalizer(templates, models, self.options, protocol.seed)
        file = detections_file(root, self.options.detections)
        self._regions: Detections | str = (
            self.options.detections if file is None else read_detections(file)
        )

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Estimate the pose of every target in an image.

        Args:
            index: Index into ``items``.
            source: The model.

        Returns:
            obj_id (E,), cam_from_object (E, 4, 4) float64 in mm, score (E,) number of inliers,
            ok (E,) whether there is an estimate.
        """
        item = self.images[index]
        image = read_image(item.image.picture())
        K = corner_K(item.image.K, self.options.test_pixels)
        objects, poses, scores, ok = [], [], [], []
        for target in sorted(item.targets.items()):
            for region in regions_of(item.image, item.instances, self._regions, target):
                if region.mask is not None and region.mask.shape != image.shape[-2:]:
                    raise EvalDataError(
                        f"{item.image.folder}: image {item.image.im_id} and its visible masks "
                        "differ in size; unpack this scene again."
                    )
                estimate = self.localizer.locate(image, K, target[0], region, source)
                good = estimate is not None and estimate.ok
                pose = torch.eye(4, dtype=torch.float64)
                if estimate is not None and good:
                    pose = estimate.cam_from_object.double()
                objects.append(target[0])
                poses.append(pose)
                scores.append(
                    float(estimate.inliers.sum()) if estimate is not None and good else 0.0
                )
                ok.append(good)
        return {
            "obj_id": torch.tensor(objects, dtype=torch.int64),
            "cam_from_object": torch.cat(
                [torch.zeros(0, 4, 4).double(), *(p[None] for p in poses)]
            ),
            "score": torch.tensor(scores, dtype=torch.float32),
            "ok": torch.tensor(ok, dtype=torch.bool),
        }

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Score the estimates of an image.

        Args:
            index: Index into ``items``.
            prediction: What `predict` gave.

        Returns:
            One row for each true instance that counts.
        """
        item, rows = self.images[index], []
        with Image.open(item.image.picture()) as picture:
            size_hw = (picture.height, picture.width)
        scene = self._depth(item.image, size_hw) if self.options.vsd else None
        name = self.items[index]
        unit = name.partition("/")[0] if self.protocol.unit == "scene" else name
        for obj, count in sorted(item.targets.items()):
            instances = [i for i in item.instances if item.image.objects[i].obj_id == obj]
            mine = (prediction["obj_id"] == obj) & prediction["ok"]
            scores = prediction["score"][mine]
            # no more estimates than instances are asked for, the best ones
            best = torch.argsort(scores, descending=True, stable=True)[:count]
            poses = prediction["cam_from_object"][mine][best]
            values = score_object(
                item.image, instances, poses, scores[best], self._models[obj], size_hw, scene
            )
            for instance, one in zip(instances, values, strict=True):
                seen = item.image.objects[instance].visib_fract
                labels = {"object": f"{obj:06d}", "visible": _bin(seen)}
                rows.append(Row(name, unit, one, {}, labels))
        return rows

    def picture(self, index: int, prediction: Prediction) -> Image.Image | None:
        """Draw outlines of the objects in their true and estimated poses.

        Args:
            index: Index into ``items``.
            prediction: What `predict` gave.

        Returns:
            The image, with the truth in green and estimates in red.
        """
        item = self.images[index]
        K = corner_K(item.image.K, self.options.test_pixels)
        annotated = [item.image.objects[i] for i in item.instances]
        true = [(self._models[one.obj_id].surface, one.cam_from_object) for one in annotated]
        found = [
            (self._models[obj].surface, pose)
            for obj, pose, ok in zip(
                prediction["obj_id"].tolist(),
                prediction["cam_from_object"],
                prediction["ok"].tolist(),
                strict=True,
            )
            if ok
        ]
        return pose_picture(read_image(item.image.picture()), K, true, found)

    def caption(self) -> str:
        """Return what the numbers mean.

        Returns:
            Counts, thresholds, detector, unit.
        """
        instances = sum(len(item.instances) for item in self.images)
        detector = {
            "visib_mask": "found by the true visible masks, an oracle detector",
            "bbox_visib": "found by the true boxes of the visible parts, an oracle detector",
        }.get(self.options.detections, f"found by {self.options.detections}")
        return (
            f"{instances} object instances in {len(self.images)} images, {detector}. Percentage of "
            "instances localised, averaged over the thresholds of BOP19 (VSD: 5-50 % of pixels and "
            "of the diameter; MSSD: 5-50 % of the diameter; MSPD: 5-50 px at a width of 640); AR "
            f"is the mean of the three. Intervals resample {self.protocol.unit}s."
        )

    def _depth(self, frame: BopImage, size_hw: tuple[int, int]) -> SceneDepth:
        depth = read_depth(frame)
        if depth is None or tuple(depth.shape) != size_hw:
            raise EvalDataError(
                f"{frame.folder}: image {frame.im_id} has no depth of its size, which VSD needs; "
                "unpack depth/, or leave VSD (and with it AR) out with --set vsd=false."
            )
        return SceneDepth(depth, self.options.vsd_delta)


def _bin(share: float) -> str:
    for low, high in itertools.pairwise(_BINS):
        if share < high:
            return f"{100 * low:03.0f}-{100 * high:03.0f}%"
    return f"{100 * _BINS[-2]:03.0f}-{100 * _BINS[-1]:03.0f}%"

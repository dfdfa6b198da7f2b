"""Poses of objects that are known from one video, in the frames of another (OnePose)."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from equifeat.data.onepose import OnePoseFrame, OnePoseObject, find_objects, read_matches
from equifeat.data.point_cloud import read_points
from equifeat.errors import EvalDataError
from equifeat.eval.data_hash import check_sums, data_hash
from equifeat.eval.features import FeatureSource
from equifeat.eval.matching import mutual_nearest
from equifeat.eval.onepose_picture import box_corners, box_picture
from equifeat.eval.onepose_protocols import (
    ADD,
    PROTOCOLS,
    THRESHOLDS,
    WHERE,
    OnePoseOptions,
    accuracy_name,
    check_options,
)
from equifeat.eval.onepose_templates import TemplateBank, build_bank, chosen_frames, features_of
from equifeat.eval.pnp import estimate_pose
from equifeat.eval.protocol import Protocol
from equifeat.eval.task import Check, Prediction, Row, TaskData
from equifeat.geometry.camera import Camera
from equifeat.image_files import read_image
from equifeat.metrics.bop import add
from equifeat.metrics.pose import rotation_error_deg, translation_error_cm, within_cm_deg

__all__ = ["PROTOCOLS", "WHERE", "OnePoseData", "check_onepose", "open_onepose"]

# OnePose++, doc/dataset_document.md: 40 objects with 80 sequences.
_OBJECTS, _SEQUENCES = 40, 80
_ADD_SHARE = 0.1


class OnePoseData(TaskData):
    """Query frames of all objects; an item is a frame.

    Frames rather than objects are items, so that an interrupted run loses one frame and processes
    share the work evenly. The descriptors of an object's templates are kept while its frames are
    asked for one after the other, as the harness does; another process makes them once more.

    Args:
        root: Folder of the data set.
        protocol: One of `PROTOCOLS`, perhaps changed.
        objects: What is to be found.
        queries: By object, its query frames.
        digest: Hash of the data.
    """

    def __init__(
        self,
        root: Path,
        protocol: Protocol,
        objects: list[OnePoseObject],
        queries: list[list[OnePoseFrame]],
        digest: str,
    ) -> None:
        self.options: OnePoseOptions = protocol.options
        self.objects = objects
        self.frames = [
            (thing, frame)
            for thing, frames in zip(objects, queries, strict=True)
            for frame in frames
        ]
        names = [f"{thing.name}/{frame.name}" for thing, frame in self.frames]
        super().__init__(root, protocol, names, digest)
        self._bank: tuple[str, FeatureSource, TemplateBank] | None = None
        self._models: dict[str, tuple[Tensor, float] | None] = {}

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Estimate the pose in one frame.

        Args:
            index: Index into ``items``.
            source: The model.

        Returns:
            cam_from_object (4, 4) float64 in metres, the identity where nothing was found; ok, the
            numbers of matches and of inliers, (1,) each.
        """
        thing, frame = self.frames[index]
        options = self.options
        bank = self._templates(thing, source)
        image = read_image(frame.picture)
        size_hw = (int(image.shape[-2]), int(image.shape[-1]))
        features = features_of(image, source, options.cell)
        xy = _grid(size_hw, options.query_stride)
        found = features.sample(xy[None].to(features.features.device))[0]
        to = mutual_nearest(found, bank.descriptors, dtype=options.dtype).matches0.cpu()
        matched = to >= 0
        estimate = estimate_pose(
            bank.points[to[matched]],
            xy[matched].double(),
            Camera(frame.camera_matrix(), size_hw),
            threshold_px=options.threshold_px,
            iterations=options.iterations,
            min_inliers=options.min_inliers,
            seed=self.protocol.seed,
            method=options.method,
        )
        return {
            "cam_from_object": estimate.cam_from_object,
            "ok": torch.tensor([estimate.ok]),
            "matches": matched.sum().reshape(1),
            "inliers": estimate.inliers.sum().reshape(1),
        }

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Score the pose of one frame.

        Args:
            index: Index into ``items``.
            prediction: What `predict` gave.

        Returns:
            One row: 100 or 0 for each threshold; ADD is NaN for objects without a scanned surface.
        """
        thing, frame = self.frames[index]
        estimate, true = prediction["cam_from_object"], frame.cam_from_object()
        degrees, cm = rotation_error_deg(estimate, true), translation_error_cm(estimate, true)
        values = {
            accuracy_name(k): 100.0 * float(within_cm_deg(degrees, cm, k)) for k in THRESHOLDS
        }
        values[ADD] = float("nan")
        surface = self._surface(thing)
        if surface is not None:
            near = add(estimate, true, surface[0]) < _ADD_SHARE * surface[1]
            values[ADD] = 100.0 * float(near)
        return [Row(self.items[index], thing.name, values, {}, {"category": thing.name})]

    def picture(self, index: int, prediction: Prediction) -> Image.Image | None:
        """Draw the object's box in its true and its estimated pose.

        Args:
            index: Index into ``items``.
            prediction: What `predict` gave.

        Returns:
            The frame, with the truth in green and the estimate in red.
        """
        thing, frame = self.frames[index]
        image = read_image(frame.picture)
        camera = Camera(frame.camera_matrix(), (int(image.shape[-2]), int(image.shape[-1])))
        outline = thing.box()
        outline = thing.points() if outline is None else outline
        corners = box_corners(outline.amin(dim=0), outline.amax(dim=0))
        estimate, true = prediction["cam_from_object"], frame.cam_from_object()
        ok, inliers = bool(prediction["ok"]), int(prediction["inliers"])
        matches = int(prediction["matches"])
        said = f"{inliers} of {matches} matches agree"
        if ok:
            degrees = float(rotation_error_deg(estimate, true))
            cm = float(translation_error_cm(estimate, true))
            said += f"; off by {degrees:.1f} deg and {cm:.1f} cm"
        title = f"{thing.name} {frame.name}: {said if ok else f'no pose from {matches} matches'}"
        return box_picture(image, camera, corners, true, estimate if ok else None, title)

    def caption(self) -> str:
        """Return what the numbers mean.

        Returns:
            Counts, thresholds, averaging, unit.
        """
        return (
            f"{len(self.items)} frames of {len(self.objects)} objects, every "
            f"{self.options.frame_step}th of sequence 2. Percentage of frames with a rotation "
            "error below k degrees and a translation error below k cm (k = 1, 3, 5), and (ADD, "
            "only objects with a scan) with a mean distance of the scan's vertices below "
            f"{_ADD_SHARE:.0%} of its diameter; means over objects. Intervals resample objects."
        )

    def _templates(self, thing: OnePoseObject, source: FeatureSource) -> TemplateBank:
        kept = self._bank
        if kept is None or kept[0] != thing.name or kept[1] is not source:
            self._bank = None  # free the old one first
            bank = build_bank(thing, self.options, self.protocol.seed, source)
            self._bank = kept = (thing.name, source, bank)
        return kept[2]

    def _surface(self, thing: OnePoseObject) -> tuple[Tensor, float] | None:
        """Vertices of the scan and its diameter; without a file of it, the box's diagonal."""
        if thing.name not in self._models:
            file = thing.model_file
            found = None
            if file is not None:
                points = read_points(file)
                if not len(points):
                    raise EvalDataError(f"{file}: has no vertices; get the scan again.")
                box = (points.amax(dim=0) - points.amin(dim=0)).norm()
                found = (points, thing.diameter() or float(box))
            self._models[thing.name] = found
        return self._models[thing.name]


def open_onepose(root: Path, protocol: Protocol) -> OnePoseData:
    """Open a OnePose data set.

    Args:
        root: Folder with lowtexture_test_data and sfm_output.
        protocol: One of `PROTOCOLS`, perhaps changed.

    Returns:
        Its query frames.

    Raises:
        EvalDataError: The folder does not hold the data.
        RecipeError: An option makes no sense.
    """
    options: OnePoseOptions = protocol.options
    check_options(options)
    objects = find_objects(root)
    if not objects:
        raise EvalDataError(f"{root} holds no object in OnePose's layout. {WHERE['onepose']}")
    queries, contents, pictures = [], [], []
    for thing in objects:
        templates = chosen_frames(thing.templates(), options.templates)
        asked = thing.queries()[:: options.frame_step]
        for what, frames in (
            (thing.sequence(1) / "anno_loftr" / "*.json", templates),
            (thing.sequence(2) / "color" / "*.png", asked),
        ):
            if not frames:
                raise EvalDataError(f"there is no {what}. {WHERE['onepose']}")
        needed = [thing.points_file]
        needed += [path for frame in templates for path in (frame.annotation, frame.picture)]
        needed += [p for frame in asked for p in (frame.picture, frame.intrinsics, frame.pose)]
        missing = [path for path in needed if not path.is_file()]
        if missing:
            more = f" and {len(missing) - 1} more files are" if len(missing) > 1 else " is"
            raise EvalDataError(f"{missing[0]}{more} missing. {WHERE['onepose']}")
        extra = (thing.model_file, thing.folder / "diameter.txt")
        needed += [path for path in extra if path is not None and path.is_file()]
        pictures += [path for path in needed if path.suffix == ".png"]
        contents += [path for path in needed if path.suffix != ".png"]
        queries.append(asked)
    return OnePoseData(root, protocol, objects, queries, data_hash(root, contents, pictures))


def check_onepose(root: Path, protocol: Protocol) -> Check:
    """Count and verify a OnePose data set.

    Args:
        root: Folder with lowtexture_test_data and sfm_output.
        protocol: One of `PROTOCOLS`, perhaps changed.

    Returns:
        Counts and problems; damaged annotations are among the problems.

    Raises:
        EvalDataError: The folder does not hold the data.
    """
    data = open_onepose(root, protocol)
    counts = {
        "objects": len(data.objects),
        "sequences": sum(o.sequence(n).is_dir() for o in data.objects for n in (1, 2)),
        "template frames": 0,
        "template matches": 0,
        "query frames": len(data.items),
        "scanned surfaces": sum(thing.model_file is not None for thing in data.objects),
    }
    problems = []
    for thing in data.objects:
        try:
            cloud = len(thing.points())
            for frame in chosen_frames(thing.templates(), data.options.templates):
                counts["template frames"] += 1
                counts["template matches"] += len(read_matches(frame, cloud).points)
        except EvalDataError as error:
            problems.append(str(error))
    for _, frame in data.frames:
        try:
            frame.camera_matrix()
            frame.cam_from_object()
        except EvalDataError as error:
            problems.append(str(error))
    compared, wrong = check_sums(root)
    notes = [f"data hash {data.data_hash}"]
    if compared:
        notes.append(f"{compared} files compared with SHA256SUMS")
    if (counts["objects"], counts["sequences"]) != (_OBJECTS, _SEQUENCES):
        notes.append(
            f"this is not all of OnePose_LowTexture: {_OBJECTS} objects, {_SEQUENCES} sequences"
        )
    return Check(counts, [*problems, *wrong], notes)


def _grid(size_hw: tuple[int, int], stride: int) -> Tensor:
    """Query points as the reference has them: pixels 0, stride, … , which K takes as they are."""
    y = torch.arange(0, size_hw[0], stride, dtype=torch.float32)
    x = torch.arange(0, size_hw[1], stride, dtype=torch.float32)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)

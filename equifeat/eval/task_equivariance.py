"""Equivariance as a task of the harness: objects are items, pairs of views are rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from equifeat.data.object_views import ObjectViews
from equifeat.data.views import Layout, open_views
from equifeat.draw_matches import match_picture
from equifeat.errors import EvalDataError, ViewsError
from equifeat.eval.data_hash import check_sums, data_hash
from equifeat.eval.equivariance import has_masks, object_errors
from equifeat.eval.equivariance_result import BIN_EDGES
from equifeat.eval.features import FeatureSource
from equifeat.eval.protocol import FeatureSpec, Metric, Protocol
from equifeat.eval.task import Check, Prediction, Row, Task, TaskData
from equifeat.metrics import THRESHOLDS, Normalizer, ape, matching_errors, pcdp
from equifeat.model.feature_map import FeatureMap

METRICS = (
    *(Metric(f"PCDP@{t:.2f}".replace("0.", ".")) for t in THRESHOLDS),
    Metric("APE", higher=False),
)


@dataclass(frozen=True)
class EquivarianceOptions:
    """What is matched, and what errors are relative to.

    Args:
        layout: How the folder is read, see equifeat.data.views.open_views.
        pairs: "all" ordered pairs of views, or a number drawn per object.
        points: "dense" for every covisible pixel, or a number drawn per pair.
        target_stride: Match against every n-th mask pixel of view 1, in x and y.
        min_angle: Smallest view change in degrees.
        max_angle: Largest view change in degrees.
        min_points: Pairs with fewer covisible pixels are left out.
        normalizer: "box" (longer side of the object's box in view 1) or "image".
    """

    layout: Layout = "auto"
    pairs: int | Literal["all"] = "all"
    points: int | Literal["dense"] = 500
    target_stride: int = 1
    min_angle: float = 0.0
    max_angle: float = 180.0
    min_points: int = 10
    normalizer: Normalizer = "box"


def _published(column: int) -> dict[str, dict[str, float]]:
    """ArXiv 2411.19458 v1: PCDP@.05 and APE; the normaliser is not named there."""
    rows = {
        "vit_base_patch14_dinov2.lvd142m": (22.60, 30.61, 19.12, 17.98, 62.09, 71.74, 6.24, 4.96),
        "vit_base_patch14_reg4_dinov2.lvd142m": (
            *(23.05, 22.81, 19.51, 19.48),
            *(64.54, 64.35, 6.06, 5.90),
        ),
        "vit_base_patch16_224.mae": (16.25, 22.57, 20.58, 19.88, 59.10, 73.76, 6.73, 4.76),
        "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k": (
            *(17.05, 22.54, 20.11, 19.17),
            *(46.63, 60.23, 11.34, 8.42),
        ),
        "deit3_base_patch16_224.fb_in1k": (18.07, 23.39, 19.72, 19.00, 54.63, 67.31, 8.34, 5.89),
    }
    out = {}
    for name, values in rows.items():
        raw, tuned, ape_raw, ape_tuned = values[column : column + 4]
        out[name] = {"PCDP@.05": raw, "APE": ape_raw}
        out[f"{name} + 3DCorrEnhance"] = {"PCDP@.05": tuned, "APE": ape_tuned}
    return out


_PAPER = "arXiv 2411.19458 (ICLR 2025); its normaliser and code were not published"


def _protocol(name: str, about: str, column: int | None = None, **options: Any) -> Protocol:
    return Protocol(
        id=name,
        task="equivariance",
        about=about,
        source=_PAPER,
        metrics=METRICS,
        unit="object",
        features=FeatureSpec(),
        options=EquivarianceOptions(**options),
        published={} if column is None else _published(column),
    )


class EquivarianceData(TaskData):
    """Posed views of objects: rendered, packed or captured."""

    def __init__(self, root: Path, protocol: Protocol) -> None:
        self.options: EquivarianceOptions = protocol.options
        try:
            self.objects: list[ObjectViews] = open_views(root, self.options.layout)
        except ViewsError as error:
            raise EvalDataError(f"{error}. {WHERE[protocol.id.split('/')[0]]}") from error
        super().__init__(root, protocol, [o.name for o in self.objects], _hash(root))

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Return the errors in pixels of all pairs; see TaskData."""
        options = self.options
        found = object_errors(
            _Model(source),
            self.objects[index],
            pairs=options.pairs,
            points=options.points,
            angles_deg=(options.min_angle, options.max_angle),
            min_points=options.min_points,
            target_stride=options.target_stride,
            seed=self.protocol.seed,
            device=source.device,
        )
        lengths = [[e.view_change_deg, e.box_px, e.image_px] for e in found]
        return {
            "views": torch.tensor([[e.view0, e.view1] for e in found]).reshape(-1, 2),
            "lengths": torch.tensor(lengths, dtype=torch.float64).reshape(-1, 3),
            "counts": torch.tensor([len(e.errors_px) for e in found], dtype=torch.int64),
            "errors_px": torch.cat([e.errors_px for e in found]) if found else torch.zeros(0),
            "drawn": torch.cat([e.drawn for e in found]) if found else torch.zeros(0, 6),
            "drawn_counts": torch.tensor([len(e.drawn) for e in found], dtype=torch.int64),
        }

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Return one row a pair; see TaskData."""
        name, rows = self.items[index], []
        errors = _parts(prediction["errors_px"], prediction["counts"])
        for (i, j), (change, box, image), px in zip(
            prediction["views"].tolist(), prediction["lengths"].tolist(), errors, strict=True
        ):
            relative = px / (box if self.options.normalizer == "box" else image)
            values = dict(
                zip((m.name for m in METRICS), (*pcdp(relative), ape(relative)), strict=True)
            )
            labels = {"view change": _bin(change)}
            rows.append(Row(name, name, values, labels=labels, part=f"{i}-{j}"))
        return rows

    def picture(self, index: int, prediction: Prediction) -> Image.Image | None:
        """Draw matches of the pair whose error is the object's median; see TaskData."""
        rows = self.score(index, prediction)
        if not rows:
            return None
        apes = [row.values["APE"] for row in rows]
        at = sorted(range(len(rows)), key=apes.__getitem__)[len(rows) // 2]
        obj = self.objects[index]
        i, j = prediction["views"][at].tolist()
        drawn = _parts(prediction["drawn"], prediction["drawn_counts"])[at]
        xy0, found, true = drawn[:, :2], drawn[:, 2:4], drawn[:, 4:]
        box, image = prediction["lengths"][at, 1:].tolist()
        length = box if self.options.normalizer == "box" else image
        return match_picture(
            obj.view(i).image,
            obj.view(j).image,
            xy0,
            found,
            matching_errors(found, true, length),
            label=f"error / {self.options.normalizer}",
            titles=(f"view {i}", f"view {j}"),
            title=f"{obj.name}, APE {apes[at]:.1f} %: its pair of median error",
        )

    def caption(self) -> str:
        """See TaskData."""
        what = {
            "box": "the longer side of the object's box in the target view",
            "image": "the longer side of the target image",
        }[self.options.normalizer]
        captured = [o for o in self.objects if o.tracks is not None]
        bare = sum(not has_masks(o) for o in captured)
        tracks = (
            f" {len(captured)} objects are captures: their points are tracks." if captured else ""
        )
        if bare:
            tracks += (
                f" {bare} captures have no masks: all pixels are searched, and the box is that of "
                "the points observed in the target view."
            )
        return (
            f"{len(self.items)} objects; errors relative to {what}; targets are the mask pixels at "
            f"stride {self.options.target_stride}; means over the points of a pair, the pairs of "
            f"an object, then objects; intervals over objects.{tracks}"
        )


class _Model:
    """A source under the name that equivariance calls."""

    def __init__(self, source: FeatureSource) -> None:
        self.source = source

    def dense(self, images: Tensor, resolution: int | None = None) -> FeatureMap:
        return self.source(images, resolution)


def _parts(rows: Tensor, counts: Tensor) -> list[Tensor]:
    """Cut rows into parts of the given lengths."""
    ends = counts.cumsum(0).tolist()
    return [rows[end - n : end] for end, n in zip(ends, counts.tolist(), strict=True)]


def _bin(angle: float) -> str:
    low, high = next((a, b) for a, b in pairwise(BIN_EDGES) if angle < b or b == 180.0)
    return f"{low:03.0f}-{high:03.0f}°"


def _hash(root: Path) -> str:
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.name[0] != "."]
    texts = [p for p in files if p.suffix in (".json", ".txt", ".npy")]
    return data_hash(root, texts, set(files) - set(texts))


def open_equivariance(root: Path, protocol: Protocol) -> EquivarianceData:
    """Open posed views under a protocol.

    Args:
        root: Folder of views of one object, or of many.
        protocol: One of `EQUIVARIANCE`'s.

    Returns:
        The data.

    Raises:
        EvalDataError: There are no views.
    """
    return EquivarianceData(root, protocol)


def check_equivariance(root: Path, protocol: Protocol) -> Check:
    """Count objects and views, and compare hashes.

    Args:
        root: Folder of views.
        protocol: One of `EQUIVARIANCE`'s.

    Returns:
        What was found.
    """
    data = open_equivariance(root, protocol)
    compared, problems = check_sums(root)
    problems += [f"{o.where} has {len(o)} view: no pair" for o in data.objects if len(o) < 2]
    counts = {"objects": len(data.objects), "views": sum(map(len, data.objects))}
    notes = [] if compared else [f"no SHA256SUMS; data hash {data.data_hash}"]
    return Check({**counts, "files compared": compared}, problems, notes)


WHERE = {
    "views": "Render meshes you did not train on: equifeat render MESHES --out DIR.",
    "mvimgnet": (
        "MVImgNet is asked for at github.com/GAP-LAB-CUHK-SZ/MVImgNet; the folder must hold "
        "CATEGORY/OBJECT/images and CATEGORY/OBJECT/sparse/0."
    ),
}
EQUIVARIANCE = Task(
    "equivariance",
    (
        _protocol("views/box-500", "all ordered pairs, 500 covisible pixels of each"),
        _protocol(
            "views/quick",
            "100 pairs an object, every second target pixel",
            pairs=100,
            target_stride=2,
        ),
        _protocol("views/dense", "all ordered pairs, every covisible pixel", 0, points="dense"),
        _protocol(
            "mvimgnet/tracks",
            "all ordered pairs of photographs, every point that both observe",
            4,
            points="dense",
            layout="mvimgnet",
        ),
    ),
    open_equivariance,
    check_equivariance,
    WHERE,
)

"""Runs exported ONNX graphs in onnxruntime and compares them with the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.errors import ExportError, import_extra
from equifeat.geometry.pixels import SizeHW, resize
from equifeat.model.extractor import FeatureExtractor

DENSE, KEYPOINTS = "dense.onnx", "keypoints.onnx"
PROVIDER = "CPUExecutionProvider"


class Case(NamedTuple):
    """Something to run the graphs at.

    Attributes:
        batch: Number of images.
        size_hw: Their height and width.
        points: Points an image.
    """

    batch: int
    size_hw: SizeHW
    points: int


class Tolerance(NamedTuple):
    """How far an export may be from the model.

    Attributes:
        features: Largest difference of raw features, as a part of the largest feature.
        descriptors: Largest difference of descriptors, whose length is 1.
        cosine: Smallest cosine of the two descriptors of a point.
    """

    features: float
    descriptors: float
    cosine: float


# Rounding alone stays well below, see docs/onnx.md.
SINGLE = Tolerance(1e-4, 1e-4, 0.99999)
HALF = Tolerance(2e-2, 1e-2, 0.999)


@torch.no_grad()
def compare(
    folder: Path, extractor: FeatureExtractor, cases: Sequence[Case], half: bool
) -> dict[str, Any]:
    """Run dense.onnx and keypoints.onnx and compare what they give with the model.

    Args:
        folder: Where the two files are.
        extractor: The model, with its adapter.
        cases: What to run at.
        half: Whether the graphs compute in float16.

    Returns:
        The largest differences ("features", "descriptors") and the smallest cosine over all cases,
        and what was run, for config.json.

    Raises:
        ExportError: onnxruntime cannot run a graph, or a difference is larger than rounding.
        MissingExtraError: onnxruntime is not installed.
    """
    runtime = import_extra("onnxruntime", "onnx", "checking an ONNX export")
    limit = HALF if half else SINGLE
    dense, at = (_session(runtime, folder / name) for name in (DENSE, KEYPOINTS))
    worst = Tolerance(0.0, 0.0, 1.0)
    for index, case in enumerate(cases):
        images, points = _inputs(case, index)
        expected = extractor.dense(images).features
        features = _run(dense, {"images": images})
        one = float((features - expected).abs().max() / expected.abs().max())
        wanted = extractor.at(images, points)
        found = _run(at, {"images": images, "keypoints": points})
        two = float((found - wanted).abs().max())
        cosine = float(F.cosine_similarity(found, wanted, dim=-1).min())
        # min and max would pass over NaN.
        if not (one <= limit.features and two <= limit.descriptors and cosine >= limit.cosine):
            worst = Tolerance(one, two, cosine)
            break
        worst = Tolerance(
            max(worst.features, one), max(worst.descriptors, two), min(worst.cosine, cosine)
        )
    else:
        return {
            **{key: _rounded(value) for key, value in worst._asdict().items()},
            "tolerance": limit._asdict(),
            "runtime": f"onnxruntime {runtime.__version__}",
            "provider": PROVIDER,
            "cases": [case._asdict() for case in cases],
        }
    remedy = ": export it in float32" if half else "; please report this"
    raise ExportError(
        f"the ONNX graphs give other features than the model (for {case.batch} images of "
        f"{case.size_hw[0]} x {case.size_hw[1]} pixels: features differ by {worst.features:.1e} of "
        f"the largest, descriptors by {worst.descriptors:.1e}, cosine {worst.cosine:.4f}), so "
        f"nothing was written{remedy}"
    )


def _session(runtime: Any, path: Path) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # its errors reach the user as an ExportError
    try:
        return runtime.InferenceSession(str(path), options, providers=[PROVIDER])
    except Exception as error:  # its exceptions have no public base
        raise ExportError(f"onnxruntime cannot load {path.name}: {_first_line(error)}") from error


def _run(session: Any, inputs: dict[str, Tensor]) -> Tensor:
    try:
        (out,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    except Exception as error:  # its exceptions have no public base
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise ExportError(
            f"onnxruntime cannot run the graph with {shapes}: {_first_line(error)}"
        ) from error
    return torch.from_numpy(out)


def _inputs(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """Return images with coarse and fine structure, as photographs have, and points in them."""
    generator = torch.Generator().manual_seed(seed)
    h, w = case.size_hw
    coarse = resize(torch.rand(case.batch, 3, 5, 7, generator=generator), (h, w), "bicubic")
    fine = torch.rand(case.batch, 3, h, w, generator=generator)
    points = torch.rand(case.batch, case.points, 2, generator=generator)
    return (0.8 * coarse + 0.2 * fine).clamp(0, 1), points * torch.tensor([w - 0.01, h - 0.01])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _rounded(value: float) -> float:
    """Keep as many digits as say something, also next to 1."""
    return round(value, 7) if value > 0.5 else float(f"{value:.2e}")

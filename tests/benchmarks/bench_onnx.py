"""Time of one image in torch and in onnxruntime, dense features and descriptors of 500 points.

    python tests/benchmarks/bench_onnx.py --sizes "[224,448]" --repeats 5
    python tests/benchmarks/bench_onnx.py --sizes "[224,448]" --repeats 50 --device cuda

DINOv2-S as packaged, with LoRA and a residual head. Both runtimes take the same image in turn in
one process, with as many threads; only the ratio counts. In torch the model runs as a user runs it
(FeatureExtractor, in float16 on a GPU when the graph is); on the CPU torch is always in float32.
On a GPU times include the copy of the image to it and of the result back.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import onnxruntime
import torch
from jsonargparse import auto_cli

from equifeat.checkpoint import load_model, save_model
from equifeat.export.onnx_ import export_onnx
from equifeat.model.extractor import build_extractor
from equifeat.model.weights import PACKAGED_BACKBONE

POINTS = 500
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Row(NamedTuple):
    """One comparison; seconds are medians, the ratio is the median of paired ratios."""

    output: str
    size: int
    precision: str
    torch_s: float
    onnx_s: float
    ratio: float
    megabytes: float


def paired(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[float, float, float]:
    """Return the median seconds of two functions run in turn, and the median of second / first."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):  # the first round warms up
        pair = []
        for run in (first, second):
            start = time.perf_counter()
            run()
            pair.append(time.perf_counter() - start)
        times.append((pair[0], pair[1]))
    kept = times[1:]
    return (
        statistics.median(one for one, _ in kept),
        statistics.median(two for _, two in kept),
        statistics.median(two / one for one, two in kept),
    )


def session(path: Path, device: str) -> Any:
    """Open a graph with as many threads as torch has."""
    provider = PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise SystemExit(f"onnxruntime has no {provider} here: pip install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=[provider])


@torch.no_grad()
def measure(folder: Path, size: int, half: bool, repeats: int, device: str) -> list[Row]:
    """Export one size in one precision and time both graphs."""
    extractor = load_model(folder, device)
    if half and device == "cuda":
        extractor.compute_in(torch.float16)
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    xy = torch.rand(1, POINTS, 2, generator=torch.Generator().manual_seed(1)) * (size - 1)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "onnx"
        sys.stderr.write(export_onnx(folder, out, size_hw=(size, size), half=half) + "\n")
        dense, at = (session(out / name, device) for name in ("dense.onnx", "keypoints.onnx"))
        feeds = {"images": image.numpy()}
        with_points = {**feeds, "keypoints": xy.numpy()}
        pairs: tuple[tuple[str, str, Callable[[], object], Callable[[], object]], ...] = (
            (
                "dense",
                "dense.onnx",
                lambda: extractor.dense(image.to(device)).features.cpu(),
                lambda: dense.run(None, feeds),
            ),
            (
                f"{POINTS} points",
                "keypoints.onnx",
                lambda: extractor.at(image.to(device), xy.to(device)).cpu(),
                lambda: at.run(None, with_points),
            ),
        )
        for output, name, first, second in pairs:
            found = paired(first, second, repeats)
            megabytes = (out / name).stat().st_size / 1e6
            rows.append(Row(output, size, "float16" if half else "float32", *found, megabytes))
    return rows


def main(
    sizes: list[int] | None = None,
    repeats: int = 5,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
) -> None:
    """Print a Markdown table.

    Args:
        sizes: Sides of the square images in pixels.
        repeats: Measured rounds, after one that warms up.
        device: cpu or cuda.
        threads: Threads of both runtimes; torch's own number when left out.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    lines = [
        "| output | px | graph | torch ms | onnxruntime ms | onnxruntime / torch | MB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory() as work:
        built = build_extractor(PACKAGED_BACKBONE, "packaged", head="residual")
        folder = save_model(built, Path(work) / "model")
        for size in sizes or [224, 448]:
            for half in (False, True):
                for row in measure(folder, size, half, repeats, device):
                    lines.append(
                        f"| {row.output} | {row.size} | {row.precision} | {row.torch_s * 1e3:.0f} "
                        f"| {row.onnx_s * 1e3:.0f} | {row.ratio:.2f} | {row.megabytes:.0f} |"
                    )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    auto_cli(main)

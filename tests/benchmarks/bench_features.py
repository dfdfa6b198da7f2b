"""Images a second of `equifeat features` against the bare model on the same images, in one run.

Core-seconds count all processes; on a busy machine without a GPU their ratio says more than rates.
The bare loop has all images decoded, resized, in batches and on the device beforehand and throws
its features away, so its rate is the most that any pipeline could reach. Both take turns.

Run: python -m tests.benchmarks.bench_features [--device cuda --precision bfloat16 --batch 64]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from equifeat.features.command import features_command
from equifeat.features.formats import FORMATS
from equifeat.features.loader import GridRule
from equifeat.geometry.pixels import resize
from equifeat.image_files import read_pixels
from equifeat.model.extractor import FeatureExtractor, build_extractor


def photographs(folder: Path, count: int, sizes: list[tuple[int, int]]) -> list[Path]:
    """Write JPEG files of the sizes in turn, with as much detail as photographs have."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        h, w = sizes[index % len(sizes)]
        layers = [
            Image.fromarray(rng.integers(0, 256, (max(2, h // k), max(2, w // k), 3), np.uint8))
            for k in (8, 32, 128)
        ]
        pixels = np.mean([np.asarray(layer.resize((w, h))) for layer in layers], axis=0)
        paths.append(folder / f"{index:05d}.jpg")
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def core_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def bare(extractor: FeatureExtractor, batches: list[torch.Tensor]) -> float:
    """Seconds that the model takes for all batches."""
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            extractor.dense(batch)
    if extractor.backbone.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def batched(
    extractor: FeatureExtractor, paths: list[Path], resolution: int, batch: int
) -> list[torch.Tensor]:
    """Return all images, decoded, resized and joined by size, on the device."""
    rule = GridRule.of(extractor, resolution)
    sizes: dict[tuple[int, int], list[torch.Tensor]] = {}
    for path in paths:
        pixels = read_pixels(path)
        whole = rule.whole((int(pixels.shape[1]), int(pixels.shape[2])))
        sizes.setdefault(whole, []).append(resize(pixels[None], whole))
    device = extractor.backbone.device
    return [
        torch.cat(images[i : i + batch]).to(device)
        for images in sizes.values()
        for i in range(0, len(images), batch)
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=960, help="longer side of the JPEG files")
    asked = parser.parse_args()
    extractor = build_extractor(asked.backbone, "random", lora_blocks=0).to(asked.device).eval()
    if asked.precision != "float32":
        extractor.half_precision(getattr(torch, asked.precision))
    side = asked.side
    sizes = [(side * 3 // 4, side), (side, side * 3 // 4), (side * 2 // 3, side)]
    rates: dict[str, list[float]] = {}
    cores: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        paths = photographs(folder, asked.images, sizes)
        batches = batched(extractor, paths, asked.resolution, asked.batch)
        bare(extractor, batches[:1])
        for turn in range(asked.rounds):
            before = core_seconds()
            rates.setdefault("bare model", []).append(len(paths) / bare(extractor, batches))
            cores.setdefault("bare model", []).append(core_seconds() - before)
            for kind in FORMATS:
                end = ".zarr" if kind == "zarr" else ""
                before = core_seconds()
                text = features_command(
                    [folder],
                    asked.backbone,
                    Path(name) / f"{kind}{turn}{end}",
                    format=kind,
                    weights="random",
                    resolution=asked.resolution,
                    precision=asked.precision,
                    dtype=asked.dtype,
                    batch=asked.batch,
                    workers=asked.workers,
                    device=asked.device,
                )
                rate = float(text.split(" images/s")[0].rsplit(" ", 1)[1])
                rates.setdefault(kind, []).append(rate)
                cores.setdefault(kind, []).append(core_seconds() - before)
    cuda = asked.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores"
    sys.stdout.write(
        f"{asked.backbone}, {asked.images} JPEGs of {side} px in {len(sizes)} sizes, "
        f"{asked.resolution} patches, batch {asked.batch}, {asked.precision}, {where}\n"
    )
    base = statistics.median(rates["bare model"])
    for kind, values in rates.items():
        median = statistics.median(values)
        spent = statistics.median(cores[kind])
        share = statistics.median(cores["bare model"]) / spent
        sys.stdout.write(
            f"{kind:<12}{median:>8.1f} images/s{median / base:>7.2f}"
            f"{spent / asked.images:>9.3f} core-s an image{share:>7.2f}\n"
        )


if __name__ == "__main__":
    main()

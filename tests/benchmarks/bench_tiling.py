"""Peak memory and time of a tiled image against the whole one.

    python -m tests.benchmarks.bench_tiling
    python -m tests.benchmarks.bench_tiling --rows 214 --columns 286 --tile 64   # on a GPU

Both run in one process on the same random image, so that only ratios count. Memory is what torch
allocates beside the resulting map: on a GPU by its own count, elsewhere by what tensors take.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from jsonargparse import auto_cli

from equifeat.model.extractor import build_extractor
from equifeat.model.feature_map import FeatureMap
from tests.eval.allocations import Allocations


def measured(run: Callable[[], FeatureMap], device: torch.device) -> tuple[float, int]:
    """Return seconds and bytes of a run."""
    if device.type == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        out = run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - before
    else:
        start = time.perf_counter()
        out = run()
        seconds = time.perf_counter() - start
        with Allocations() as seen:
            run()
        peak = seen.peak_bytes
    return seconds, peak - out.features.numel() * out.features.element_size()


def main(
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    weights: str = "packaged",
    rows: int = 32,
    columns: int = 44,
    tile: int = 16,
    tile_overlap: int | None = None,
    batch_size: int = 1,
) -> None:
    """Print a table.

    Args:
        backbone: timm's name.
        weights: Its weights.
        rows: Patches of the image.
        columns: Patches of the image.
        tile: Side of a window in patches.
        tile_overlap: Patches that windows share.
        batch_size: Windows that run together.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_extractor(backbone, weights, "residual", lora_blocks=0).to(device).eval()
    image = torch.rand(1, 3, rows * model.patch_size, columns * model.patch_size, device=device)
    with torch.no_grad():
        whole = measured(lambda: model.dense(image), device)
        tiled = measured(
            lambda: model.dense_tiled(
                image, tile=tile, tile_overlap=tile_overlap, batch_size=batch_size
            ),
            device,
        )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    sys.stdout.write(f"{backbone}, {rows} x {columns} patches, {name}\n")
    for label, (seconds, peak) in (("whole", whole), (f"tiles of {tile}", tiled)):
        sys.stdout.write(f"{label:<14}{seconds:>8.2f} s{peak / 2**20:>9.1f} MiB\n")
    sys.stdout.write(f"ratio{'':<9}{tiled[0] / whole[0]:>8.2f}{tiled[1] / whole[1]:>11.3f}\n")


if __name__ == "__main__":
    auto_cli(main)

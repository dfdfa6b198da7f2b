"""Time and peak memory of a training step in each number format, with and without the switches.

    python tests/benchmarks/bench_precision.py --resolution 224 --steps 3
    python tests/benchmarks/bench_precision.py --resolution 1120 --steps 10 --batch 4   # on a GPU

All variants run in turn in one process on the same random images, so that only ratios to the
first one count. On a GPU memory is the most that was allocated; on the CPU it is what the tensors
kept for the backward pass and the weights take, as freed memory does not return to the system.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor

from equifeat.model.compiled import CompiledBlocks
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.train.precision import tf32


class Variant(NamedTuple):
    """One way to make a step.

    Attributes:
        name: What the table calls it.
        dtype: Type of products; None for float32.
        copied: Whether the frozen weights are kept in it.
        recompute: Gradient checkpointing.
        compiled: torch.compile.
        channels_last: Layout of the head's convolution.
        tf32: TF32 in float32 products, on a GPU.
    """

    name: str
    dtype: torch.dtype | None = None
    copied: bool = True
    recompute: bool = False
    compiled: bool = False
    channels_last: bool = True
    tf32: bool = False


BF16 = torch.bfloat16
VARIANTS = (
    Variant("float32"),
    Variant("float32, TF32", tf32=True),
    Variant("float32, head's channels first", channels_last=False),
    Variant("float32, checkpointing", recompute=True),
    Variant("float32, compile", compiled=True),
    Variant("bf16, float32 weights", BF16, copied=False),
    Variant("bf16", BF16),
    Variant("bf16, checkpointing", BF16, recompute=True),
    Variant("bf16, compile", BF16, compiled=True),
    Variant("bf16, compile, checkpointing", BF16, recompute=True, compiled=True),
)


def prepared(first: FeatureExtractor, variant: Variant) -> FeatureExtractor:
    """Return a copy of the model set up for a variant."""
    extractor = copy.deepcopy(first)
    extractor.recompute = variant.recompute
    if variant.compiled:
        extractor.backbone.run_block = CompiledBlocks()
    if variant.dtype is not None and variant.copied:
        extractor.compute_in(variant.dtype)
    if not variant.channels_last and extractor.head.conv is not None:
        extractor.head.conv.to(memory_format=torch.contiguous_format)
    return extractor


def stepper(extractor: FeatureExtractor, images: Tensor, variant: Variant) -> Callable[[], None]:
    """Return a function that makes one step, but for the loss and the data."""
    optimizer = torch.optim.AdamW(extractor.trainable_parameters().values(), lr=1e-6)

    def step() -> None:
        on = variant.dtype is not None
        with tf32(variant.tf32):
            with torch.autocast(images.device.type, variant.dtype or BF16, on, cache_enabled=False):
                features = extractor.tail(extractor.trunk(images)).features
            torch.autograd.backward(features.float().square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def megabytes(extractor: FeatureExtractor, images: Tensor, variant: Variant) -> float:
    """Return the peak of a step on a GPU; elsewhere weights and what backward keeps."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        stepper(extractor, images, variant)()
        return torch.cuda.max_memory_allocated() / 2**20
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for weight in extractor.parameters():
        pack(weight.data)
    with torch.autocast("cpu", variant.dtype or BF16, variant.dtype is not None):
        state = extractor.trunk(images)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = extractor.tail(state)
    size = sum(kept.values()) / 2**20
    del out
    return size


def main(
    backbone: str = "vit_small_patch14_dinov2.lvd142m",
    resolution: int = 224,
    batch: int = 1,
    steps: int = 3,
) -> None:
    """Print a table.

    Args:
        backbone: timm's name; weights are random.
        resolution: Side of the images in pixels.
        batch: Pairs a step.
        steps: Timed steps of each variant, after two that are not counted.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = build_extractor(backbone, "random", "residual").to(device)
    images = torch.rand(2 * batch, 3, resolution, resolution, device=device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    sys.stdout.write(f"{backbone}, {batch} pairs, {resolution} px, {name}\n")
    sys.stdout.write(f"{'variant':<32}{'s a step':>10}{'ratio':>8}{'MiB':>10}{'ratio':>8}\n")
    base: tuple[float, float] | None = None
    for variant in VARIANTS:
        if variant.tf32 and device.type != "cuda":
            continue
        extractor = prepared(first, variant)
        size = megabytes(prepared(first, variant._replace(compiled=False)), images, variant)
        step, seconds = stepper(extractor, images, variant), []
        for index in range(steps + 2):
            start = time.perf_counter()
            step()
            if index > 1:
                seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        base = base or (median, size)
        sys.stdout.write(
            f"{variant.name:<32}{median:>10.3f}{median / base[0]:>8.2f}{size:>10.1f}"
            f"{size / base[1]:>8.2f}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    auto_cli(main)

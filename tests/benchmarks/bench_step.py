"""Seconds and peak memory of a training step, against a plain loop of the same mathematics.

    python tests/benchmarks/bench_step.py --resolution 448 --steps 5
    python tests/benchmarks/bench_step.py --resolution 1120 --steps 2

The plain loop does what the reference does: the whole ViT for each of the two images in turn,
attention as an explicit softmax matrix, no cache, and the loss from a gathered
positives-by-negatives matrix. Both run in one process on the same pairs, in turn; ratios are what
counts, the machine's speed drifts. Each variant's memory is measured in a process of its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from data_prep.procedural import write_procedural
from data_prep.render import RenderOptions, render_object
from equifeat.data.datamodule import collate_pairs
from equifeat.data.pairs import Pair, PairSource
from equifeat.data.views import open_views
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.feature_map import FeatureMap
from equifeat.train.module import EquivariantFinetune

VARIANTS = ("plain", "ours", "ours, trunk cached")


def plain_loss(d0: Tensor, d1: Tensor, p0: Tensor, p1: Tensor, tau: float = 0.01) -> Tensor:
    """SmoothAP with one row a positive pair and one column a pixel of view 1, nothing shared."""
    distance = torch.cdist(p0, p1)
    positives = (distance < 5e-3).nonzero()
    similarity = d0 @ d1.T
    rows = similarity[positives[:, 0]]
    negative = (distance > 0.1)[positives[:, 0]].float()
    s = similarity[positives[:, 0], positives[:, 1]][:, None]

    def step(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp((-x / tau).clamp(-50, 50)))

    own1, own2 = 1 + step(s - 1), 1 + step(1 - s)
    ap1 = own1 / (own1 + (step(rows - 1) * negative).sum(1, keepdim=True))
    ap2 = own2 / (own2 + (step(rows - s) * negative).sum(1, keepdim=True))
    return (1 - (ap1 + ap2) / 2).mean()


def plain_step(extractor: FeatureExtractor, pair: Pair) -> Tensor:
    """Two forwards through the whole ViT."""
    descriptors = []
    backbone = extractor.backbone
    assert extractor.adapter is not None
    for image, keypoints in ((pair.image0, pair.keypoints0), (pair.image1, pair.keypoints1)):
        size_hw = (image.shape[1], image.shape[2])
        with extractor.adapter.attached(backbone.blocks):
            pixels = (image[None] - backbone.mean) / backbone.std
            tokens = backbone.model.forward_features(pixels)[:, backbone.num_prefix_tokens :]
        features = tokens.mT.reshape(1, extractor.dim, *extractor.grid_hw(size_hw))
        found = FeatureMap(extractor.head(features), size_hw).sample(keypoints[None])[0]
        descriptors.append(found)
    return plain_loss(descriptors[0], descriptors[1], pair.points3d0, pair.points3d1)


def peak_of(work: Callable[[], object]) -> float:
    """GiB by which the process grows while it works, by its resident set (Linux)."""
    statm, page = Path("/proc/self/statm"), resource.getpagesize()

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    before = most = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return (most - before) / 2**30


def make_step(variant: str, views: Path, steps: int) -> Callable[[int], float]:
    """Return a function that makes optimiser step i and gives its loss."""
    source = PairSource(open_views(views), num_keypoints=1000)
    if variant == "plain":
        extractor = build_extractor("vit_small_patch14_dinov2.lvd142m", head="residual")
        for block in extractor.backbone.blocks:
            block.attn.fused_attn = False  # type: ignore[union-attr]
        module = None
    else:
        module = EquivariantFinetune(
            weights="packaged",
            head="residual",  # what plain_step does
            lora_rank=4,
            loss="smooth_ap",
            tau=0.01,
            both_directions=False,
            trunk_cache_mb=4096 if "cached" in variant else 0,
        )
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        extractor = module.extractor
        if "cached" in variant:  # its steady state: every view has been met before
            for pair in map(source.draw, range(steps)):
                images = torch.stack([pair.image0, pair.image1])
                keys = [(f"train/{name}", view, 0) for name, view in (pair.key0, pair.key1)]
                module.cache.views(extractor, images, keys, None)
    weights = list(extractor.trainable_parameters().values())
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def run(i: int) -> float:
        pair = source.draw(i)
        loss = (
            plain_step(extractor, pair)
            if module is None
            else module.training_step(collate_pairs([pair]), i)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return float(loss.detach())

    return run


def bench(
    resolution: int = 448, steps: int = 5, folder: Path | None = None, only: str | None = None
) -> None:
    """Measure the variants.

    Args:
        resolution: Side of the images in pixels, a multiple of 14.
        steps: Steps a variant, after one that is not counted.
        folder: Views made by an earlier call; made anew when None.
        only: Run one variant and print the peak memory of this process.
    """
    folder = folder or Path(tempfile.mkdtemp())
    views = folder / "views"
    if not views.exists():
        render_object(write_procedural(folder, [0])[0], views, RenderOptions(size=resolution))
    if only is not None:
        run = make_step(only, views, 1)
        # The first step: later ones find its memory still held by the allocator.
        sys.stdout.write(f"{peak_of(lambda: run(0)):.2f}\n")
        return
    runs = {name: make_step(name, views, steps + 1) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for i in range(steps + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            loss = run(i)
            if i:
                seconds[name].append(time.perf_counter() - start)
            losses[name].append(loss)
    command = [sys.executable, __file__, "--resolution", str(resolution), "--folder", str(folder)]
    peaks = {
        name: float(subprocess.check_output([*command, "--only", name]).split()[-1])
        for name in VARIANTS
    }
    base = sorted(seconds["plain"])[len(seconds["plain"]) // 2]
    out = [f"{resolution} px, {torch.get_num_threads()} threads, {steps} steps, medians"]
    out.append("| variant | s a step | of the plain loop | GiB a step adds | first loss |")
    out.append("| --- | ---: | ---: | ---: | ---: |")
    for name in VARIANTS:
        median = sorted(seconds[name])[len(seconds[name]) // 2]
        out.append(
            f"| {name} | {median:.2f} | {median / base:.2f}× | {peaks[name]:.2f} "
            f"| {losses[name][0]:.4f} |"
        )
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    auto_cli(bench)

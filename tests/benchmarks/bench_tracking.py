"""Tracking a video of DAVIS' size against a loop over query points, on the same features.

    python tests/benchmarks/bench_tracking.py --frames 24 --queries 60 --loop 2
    python tests/benchmarks/bench_tracking.py --frames 68 --queries 300 --loop 4 --device cuda

Features are made up: a smooth random picture that drifts over the video, with noise, so that many
frames are anchors as in a real video. The loop does what the published code does, one query after
the other: similarities of T equal descriptors with every frame of which it keeps its own, softmax
over the whole map, and for every anchor frame the way back from all frames. It runs for a few
queries only and is extrapolated. "lean loop" is the same without the similarities that are thrown
away. Both must give the tracks and the occlusions that the tracker gives.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F  # noqa: N812
from jsonargparse import auto_cli
from torch import Tensor

from equifeat.eval.tracker import TrackerOptions, track
from equifeat.geometry.pixels import resize
from equifeat.model.feature_map import FeatureMap

SIZE_HW, GRID_HW, MARGIN_YX = (476, 854), (67, 121), (3.5, 3.5)


def made_up_video(frames: int, dim: int, noise_level: float, device: str) -> FeatureMap:
    """Return features of a drifting picture; noise grows away from the middle."""
    generator = torch.Generator().manual_seed(0)
    h, w = GRID_HW
    coarse = torch.randn(dim, h // 3, (w + frames) // 3, generator=generator)
    wide = resize(coarse[None], (h, w + frames), "bicubic", antialias=False)[0]
    maps = torch.empty(frames, dim, h, w)
    for t in range(frames):
        noise = torch.randn(dim, h, w, generator=generator)
        maps[t] = wide[:, :, t : t + w] + (0.4 + abs(t / frames - 0.5)) * noise_level * noise
    return FeatureMap(maps.to(device), SIZE_HW, MARGIN_YX)


def track_one(
    maps: FeatureMap, query: Tensor, options: TrackerOptions, lean: bool
) -> tuple[Tensor, Tensor]:
    """Track one query with plain steps: (T, 2) places and (T,) occlusions."""
    features, centers = maps.features, maps.centers().reshape(-1, 2)
    norms = features.norm(dim=1)
    frames = range(len(features))

    def sample(t: int, xy: Tensor) -> Tensor:
        one = FeatureMap(features[t : t + 1], maps.size_hw, maps.margin_yx)
        return one.sample(xy[None, None], normalize=False)[0, 0]

    def find(sources: Tensor, targets: list[int]) -> Tensor:
        if lean:
            same = len(set(targets)) == 1
            maps_of = features[targets[0]][None] if same else features[targets]
            products = torch.einsum("bc,nchw->bnhw" if same else "nc,nchw->nhw", sources, maps_of)
            products = products[:, 0] if same else products
        else:
            every = torch.einsum("bc,nchw->bnhw", sources, features)
            products = every[torch.arange(len(sources)), targets]
        lengths = sources.norm(dim=1)[:, None, None] * norms[targets]
        cosines = (products / lengths.clamp(min=1e-8)).relu().flatten(1)
        heat = cosines.softmax(dim=1)
        best = centers[cosines.argmax(dim=1)]
        near = (centers[None] - best[:, None]).norm(dim=-1) <= options.radius
        heat = heat * near
        places: Tensor = (heat[..., None] * centers).sum(dim=1) / heat.sum(dim=1, keepdim=True)
        return places

    start = int(query[2])
    xy = find(sample(start, query[:2]).expand(len(features), -1), list(frames))
    found = torch.stack([sample(t, xy[t]) for t in frames])
    similarity = F.cosine_similarity(found[start][None], found, dim=-1)
    anchors = similarity >= options.anchor_threshold
    errors = []
    for t in anchors.nonzero()[:, 0].tolist():
        back = find(found, [t] * len(features))
        errors.append((back - xy[t]).norm(dim=-1))
    median = torch.stack(errors).median(dim=0).values
    return xy, (median > median[anchors].max()) | (similarity < options.cosine_threshold)


def wait(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def main(
    frames: int = 24,
    queries: int = 60,
    loop: int = 2,
    dim: int = 768,
    noise: float = 0.5,
    device: str = "cpu",
) -> None:
    """Compare the tracker with both loops.

    Args:
        frames: Frames T.
        queries: Queries of the tracker.
        loop: Queries of the loops, from which their time is extrapolated.
        dim: Channels of the features: 768 is a ViT-B.
        noise: Strength of the noise; more of it puts similarities between the thresholds, where
            occlusion needs the way back.
        device: Where it runs.
    """
    maps = made_up_video(frames, dim, noise, device)
    generator = torch.Generator().manual_seed(1)
    place = torch.rand(queries, 2, generator=generator) * torch.tensor([854.0, 476.0])
    when = torch.randint(0, (frames + 4) // 5, (queries, 1), generator=generator) * 5
    asked = torch.cat([place, when], dim=1)
    options = TrackerOptions()
    track(maps, asked[:1], options)
    wait(device)
    start = time.perf_counter()
    result = track(maps, asked, options)
    ours = time.perf_counter() - start
    anchors = (result.similarity >= options.anchor_threshold).float().mean()
    between = (result.similarity < options.anchor_threshold) & (
        result.similarity >= options.cosine_threshold
    )
    write = sys.stdout.write
    write(
        f"{frames} frames, {queries} queries, {dim} channels, {device}: {anchors:.0%} anchors, "
        f"{result.occluded.float().mean():.0%} hidden, "
        f"{between.any(dim=1).float().mean():.0%} of the queries need the way back\n"
        f"tracker {ours:.2f} s\n"
    )
    for name, lean in (("loop", False), ("lean loop", True)):
        with torch.no_grad():
            track_one(maps, asked[0].to(device), options, lean)
            some = asked[:loop].to(device)
            start = time.perf_counter()
            kept = [track_one(maps, query, options, lean) for query in some]
            wait(device)
            took = time.perf_counter() - start
        off = max(float((kept[i][0].cpu() - result.xy[i]).abs().max()) for i in range(loop))
        differ = sum(int((kept[i][1].cpu() != result.occluded[i]).sum()) for i in range(loop))
        whole = took / loop * queries
        write(
            f"{name}: {took:.2f} s for {loop} queries, {whole:.1f} s for all (extrapolated), "
            f"{whole / ours:.0f} times as long; largest difference {off:.1e} px, "
            f"{differ} occlusions differ\n"
        )
        if off > 1e-2 or differ:
            raise SystemExit(f"{name}: not equal")


if __name__ == "__main__":
    auto_cli(main)

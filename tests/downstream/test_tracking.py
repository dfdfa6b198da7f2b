"""Tracks of points of an object that a camera moves around: the truth follows from depth."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.procedural import make_object
from equifeat.downstream import tracking
from equifeat.downstream.tracking import TrackedPoints, TrackOptions, draw_tracks, track
from equifeat.errors import ImageError, KeypointError, RecipeError
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from tests.downstream.scenes import dinov2, render, ring, seen_at, surface_points

FAST = TrackOptions(overlap=1)


@cache
def moving(painted: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Frames, queries (N, 3) in frame 0, true tracks (N, T, 2) and whether they are seen (N, T)."""
    views = render(make_object(3), ring([0.0, 13.0, 26.0, 39.0], 30.0), painted, size=140)
    xy, points = surface_points(views[0], 40)
    places = [seen_at(points, view, 0.02) for view in views]
    queries = torch.cat([xy, torch.zeros(len(xy), 1)], dim=1)
    tracks = torch.stack([place for place, _ in places], dim=1)
    return [view.image for view in views], queries, tracks, torch.stack([on for _, on in places], 1)


def run(model: Any, painted: bool, options: TrackOptions = FAST) -> tuple[TrackedPoints, Tensor]:
    frames, queries, tracks, seen = moving(painted)
    found = track(model, frames, queries, options)
    return found, (found.tracks - tracks).norm(dim=-1)[seen]


def test_oracle_follows_points_and_tells_hidden_ones() -> None:
    found, error = run(CoordinateOracle(width=0.025), True)
    _, _, tracks, seen = moving(True)
    assert found.tracks.shape == tracks.shape
    assert error.median() < 0.5
    assert (error < 3.0).float().mean() > 0.97
    assert 0.5 < seen.float().mean() < 0.99
    visible = found.visible.float()
    assert visible[seen].mean() > 0.85
    # some of what the depth test does not find is only at the object's rim
    assert visible[~seen].mean() < visible[seen].mean() - 0.1
    assert ((found.similarity >= 0.0) & (found.similarity < 1.0 + 1e-5)).all()


def test_dinov2_is_about_right_and_random_features_are_not() -> None:
    _, error = run(dinov2(), False, TrackOptions(resolution=16, overlap=1))
    _, chance = run(RandomFeatures(), False)
    # the object is about 70 px long
    assert error.median() < 15.0
    assert error.median() < 0.5 * chance.median()


def test_a_file_of_features_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    frames, queries, _, _ = moving(True)
    calls: list[int] = []
    write = tracking._Features.all

    def seen(store: tracking._Features) -> Tensor:
        calls.append(store.file.stat().st_size if store.file.exists() else 0)
        return write(store)

    monkeypatch.setattr(tracking._Features, "all", seen)
    in_memory = track(CoordinateOracle(), frames, queries, FAST)
    # a frame of the oracle has 96 half-precision channels for each of 140 x 140 pixels: 3.6 MiB
    by_file = track(
        CoordinateOracle(),
        (frame for frame in frames),
        queries,
        TrackOptions(overlap=1, memory_mb=10, folder=str(tmp_path)),
    )
    assert calls[0] == 0
    assert calls[1] == 4 * 2 * 96 * 140 * 140
    assert not list(tmp_path.iterdir())
    for one, other in zip(in_memory, by_file, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0.0)
    stacked = track(CoordinateOracle(), torch.stack(frames), queries[:3], FAST)
    torch.testing.assert_close(stacked.tracks, in_memory.tracks[:3], atol=1e-4, rtol=0.0)


def test_the_radius_grows_with_the_video() -> None:
    """Twice the pixels, the same tracks at twice the places."""
    frames, queries, _, _ = moving(True)
    large = [frame.repeat_interleave(2, 1).repeat_interleave(2, 2) for frame in frames[:2]]
    small = track(CoordinateOracle(), frames[:2], queries, FAST)
    doubled = queries * torch.tensor([2.0, 2.0, 1.0])
    found = track(CoordinateOracle(), large, doubled, FAST)
    assert (found.tracks - 2 * small.tracks).norm(dim=-1).median() < 0.5


def test_a_video_file(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    frames, queries, _, _ = moving(True)
    file = tmp_path / "video.mkv"
    with av.open(str(file), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 140, 140, "bgr0"
        for frame in frames:
            rgb = (frame.permute(1, 2, 0) * 255).round().byte().numpy()
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    by_file = track(CoordinateOracle(), file, queries, FAST)
    same = track(CoordinateOracle(), frames, queries, FAST)
    torch.testing.assert_close(by_file.tracks, same.tracks, atol=1e-3, rtol=0.0)


def test_the_picture_shows_points_where_they_are() -> None:
    frames, _, _, _ = moving(True)
    tracks = torch.full((1, 4, 2), 70.0)
    visible = torch.tensor([[True, False, True, True]])
    found = TrackedPoints(tracks, visible, torch.ones(1, 4))
    black = [torch.zeros_like(frame) for frame in frames]
    page = np.asarray(draw_tracks(black, found, [0, 1])).astype(int)
    dark = (page.sum(axis=2) < 60).any(axis=0).nonzero()[0]
    assert page.shape[1] > 480
    assert len(dark) > 470
    # the middle of the first cell is coloured, of the second black with a ring around it
    row = 52 + 120
    first, second = page[row, 6 + 120], page[row, 6 + 240 + 6 + 120]
    assert first.sum() > 60
    assert second.sum() < 60
    assert page[row - 6 : row + 7, 6 + 240 + 6 + 108 : 6 + 240 + 6 + 132].sum() > 0


def test_bad_input_is_one_sentence() -> None:
    frames, queries, _, _ = moving(True)
    oracle = CoordinateOracle()
    with pytest.raises(KeypointError, match=r"\(N, 3\)"):
        track(oracle, frames, queries[:, :2])
    with pytest.raises(KeypointError, match="outside frames of width 140"):
        track(oracle, frames, torch.tensor([[140.0, 3.0, 0.0]]))
    for t in (4.0, -1.0, 0.5):
        with pytest.raises(KeypointError, match="frames 0 to 3"):
            track(oracle, frames, torch.tensor([[10.0, 3.0, t]]), FAST)
    with pytest.raises(ImageError, match="no frame"):
        track(oracle, [], queries)
    with pytest.raises(ImageError, match=r"frame 1 has the size \(140, 139\)"):
        track(oracle, [frames[0], frames[1][..., :-1]], queries)
    with pytest.raises(ImageError, match="frame 0: images must be floats"):
        track(oracle, [frames[0] * 255], queries)
    with pytest.raises(RecipeError, match="memory_mb=0"):
        TrackOptions(memory_mb=0)

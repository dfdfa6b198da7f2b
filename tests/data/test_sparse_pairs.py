"""Tracks, pairs of captures, and a real fit on them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from equifeat.cli import run
from equifeat.data.augment import Augment
from equifeat.data.batch import collate_pairs
from equifeat.data.datamodule import PairDataModule
from equifeat.data.pairs import Pair, PairSource
from equifeat.data.sparse_views import CaptureOptions
from equifeat.data.tracks import Tracks, draw_keypoints
from equifeat.data.views import open_views
from equifeat.errors import ViewsError
from equifeat.geometry.camera import Camera, transform
from tests.data.sparse_fixtures import write_co3d, write_colmap
from tests.synthetic import write_views

pytest.importorskip("pycolmap")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of MVImgNet with one object each, and a category of CO3D."""
    root = tmp_path_factory.mktemp("captures")
    write_colmap(root / "mv/7/aa", masks=root / "mv/mask/7/aa", points=900)
    write_colmap(root / "mv/9/bb", mixed=True, masks=root / "mv/mask/9/bb", points=900)
    write_co3d(root / "co")
    return root


def checked(pair: Pair, cam0_from_world: Tensor) -> None:
    """Both keypoints of every match are where the 3D point projects."""
    cam1_from_world = pair.cam1_from_cam0 @ cam0_from_world
    sides = (
        (pair.camera0, cam0_from_world, pair.keypoints0, pair.points3d0),
        (pair.camera1, cam1_from_world, pair.keypoints1, pair.points3d1),
    )
    for camera, pose, keypoints, points in sides:
        exact = Camera(camera.K.double(), camera.size_hw)
        at = exact.project(transform(pose.double(), points.double()))
        assert float((at - keypoints).abs().max()) < 2e-3


@pytest.mark.parametrize("where", ["mv", "co"])
@pytest.mark.parametrize("augment", [None, Augment()])
def test_matches_are_the_shared_points(root: Path, where: str, augment: Augment | None) -> None:
    objects = {views.name: views for views in open_views(root / where)}
    source = PairSource([*objects.values()], augment=augment, min_keypoints=8, num_keypoints=50)
    for draw in range(12):
        pair = source.draw(draw)
        assert 8 <= len(pair.keypoints0) <= 50
        assert torch.equal(pair.points3d0, pair.points3d1)
        views = objects[pair.object_name]
        checked(pair, views.cam_from_world[pair.key0[1]])
        assert views.tracks is not None
        ids = [set(views.tracks.point_ids[key[1]].tolist()) for key in (pair.key0, pair.key1)]
        known = {tuple(p.tolist()): n for n, p in enumerate(views.tracks.points3d)}
        assert {known[tuple(p.tolist())] for p in pair.points3d0} <= ids[0] & ids[1]
        assert not pair.depth0.any()
        h, w = pair.camera0.size_hw
        assert pair.image0.shape == (3, h, w)
        assert float(pair.image0[:, ~pair.mask0].abs().max()) == 0.0
        again = source.draw(draw)
        assert torch.equal(pair.image1, again.image1)
        assert torch.equal(pair.keypoints1, again.keypoints1)


def test_reference_sampler_draws_each_view_by_itself(root: Path) -> None:
    objects = open_views(root / "mv/7/aa")
    source = PairSource(objects, sampler="reference", num_keypoints=700)
    pair = source.draw(0)
    # More than the views see: drawn with repetitions, as from rendered masks.
    assert len(pair.keypoints0) == len(pair.keypoints1) == 700
    assert not torch.equal(pair.points3d0, pair.points3d1)
    checked(pair, objects[0].cam_from_world[pair.key0[1]])
    few = PairSource(objects, sampler="reference", num_keypoints=30).draw(0)
    assert len(np.unique(few.points3d0.numpy(), axis=0)) == 30


def test_too_few_shared_points_are_said_at_the_start(root: Path) -> None:
    objects = open_views(root / "mv/7/aa")
    with pytest.raises(ViewsError, match="share 5000 points of its reconstruction"):
        PairSource(objects, min_keypoints=5000, num_keypoints=5000)
    assert objects[0].tracks is not None
    counts = objects[0].tracks.shared_counts()
    # A few lie beside a mask, on its edge.
    limit = int(counts.fill_diagonal_(0).max()) - 5
    source = PairSource(objects, min_keypoints=limit, num_keypoints=limit)
    assert len(source.draw(3).keypoints0) == limit


def test_shared_counts_are_the_sizes_of_the_intersections(root: Path) -> None:
    tracks = open_views(root / "mv/7/aa")[0].tracks
    assert tracks is not None
    counts = tracks.shared_counts()
    for i in range(len(tracks)):
        for j in range(len(tracks)):
            rows_i, rows_j = tracks.shared(i, j)
            same = set(tracks.point_ids[i].tolist()) & set(tracks.point_ids[j].tolist())
            assert int(counts[i, j]) == len(rows_i) == len(same)
            assert torch.equal(tracks.point_ids[i][rows_i], tracks.point_ids[j][rows_j])


def test_points_beside_a_mask_are_not_drawn() -> None:
    xy = torch.tensor([[0.5, 0.5], [1.5, 0.5], [2.5, 0.5]])
    ids = torch.tensor([0, 1, 2])
    tracks = Tracks([xy, xy], [ids, ids], torch.eye(3))
    masks = (torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]]))
    rng = np.random.default_rng(0)
    found = draw_keypoints(tracks, (0, 1), masks, 10, matched=True, rng=rng)
    assert found.points3d0.tolist() == [[0.0, 1.0, 0.0]]
    alone = draw_keypoints(tracks, (0, 1), masks, 10, matched=False, rng=rng)
    assert set(alone.keypoints0[:, 0].tolist()) == {0.5, 1.5}
    empty = (torch.zeros(1, 3, dtype=torch.bool),) * 2
    assert len(draw_keypoints(tracks, (0, 1), empty, 10, matched=False, rng=rng).keypoints0) == 0


def test_sizes_in_one_batch(root: Path) -> None:
    source = PairSource(open_views(root / "mv"), min_keypoints=8)
    pairs = [source.draw(i) for i in range(8)]
    with pytest.raises(ViewsError, match=r"data\.captures\.pad=true"):
        collate_pairs(pairs)
    padded = CaptureOptions(max_side=96, pad=True)
    data = PairDataModule(
        root / "mv", batch_size=8, min_keypoints=8, captures=padded, draws_per_epoch=8
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.images0.shape == (8, 3, 96, 96)


def test_captures_and_renders_mix(root: Path, tmp_path: Path) -> None:
    (tmp_path / "aa").symlink_to(root / "mv/7/aa")
    write_views(tmp_path / "rendered", "sphere", object_name="sphere")
    source = PairSource(open_views(tmp_path), min_keypoints=8, seed=2)
    assert {source.draw(i).object_name for i in range(10)} == {"aa", "sphere"}


def test_workers_draw_the_same(root: Path) -> None:
    def epoch(workers: int) -> list[Tensor]:
        data = PairDataModule(
            root / "co", num_workers=workers, draws_per_epoch=4, num_keypoints=64, min_keypoints=8
        )
        data.setup("fit")
        return [batch.keypoints1[0] for batch in data.train_dataloader()]

    for a, b in zip(epoch(0), epoch(2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["mv", "co"])
def test_fit(root: Path, tmp_path: Path, where: str) -> None:
    """A real run of the command: the loss is finite and falls."""
    settings = {
        "seed_everything": 0,
        "run": {"dir": str(tmp_path / "run")},
        "model": {
            "backbone": "test_vit.r160_in1k",
            "weights": "random",
            "lr": 1e-3,
            "pos_radius": 0.05,
            "neg_radius": 0.1,
        },
        "data": {
            "views": str(root / where),
            "val_views": str(root / where),
            "layout": "mvimgnet" if where == "mv" else "co3d",
            "captures": {"max_side": 128, "pad": True},
            "num_keypoints": 200,
            "min_keypoints": 16,
            "augment": False,
            "batch_size": 2,
            "draws_per_epoch": 8,
            "val_draws": 4,
        },
        "trainer": {"max_steps": 16, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    run(["fit", "--config", str(path)])
    losses = []
    for file in sorted((tmp_path / "run").glob("logs/metrics.csv")):
        with file.open() as lines:
            losses += [float(r["train/loss"]) for r in csv.DictReader(lines) if r["train/loss"]]
    assert len(losses) == 16
    assert all(np.isfinite(losses))
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert (tmp_path / "run/model/adapter_model.safetensors").is_file()

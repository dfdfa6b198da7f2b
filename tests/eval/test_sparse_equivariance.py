"""The protocol on captures: the truth is the tracks' observation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.cli import run
from equifeat.data.sparse_views import CaptureOptions, SparseViews
from equifeat.data.views import open_views
from equifeat.eval.equivariance import HasDense, evaluate_equivariance
from equifeat.eval.equivariance_result import EquivarianceResult
from equifeat.eval.results import Results
from equifeat.geometry.camera import Camera
from tests.data.sparse_fixtures import Truth, write_co3d, write_colmap
from tests.eval.spheres import PointMap, RandomFeatures, Sphere

pytest.importorskip("pycolmap")


class SurfaceOracle:
    """Paints the true surface point of every pixel, from the fixture's own poses and shape."""

    def __init__(self, *captures: tuple[SparseViews, Truth]) -> None:
        self.known: list[tuple[Tensor, Tensor]] = []
        for views, truth in captures:
            for i in range(len(views)):
                view = views.view(i)
                camera = Camera(view.camera.K.double(), view.camera.size_hw)
                points = truth.object_points(i, camera)
                # The constant keeps directions unique; nothing is painted beside the box.
                both = F.pad(points, (0, 1), value=0.5) * ~points[..., :1].isnan()
                features = both.nan_to_num(0.0).permute(2, 0, 1)[None].float()
                self.known.append((view.image, features))

    def dense(self, images: Tensor, resolution: int | None = None) -> PointMap:
        for image, features in self.known:
            if image.shape == images.shape[1:] and torch.equal(image, images[0]):
                return PointMap(features, (int(images.shape[-2]), int(images.shape[-1])))
        raise AssertionError("the oracle has not seen this image")


def capture(folder: Path, **options: object) -> SparseViews:
    (views,) = open_views(folder, captures=CaptureOptions(**options))  # type: ignore[arg-type]
    assert isinstance(views, SparseViews)
    return views


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    root = tmp_path_factory.mktemp("capture")
    return write_colmap(root / "7/box", mixed=True, masks=root / "mask/7/box", size_hw=(180, 240))


def test_the_oracle_is_nearly_perfect(truth: Truth, tmp_path: Path) -> None:
    toy = write_co3d(tmp_path, size_hw=(240, 180))
    objects = [capture(truth.folder), capture(toy.folder)]
    models: dict[str, HasDense] = {
        "oracle": SurfaceOracle((objects[0], truth), (objects[1], toy)),
        "random": RandomFeatures(),
    }
    result = evaluate_equivariance(models, objects, points=200, target_stride=1)
    for values in result.object_values("oracle"):
        assert float(values[0]) < 1.5  # APE
        assert float(values[1]) >= 99.0  # PCDP@.05
    assert result.summary("random")["PCDP@.05"].mean < 5.0
    assert result.config["captured_objects"] == 2
    assert result.config["captured_without_masks"] == 0
    assert "2 objects are captures: their points are tracks" in result.caption()
    assert "no masks" not in result.caption()
    assert EquivarianceResult.from_json(result.to_json()) == result


def test_points_are_the_shared_tracks(truth: Truth) -> None:
    views = capture(truth.folder)
    assert views.tracks is not None
    result = evaluate_equivariance(RandomFeatures(), [views], points="dense", target_stride=4)
    for row in result.rows:
        shared = set(views.tracks.point_ids[row.view0].tolist())
        shared &= set(views.tracks.point_ids[row.view1].tolist())
        assert len(shared) - 5 <= row.points <= len(shared)  # a mask may cost a point at its edge


def test_a_shifted_truth_is_seen(truth: Truth) -> None:
    """The error is against the observation: moving those by 10 px costs the oracle 10 px."""
    views = capture(truth.folder)
    oracle = SurfaceOracle((views, truth))
    assert views.tracks is not None
    good = evaluate_equivariance(oracle, [views], target_stride=1, normalizer="image")
    moved = capture(truth.folder)
    assert moved.tracks is not None
    for i in range(len(moved)):
        moved.tracks.xy[i][:, 0] += 0.0 if i != 2 else 10.0
    bad = evaluate_equivariance(oracle, [moved], target_stride=1, normalizer="image")
    to2 = [row.scores["model"][0] for row in bad.rows if row.view1 == 2]
    was = [row.scores["model"][0] for row in good.rows if row.view1 == 2]
    # 10 px of 240 are 4.2 percent.
    assert sum(to2) / len(to2) - sum(was) / len(was) == pytest.approx(4.2, abs=0.7)


def test_without_masks_the_box_is_that_of_the_points(tmp_path: Path) -> None:
    truth = write_colmap(tmp_path / "bare")
    views = capture(tmp_path / "bare")
    assert not views.has_masks
    assert views.tracks is not None
    result = evaluate_equivariance(RandomFeatures(), [views], target_stride=1, points="dense")
    image = evaluate_equivariance(
        RandomFeatures(), [views], target_stride=1, points="dense", normalizer="image"
    )
    for a, b in zip(result.rows, image.rows, strict=True):
        xy = views.tracks.xy[a.view1]
        side = float((xy.amax(0) - xy.amin(0)).max())
        assert side < 160
        ratio = a.scores["model"][0] / b.scores["model"][0]
        assert ratio == pytest.approx(160 / side, rel=1e-5)
    assert result.config["captured_without_masks"] == 1
    assert "have no masks: all pixels are searched" in result.caption()
    assert len(truth.cameras) == len(views)


def test_rendered_objects_are_reported_as_before() -> None:
    result = evaluate_equivariance(RandomFeatures(), [Sphere()], points=20)
    assert "captured_objects" not in result.config
    assert "captures" not in result.caption()


def test_command(truth: Truth, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result"
    run(
        [
            *("evaluate", "equivariance", "--data", str(truth.folder.parent)),
            *("--model", "test_vit.r160_in1k", "--weights", "random"),
            *("--set", "points=50", "pairs=3", "target_stride=4", "--out", str(out)),
        ]
    )
    said = capsys.readouterr().out
    assert "captures: their points are tracks" in said
    (task,) = Results.load(out / "results.json").tasks
    assert "1 objects are captures" in task.caption

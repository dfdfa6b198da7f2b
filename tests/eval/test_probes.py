"""Probes on features whose truth is known, on chance, and on a real tiny ViT."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equifeat.cli import run
from equifeat.data.object_views import View
from equifeat.data.views import open_views
from equifeat.errors import EquifeatError, EvalDataError, RecipeError
from equifeat.eval.controls import RandomFeatures
from equifeat.eval.features import Dense, FeatureSource
from equifeat.eval.harness import evaluate, find_protocol
from equifeat.eval.models import ModelSpec, OpenModel
from equifeat.eval.probes import PROBES
from equifeat.eval.probes_data import ProbeData
from equifeat.eval.probes_linear import DepthProbe, LinearProbe
from equifeat.eval.probes_ranking import overlap, spearman
from equifeat.eval.probes_ridge import (
    PENALTIES,
    Moments,
    _error,
    _solve,
    fit_probe,
    is_held_out,
)
from equifeat.eval.probes_segmentation import SegmentationProbe
from equifeat.eval.probes_truth import cut_clutter, octants, surface_normals
from equifeat.eval.shared_trunk import SharedTokens, SharedTrunk
from equifeat.geometry.pixels import patch_centers
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.feature_map import FeatureMap
from equifeat.seeding import numpy_generator
from tests.model.tiny import randomize
from tests.synthetic import HALF, rays_at, shape_depth, write_views

SIZE, PATCH = 96, 8
SHAPES = {"ball": "sphere", "brick": "box", "globe": "sphere", "crate": "box"}
MODEL = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes") / "data"
    for split, names, views in (("train", ("ball", "brick"), 5), ("val", ("globe", "crate"), 6)):
        for name in names:
            write_views(folder / split / name, SHAPES[name], views, SIZE, name)
    return folder


class Knowing:
    """Its features are what is true of a patch, computed from the shapes and not from pictures.

    Channels: depth, normal (3), whether the object is there, octant (8), a constant.
    """

    def __init__(self, root: Path) -> None:
        self.views = []
        for split in ("train", "val"):
            for obj in open_views(root / split):
                self.views += [(SHAPES[obj.name], obj.view(i)) for i in range(len(obj))]

    def dense(self, images: Tensor, resolution: int | None = None) -> FeatureMap:
        image = images[0]
        # Before another background the object's own pixels still tell which view it is.
        shape, view = next(
            (s, v) for s, v in self.views if torch.equal(v.image[:, v.mask], image[:, v.mask])
        )
        grid = (SIZE // PATCH, SIZE // PATCH)
        xy = patch_centers(grid, (SIZE, SIZE)).reshape(-1, 2).floor() + 0.5
        eye, d = rays_at(view.camera, view.cam_from_world, xy)
        z = shape_depth(shape, eye, d)
        points = eye + d * z[:, None]
        if shape == "sphere":
            normals = points / points.norm(dim=-1, keepdim=True)
        else:
            face = (points / HALF).abs().argmax(-1)
            normals = torch.nn.functional.one_hot(face, 3) * points.sign()
        rotation = view.cam_from_world[:3, :3].double()
        half = torch.stack([-HALF, HALF]) if shape == "box" else torch.tensor([[-0.5], [0.5]])
        eighth = torch.nn.functional.one_hot(octants(points, half.double().expand(2, 3)), 8)
        there = (z > 0).double()[:, None]
        columns = [z[:, None], normals @ rotation.mT, eighth]
        known = torch.cat([torch.cat(columns, 1) * there, there, torch.full_like(there, 7.0)], 1)
        return FeatureMap(known.mT.reshape(1, -1, *grid).float(), (SIZE, SIZE))


def opened(root: Path, name: str, *changes: str) -> ProbeData:
    data = PROBES.open(root, find_protocol(PROBES, f"probe/{name}", changes))
    assert isinstance(data, ProbeData)
    return data


def means(data: ProbeData, model: Dense, items: Sequence[int] = (0, 1)) -> dict[str, float]:
    source = FeatureSource(model, data.protocol.features)
    rows = [row for i in items for row in data.score(i, data.predict(i, source))]
    columns = {
        m.name: torch.tensor([r.values[m.name] for r in rows]) for m in data.protocol.metrics
    }
    return {name: float(column.nanmean()) for name, column in columns.items()}


def raw_vit() -> FeatureExtractor:
    return build_extractor(MODEL, "random", lora_blocks=0).eval()


@pytest.mark.parametrize(
    ("name", "best", "chance"),
    [
        ("depth", {"RMSE": (0.0, 0.5), "R² aligned": (99.9, 100.0)}, {"R² aligned": (0.0, 20.0)}),
        (
            "normals",
            {"mean angle": (0.0, 1.0), "within 11.25°": (99.9, 100.0)},
            {"mean angle": (25.0, 70.0), "within 11.25°": (0.0, 20.0)},
        ),
        ("segmentation", {"mIoU": (100.0, 100.0)}, {"mIoU": (20.0, 50.0)}),
        # the box of what is seen is not quite the shape's own
        ("parts", {"mIoU": (95.0, 100.0), "accuracy": (98.0, 100.0)}, {"mIoU": (0.0, 20.0)}),
    ],
)
def test_features_that_know_are_perfect_and_random_ones_are_at_chance(
    root: Path, name: str, best: dict[str, Any], chance: dict[str, Any]
) -> None:
    data = opened(root, name)
    for model, expected in ((Knowing(root), best), (RandomFeatures(patch=PATCH), chance)):
        found = means(data, model)
        for metric, (low, high) in expected.items():
            assert low <= found[metric] <= high, (metric, found)


def test_the_probe_is_fitted_to_training_objects_alone_and_once_a_model(root: Path) -> None:
    asked: list[int] = []

    class Counted(Knowing):
        def dense(self, images: Tensor, resolution: int | None = None) -> FeatureMap:
            asked.append(1)
            return super().dense(images, resolution)

    data = opened(root, "depth", "train_views=3", "val_views=4")
    assert isinstance(data, LinearProbe)
    source = FeatureSource(Counted(root), data.protocol.features)
    last = data.predict(1, source)
    assert len(asked) == 2 * 3 + 4
    data.predict(0, source)
    assert len(asked) == 2 * 3 + 4 + 4
    assert last["true"].shape == (int(last["counts"].sum()), 1)
    # another process, another order: the same to the bit
    again = opened(root, "depth", "train_views=3", "val_views=4")
    other = FeatureSource(Knowing(root), data.protocol.features)
    again.predict(0, other)
    assert torch.equal(again.predict(1, other)["predicted"], last["predicted"])


def test_views_are_drawn_by_seed_and_name(root: Path) -> None:
    def drawn(*changes: str) -> dict[str, tuple[int, ...]]:
        data = opened(root, "depth", "train_views=3", "val_views=2", *changes)
        return {obj.name: obj.numbers for obj in (*data.train, *data.val)}

    first = drawn()
    assert [len(n) for n in first.values()] == [3, 3, 2, 2]
    assert drawn() == first
    assert drawn("seed=1") != first
    one = drawn("val_objects=1")
    assert len(one) == 3
    assert one.items() <= first.items()


def normalised(view: View) -> Tensor:
    rotation = view.cam_from_world[:3, :3].double()
    eye, d = rays_at(view.camera, view.cam_from_world, _centers())
    points = eye + d * shape_depth("sphere", eye, d)[:, None]
    normals: Tensor = points / points.norm(dim=-1, keepdim=True)
    return normals @ rotation.mT


def _centers() -> Tensor:
    return patch_centers((SIZE, SIZE), (SIZE, SIZE)).reshape(-1, 2)


def test_normals_are_those_of_the_sphere_and_stop_at_jumps(root: Path) -> None:
    view = open_views(root / "val" / "globe")[0].view(0)
    normals, valid = surface_normals(view)
    cosine = (normals.reshape(-1, 3) * normalised(view)).sum(-1).clamp(-1, 1)
    angles = torch.rad2deg(torch.acos(cosine))[valid.reshape(-1)]
    assert 0.5 * int(view.mask.sum()) < int(valid.sum()) < int(view.mask.sum())
    assert float(angles.max()) < 1.5
    assert float(normals[..., 2][valid].max()) < 0.0, "normals look at the camera"
    # a step between two frontal planes: both sides of it are left out, and nothing else
    depth = torch.full((SIZE, SIZE), 2.0)
    depth[:, 40:] = 2.1
    step = view._replace(depth=depth, mask=torch.ones_like(view.mask))
    _, valid = surface_normals(step)
    columns = valid[1:-1].all(0)
    assert (~columns).nonzero()[:, 0].tolist() == [0, 39, 40, SIZE - 1]


def test_ridge_from_sums_equals_ridge_from_rows() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=g).double() * torch.tensor([1e3, 1, 1e-3, 1, 0]) + 50.0
    y = torch.randn(200, 2, generator=g).double() + x[:, :2]
    both = Moments()
    both.add(x[:120], y[:120])
    both.add(x[120:], y[120:])
    z = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-9)
    z[:, 4] = 0.0  # the constant channel
    w = torch.linalg.solve(z.mT @ z / 200 + 0.1 * torch.eye(5), z.mT @ (y - y.mean(0)) / 200)
    probe = _solve(both, 2, 0.1)
    torch.testing.assert_close(probe(x), z @ w + y.mean(0), rtol=1e-6, atol=0)
    direct = (probe(x) - y).square().mean(0).sum()
    torch.testing.assert_close(_error(probe, both, 2), direct, rtol=1e-6, atol=0)


def test_the_penalty_is_chosen_on_held_out_groups() -> None:
    assert [i for i in range(9) if is_held_out(i, 9)] == [3, 7]
    assert [i for i in range(3) if is_held_out(i, 3)] == [2]
    g = torch.Generator().manual_seed(0)

    def moments(noise: float) -> Moments:
        out = Moments()
        x = torch.randn(60, 40, generator=g)
        out.add(x, x[:, :1] + noise * torch.randn(60, 1, generator=g))
        return out

    assert fit_probe(moments(0.0), moments(0.0), 1).penalty == PENALTIES[0]
    assert fit_probe(moments(9.0), moments(9.0), 1).penalty >= 10.0
    with pytest.raises(EvalDataError, match="no patch of the object"):
        fit_probe(moments(0.0), Moments(), 1)
    with pytest.raises(RecipeError, match="not finite"):
        Moments().add(torch.full((2, 2), torch.nan), torch.zeros(2, 1))


def test_alignment_takes_the_best_scale_and_shift(root: Path) -> None:
    data = opened(root, "depth")
    assert isinstance(data, DepthProbe)
    true = torch.tensor([[1.0], [2.0], [4.0]]).double()
    scaled = data.values(5.0 + 2.0 * true, true)
    assert scaled["RMSE aligned"] == pytest.approx(0.0, abs=1e-9)
    assert scaled["R² aligned"] == pytest.approx(100.0)
    upside_down = data.values(5.0 - 2.0 * true, true)
    assert upside_down["R² aligned"] == pytest.approx(0.0, abs=1e-9)
    flat = data.values(torch.full_like(true, 3.0), true)
    assert flat["R² aligned"] == pytest.approx(0.0, abs=1e-9)
    assert flat["RMSE aligned"] == pytest.approx(100 * float(true.std(correction=0)))
    assert flat["RMSE"] == pytest.approx(100 * (6.0 / 3.0) ** 0.5)


def test_backgrounds_are_drawn_and_the_object_stays(root: Path, tmp_path: Path) -> None:
    data = opened(root, "segmentation")
    assert isinstance(data, SegmentationProbe)
    obj, shown = data.val[0], []
    for number in obj.numbers[:3]:
        view = obj.view(number)
        image = data.shown(data.val, 0, number, view)
        assert torch.equal(image[:, view.mask], view.image[:, view.mask])
        assert torch.equal(image, data.shown(data.val, 0, number, view))
        shown.append(image[:, ~view.mask])
        assert float((shown[-1] == 0).all(0).double().mean()) < 0.5, "the background is black"
    other = data.val[1].view(data.val[1].numbers[0])
    window = cut_clutter(other, numpy_generator(0))
    assert window.shape == (3, SIZE, SIZE)
    assert float(window.mean()) > float(other.image.mean()), "nearer than in the view itself"
    files = tmp_path / "data"
    shutil.copytree(root, files)
    with pytest.raises(RecipeError, match=r"backgrounds' is neither .* nor a folder with images"):
        opened(root, "segmentation", "background=files")
    (files / "backgrounds").mkdir()
    shutil.copy(root / "val" / "globe" / "color_000000.png", files / "backgrounds" / "a.png")
    theirs = opened(files, "segmentation", "background=files")
    assert theirs.data_hash != data.data_hash
    assert means(theirs, Knowing(root), (0,))["mIoU"] == 100.0


def test_overlap_and_rank_correlation() -> None:
    own, raw = torch.tensor([0.9, 0.8, 0.1, 0.2]), torch.tensor([0.9, 0.1, 0.8, 0.2])
    assert overlap(own, raw, 2) == 50.0
    assert overlap(own, own, 3) == 100.0
    assert overlap(own, own, 4) != overlap(own, own, 4), "all of four are no choice"
    assert spearman(own, own**3) == pytest.approx(1.0)
    assert spearman(own, -own) == pytest.approx(-1.0)
    # ties share ranks 1.5 and 3.5: 4 / sqrt(4 * 5)
    tied = torch.tensor([1.0, 1.0, 2.0, 2.0]).double()
    assert spearman(tied, torch.arange(4).double()) == pytest.approx(0.8**0.5)


def test_ranking_compares_with_the_models_own_raw_vit(root: Path) -> None:
    data = opened(root, "ranking", "neighbours=4")
    kept = {"overlap": 100.0, "overlap other objects": 100.0, "Spearman": pytest.approx(100.0)}
    assert means(data, raw_vit()) == kept
    tuned = build_extractor(MODEL, "random", head="residual", lora_blocks=2).eval()
    assert means(data, tuned) == kept, "an untrained adapter changes nothing"
    assert tuned.adapter is not None
    randomize(tuned.adapter)
    found = means(data, tuned)
    assert found["overlap"] < 100.0
    assert found["Spearman"] < 99.9
    shared = SharedTrunk(tuned, SharedTokens(), tuned)
    assert means(data, shared) == pytest.approx(found, abs=1e-3)
    with pytest.raises(RecipeError, match="no raw ViT"):
        means(data, RandomFeatures())


def test_an_interrupted_run_ends_as_an_unbroken_one(root: Path, tmp_path: Path) -> None:
    protocol = find_protocol(PROBES, "probe/normals", ["train_views=2", "val_views=3"])
    model = raw_vit()

    def rows(cache: Path | None, limit: int | None = None) -> Any:
        opened = OpenModel(model, "tiny")
        specs = [ModelSpec("raw", ("raw",))]
        result = evaluate(
            PROBES, protocol, root, specs, lambda word: opened, cache=cache, limit=limit
        )
        assert result is not None
        return result.models[0].rows

    whole = rows(None)
    assert {row.unit for row in whole[0]} == {"crate", "globe"}
    rows(tmp_path, limit=1)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert rows(tmp_path) == whole


@pytest.mark.parametrize("name", ["depth", "ranking"])
def test_the_command(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    views = ["--protocol", f"probe/{name}", "--set", "val_views=6"]
    words = ["evaluate", "probes", "--data", str(root), "--model", MODEL, *views]
    run([*words, "--weights", "random", "--device", "cpu"])
    text = capsys.readouterr().out
    assert f"probe/{name}+val_views=6" in text
    assert {"depth": "RMSE aligned [%] ↓", "ranking": "100.00 [100.00, 100.00]"}[name] in text
    run(["data", "probes", "--check", str(root), "--protocol", f"probe/{name}"])
    assert "views of val taken: 12" in capsys.readouterr().out


def test_links_to_folders_count_and_overlap_is_refused(root: Path, tmp_path: Path) -> None:
    linked, copied = tmp_path / "linked", tmp_path / "copied"
    linked.mkdir()
    shutil.copytree(root, copied)
    for split in ("train", "val"):
        (linked / split).symlink_to(copied / split)
    before = opened(linked, "depth").data_hash
    assert before == opened(root, "depth").data_hash
    picture = copied / "val" / "globe" / "color_000000.png"
    picture.write_bytes(picture.read_bytes() + b" ")
    assert opened(linked, "depth").data_hash != before
    shutil.copytree(copied / "val" / "globe", copied / "train" / "globe")
    with pytest.raises(EvalDataError, match=r"globe is in train/ and in val/ \(1 such"):
        opened(copied, "depth")


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("depth", ["train_objects=1"], "train: 1 object, but at least 2"),
        ("depth", ["val_views=0"], "val_views=0 must be at least 1"),
        ("segmentation", ["val_objects=1"], "val: 1 object, but at least 2"),
        ("parts", ["val_views=3"], "3 views are taken, but parts need at least 4"),
        ("ranking", ["val_views=5"], "10 views are taken, too few to compare 10 neighbours"),
        ("ranking", ["neighbours=0"], "neighbours=0 must be at least 1"),
    ],
)
def test_too_little_is_refused(root: Path, name: str, changes: list[str], match: str) -> None:
    with pytest.raises(EquifeatError, match=match) as caught:
        opened(root, name, *changes)
    assert "\n" not in str(caught.value)


def test_a_folder_without_splits_says_how_it_must_look(root: Path) -> None:
    with pytest.raises(EvalDataError, match=r"no such folder.*must hold train/ and val/"):
        opened(root / "val", "depth")


def test_views_that_show_nothing_say_nothing(root: Path) -> None:
    data = opened(root, "depth")
    few = {"views": torch.tensor([2]), "counts": torch.tensor([9])}
    rows = data.score(0, {**few, "predicted": torch.zeros(9, 1), "true": torch.zeros(9, 1)})
    assert [row.values["RMSE"] == row.values["RMSE"] for row in rows] == [False]

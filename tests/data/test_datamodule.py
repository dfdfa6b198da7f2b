"""The order of draws: equal for any number of workers, disjoint across ranks, exact on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from equifeat.data.augment import Augment
from equifeat.data.batch import PairBatch, collate_pairs
from equifeat.data.datamodule import DrawSampler, PairDataModule
from equifeat.data.pairs import PairSource
from equifeat.data.views import open_views
from equifeat.errors import ImageError, RecipeError, ViewsError
from equifeat.geometry.camera import transform
from tests.synthetic import write_views

# Torch only knows the machine's cores; that draws are equal for 4 workers must hold on 2 cores too.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning",
    "ignore:.*does not have many workers.*",
    "ignore:.*number of training batches.*",
    "ignore:Checkpoint directory .* exists and is not empty",  # of course, when resuming
    "ignore:.*LeafSpec.*:FutureWarning",  # pytorch_lightning.utilities._pytree with torch 2.15
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("views")
    write_views(root / "sphere", "sphere", views=4, size=64)
    write_views(root / "box", "box", views=4, size=64)
    return root


def module(folder: Path, **options: Any) -> PairDataModule:
    return PairDataModule(folder, **{"num_keypoints": 40, "draws_per_epoch": 12, **options})


def tensors(batch: PairBatch) -> list[Tensor]:
    out: list[Tensor] = []
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            out.append(value)
        elif isinstance(value[0], Tensor):
            out.extend(value)
    return out


def test_the_batch_holds_what_the_pairs_hold(folder: Path) -> None:
    source = PairSource(open_views(folder), 4, num_keypoints=50, augment=Augment())
    pairs = [source.draw(i) for i in range(3)]
    batch = collate_pairs(pairs)
    assert len(batch) == 3
    assert batch.images0.shape == (3, 3, 64, 64)
    assert batch.masks1.shape == batch.depths1.shape == (3, 64, 64)
    assert batch.cam1_from_cam0.shape == (3, 4, 4)
    for i, pair in enumerate(pairs):
        assert torch.equal(batch.images1[i], pair.image1)
        assert torch.equal(batch.keypoints0[i], pair.keypoints0)
        assert torch.equal(batch.points3d1[i], pair.points3d1)
        assert batch.keys0[i] == pair.key0
        assert batch.draws[i] == i
        assert (batch.versions0[i], batch.versions1[i]) == (pair.version0, pair.version1)
        assert batch.augmented[i] == (pair.version0 != 0 or pair.version1 != 0)
        assert torch.equal(batch.camera1(i).K, pair.camera1.K)
        assert batch.camera0(i).size_hw == (64, 64)
    moved = batch.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(moved), strict=True))
    on_meta = batch.to("meta", non_blocking=True)
    assert all(tensor.is_meta for tensor in tensors(on_meta))
    assert on_meta.object_names == batch.object_names


def test_views_of_two_sizes_do_not_make_a_batch(folder: Path, tmp_path: Path) -> None:
    small = PairSource(open_views(write_views(tmp_path / "s", views=4, size=48)), num_keypoints=40)
    large = PairSource(open_views(folder), num_keypoints=40)
    with pytest.raises(ViewsError, match=r"\(64, 64\).*\(48, 48\).*batch_size=1"):
        collate_pairs([large.draw(0), small.draw(0)])


def test_any_number_of_workers_gives_the_same_batches(folder: Path) -> None:
    def batches(workers: int) -> list[PairBatch]:
        data = module(folder, num_workers=workers, batch_size=2, background="noise")
        return list(data.train_dataloader())

    none, four = batches(0), batches(4)
    assert [batch.draws for batch in none] == [[2 * i, 2 * i + 1] for i in range(6)]
    for a, b in zip(none, four, strict=True):
        assert a.draws == b.draws
        assert a.keys0 == b.keys0
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_ranks_are_disjoint_and_epochs_differ(folder: Path) -> None:
    source = PairSource(open_views(folder), length=26)
    seen: list[int] = []
    for epoch in range(3):
        for rank in range(4):
            sampler = DrawSampler(source, batch_size=2, num_replicas=4, rank=rank)
            sampler.set_epoch(epoch)
            draws = list(sampler)
            assert len(draws) == len(sampler) == 6
            seen += draws
    # 26 draws are three batches of two on four ranks: all draws of the run, each once.
    assert sorted(seen) == list(range(3 * 24))
    fixed = DrawSampler(source, batch_size=2, fixed=True)
    first = list(fixed)
    fixed.set_epoch(1)
    assert list(fixed) == first
    with pytest.raises(RecipeError, match="26 draws an epoch are less than one batch of 16"):
        DrawSampler(source, batch_size=16, num_replicas=2)


def test_validation_pairs_are_fixed_and_others_than_those_of_training(folder: Path) -> None:
    data = module(folder, val_views=folder, val_draws=4)
    loader = data.val_dataloader()
    first, second = list(loader), list(loader)
    assert len(first) == 4
    assert not any(flag for batch in first for flag in batch.augmented)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    trained = next(iter(module(folder, augment=False).train_dataloader()))
    assert not (
        trained.keys0 == first[0].keys0
        and trained.keys1 == first[0].keys1
        and torch.equal(trained.keypoints0[0], first[0].keypoints0[0])
    )


class Recorder(pl.LightningModule):
    """Notes the draws it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.seen: list[int] = []

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        self.seen += batch.draws
        loss: Tensor = self.layer(batch.keypoints0[0] / 64).mean()
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        assert not any(batch.augmented)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(data: PairDataModule, root: Path, ckpt: Path | None = None, **options: Any) -> list[int]:
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            pl.callbacks.ModelCheckpoint(
                root / "first",
                "{step}",
                every_n_train_steps=1,
                save_top_k=-1,
            )
        ],
        **options,
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return recorder.seen


@pytest.mark.parametrize(("stop", "workers"), [(2, 0), (3, 0), (5, 0), (6, 0), (5, 2), (6, 2)])
def test_a_resumed_run_makes_the_same_draws(
    folder: Path, tmp_path: Path, stop: int, workers: int
) -> None:
    """Three batches of two an epoch: stops lie within epochs and at their ends."""

    def data() -> PairDataModule:
        return module(folder, batch_size=2, draws_per_epoch=6, num_workers=workers)

    first = fit(data(), tmp_path, max_steps=stop)
    assert first == list(range(2 * stop))
    rest = fit(data(), tmp_path, tmp_path / "first" / f"step={stop}.ckpt", max_steps=13)
    assert rest == list(range(2 * stop, 26))


def test_resuming_with_accumulation_and_validation_inside_an_epoch(
    folder: Path, tmp_path: Path
) -> None:
    def data() -> PairDataModule:
        return module(folder, draws_per_epoch=8, val_views=folder, val_draws=2)

    options: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 4}
    assert fit(data(), tmp_path, max_steps=3, **options) == list(range(6))
    rest = fit(data(), tmp_path, tmp_path / "first" / "step=3.ckpt", max_steps=9, **options)
    assert rest == list(range(6, 18))


def test_resuming_with_another_batch_size_repeats_and_skips_nothing(
    folder: Path, tmp_path: Path
) -> None:
    fit(module(folder, batch_size=1), tmp_path, max_steps=3)
    rest = fit(
        module(folder, batch_size=2), tmp_path, tmp_path / "first" / "step=3.ckpt", max_steps=5
    )
    assert rest == [3, 4, 5, 6]


def test_limited_epochs_go_on_where_the_last_one_stopped(folder: Path, tmp_path: Path) -> None:
    seen = fit(module(folder), tmp_path, max_epochs=3, limit_train_batches=2)
    assert seen == list(range(6))


def test_an_error_in_a_worker_is_not_swallowed(folder: Path, tmp_path: Path) -> None:
    write_views(tmp_path / "sphere", "sphere", views=4, size=64)
    data = PairDataModule(tmp_path, num_workers=1, num_keypoints=40)
    loader = data.train_dataloader()
    for file in tmp_path.glob("*/color_*.png"):
        file.write_text("not an image")
    with pytest.raises(ImageError, match="not a readable image") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_wrong_options_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="batch_size is 0"):
        PairDataModule(folder, batch_size=0)
    with pytest.raises(ViewsError, match="no such folder"):
        PairDataModule(tmp_path / "absent").setup("fit")
    with pytest.raises(RecipeError, match=r"set data\.val_views"):
        PairDataModule(folder).val_dataloader()


def test_a_recipe_builds_it_from_plain_arguments(folder: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PairDataModule, "data")

    def build(*arguments: str) -> PairDataModule:
        config = parser.parse_args([f"--data.views={folder}", *arguments])
        made: PairDataModule = parser.instantiate(config).data
        return made

    assert build().augment == Augment()
    assert build("--data.augment=false").augment is None
    assert build("--data.augment.rotate_deg=10").augment == Augment(rotate_deg=10.0)
    turned = build("--data.augment={affine_p: 1.0}", "--data.seed=4", "--data.background=noise")
    assert turned.augment == Augment(affine_p=1.0)
    assert turned.seed == 4


def test_keypoints_project_through_the_batch_cameras(folder: Path) -> None:
    batch = next(iter(module(folder, batch_size=2, augment=Augment(1.0)).train_dataloader()))
    views = {found.name: found for found in open_views(folder)}
    for i in range(2):
        name, index = batch.keys1[i]
        points = transform(views[name].cam_from_world[index], batch.points3d1[i])
        xy = batch.camera1(i).project(points)
        assert float((xy - batch.keypoints1[i]).norm(dim=-1).max()) < 1e-3

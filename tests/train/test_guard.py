"""A step that is not finite changes nothing, is counted on all ranks, and too many stop the run."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor

from equifeat.cli import run
from equifeat.data.batch import PairBatch
from equifeat.data.datamodule import PairDataModule
from equifeat.errors import TrainingError
from equifeat.train.checkpoints import read_checkpoint
from equifeat.train.cli import quiet
from equifeat.train.guard import NonFiniteGuard
from equifeat.train.loggers import read_metrics
from equifeat.train.module import EquivariantFinetune
from equifeat.train.run_checkpoint import RunCheckpoint
from tests.synthetic import write_views
from tests.train.runs import SERVER
from tests.train.test_fit import recipe

BACKBONE = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard_views")
    write_views(folder / "box", "box", views=6, size=96)
    return folder


class Poisoned(EquivariantFinetune):
    """Some draws have a loss, or only a gradient, that is not finite."""

    def __init__(self, losses: set[int] = frozenset(), grads: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        super().__init__(BACKBONE, weights="random", lr=1e-3)
        self.losses, self.grads = losses, grads
        self.seen: list[dict[str, Tensor]] = []
        self.moments: list[Any] = []

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.losses & set(batch.draws):
            return loss * math.inf
        if self.grads & set(batch.draws):
            weight = next(iter(self.extractor.trainable_parameters().values()))
            # sqrt has an infinite slope at 0, and 0 * inf is NaN.
            return loss + (weight * 0).abs().sqrt().sum()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append({name: value.clone() for name, value in self.state_dict().items()})
        state = self.optimizers().optimizer.state_dict()["state"]  # type: ignore[union-attr]
        self.moments.append({k: {n: v.clone() for n, v in s.items()} for k, s in state.items()})


def fit(
    module: EquivariantFinetune,
    views: Path,
    guard: NonFiniteGuard,
    steps: int,
    callbacks: list[pl.Callback] | None = None,
    ckpt: Path | None = None,
    batch_size: int = 1,
    **options: Any,
) -> pl.Trainer:
    with quiet():
        trainer = pl.Trainer(
            max_steps=steps,
            logger=False,
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            callbacks=[guard, *(callbacks or [])],
            **{"accelerator": "cpu", "devices": 1, **options},
        )
        data = PairDataModule(
            views, num_keypoints=64, augment=False, draws_per_epoch=100, batch_size=batch_size
        )
        trainer.fit(module, data, ckpt_path=str(ckpt) if ckpt else None)
    return trainer


def same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(same(a[k], b[k]) if isinstance(a[k], dict) else torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["losses", "grads"])
def test_the_step_is_skipped_and_the_draw_named(
    views: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    module, guard = Poisoned(**{kind: {2}}), NonFiniteGuard()
    fit(module, views, guard, steps=4)
    assert guard.skipped == 1
    weights, moments = module.seen, module.moments
    assert not same(weights[0], weights[1])
    assert same(weights[1], weights[2])
    assert same(moments[1], moments[2])
    assert not same(weights[2], weights[3])
    assert all(bool(w.isfinite().all()) for w in weights[3].values())
    [line] = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    what = "loss" if kind == "losses" else "gradient"
    assert line == f"step 2 skipped: its {what} is not finite, draw 2 (box); 1 of at most 10"


def test_a_step_of_several_batches_is_skipped_as_a_whole(
    views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, guard = Poisoned(losses={2}), NonFiniteGuard()
    fit(module, views, guard, steps=3, accumulate_grad_batches=2)
    assert guard.skipped == 1
    assert same(module.seen[1], module.seen[3])  # batches 2 and 3 are one step
    assert not same(module.seen[3], module.seen[5])
    assert "step 1 skipped: its loss is not finite, draw 2 (box);" in capsys.readouterr().err


def test_too_many_stop_the_run_and_resuming_goes_on_counting(views: Path, tmp_path: Path) -> None:
    guard = NonFiniteGuard(max_skipped=1)
    saving = RunCheckpoint(tmp_path, every=3)
    with pytest.raises(
        TrainingError, match=r"step 4 .*draw 4 \(box\)\), after 1 skipped"
    ) as caught:
        fit(Poisoned({1, 4}), views, guard, steps=6, callbacks=[saving])
    assert "\n" not in str(caught.value)
    for remedy in ("model.lr", "trainer.precision", "run.max_skipped"):
        assert remedy in str(caught.value)
    path = tmp_path / "step=3.ckpt"
    assert read_checkpoint(path)["callbacks"]["NonFiniteGuard"] == {"skipped": 1}
    again = NonFiniteGuard(max_skipped=1)
    with pytest.raises(TrainingError, match="step 4"):
        fit(Poisoned({4}), views, again, steps=6, ckpt=path)
    patient = NonFiniteGuard(max_skipped=2)
    fit(Poisoned({4}), views, patient, steps=6, ckpt=path)
    assert patient.skipped == 2


def test_a_resumed_run_equals_the_unbroken_one(views: Path, tmp_path: Path) -> None:
    whole, broken = Poisoned({1, 4}), Poisoned({1, 4})
    fit(whole, views, NonFiniteGuard(), steps=6)
    fit(broken, views, NonFiniteGuard(), 3, callbacks=[RunCheckpoint(tmp_path, every=3)])
    resumed = Poisoned({1, 4})
    fit(resumed, views, NonFiniteGuard(), 6, ckpt=tmp_path / "step=3.ckpt")
    assert same(whole.seen[-1], resumed.seen[-1])
    assert same(whole.moments[-1], resumed.moments[-1])


def scaled(scale: float) -> MixedPrecision:
    """16-mixed with its GradScaler, in bfloat16: the CPU has no other."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", torch.bfloat16)  # type: ignore[method-assign]
    return plugin


def test_gradscaler_and_guard_work_together(views: Path) -> None:
    plugin = scaled(64.0)
    module, guard = Poisoned(losses={1}), NonFiniteGuard()
    fit(module, views, guard, steps=3, plugins=[plugin])
    assert guard.skipped == 1
    assert same(module.seen[0], module.seen[1])
    assert same(module.moments[0], module.moments[1])
    assert not same(module.seen[1], module.seen[2])
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 32.0


def test_overflow_is_the_scalers_until_its_scale_is_below_one(views: Path) -> None:
    """A scale of 4 falls to 2, 1 and 1/2 by itself; what overflows then is not for it."""
    plugin = scaled(4.0)
    module, guard = Poisoned(grads=set(range(9))), NonFiniteGuard(max_skipped=2)
    with pytest.raises(TrainingError, match="gradient of step 5"):
        fit(module, views, guard, steps=9, plugins=[plugin])
    assert guard.skipped == 3
    assert same(module.seen[0], module.seen[4])


def rank_process(
    rank: int, port: int, views: str, answers: Any, poison: set[int], log: str
) -> None:
    """One of two ranks: they must decide alike, though only one of them sees the bad draw."""
    import os

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    os.environ.update({k: str(v) for k, v in {**environment, "LOCAL_RANK": rank}.items()})
    os.environ.update({"RANK": str(rank), "NODE_RANK": "0"})
    torch.set_num_threads(1)
    module, guard = Poisoned(losses=poison), NonFiniteGuard()
    fit(module, Path(views), guard, steps=3, devices=2, strategy="ddp")
    answers.put((rank, guard.skipped, [{k: v.tolist() for k, v in s.items()} for s in module.seen]))


def test_two_ranks_skip_together(views: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = SERVER.Queue()
    # Draws 2 and 3 are step 1; rank 1 makes draw 3.
    log = tmp_path / "log"
    arguments = [(rank, port, str(views), answers, {3}, str(log)) for rank in range(2)]
    processes = [SERVER.Process(target=rank_process, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    assert [skipped for _, skipped, _ in found] == [1, 1]
    first, second = (seen for _, _, seen in found)
    assert first == second
    assert first[0] == first[1] != first[2]
    lines = [line for line in log.read_text().splitlines() if "skipped" in line]
    assert lines == ["step 1 skipped: its loss is not finite, draw 3 (box); 1 of at most 10"]


def test_a_real_run_logs_the_count(
    views: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Tensor] = EquivariantFinetune.training_step

    def step(self: EquivariantFinetune, batch: PairBatch, batch_idx: int) -> Tensor:
        return real(self, batch, batch_idx) * (math.nan if 3 in batch.draws else 1.0)

    monkeypatch.setattr(EquivariantFinetune, "training_step", step)
    path = str(recipe(tmp_path, views))
    run(["fit", "--config", path, "--trainer.max_steps", "5", "--run.max_skipped", "1"])
    rows = read_metrics(tmp_path / "run")
    assert [row["train/skipped"] for row in rows if row["train/loss"]] == ["", "", "", "1.0", "1.0"]
    monkeypatch.setattr(EquivariantFinetune, "training_step", lambda *args: real(*args) * math.nan)
    with pytest.raises(TrainingError, match=r"run\.max_skipped"):
        run(["fit", "--config", path, "--trainer.max_steps", "9", "--run.max_skipped", "1"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_16_mixed_on_a_gpu(views: Path) -> None:
    module, guard = Poisoned(losses={2}), NonFiniteGuard()
    options: Any = {"accelerator": "gpu", "precision": "16-mixed"}
    fit(module, views, guard, 4, **options)
    assert guard.skipped == 1
    assert same(module.seen[1], module.seen[2])

"""Damaged checkpoints, changed recipes, two runs in a folder, full disks, logs, random numbers."""

from __future__ import annotations

import random
import resource
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from equifeat.cli import run as equifeat
from equifeat.data.augment import Augment
from equifeat.data.datamodule import PairDataModule
from equifeat.errors import CheckpointError, EquifeatError, RecipeError
from equifeat.train.checkpoints import checkpoints, latest_checkpoint, read_checkpoint
from equifeat.train.cli import quiet
from equifeat.train.loggers import RunCsv, cut_metrics, read_metrics, run_loggers
from equifeat.train.module import EquivariantFinetune
from equifeat.train.run_folder import check_recipe, find_start, run_callbacks
from equifeat.train.signals import signals_restored
from tests.train import runs

# In this process and without workers: a fit is a second.
PLAIN: dict[str, dict[str, Any]] = {
    "data": {"num_workers": 0},
    "model": {"schedule": "constant"},
    "trainer": {"max_steps": 6},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, views: Path) -> Path:
    folder = tmp_path_factory.mktemp("done")
    equifeat(["fit", "--config", str(runs.recipe(folder, views, **PLAIN))])
    return folder / "run/checkpoints"


@pytest.mark.parametrize(
    "trainer",
    [{}, {"val_check_interval": 3}, {"accumulate_grad_batches": 2}],
    ids=["plain", "validation", "accumulation"],
)
def test_resuming_at_ends_of_epochs_counts_as_the_unbroken_run(
    tmp_path: Path, views: Path, trainer: dict[str, Any]
) -> None:
    changes = {**PLAIN, "run": {"save_every": 4}, "trainer": {"max_steps": 16, **trainer}}
    if "val_check_interval" in trainer:
        # The last step of every start is one with a validation, or the end of an epoch.
        changes["data"] = {"num_workers": 0, "val_views": str(views), "val_draws": 2}
    whole = runs.recipe(tmp_path / "whole", views, **changes)
    broken = runs.recipe(tmp_path / "broken", views, **changes)
    for steps in (4, 7, 9, 14, 16):
        equifeat(["fit", "--config", str(broken), f"--trainer.max_steps={steps}"])
    equifeat(["fit", "--config", str(whole)])
    one, other = tmp_path / "whole/run", tmp_path / "broken/run"
    for folder in (one, other):  # they saved at other steps on the way
        for path in checkpoints(folder / "checkpoints")[:-1]:
            path.unlink()
    runs.assert_same_run(one, other, checked=True)
    rows = read_metrics(one)
    assert [int(row["step"]) for row in rows] == list(range(16))
    if "val_check_interval" in trainer:
        assert sum(bool(row["val/loss"]) for row in rows) >= 4


def copy(done: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in checkpoints(done):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_last_two_are_kept_and_hold_trainable_weights_only(done: Path) -> None:
    assert sorted(path.name for path in done.iterdir()) == ["step=3.ckpt", "step=6.ckpt"]
    content = read_checkpoint(done / "step=6.ckpt")
    assert all(name.startswith(("adapter", "head")) for name in content["state_dict"])


def test_whatever_is_damaged_the_one_before_is_taken(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(done, tmp_path / "checkpoints")
    newest = folder / "step=6.ckpt"
    good = newest.read_bytes()
    chance = random.Random(0)
    for case in range(60):
        data = bytearray(good)
        if case % 2:
            del data[chance.randrange(len(data)) :]
        else:
            start = chance.randrange(len(data) - 64)
            data[start : start + 64] = bytes(64 * [data[start] ^ 0xFF])
        newest.write_bytes(data)
        found = latest_checkpoint(folder)
        assert found
        said = capsys.readouterr().err
        if found[0].name == "step=6.ckpt":  # the damage lies in padding: all values are right
            assert runs.same(found[1], read_checkpoint(done / "step=6.ckpt"))
        else:
            assert found[0].name == "step=3.ckpt"
            assert said.count("\n") == 1
            assert "step=6.ckpt is truncated or damaged" in said
            assert "going on from step=3.ckpt" in said
    newest.write_bytes(good[:100])
    (folder / "step=3.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step=6\.ckpt.*step=3\.ckpt.*backup") as caught:
        latest_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_from_the_one_before(
    tmp_path: Path, views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = runs.recipe(tmp_path, views, **PLAIN), tmp_path / "run"
    equifeat(["fit", "--config", str(path)])
    before = (
        runs.results(run),
        read_checkpoint(run / "checkpoints/step=6.ckpt"),
    )
    newest = run / "checkpoints/step=6.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    equifeat(["fit", "--config", str(path)])
    assert "going on from step=3.ckpt" in capsys.readouterr().err
    assert runs.results(run) == before[0]
    after = read_checkpoint(newest)
    assert runs.same(after["state_dict"], before[1]["state_dict"])
    assert runs.same(after["optimizer_states"], before[1]["optimizer_states"])
    # An explicit older one: what is newer is put aside, not mixed in.
    older = str(run / "checkpoints/step=3.ckpt")
    equifeat(["fit", "--config", str(path), "--ckpt_path", older, "--trainer.max_steps=4"])
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["step=3.ckpt", "step=4.ckpt"]
    assert (run / "checkpoints/step=6.ckpt.old").is_file()
    assert [int(row["step"]) for row in read_metrics(run)] == [0, 1, 2, 3]


def test_another_recipe_is_refused_by_name(tmp_path: Path, views: Path) -> None:
    path = runs.recipe(tmp_path, views, **PLAIN)
    command = ["fit", "--config", str(path)]
    equifeat([*command, "--trainer.max_steps=2"])
    for option, said in (
        ("--model.lr=0.5", r"model\.lr was 0\.001 and is 0\.5"),
        ("--data.batch_size=2", r"data\.batch_size was 1 and is 2"),
        ("--data.augment={rotate_deg: 3}", r"data\.augment was True and is \{.*3\.0"),
        ("--trainer.gradient_clip_val=3", r"trainer\.gradient_clip_val was 1\.0 and is 3"),
        ("--seed_everything=4", r"data\.seed was 3 and is 4, model\.seed was 3 and is 4"),
    ):
        with pytest.raises(RecipeError, match=said) as caught:
            equifeat([*command, option])
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="holds a run of 2 steps"):
        equifeat([*command, "--ckpt_path=null"])
    equifeat([*command, "--data.num_workers=1", "--run.save_every=9", "--trainer.max_steps=3"])
    equifeat([*command, "--model.lr=0.5", "--run.allow_changes=[model.lr]"])
    saved = read_checkpoint(checkpoints(tmp_path / "run/checkpoints")[-1])
    assert saved["recipe"]["model"]["lr"] == 0.5
    with pytest.raises(
        RecipeError, match=r"max_steps was 6 and is 8.*schedule|schedule.*max_steps"
    ):
        equifeat([*command, "--model.lr=0.5", "--model.schedule=cosine", "--trainer.max_steps=8"])


def test_ranges_of_augmentation_that_came_later_are_no_change() -> None:
    now = asdict(Augment(rotate_deg=3.0))
    then = {key: value for key, value in now.items() if key not in ("versions", "light")}
    check_recipe({"data": {"augment": then}}, {"data": {"augment": now}}, {})
    for key, value in (("versions", 2), ("rotate_deg", 4.0)):
        with pytest.raises(RecipeError, match=rf"data\.augment was .*'{key}': {value}"):
            check_recipe(
                {"data": {"augment": then}}, {"data": {"augment": {**now, key: value}}}, {}
            )


def test_two_fits_in_one_folder_are_refused(tmp_path: Path, views: Path) -> None:
    path = runs.recipe(tmp_path, views, **{**PLAIN, "trainer": {"max_steps": 100000}})
    process, _ = runs.fit(path)
    try:
        runs.wait_for(lambda: runs.logged(tmp_path / "run") >= 1, process)
        with pytest.raises(EquifeatError, match=rf"in use by another fit \(process {process.pid}"):
            equifeat(["fit", "--config", str(path)])
    finally:
        process.kill()
        process.join()
    # The lock went with its process.
    equifeat(["fit", "--config", str(path), "--trainer.max_steps=4"])


class SmallDisk:
    """Files above this size cannot be written; the system refuses as it does on a full disk."""

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # PlainProgress and the logs stay below; a checkpoint of this model has 500 kB.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, views: Path) -> None:
    path, folder = runs.recipe(tmp_path, views, **PLAIN), tmp_path / "run/checkpoints"
    equifeat(["fit", "--config", str(path), "--trainer.max_steps=3"])
    process, log = runs.fit(path, before=SmallDisk())
    process.join(60)
    text = log.read_text()
    assert process.exitcode == 1, text
    assert [p.name for p in folder.iterdir()] == ["step=3.ckpt"]
    last = text.strip().rsplit("\n", 1)[-1]
    assert last.startswith("equifeat: error: the checkpoint of step 6 cannot be written")
    assert "the one before is kept" in last
    equifeat(["fit", "--config", str(path)])
    assert [int(row["step"]) for row in read_metrics(tmp_path / "run")] == list(range(6))


def test_csv_rows_merge_grow_and_are_cut(tmp_path: Path) -> None:
    log = RunCsv(tmp_path)
    log.log_metrics({"lr": 0.5}, 0)
    log.log_metrics({"loss": 0.1 + 0.2}, 0)
    for step in range(1, 6):
        log.log_metrics({"watch": step}, step + 1)  # a callback that is a step ahead
        log.log_metrics({"lr": 0.5, "loss": float(step)}, step)
        log.log_metrics({"val": 1.0} if step == 3 else {}, step)
    log.log_metrics({"late": 7.0}, 1)  # no longer among the last rows
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [str(step) for step in range(7)]
    assert float(rows[0]["loss"]) == 0.1 + 0.2
    assert (rows[1]["late"], rows[3]["val"], rows[4]["val"], rows[6]["watch"]) == (
        "7.0",
        "1.0",
        "",
        "5",
    )
    file = tmp_path / "logs/metrics.csv"
    with file.open("a") as torn:
        torn.write("7,0.5,3")
    assert len(read_metrics(tmp_path)) == 7
    cut_metrics(tmp_path, 4)
    assert [row["step"] for row in read_metrics(tmp_path)] == ["0", "1", "2", "3"]
    resumed = RunCsv(tmp_path)
    resumed.log_metrics({"loss": 4.0}, 4)
    resumed.log_metrics({"lr": 1.0}, 4)
    assert read_metrics(tmp_path)[4] | {"late": ""} == {
        "step": "4", "lr": "1.0", "loss": "4.0", "watch": "", "val": "", "late": ""
    }  # fmt: skip


class Noise(pl.Callback):
    """Consumes all global random numbers, as another callback or a dropout might."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.log("torch", torch.rand(()).item())
        pl_module.log("numpy", np.random.rand())  # noqa: NPY002
        pl_module.log("python", random.random())


def noisy_fit(run: Path, views: Path, steps: int) -> None:
    torch.set_num_threads(1)
    start = find_start(run, "last")
    pl.seed_everything(1, verbose=False)
    with quiet(), signals_restored():
        pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            log_every_n_steps=1,
            val_check_interval=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=run,
            logger=run_loggers(run, start=start.step),
            callbacks=[Noise(), *run_callbacks(run, save_every=2)],
        ).fit(
            EquivariantFinetune(runs.BACKBONE, weights="random"),
            datamodule=PairDataModule(
                views, views, num_keypoints=60, draws_per_epoch=5, val_draws=2
            ),
            ckpt_path=start.checkpoint,
            weights_only=True,
        )


def test_global_random_numbers_go_on(tmp_path: Path, views: Path) -> None:
    # In other processes: beartype, which checks shapes in this one, uses Python's random numbers.
    runs.elsewhere(noisy_fit, tmp_path / "whole", views, 11)
    for steps in (3, 5, 11):
        runs.elsewhere(noisy_fit, tmp_path / "broken", views, steps)
    assert runs.results(tmp_path / "whole") == runs.results(tmp_path / "broken")
    for name in ("torch", "numpy", "python"):
        assert len({row[name] for row in read_metrics(tmp_path / "whole")}) == 11

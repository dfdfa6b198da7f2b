"""Held-out watching and the monitor in real fits: numbers, pictures, best model, early stop."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equifeat.checkpoint import load_model
from equifeat.cli import run
from equifeat.errors import EquifeatError, RecipeError
from equifeat.eval.equivariance_result import EquivarianceResult
from equifeat.eval.results import Results
from equifeat.model.extractor import build_extractor
from equifeat.train.checkpoints import checkpoints, read_checkpoint
from equifeat.train.loggers import read_metrics
from equifeat.train.watch_options import watch_options
from tests.helpers import ROOT
from tests.synthetic import write_views
from tests.train import runs

MACHINE = ("time/step_s", "time/pairs_per_s", "time/data_wait", "time/memory_gib")
RESULTS = ("train/loss", "train/ap", "train/positives", "train/grad_norm", "train/lr")
WATCHED = [
    f"watch/{who}{metric}"
    for who in ("", "raw/", "untrained/")
    for metric in ("ape", "pcdp@.05", "pcdp@.10", "pcdp@.20")
]


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    write_views(folder / "train/box", "box", views=5, size=64)
    for name in ("box", "sphere"):
        write_views(folder / "held_out" / name, name, 4, 64, object_name=f"held out {name}")
    return folder


def recipe(folder: Path, views: Path, watched: bool = True, **run_options: object) -> Path:
    options = {
        "watch_every": 2,
        "watch_views": str(views / "held_out"),
        "watch_pairs": 3,
        "watch_points": 50,
    }
    return runs.recipe(
        folder,
        views / "train",
        run={"save_every": 2, **(options if watched else {}), **run_options},
        model={"schedule": "constant", "warmup_steps": 0, "head": "conv"},
        data={"num_workers": 0, "draws_per_epoch": 5},
        trainer={"max_steps": 6},
    )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, views: Path) -> Path:
    """A watched run of 6 steps that logs to wandb too."""
    wandb = pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        run(["fit", "--config", str(recipe(folder, views, wandb_project="equifeat-test"))])
    wandb.finish()  # its own process writes the rest down
    return folder / "run"


def column(folder: Path, name: str) -> dict[int, float]:
    return {int(r["step"]): float(r[name]) for r in read_metrics(folder) if r.get(name)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = read_checkpoint(checkpoints(folder / "checkpoints")[-1])[
        "state_dict"
    ]
    return state


def test_every_value_is_in_the_log_and_makes_sense(watched: Path) -> None:
    for name in (*RESULTS, *MACHINE):
        values = column(watched, name)
        assert sorted(values) == list(range(6)), name
        assert all(math.isfinite(v) and v >= 0 for v in values.values()), name
    assert set(column(watched, "train/lr").values()) == {1e-3}
    assert all(0 <= v <= 1 for v in column(watched, "time/data_wait").values())
    step, rate = column(watched, "time/step_s"), column(watched, "time/pairs_per_s")
    assert all(step[k] * rate[k] == pytest.approx(1.0) for k in step)  # one pair a step
    assert all(0.05 < v < 100 for v in column(watched, "time/memory_gib").values())
    for name in WATCHED:
        control = "/raw/" in name or "/untrained/" in name
        values = column(watched, name)
        assert sorted(values) == ([0, 1, 3, 5] if control else [1, 3, 5]), name
        assert len(set(values.values())) == (1 if control else len(set(values.values())))
    # A random convolution differs from the raw ViT, and training moves the model.
    assert column(watched, "watch/raw/ape")[0] != column(watched, "watch/untrained/ape")[0]
    assert len(set(column(watched, "watch/ape").values())) > 1


def test_numbers_are_those_of_evaluate_equivariance(
    watched: Path, views: Path, tmp_path: Path
) -> None:
    config = json.loads((watched / "best/config.json").read_text())
    best, step = watched / "best", config["recipe"]["steps"]
    for name, model in ((f"step_{step:06d}", best), ("step_000006", watched / "model")):
        out = tmp_path / name
        command = ["evaluate", "equivariance", "--data", str(views / "held_out"), "--device", "cpu"]
        command += ["--set", "pairs=3", "points=50", "target_stride=2"]
        run([*command, "--model", str(model), "--out", str(out), "--pictures", "0"])
        ours = EquivarianceResult.from_json((watched / f"watch/{name}.json").read_text())
        (theirs,) = Results.from_json((out / "results.json").read_text()).tasks
        rows = theirs.models[0].rows[0]
        pairs = [(r.object_name, f"{r.view0}-{r.view1}") for r in ours.rows]
        assert pairs == [(r.item, r.part) for r in rows]
        for mine, row in zip(ours.rows, rows, strict=True):
            values = dict(zip(ours.metrics, mine.scores["now"], strict=True))
            assert values == pytest.approx(dict(row.values), rel=1e-6)
    logged = column(watched, "watch/pcdp@.10")
    assert logged[step - 1] == max(logged.values())
    assert config["recipe"]["held_out"]["this model"]["PCDP@.10"] == logged[step - 1]
    card = (best / "README.md").read_text()
    assert "| raw |" in card
    assert "| untrained |" in card
    assert "| now |" in card
    # The controls are a raw and a fresh model, whatever the run did to its own.
    controls = EquivarianceResult.from_json((watched / "watch/controls.json").read_text())
    fresh = load_model(best)
    untrained = build_extractor(fresh.backbone, head="conv", seed=3)
    again = equifeat_values(views, {"raw": fresh.raw(), "untrained": untrained.eval()})
    for name in ("raw", "untrained"):
        assert torch.equal(controls.object_values(name), again.object_values(name))


def equifeat_values(views: Path, models: dict[str, object]) -> EquivarianceResult:
    from equifeat.data.views import open_views
    from equifeat.eval.equivariance import evaluate_equivariance

    held_out = open_views(views / "held_out")
    return evaluate_equivariance(models, held_out, pairs=3, points=50)  # type: ignore[arg-type]


def test_pictures_and_values_reach_tensorboard_and_files(watched: Path) -> None:
    events = EventAccumulator(str(watched / "logs"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {*RESULTS, *MACHINE, *WATCHED} <= set(tags["scalars"])
    values = {e.step: e.value for e in events.Scalars("watch/pcdp@.10")}
    assert values == pytest.approx(column(watched, "watch/pcdp@.10"))
    pictures = events.Images("watch/picture")
    assert [p.step for p in pictures] == [1, 3, 5]
    for step in (2, 4, 6):
        with Image.open(watched / f"watch/step_{step:06d}.png") as picture:
            assert picture.size == (pictures[0].width, pictures[0].height)
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 50


def test_pictures_and_values_reach_wandb_offline(watched: Path) -> None:
    from equifeat.train.wandb_files import offline_rows

    (start,) = (watched / "wandb").glob("offline-run-*")
    assert len(list((start / "files/media/images/watch").glob("picture_*.png"))) == 3
    rows = [row for file in start.glob("run-*.wandb") for row in offline_rows(file)]
    names = {name for row in rows for name in row}
    assert {*RESULTS, *MACHINE, *WATCHED} <= names
    found = {
        int(r["trainer/global_step"]): r["watch/pcdp@.10"] for r in rows if "watch/pcdp@.10" in r
    }
    assert found == pytest.approx(column(watched, "watch/pcdp@.10"))


def test_watching_changes_no_training(watched: Path, views: Path, tmp_path: Path) -> None:
    run(["fit", "--config", str(recipe(tmp_path, views, watched=False))])
    mine, theirs = weights(watched), weights(tmp_path / "run")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for name in RESULTS:
        assert column(watched, name) == column(tmp_path / "run", name)
    assert not (tmp_path / "run/watch").exists()
    assert not (tmp_path / "run/best").exists()


def test_early_stop_survives_resume(
    views: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A learning rate of zero never gains: the first round is the best, the next two do not.
    still = ["--model.lr=0", "--trainer.max_steps=40", "--run.patience=2"]
    whole, broken = (recipe(tmp_path / name, views) for name in ("whole", "broken"))
    run(["fit", "--config", str(whole), *still])
    said = capfd.readouterr().err
    assert "stopped after step 6: 2 held-out rounds without a gain in PCDP@.10" in said
    assert "at step 2" in said
    # Interrupted after the second of three rounds: the count goes on from the checkpoint.
    run(["fit", "--config", str(broken), *still, "--trainer.max_steps=4"])
    assert "stopped after" not in capfd.readouterr().err
    stored = (tmp_path / "broken/run/watch/controls.json").stat().st_mtime_ns
    for _ in range(2):  # a stopped run stays stopped
        run(["fit", "--config", str(broken), *still])
        assert "stopped after step 6" in capfd.readouterr().err
        assert [p.name for p in checkpoints(tmp_path / "broken/run/checkpoints")][-1:] == [
            "step=6.ckpt"
        ]
    assert (tmp_path / "broken/run/watch/controls.json").stat().st_mtime_ns == stored
    for name in (*RESULTS, *WATCHED):
        assert column(tmp_path / "whole/run", name) == column(tmp_path / "broken/run", name), name
    for name in ("whole", "broken"):
        config = json.loads((tmp_path / name / "run/best/config.json").read_text())
        assert config["recipe"]["steps"] == 2


def test_two_ranks_watch_without_waiting_for_ever(
    watched: Path, views: Path, tmp_path: Path
) -> None:
    """Rank 0 measures under ddp; under fsdp2 both do, as each holds half of every block."""
    jobs = []
    for name in ("ddp", "fsdp2"):
        path = recipe(tmp_path / name, views)
        options = ["--trainer.devices=2", f"--trainer.strategy={name}", "--trainer.max_steps=4"]
        jobs.append(["fit", "--config", str(path), *options])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["-m", "tests.train.two_nodes", str(tmp_path / "jobs.json"), str(tmp_path)]
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", *script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = tmp_path / "ddp/run", tmp_path / "fsdp2/run"
    for name in WATCHED:
        assert column(one, name) == pytest.approx(column(other, name), abs=1.0), name
    assert sorted(column(one, "watch/pcdp@.10")) == [1, 3]
    # The controls know nothing of ranks.
    for name in ("watch/raw/ape", "watch/untrained/pcdp@.10"):
        assert column(one, name)[0] == pytest.approx(column(watched, name)[0], abs=1e-6)
    for folder in (one, other):
        step, rate = (column(folder, f"time/{key}") for key in ("step_s", "pairs_per_s"))
        assert all(step[k] * rate[k] == pytest.approx(2.0) for k in range(4))
        assert (folder / "best/config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2}, r"run\.patience=2 counts held-out rounds"),
        ({"watch_every": 5}, r"run\.watch_every=5 needs run\.watch_views"),
        ({"watch_every": -1}, r"run\.watch_every is -1"),
        ({"watch_every": 5, "watch_views": "x", "watch_pairs": 0}, r"run\.watch_pairs is 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    plain = {
        "watch_every": 0, "watch_views": None, "watch_objects": 1, "watch_pairs": 1,
        "watch_points": 1, "watch_cache_mb": 0, "patience": 0,
    }  # fmt: skip
    assert watch_options(plain) is None
    with pytest.raises(RecipeError, match=message):
        watch_options({**plain, **options})


def test_missing_views_are_one_sentence_before_the_first_step(views: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, views, watch_views=str(tmp_path / "nowhere"))
    with pytest.raises(EquifeatError, match="nowhere") as caught:
        run(["fit", "--config", str(path)])
    assert "\n" not in str(caught.value)
    assert not read_metrics(tmp_path / "run")

"""The two passes, on real files: caching, resuming after SIGKILL, sharing among processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.fixtures.views import write_views
from equifeat.cli import run
from equifeat.errors import EvalDataError, RecipeError
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from equifeat.eval.harness import evaluate, find_protocol
from equifeat.eval.models import ModelSpec, OpenModel, open_word, parse_models
from equifeat.eval.ranks import Ranks
from equifeat.eval.results import Results, TaskResult
from equifeat.eval.task_equivariance import EQUIVARIANCE
from equifeat.model.feature_map import FeatureMap
from tests.helpers import ROOT
from tests.train import runs

PROTOCOL = find_protocol(EQUIVARIANCE, "views/quick", ["pairs=3", "points=40"])


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "views"
    write_views(folder, [], painted=True, seed=0)
    return folder


class Counted:
    """The oracle, and how often it was asked."""

    hash = "counted"

    def __init__(self) -> None:
        self.calls = 0
        self.inner = CoordinateOracle()

    def dense(self, images: Tensor, resolution: int | None = None) -> FeatureMap:
        self.calls += 1
        return self.inner.dense(images, resolution)


def score(views: Path, model: Counted, cache: Path | None, **options: Any) -> TaskResult:
    specs = [ModelSpec("oracle", ("oracle",))]
    opened = OpenModel(model, model.hash)
    result = evaluate(
        EQUIVARIANCE, PROTOCOL, views, specs, lambda word: opened, cache=cache, **options
    )
    assert result is not None
    return result


def test_scoring_again_needs_no_forward_pass(views: Path, tmp_path: Path) -> None:
    model = Counted()
    first = score(views, model, tmp_path)
    assert model.calls > 0
    calls, model.calls = model.calls, 0
    again = score(views, model, tmp_path)
    assert model.calls == 0
    assert again.models[0].rows == first.models[0].rows
    # one object's predictions are gone: only it is predicted again
    victim = sorted(tmp_path.rglob("*.safetensors"))[0]
    victim.unlink()
    assert score(views, model, tmp_path).models[0].rows == first.models[0].rows
    assert 0 < model.calls < calls
    assert score(views, Counted(), None).models[0].rows == first.models[0].rows
    model.hash = "trained a little more"
    with pytest.raises(RecipeError, match="made with model counted, but now model is trained"):
        score(views, model, tmp_path)


def test_limit_and_pictures(views: Path, tmp_path: Path) -> None:
    result = score(views, Counted(), tmp_path, limit=1, pictures=1)
    assert {row.unit for row in result.models[0].rows[0]} == {"procedural_0000"}
    assert list(result.pictures) == [("oracle", "procedural_0000")]
    with pytest.raises(RecipeError, match="--limit 0"):
        score(views, Counted(), None, limit=0)
    with pytest.raises(RecipeError, match="several processes need"):
        score(views, Counted(), None, ranks=Ranks(0, 2, "cpu"))


def test_ranks_share_all_items_and_neighbours_stay_together() -> None:
    left = list(range(3, 20))
    parts = [Ranks(rank, 4, "cpu").mine(left) for rank in range(4)]
    assert [i for part in parts for i in part] == left
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Ranks(3, 4, "cpu").mine([1]) == []


EVALUATE = ["evaluate", "equivariance", "--device", "cpu", "--model", "oracle", "random"]
EVALUATE += ["--protocol", "views/quick", "--pictures", "0"]
SCRIPT = ["-m", "equifeat.cli"]


def rows(folder: Path) -> object:
    (task,) = Results.from_json((folder / "results.json").read_text()).tasks
    return [(model.name, model.rows) for model in task.models]


@pytest.mark.parametrize("launcher", ["devices", "torchrun"])
def test_two_processes_give_what_one_gives(views: Path, tmp_path: Path, launcher: str) -> None:
    small = [*EVALUATE, "--data", str(views), "--set", "pairs=3", "points=40"]
    words = [*SCRIPT, *small, "--out", str(tmp_path / "two")]
    if launcher == "devices":
        words += ["--devices", "2"]
    else:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote") == 1
    run([*small, "--out", str(tmp_path / "one")])
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


def test_a_killed_evaluation_goes_on(views: Path, tmp_path: Path) -> None:
    small = [*EVALUATE, "--data", str(views), "--set", "pairs=12", "points=400"]
    process = runs.start([*small, "--out", str(tmp_path / "killed")], tmp_path / "out.log")
    kept = tmp_path / "killed" / "predictions"
    runs.wait_for(lambda: bool(list(kept.rglob("*.safetensors"))), process)
    process.kill()
    process.join()
    before = {p: p.stat().st_mtime_ns for p in kept.rglob("*.safetensors")}
    assert not (tmp_path / "killed" / "results.json").exists()
    run([*small, "--out", str(tmp_path / "killed")])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    run([*small, "--out", str(tmp_path / "whole")])
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_oracle_is_right_and_chance_is_chance(views: Path) -> None:
    specs = parse_models(["oracle", "random"])
    result = evaluate(EQUIVARIANCE, PROTOCOL, views, specs, open_word)
    assert result is not None
    oracle, chance = ([dict(r.values) for r in m.rows[0]] for m in result.models)
    assert sum(r["PCDP@.05"] for r in oracle) / len(oracle) >= 99.0
    # a disc of radius t·box among the mask pixels; the mask covers at least a third of its box
    mean = {k: sum(r[k] for r in chance) / len(chance) for k in chance[0]}
    assert mean["PCDP@.05"] <= 3.2 * 0.05**2 * 3 * 100
    assert mean["PCDP@.20"] <= 3.2 * 0.2**2 * 3 * 100
    assert mean["APE"] > 25.0


def test_missing_views_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(EvalDataError, match="equifeat render MESHES"):
        EQUIVARIANCE.open(tmp_path / "none", PROTOCOL)
    with pytest.raises(EvalDataError, match="MVImgNet"):
        EQUIVARIANCE.open(tmp_path, find_protocol(EQUIVARIANCE, "mvimgnet/tracks"))


def test_random_features_are_the_same_for_the_same_picture() -> None:
    image = torch.rand(1, 3, 28, 42)
    first, again = (RandomFeatures().dense(image).features for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (1, 64, 2, 3)
    other = RandomFeatures().dense(1 - image).features
    assert abs(float((first * other).sum(1).mean())) < 0.3

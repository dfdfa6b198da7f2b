"""kill -9 at random moments: the resumed run equals the unbroken one to the bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equifeat.train.checkpoints import checkpoints
from equifeat.train.loggers import losses, read_metrics
from tests.train import runs

KILLS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, views: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    runs.finish(runs.recipe(folder, views))
    return folder / "run"


def test_killed_many_times_equals_unbroken(tmp_path: Path, views: Path, whole: Path) -> None:
    path, run = runs.recipe(tmp_path, views), tmp_path / "run"
    chance = random.Random(5)
    orphans: list[psutil.Process] = []
    reached = []
    for kill in range(KILLS):
        process, log = runs.fit(path)
        goal = chance.randint(4 * kill, 4 * kill + 4)
        runs.wait_for(lambda goal=goal: runs.logged(run) >= goal, process)  # type: ignore[misc]
        time.sleep(chance.random() * 0.06)
        orphans += runs.workers(process)
        process.kill()
        process.join()
        assert process.exitcode == -9, log.read_text()
        reached.append(runs.logged(run))
        # Whatever the moment, the log can be read, without holes or repeats.
        steps = [int(row["step"]) for row in read_metrics(run)]
        assert steps == list(range(len(steps)))
        assert len(checkpoints(run / "checkpoints")) <= 3
    runs.finish(path)
    assert len(set(reached)) > KILLS // 2, "the kills were all at one step"
    assert any(step % 3 for step in reached), "no kill between two checkpoints"
    assert any(step % 7 not in (0, 6) for step in reached), "no kill inside an epoch"
    runs.assert_same_run(run, whole)
    assert sorted(losses(run)) == list(range(1, 31))
    assert not list((run / "checkpoints").glob(".*"))
    assert runs.all_gone(orphans)
    # TensorBoard hides what the killed starts had logged behind their checkpoints.
    curves = []
    for folder in (run, whole):
        events = EventAccumulator(str(folder / "logs")).Reload()
        curves.append([(e.step, e.value) for e in events.Scalars("train/loss")])
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(30))

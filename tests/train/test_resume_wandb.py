"""One wandb run over all starts of a run, offline as on a cluster without network."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from equifeat.train.loggers import read_metrics
from equifeat.train.wandb_files import offline_rows
from tests.synthetic import write_views
from tests.train import runs

pytest.importorskip("wandb")


def test_a_killed_run_is_one_wandb_run_with_every_step_once(
    tmp_path: Path,
) -> None:
    write_views(tmp_path / "views/box", "box", views=6, size=64)
    changes: dict[str, dict[str, Any]] = {
        "run": {"wandb_project": "equifeat-test", "save_every": 4},
        "trainer": {"max_steps": 18},
        "data": {"num_workers": 0},
    }
    path, run = runs.recipe(tmp_path, tmp_path / "views", **changes), tmp_path / "run"
    for goal in (6, 11):
        process, _ = runs.fit(path)
        runs.wait_for(lambda goal=goal: runs.logged(run) >= goal, process)  # type: ignore[misc]
        process.kill()
        process.join()
        time.sleep(0.5)  # wandb's own process ends
    runs.finish(path)
    name = json.loads((run / "wandb.json").read_text())["id"]
    starts = sorted((run / "wandb").glob("offline-run-*"))
    assert len(starts) == 3
    assert all(start.name.endswith(name) for start in starts)
    rows = [row for start in starts for row in offline_rows(start / f"run-{name}.wandb")]
    steps = [int(row["trainer/global_step"]) for row in rows]
    assert steps == list(range(18)), "a step is missing or was logged twice"
    assert all(row["_step"] == row["trainer/global_step"] for row in rows)
    csv = {int(r["step"]): float(r["train/loss"]) for r in read_metrics(run)}
    assert {step: csv[step] for step in steps} == {
        step: row["train/loss"] for step, row in zip(steps, rows, strict=True)
    }

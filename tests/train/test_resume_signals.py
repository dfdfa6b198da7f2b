"""SIGTERM and SIGUSR1 on real processes: saved, stopped, nothing left behind, and resumed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from equifeat.train.checkpoints import checkpoints, read_checkpoint
from tests.train import runs

STEPS = {"trainer": {"max_steps": 40}, "run": {"save_every": 1000}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, views: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    runs.finish(runs.recipe(folder, views, **STEPS))
    return folder / "run"


def _scontrol(folder: Path) -> None:
    """What SLURM gives a batch job, with a scontrol that notes how it was called."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
    program.chmod(0o755)
    os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    os.environ |= {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "fit"}
    os.environ |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    os.environ["SLURM_JOB_NODELIST"] = os.environ["SLURM_NODELIST"] = "localhost"


def test_stops_at_a_step_and_the_resumed_run_is_the_unbroken_one(
    tmp_path: Path, views: Path, whole: Path
) -> None:
    path, run = runs.recipe(tmp_path, views, **STEPS), tmp_path / "run"
    stops: list[int] = []
    cases = ((signal.SIGTERM, 3, True), (signal.SIGUSR1, 6, False), (signal.SIGTERM, 4, True))
    for number, steps, everyone in cases:
        process, log = runs.fit(path)
        goal = (stops[-1] if stops else 0) + steps
        runs.wait_for(lambda goal=goal: runs.logged(run) >= goal, process)  # type: ignore[misc]
        children = runs.workers(process)
        assert len(children) == 2
        assert process.pid
        # SLURM and terminals signal all processes of a job, and may do so again.
        send = os.killpg if everyone else os.kill
        send(process.pid, number)
        time.sleep(0.01)
        if process.is_alive():
            send(process.pid, signal.SIGTERM)
        process.join(60)
        text = log.read_text()
        assert process.exitcode == 128 + number, text
        assert runs.all_gone(children, 5), "orphan workers"
        found = checkpoints(run / "checkpoints")
        stops.append(int(read_checkpoint(found[-1])["global_step"]))
        assert goal < stops[-1] < 40
        line = f"stopped by {number.name} after step {stops[-1]}, which is saved"
        assert text.count(line) == 1
        assert "Traceback" not in text
        assert not (run / "model").exists()
        assert runs.logged(run) == stops[-1] - 1
    assert [f"step={s}.ckpt" for s in stops[-2:]] == [f.name for f in found]
    runs.finish(path)
    # Stopping saved at other steps than the unbroken run did.
    for step in stops:
        (run / f"checkpoints/step={step}.ckpt").unlink(missing_ok=True)
    runs.assert_same_run(run, whole)


def test_in_slurm_sigusr1_queues_the_job_again(tmp_path: Path, views: Path) -> None:
    path = runs.recipe(tmp_path, views, **STEPS)
    process, log = runs.fit(path, before=Slurm(tmp_path))
    runs.wait_for(lambda: runs.logged(tmp_path / "run") >= 1, process)
    assert process.pid
    os.killpg(process.pid, signal.SIGUSR1)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGUSR1, log.read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert "job 77 is queued again" in log.read_text()
    assert not list(tmp_path.rglob("hpc_ckpt*")), "Lightning saved inside its signal handler"


class Slurm:
    """A batch job, for another process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        _scontrol(self.folder)

"""On a real SLURM, the one of setup.sh beside this file: nodes, requeue, scancel, arrays."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from equifeat.cli import run
from equifeat.errors import SubmitError
from equifeat.sweep.command import sweep_command
from equifeat.train.checkpoints import checkpoints
from equifeat.train.loggers import losses, read_metrics
from equifeat.train.wandb_files import offline_rows
from tests.helpers import ROOT
from tests.synthetic import write_views

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SCRIPT = ROOT / "recipes" / "slurm" / "fit.sbatch"
Submit = Callable[..., str]


def call(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def state(job: str) -> dict[str, str]:
    """The fields of `scontrol show job`."""
    words = call("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait(what: str, seconds: float, done: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.5)


def ended(job: str) -> bool:
    return state(job)["JobState"] in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def log_of(run: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(run.glob("slurm/*_log.out")))


def reach(job: str, steps: int, run: Path) -> None:
    def reached() -> bool:
        assert not ended(job), f"{state(job)}\n{log_of(run)}"
        return len(losses(run)) >= steps

    wait(f"step {steps} of job {job}", 180, reached)


def finish(job: str, seconds: float, expected: str = "COMPLETED") -> dict[str, str]:
    wait(f"job {job}", seconds, lambda: ended(job))
    fields = state(job)
    assert fields["JobState"] == expected, f"{fields}\n{log_of(Path('run'))}"
    return fields


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    write_views(folder / "box", "box", views=6, size=256)
    return folder


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    conf = Path(os.environ.get("SLURM_CONF", "/nonexistent"))
    # Nobody's real cluster is called equifeat: the tests never go to one by accident.
    if not conf.is_file() or "ClusterName=equifeat\n" not in conf.read_text():
        pytest.skip('no test SLURM is running: `eval "$(tests/slurm/setup.sh)"` starts one')
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        pytest.skip("sbatch or srun is not on PATH: tests/slurm/setup.sh installs them")
    monkeypatch.chdir(tmp_path)
    # Both nodes are this machine, and their names lead nowhere.
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("EQUIFEAT", str(shutil.which("equifeat", path=_scripts())))
    yield
    for line in call("squeue", "--noheader", "--format=%i %Z").splitlines():
        job, _, folder = line.partition(" ")
        if Path(folder) == tmp_path:
            call("scancel", job)


def _scripts() -> str:
    import sysconfig

    return sysconfig.get_path("scripts")


@pytest.fixture
def recipe(tmp_path: Path, views: Path) -> Path:
    settings = {
        "seed_everything": 0,
        "run": {"dir": "run", "save_every": 50},
        "model": {"backbone": "test_vit.r160_in1k", "weights": "random", "lr": 1e-3},
        # Loader processes get the signals of a job, too.
        "data": {"views": str(views), "num_keypoints": 200, "batch_size": 2, "num_workers": 1},
        "trainer": {"max_steps": 6, "accelerator": "cpu", "log_every_n_steps": 1},
        "ckpt_path": "last",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


@pytest.fixture
def submit(recipe: Path, capsys: pytest.CaptureFixture[str]) -> Submit:
    def submit(*options: str) -> str:
        run(["submit", str(recipe), "--gpus", "0", "--cpus-per-task", "1", *options])
        found = re.match(r"submitted job (\d+)", capsys.readouterr().out)
        assert found
        return found[1]

    return submit


def assert_every_step_once(folder: Path, steps: int) -> None:
    assert [int(row["step"]) for row in read_metrics(folder)] == list(range(steps))
    assert sorted(losses(folder)) == list(range(1, steps + 1))
    assert checkpoints(folder / "checkpoints")[-1].name == f"step={steps}.ckpt"
    assert (folder / "model" / "adapter_model.safetensors").is_file()


def test_the_script_trains_alike_on_one_node_and_on_two(recipe: Path) -> None:
    curves = {}
    for nodes in (1, 2):
        tasks = str(2 // nodes)
        options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}"]
        # These replace what the script says for a machine with four real GPUs.
        options += ["--cpus-per-task=2", "--time=5"]
        words = [str(SCRIPT), str(recipe), "--run.dir", f"run{nodes}"]
        job = call("sbatch", "--parsable", *options, *words).strip()
        fields = finish(job, 180)
        assert fields["NumNodes"] == str(nodes)
        assert fields["TresPerNode"] == f"gres:gpu:{tasks}"
        assert fields["Requeue"] == "1"
        log = Path(f"equifeat-{job}.log").read_text()
        assert "GLOBAL_RANK: 1, MEMBER: 2/2" in log
        assert_every_step_once(Path(f"run{nodes}"), 6)
        curves[nodes] = losses(Path(f"run{nodes}"))
    assert curves[1] == pytest.approx(curves[2], abs=1e-6)


def test_a_time_limit_ends_in_another_turn_of_the_same_run(submit: Submit, recipe: Path) -> None:
    settings = json.loads(recipe.read_text())

    def last_step(step: int) -> None:
        settings["trainer"]["max_steps"] = step
        recipe.write_text(json.dumps(settings))

    last_step(1_000_000)
    options = ("--nodes", "2", "--time", "2", "--save-before", "30")
    job = submit(*options, "--fit=--run.wandb_project p")
    wait("another turn", 240, lambda: ended(job) or state(job)["Restarts"] == "1")
    saved = len(losses(Path("run")))
    # Every turn reads the recipe; so the number of turns is no matter of the machine's speed.
    last_step(saved + 10)
    assert finish(job, 240)["Restarts"] == "1"
    log = Path(f"run/slurm/{job}_0_log.out").read_text()
    stopped = f"stopped by SIGUSR1 after step {saved}, which is saved: job {job} is queued again"
    assert log.count("stopped by") == 1
    assert stopped in log
    resumed = re.findall(r"Restored all states .*step=(\d+)\.ckpt", log)
    assert resumed == [str(saved)]
    assert log.index(stopped) < log.index("Restored all states"), "the log was written on"
    assert_every_step_once(Path("run"), saved + 10)
    assert not list(Path("run").glob("logs/version_*"))
    name = f"run-{json.loads(Path('run/wandb.json').read_text())['id']}.wandb"
    files = sorted(Path("run/wandb").glob(f"offline-run-*/{name}"))
    assert len(files) == 2
    assert [row["trainer/global_step"] for file in files for row in offline_rows(file)] == list(
        range(saved + 10)
    )


def test_scancel_saves_and_the_same_command_goes_on(submit: Submit) -> None:
    options = ("--tasks", "2", "--time", "5", "--fit=--trainer.max_steps 60")
    job = submit(*options)
    reach(job, 5, Path("run"))
    call("scancel", job)
    finish(job, 60, "CANCELLED")
    assert state(job)["Restarts"] == "0"
    step = len(losses(Path("run")))
    assert step < 60
    assert [path.name for path in checkpoints(Path("run/checkpoints"))][-1] == f"step={step}.ckpt"
    assert "stopped by SIGTERM" in Path(f"run/slurm/{job}_0_log.out").read_text()
    again = submit(*options)
    finish(again, 180)
    assert f"step={step}.ckpt" in Path(f"run/slurm/{again}_0_log.out").read_text()
    assert_every_step_once(Path("run"), 60)


def test_every_seed_of_an_array_queues_again_by_itself(submit: Submit) -> None:
    job = submit("--array-seeds", "0,3", "--time", "5", "--fit=--trainer.max_steps 60")
    runs = [Path("run/seed_0"), Path("run/seed_3")]
    for task, folder in enumerate(runs):
        reach(f"{job}_{task}", 5, folder)
    call("scancel", "--signal=USR1", f"{job}_1")
    wait("another turn", 120, lambda: state(f"{job}_1")["Restarts"] == "1")
    for task, folder in enumerate(runs):
        assert finish(f"{job}_{task}", 180)["Restarts"] == str(task)
        assert_every_step_once(folder, 60)
    assert losses(runs[0]) != losses(runs[1])


def test_a_sweep_is_one_array_and_then_a_table(recipe: Path, views: Path) -> None:
    content = {
        "recipe": recipe.name,
        "runs": {"conv": {"model.head": "conv"}, "residual": {}},
        "evaluate": {"held_out": [{"task": "equivariance", "data": str(views)}]},
    }
    Path("heads.yaml").write_text(json.dumps(content))
    options = "--time 5 --gpus 0 --cpus-per-task 1"

    def sweep() -> str:
        said = sweep_command(
            "heads.yaml", Path("out"), engine="slurm", submit=options, device="cpu"
        )
        assert said is not None
        return said

    found = re.match(r"submitted job (\d+) .*array of 2 runs", sweep())
    assert found
    again = sweep()
    assert "2 fits are in SLURM's queue already" in again
    assert "submitted" not in again
    for task in (0, 1):
        finish(f"{found[1]}_{task}", 240)
    table = sweep()
    assert "residual untrained" in table
    assert_every_step_once(Path("out/runs/conv/seed_0"), 6)


def test_a_task_that_dies_ends_the_job(submit: Submit) -> None:
    job = submit("--nodes", "2", "--time", "5", "--fit=--trainer.max_steps 2000")
    reach(job, 5, Path("run"))
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        mine = {f"SLURM_JOB_ID={job}".encode(), b"SLURM_PROCID=1"} <= set(environment)
        if mine and b"submitit.core._submit" in command:
            os.kill(int(process.name), signal.SIGKILL)
    fields = finish(job, 60, "FAILED")
    assert fields["Restarts"] == "0"


def test_a_refused_job_leaves_nothing(submit: Submit) -> None:
    with pytest.raises(SubmitError, match=r"^sbatch refused the job: invalid partition.*: nowhere"):
        submit("--time", "5", "--partition", "nowhere")
    assert not list(Path().glob("run/slurm/*"))

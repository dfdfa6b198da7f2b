"""The batch script made of options, and what is refused before anything is queued."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from equifeat.errors import EquifeatError, ModelNameError, RecipeError, SubmitError
from equifeat.submit import parse_recipe, parse_seeds, parse_time, submit_command
from tests.helpers import ROOT

pytest.importorskip("submitit", reason='submitit is not installed: pip install "equifeat[slurm]"')

SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-node=a100:4
#SBATCH --job-name=small
#SBATCH --mem=64G
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/runs/a/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --time=720

# setup
export SUBMITIT_PREEMPT_SIGNAL=USR2
export SRUN_CPUS_PER_TASK=4
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/runs/a/slurm/%j_%t_log.out --kill-on-bad-exit=1 \
PYTHON -u -m submitit.core._submit FOLDER/runs/a/slurm
# runs: equifeat fit --config small.yaml --model.lr 1e-4 --run.dir runs/a \
--trainer.num_nodes 2 --trainer.devices 4
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    settings = {
        "run": {"dir": "run"},
        "model": {"backbone": "test_vit.r160_in1k", "weights": "random"},
        "data": {"views": "views", "num_workers": 3},
        "trainer": {"max_steps": 6, "accelerator": "auto"},
        "ckpt_path": "last",
    }
    Path("small.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return Path("small.yaml")


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if "#SBATCH" in line]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def test_the_script_of_two_nodes_with_four_gpus(recipe: Path, tmp_path: Path) -> None:
    script = submit_command(
        [recipe],
        "12:00:00",
        nodes=2,
        gpus="a100:4",
        mem="64G",
        partition="gpu",
        account="lab",
        constraint="a100|h100",
        setup="module load cuda",
        fit="--model.lr 1e-4 --run.dir runs/a",
        sbatch="--qos=long",
        dry_run=True,
    )
    expected = SCRIPT.replace("FOLDER", str(tmp_path)).replace(
        "PYTHON", shlex.quote(sys.executable)
    )
    assert script == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "small.yaml"], "a dry run writes nothing"


def test_without_gpus_the_tasks_train_on_cpus(recipe: Path) -> None:
    script = submit_command([recipe], "5", gpus="0", tasks=2, cpus_per_task=1, dry_run=True)
    found = directives(script)
    assert "gpus-per-node" not in found
    assert (found["ntasks-per-node"], found["cpus-per-task"], found["time"]) == ("2", "1", "5")
    assert "--trainer.devices 2 --trainer.accelerator cpu" in script


def test_an_array_has_a_folder_and_a_seed_for_each_run(recipe: Path) -> None:
    script = submit_command([recipe], "60", array_seeds="0-1,7", dry_run=True)
    assert directives(script)["array"] == "0-2%3"
    assert directives(script)["output"].endswith("/run/slurm/%A_%a_0_log.out")
    runs = [line for line in script.splitlines() if line.startswith("# runs")]
    for seed, line in zip((0, 1, 7), runs, strict=True):
        own = f"--seed_everything {seed} --run.dir run/seed_{seed}"
        assert line.endswith(f"{own} --trainer.num_nodes 1 --trainer.devices 1")


def test_later_files_replace_keys_of_the_recipe(recipe: Path) -> None:
    Path("more.yaml").write_text("data: {num_workers: 9}\nrun: {dir: elsewhere}\n")
    script = submit_command([recipe, Path("more.yaml")], "60", dry_run=True)
    assert directives(script)["cpus-per-task"] == "10"
    assert "/elsewhere/slurm/" in directives(script)["output"]
    assert directives(script)["job-name"] == "small"


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("1:30", 2),
        ("00:45:00", 45),
        ("12:00:00", 720),
        ("12:00:01", 721),
        ("2-00", 2880),
        ("1-12:30", 2190),
        ("1-00:00:30", 1441),
    ],
)
def test_times_as_slurm_writes_them(text: str, minutes: int) -> None:
    assert parse_time(text) == minutes


@pytest.mark.parametrize(
    "text", ["", "0", "12h", "1:2:3:4", "0:00", "-5", "UNLIMITED", "1.5", "1-"]
)
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--time is .* write it as SLURM does"):
        parse_time(text)


def test_seeds() -> None:
    assert parse_seeds("0-2,7,1") == [0, 1, 2, 7]
    for text in ("", "a", "3-1", "1,,2", "-1"):
        with pytest.raises(RecipeError, match="--array-seeds is"):
            parse_seeds(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "--nodes is 0"),
        ({"gpus": "four"}, "--gpus is 'four'"),
        ({"gpus": "4", "tasks": 2}, "--tasks is 2 with --gpus 4: there is one task a GPU"),
        ({"gpus": "0", "tasks": 0}, "--tasks is 0"),
        ({"cpus_per_task": 0}, "--cpus-per-task is 0"),
        ({"mem": "64 GB"}, "--mem is '64 GB'"),
        ({"time": "3"}, "leaves no time to train"),
        ({"sbatch": "-q long"}, "--sbatch has '-q'"),
        ({"fit": "--model.lr '1e-4"}, "--fit is .*No closing quotation"),
        ({"fit": "--model.leaning 1"}, "model.leaning"),
        ({"recipe": [Path("absent.yaml")]}, "absent.yaml"),
    ],
)
def test_wrong_options_are_one_sentence(
    recipe: Path, options: dict[str, object], message: str
) -> None:
    given: dict[str, object] = {"recipe": [recipe], "time": "60", "dry_run": True, **options}
    with pytest.raises(EquifeatError, match=message) as caught:
        submit_command(**given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_wrong_recipe_never_waits_in_a_queue(recipe: Path, tmp_path: Path) -> None:
    Path("typo.yaml").write_text("model: {lora_rnak: 4}\n")
    with pytest.raises(RecipeError, match=r"lora_rnak.*lora_rank"):
        submit_command([recipe, Path("typo.yaml")], "60")
    Path("typo.yaml").write_text("model: {backbone: vit_smal_patch14_dinov2}\n")
    with pytest.raises(ModelNameError, match=r"vit_smal_patch14_dinov2.* Did you mean"):
        submit_command([recipe, Path("typo.yaml")], "60")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml", "typo.yaml"]


def test_without_slurm_it_says_so(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match="sbatch is not on PATH"):
        submit_command([recipe], "60")
    assert list(tmp_path.iterdir()) == [tmp_path / "small.yaml"]


def test_sbatch_gets_the_script_and_the_user_the_number(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", 'cp "$1" got.sh; echo "Submitted batch job 41"'), ("srun", ":")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    text = submit_command([recipe], "60", gpus="2")
    assert text.splitlines() == [
        "submitted job 41 (1 node, 2 tasks each, GPUs of a node: 2; 60 min a turn)",
        "run folder  run",
        f"logs        {tmp_path}/run/slurm: 41_0_log.out is the first task's",
        "stop        scancel 41; the same command goes on from the last checkpoint",
        "note: data.views is views, which does not exist on this machine",
    ]
    assert directives(Path("got.sh").read_text())["gpus-per-node"] == "2"
    # What the tasks will load names our function and holds words, no code.
    job = (tmp_path / "run" / "slurm" / "41_submitted.pkl").read_bytes()
    assert b"equifeat.submit" in job
    assert b"fit_in_job" in job
    assert len(job) < 1000


def test_reading_a_recipe_makes_nothing(recipe: Path, tmp_path: Path) -> None:
    config = parse_recipe(["--config", str(recipe), "--trainer.max_steps", "7"])
    assert config["trainer"]["max_steps"] == 7
    assert list(tmp_path.iterdir()) == [tmp_path / "small.yaml"]


def test_the_shell_scripts_are_bash() -> None:
    for path in (ROOT / "recipes/slurm/fit.sbatch", ROOT / "tests/slurm/setup.sh"):
        text = path.read_text()
        assert text.startswith("#!/bin/bash\n")
        assert "\nset -euo pipefail\n" in text
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_batch_script_asks_for_what_the_docs_promise() -> None:
    found = directives((ROOT / "recipes/slurm/fit.sbatch").read_text())
    assert found["signal"] == "USR1@120"
    assert found["open-mode"] == "append"
    assert found["ntasks-per-node"] == found["gpus-per-node"]
    assert "requeue" in found

"""Real fits of a tiny model, in processes, on Ray, interrupted and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from equifeat.checkpoint import load_model
from equifeat.errors import EvalDataError, RecipeError
from equifeat.sweep.command import _parameters, sweep_command
from equifeat.sweep.grid import read_sweep
from tests.helpers import ROOT
from tests.synthetic import write_views
from tests.train import runs
from tests.train.runs import BACKBONE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of two rows and two seeds in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, value in ONE_THREAD.items():
        monkeypatch.setenv(name, value)
    write_views(tmp_path / "train" / "box", "box", views=4, size=64)
    write_views(tmp_path / "held_out" / "ball", "sphere", views=3, size=64)
    recipe = {
        "model": {"backbone": BACKBONE, "weights": "random"},
        "data": {"views": "train", "num_keypoints": 40, "draws_per_epoch": 8},
        "run": {"save_every": 2},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2},
    }
    (tmp_path / "base.yaml").write_text(json.dumps(recipe))
    content = {
        "recipe": "base.yaml",
        "runs": {"conv": {"model.head": "conv"}, "residual": {"model.head": "residual"}},
        "seeds": [0, 1],
        "evaluate": {
            "select": [{"task": "equivariance", "data": "held_out", "protocol": "views/quick"}],
            "report": [{"task": "equivariance", "data": "train", "protocol": "views/quick"}],
        },
    }
    path = tmp_path / "heads.yaml"
    path.write_text(json.dumps(content))
    return path


def one_thread() -> None:
    """In the process of a sweep, whose fits inherit it."""
    os.environ.update(ONE_THREAD, PYTHONPATH=str(ROOT))


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_fits_every_seed_once_and_makes_one_table(sweep: Path) -> None:
    out = Path("out")
    said = sweep_command(str(sweep), out, dry_run=True)
    assert said is not None
    assert said.count("to do") == 5
    assert not out.exists()
    # data that is missing is found before the first fit, not after the last
    Path("held_out").rename("away")
    with pytest.raises(EvalDataError, match="held_out"):
        sweep_command(str(sweep), out)
    assert not out.exists()
    Path("away").rename("held_out")
    # a row that fails is named, the other one stays
    runs = {
        "conv": {"model.head": "conv"},
        "residual": {"model.head": "residual", "data.views": "late"},
    }
    change(sweep, runs=runs, seeds=[0])
    failed = r"1 of 2 fits failed: residual/seed_0 \(exit 1\); see out/logs"
    with pytest.raises(RecipeError, match=failed):
        sweep_command(str(sweep), out, jobs=2)
    assert "late" in Path("out/logs/residual_seed_0.log").read_text()
    fitted = out / "runs/conv/seed_0/model/config.json"
    made = fitted.stat().st_mtime_ns
    # the same command with one more seed fits what is missing
    Path("late").symlink_to("train")
    change(sweep, seeds=[0, 1])
    text = sweep_command(str(sweep), out, jobs=2, device="cpu")
    assert text is not None
    assert fitted.stat().st_mtime_ns == made
    for row in ("conv", "residual"):
        for seed in (0, 1):
            model = load_model(out / "runs" / row / f"seed_{seed}" / "model")
            assert model.head.kind == row
            trained = sum(p.numel() for p in model.trainable_parameters().values())
            assert _parameters(out / "runs" / row / f"seed_{seed}" / "model") == trained
            assert f"{trained:,}" in text
    results = json.loads((out / "select" / "results.json").read_text())
    rows = [model["name"] for model in results["tasks"][0]["models"]]
    raw = f"{BACKBONE} raw"
    assert rows == [raw, "conv untrained", "conv", "residual untrained", "residual"]
    assert (out / "select" / "fits.md").read_text().strip() in text
    assert (out / "select" / "report.html").is_file()
    # again: no fit, the same numbers
    before = json.loads((out / "sweep.json").read_text())
    assert sweep_command(str(sweep), out, device="cpu") == text
    assert json.loads((out / "sweep.json").read_text()) == before
    # the other split, of one row only
    other = sweep_command(str(sweep), out, split="report", rows="conv", device="cpu")
    assert other is not None
    assert "residual" not in other
    # differences to a row in place of the raw ViT: the same predictions in another order
    change(sweep, baseline="residual")
    other = sweep_command(str(sweep), out, device="cpu")
    assert other is not None
    assert "minus residual" in other
    results = json.loads((out / "select" / "results.json").read_text())
    turned = [model["name"] for model in results["tasks"][0]["models"]]
    assert turned == ["residual", *rows[:-1]]
    # another setting under a known name is no resume
    change(sweep, runs={"conv": {"model.head": "conv", "model.lr": 1e-5}}, baseline=None)
    with pytest.raises(RecipeError, match=r"fitted with other settings .* for 'conv'"):
        sweep_command(str(sweep), out)


def test_one_sweep_at_a_time_in_a_folder(sweep: Path) -> None:
    Path("out").mkdir()
    code = (
        "import sys\nfrom equifeat.files import lock\n"
        "with lock('out/.lock'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RecipeError, match=f"in use by another sweep .process {process.pid} "):
        sweep_command(str(sweep), Path("out"))
    process.communicate("")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_saves_and_goes_on(sweep: Path, number: int, code: int) -> None:
    recipe = json.loads(Path("base.yaml").read_text())
    recipe["trainer"]["max_steps"] = 4000
    Path("base.yaml").write_text(json.dumps(recipe))
    change(sweep, seeds=[0], runs={"residual": {}})
    process = runs.start(["sweep", str(sweep), "--out", "out"], Path("out.log"), one_thread)
    checkpoints = Path("out/runs/residual/seed_0/checkpoints")
    runs.wait_for(lambda: bool(list(checkpoints.glob("*.ckpt"))), process, 120)
    assert process.pid is not None
    (fit,) = psutil.Process(process.pid).children()
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == code
    assert not fit.is_running()
    steps = max(int(path.stem.partition("=")[2]) for path in checkpoints.glob("*.ckpt"))
    assert 0 < steps < 4000
    assert "saved" in Path("out/logs/residual_seed_0.log").read_text()
    if number == signal.SIGTERM:
        return
    # steps may change on resume, so the end comes within reach
    recipe["trainer"]["max_steps"] = steps + 2
    Path("base.yaml").write_text(json.dumps(recipe))
    Path("out/sweep.json").unlink()
    assert sweep_command(str(sweep), Path("out"), device="cpu") is not None
    log = Path("out/logs/residual_seed_0.log").read_text()
    assert f"step {steps + 2}/{steps + 2}" in log


RAY = """
import sys
from pathlib import Path
from equifeat.sweep.command import sweep_command
print(sweep_command(sys.argv[1], Path("out"), engine="ray", device="cpu") is not None)
"""


def test_on_a_real_ray_cluster(sweep: Path) -> None:
    """In a process of its own: Ray leaves threads and files behind."""
    pytest.importorskip("ray", reason='ray is not installed: pip install "equifeat[ray]"')
    change(sweep, seeds=[0], runs={"conv": {"model.head": "conv"}})
    done = subprocess.run(
        [sys.executable, "-c", RAY, str(sweep)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.strip().endswith("True"), done.stderr[-2000:]
    assert load_model("out/runs/conv/seed_0/model").head.kind == "conv"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "ablations").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_ablation_is_read_by_the_real_parser(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = sweep_command(str(path), Path("out"), dry_run=True)
    assert said is not None
    assert said.endswith("then select")
    assert read_sweep(path).splits.keys() >= {"select", "report"}
    assert len(read_sweep(path).seeds) >= 3


def test_wrong_options_are_one_sentence(sweep: Path) -> None:
    for options, reason in (
        ({"split": "test"}, "no split 'test', only select, report"),
        ({"rows": "con"}, "no row 'con'. Did you mean conv"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"engine": "slurm", "submit": "--tiem 60"}, "tiem"),
        ({"engine": "slurm", "submit": "--time 'x"}, "--submit is"),
    ):
        with pytest.raises(RecipeError, match=reason):
            sweep_command(str(sweep), Path("out"), **options)
    change(sweep, set={"model.hed": "conv"})
    with pytest.raises(RecipeError, match=r"row 'conv' of .*model\.hed"):
        sweep_command(str(sweep), Path("out"))
    Path("other").mkdir()
    Path("other/sweep.json").write_text("{")
    change(sweep, set={})
    with pytest.raises(RecipeError, match="damaged"):
        sweep_command(str(sweep), Path("other"))

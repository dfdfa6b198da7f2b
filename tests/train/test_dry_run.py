"""fit --dry-run measures real steps of the recipe, prints them and writes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from equifeat.cli import run
from equifeat.errors import RecipeError
from equifeat.train.module import EquivariantFinetune
from equifeat.train.precision import full_float32, tf32
from tests.synthetic import write_views
from tests.train.test_fit import recipe


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry_views")
    write_views(folder / "box", "box", views=6, size=96)
    return folder


def rows(text: str) -> dict[str, str]:
    found = [re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines() if "  " in line]
    return {parts[0].strip(): parts[1] for parts in found}


def test_dry_run_says_what_a_run_takes_and_writes_nothing(
    tmp_path: Path, views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe(tmp_path, views, gradient_checkpointing=True))
    before = sorted(tmp_path.rglob("*"))
    options = ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2"]
    run(["fit", "--config", path, "--trainer.max_steps=7200", *options, "--dry-run"])
    assert sorted(tmp_path.rglob("*")) == before
    found = rows(capsys.readouterr().out)
    d = 64
    lora, head = 4 * 2 * (4 * d + d * 4), d * d * 9 + d
    assert found["LoRA"].split()[:2] == [f"{lora:,}", "0"]
    assert found["head"].split()[:2] == [f"{head:,}", "0"]
    assert found["all"].split()[0] == f"{lora + head:,}"
    trunk, frozen = found["trunk"].split(), found["4 adapted blocks"].split()
    assert trunk[0] == frozen[0] == "0"
    assert int(trunk[1].replace(",", "")) > 10_000
    assert found["optimizer"].startswith(f"{8 * (lora + head) / 2**20:.1f} MiB")
    assert re.match(r"[\d.]+ MiB added to the process", found["peak memory"])
    seconds = re.match(
        r"([\d.e-]+) \(median of 5 after a warm-up\), \d+% of", found["seconds a step"]
    )
    assert seconds
    hours = re.match(r"([\d.]+) h for 7200 steps", found["whole run"])
    assert hours
    assert float(hours[1]) == pytest.approx(2 * float(seconds[1]), rel=0.02, abs=0.006)
    assert found["pairs a step"].startswith("2 (1 a batch, 1 ranks, 2 batches accumulated)")
    assert found["precision"] == "bf16-mixed, loss in float32, TF32 off"
    assert found["attention"].startswith("fused: scaled_dot_product")
    assert (found["compiled"], found["checkpointing"]) == ("no", "yes")
    assert re.match(r"1 objects, 6 views, [1-9]\d* view pairs", found["data"])


def test_dry_run_of_a_run_that_exists_leaves_it_alone(
    tmp_path: Path, views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recipe(tmp_path, views))
    run(["fit", "--config", path, "--trainer.max_steps", "2"])
    files = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    run(["fit", "--config", path, "--run.tf32", "true", "--dry-run"])
    after = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert after == files
    assert "TF32 on" in capsys.readouterr().out
    assert torch.get_float32_matmul_precision() == "highest"  # as it was before
    with pytest.raises(RecipeError, match="--dry-run is for fit"):
        run(["validate", "--config", path, "--dry-run"])


def test_half_precision_training_is_refused(tmp_path: Path, views: Path) -> None:
    path = str(recipe(tmp_path, views))
    with pytest.raises(RecipeError, match=r"trainer\.precision is 'bf16-true'.*bf16-mixed"):
        run(["fit", "--config", path, "--trainer.precision", "bf16-true"])


def test_the_loss_is_full_float32_whatever_the_precision(
    tmp_path: Path, views: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype, str]] = []
    real = EquivariantFinetune._step

    def step(self: EquivariantFinetune, batch: object, stage: str) -> torch.Tensor:
        objective = self.objective

        def watched(maps: object, *args: object, **options: object) -> object:
            loss, totals = objective(maps, *args, **options)  # type: ignore[arg-type]
            product = torch.ones(2, 2) @ torch.ones(2, 2)  # half, as autocast is on here
            seen.append((loss.dtype, product.dtype, torch.get_float32_matmul_precision()))
            return loss, totals

        monkeypatch.setattr(self, "objective", watched)
        try:
            return real(self, batch, stage)  # type: ignore[arg-type]
        finally:
            monkeypatch.setattr(self, "objective", objective)

    monkeypatch.setattr(EquivariantFinetune, "_step", step)
    options = ["--trainer.precision=bf16-mixed", "--trainer.max_steps=2", "--run.tf32=true"]
    run(["fit", "--config", str(recipe(tmp_path, views)), *options])
    assert seen == [(torch.float32, torch.bfloat16, "highest")] * 2


def test_tf32_is_put_back() -> None:
    with tf32(True):
        assert torch.get_float32_matmul_precision() == "high"
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dry_run_on_a_gpu(tmp_path: Path, views: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.accelerator=gpu", "--trainer.precision=16-mixed", "--dry-run"]
    run(["fit", "--config", str(recipe(tmp_path, views)), *options])
    peak = re.match(r"([\d.]+) MiB GPU memory", rows(capsys.readouterr().out)["peak memory"])
    assert peak
    assert float(peak[1]) > 1.0

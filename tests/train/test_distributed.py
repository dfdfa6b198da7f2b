"""Two real processes (gloo) train what one process does on the same global batch."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from equifeat.checkpoint import load_model
from equifeat.cli import run
from equifeat.errors import RecipeError
from equifeat.model.extractor import build_extractor
from equifeat.train.checkpoints import read_checkpoint
from equifeat.train.module import EquivariantFinetune
from equifeat.train.negatives import check_negatives
from equifeat.train.sharded import ShardedFrozenStrategy, check_strategy, shard_frozen
from tests.helpers import ROOT
from tests.synthetic import write_views
from tests.train.runs import EVERYTHING

STEPS = 5
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
Options = dict[str, Any]

# Independent keypoints and few of them: in some pairs no two are near, so there is no positive.
SPARSE: Options = {
    "data.sampler": "reference",
    "data.num_keypoints": 30,
    "data.min_keypoints": 1,
    "model.pos_radius": 0.02,
    "model.trunk_cache_mb": 16,
    "model.preserve": "relations",
    "model.ema_decay": 0.9,
    "data.val_draws": 4,
    "trainer.gradient_clip_val": 0.01,
}
# More keypoints than are covisible: every pair has another number of them.
GLOBAL: Options = {
    "data.num_keypoints": 3000,
    "model.negatives": "global",
    "model.max_negatives": 200,
    "trainer.accumulate_grad_batches": 2,
    "trainer.gradient_clip_val": "null",
}
BATCH: Options = {
    "data.num_keypoints": 100,
    "data.batch_size": 2,
    "model.negatives": "batch",
    "model.loss": "info_nce",
    "model.tau": 0.05,
    "model.head": "none",
    "model.preserve": "relations",
    "model.ema_decay": 0.9,
    "data.val_draws": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views of two objects, and the recipe that all runs share."""
    root = tmp_path_factory.mktemp("distributed")
    write_views(root / "views" / "box", "box", views=6, size=96)
    write_views(root / "views" / "sphere", "sphere", views=6, size=96)
    recipe = {
        "seed_everything": 0,
        "run": {"save_every": 1},
        "model": {"backbone": "test_vit.r160_in1k", "weights": "random", **EVERYTHING, "lr": 1e-3},
        "data": {
            "views": str(root / "views"),
            "val_views": str(root / "views"),
            "val_draws": 2,
            "augment": False,
            "draws_per_epoch": 9,  # Does not fit whole steps: all runs must leave out the same.
        },
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1},
        "ckpt_path": "last",
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return root


def fit(folder: Path, name: str, options: Options, **more: object) -> list[str]:
    """The arguments of a fit into a run of this name."""
    given = {"run.dir": folder / name, "trainer.devices": 1, **options, **more}
    pairs = [f"--{key.replace('__', '.')}={value}" for key, value in given.items()]
    return ["fit", "--config", str(folder / "recipe.yaml"), *pairs]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def ddp(folder: Path) -> Path:
    """A run that Lightning spreads over two processes of one machine."""
    job = fit(folder, "ddp", SPARSE, trainer__devices=2, trainer__strategy="ddp")
    done = subprocess.run(
        [sys.executable, "-m", "equifeat.cli", *job],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # One line of progress for both processes.
    assert done.stderr.count(f"step {STEPS}/{STEPS}") == 1
    return folder / "ddp"


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Path:
    """Runs on two "nodes" of one process, each started by its own torchrun."""
    nodes: Options = {"trainer.num_nodes": 2}
    sharded = {**BATCH, **nodes, "trainer.strategy": "fsdp2"}
    jobs = [
        fit(folder, "nodes", {**GLOBAL, **nodes}, trainer__strategy="ddp"),
        # Resumed half way.
        fit(folder, "fsdp2", sharded, trainer__max_steps=2),
        fit(folder, "fsdp2", sharded),
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    script = ["-m", "tests.train.two_nodes", str(folder / "jobs.json"), str(folder)]
    processes = []
    for node in range(2):
        with (folder / f"node{node}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [*command, f"--node-rank={node}", *script],
                    cwd=ROOT,
                    env=ONE_THREAD,
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(folder / f"node{node}.log").read_text()[-3000:] for node in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    return folder


def curve(run_dir: Path, column: str) -> list[float]:
    rows: list[dict[str, str]] = []
    for file in sorted(run_dir.glob("logs/**/metrics.csv")):
        with file.open() as lines:
            rows += csv.DictReader(lines)
    return [float(row[column]) for row in rows if row.get(column)]


def assert_same(run_dir: Path, other: Path) -> None:
    """The logged values, the weights and the optimiser's moments are equal to 1e-5."""
    for column in ("train/loss", "train/positives", "val/loss", "val/positives"):
        ours, theirs = curve(run_dir, column), curve(other, column)
        assert len(ours) == len(theirs) > 0, column
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5), column
    a, b = (
        read_checkpoint(path / "checkpoints" / f"step={STEPS}.ckpt") for path in (run_dir, other)
    )
    assert a["global_step"] == b["global_step"] == STEPS
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(not name.startswith("backbone") for name in a["state_dict"])
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(value, b["state_dict"][name], atol=1e-5, rtol=0.0)
    moments = [state["optimizer_states"][0]["state"] for state in (a, b)]
    assert len(moments[0]) == len(a["state_dict"])
    # AdamW forgives a gradient that is too large by a factor; its moments do not.
    for key, of_a in moments[0].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            mine, yours = of_a[moment], moments[1][key][moment]
            scale = float(yours.abs().max())
            torch.testing.assert_close(mine, yours, atol=1e-4 * scale, rtol=0.0)


def test_two_processes_one_batch_and_accumulation_train_the_same(ddp: Path, folder: Path) -> None:
    run(fit(folder, "batch2", SPARSE, data__batch_size=2))
    run(fit(folder, "accumulate2", SPARSE, trainer__accumulate_grad_batches=2))
    assert_same(folder / "batch2", ddp)
    assert_same(folder / "accumulate2", ddp)
    # The mean over the pairs that have an AP, wherever they were.
    ap = curve(ddp, "train/ap")
    assert ap == pytest.approx(curve(folder / "batch2", "train/ap"), abs=1e-5, nan_ok=True)
    assert ap == pytest.approx(curve(folder / "accumulate2", "train/ap"), abs=1e-5, nan_ok=True)
    loss, positives = curve(ddp, "train/loss"), curve(ddp, "train/positives")
    # A pair without a positive has loss 0 and no AP: then the AP is not 1 - loss.
    assert any(value != pytest.approx(1 - a, abs=1e-3) for value, a in zip(loss, ap, strict=True))
    assert max(positives) > 0


def test_global_negatives_of_two_nodes_are_those_of_one_batch(nodes: Path, folder: Path) -> None:
    run(fit(folder, "one", GLOBAL, data__batch_size=2))
    assert_same(folder / "one", folder / "nodes")
    # They do change the loss, and validation scores each pair alone.
    alone = {**GLOBAL, "model.negatives": "pair"}
    run(fit(folder, "pair", alone, data__batch_size=2, trainer__max_steps=1))
    both = [folder / name for name in ("nodes", "pair")]
    more, fewer = (curve(path, "train/loss")[0] for path in both)
    assert more > fewer + 1e-3
    more, fewer = (curve(path, "train/positives")[0] for path in both)
    assert more == fewer


def test_a_sharded_backbone_trains_the_same(nodes: Path, folder: Path) -> None:
    run(fit(folder, "whole", BATCH, trainer__accumulate_grad_batches=2))
    assert_same(folder / "whole", folder / "fsdp2")
    assert curve(folder / "whole", "train/loss")[0] > 0.0
    assert not curve(folder / "fsdp2", "train/ap")  # InfoNCE has none.
    image = torch.rand(1, 3, 64, 64)
    models = [load_model(folder / name / "model") for name in ("whole", "fsdp2")]
    with torch.no_grad():
        a, b = (model.dense(image).features for model in models)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0.0)


def test_shards_are_shards_and_gathers_have_gradients(nodes: Path) -> None:
    ranks = [torch.load(nodes / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    whole = torch.cat([torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3) + 10.0])
    for rank, found in enumerate(ranks):
        assert torch.equal(found["gathered"], whole)
        # d/dx of 1 x² on rank 0 plus 2 x² on rank 1.
        assert torch.equal(found["grad"], 6.0 * whole[2 * rank : 2 * rank + 2])
        assert torch.equal(found["sum"], whole[:2] + whole[2:])
        names = [name.removeprefix("whole/") for name in found if name.startswith("whole/")]
        assert len(names) == 1 + 18
        for name in names:
            torch.testing.assert_close(found[f"whole/{name}"], found[f"shards/{name}"])
    held = [int(found["held/shards"]) for found in ranks]
    assert sum(held) == int(ranks[0]["held/whole"])
    assert max(held) < 0.6 * sum(held)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed", FSDPStrategy(), ModelParallelStrategy()])
def test_strategies_that_would_lose_weights_are_refused(strategy: object) -> None:
    with pytest.raises(RecipeError, match="fsdp2"):
        check_strategy(strategy)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_spawn", "fsdp2"])
def test_strategies_that_keep_them_pass(strategy: str) -> None:
    check_strategy(strategy)


@pytest.mark.parametrize("option", [{"trunk_cache_mb": 1}, {"compile": True}])
def test_what_ranks_do_each_for_itself_does_not_go_with_shards(option: Options) -> None:
    """A rank that finds its views cached would leave the others waiting for it."""
    model = EquivariantFinetune("test_vit.r160_in1k", weights="random", **option)
    with pytest.raises(RecipeError, match=next(iter(option))):
        ShardedFrozenStrategy()._setup_model(model)


def test_a_backbone_whose_weights_lora_reads_is_not_sharded() -> None:
    extractor = build_extractor("eva02_tiny_patch14_224.mim_in22k", "random", lora_blocks=1)
    mesh = object.__new__(DeviceMesh)  # Refused before the processes are looked at.
    with pytest.raises(RecipeError, match="strategy=ddp"):
        shard_frozen(extractor, mesh)


def test_an_unfit_strategy_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="strategy=fsdp would"):
        run(fit(folder, "none", {"run.dir": tmp_path / "none", "trainer.strategy": "fsdp"}))


def test_negatives_of_others_need_others() -> None:
    with pytest.raises(RecipeError, match=r"negatives=batch .*batch_size is 1: use a"):
        check_negatives("batch", 1, 8)
    with pytest.raises(RecipeError, match="more ranks"):
        check_negatives("global", 1, 1)
    check_negatives("global", 1, 2)
    check_negatives("batch", 2, 1)
    check_negatives("pair", 1, 1)


def test_random_weights_do_not_depend_on_the_rank(ddp: Path, folder: Path) -> None:
    """DDP copies rank 0's weights at the start, so they must be those of any other run."""
    a, b = (load_model(folder / name / "model") for name in ("ddp", "batch2"))
    weights: list[Tensor] = [model.head.conv.weight for model in (a, b) if model.head.conv]
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0.0)

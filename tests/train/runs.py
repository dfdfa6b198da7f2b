"""Real commands, mostly fits of a tiny model, in processes of their own, to be killed."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import torch

from equifeat.train.checkpoints import checkpoints, read_checkpoint
from equifeat.train.loggers import read_metrics

BACKBONE = "test_vit.r160_in1k"
# LoRA and a head, and a loss that logs an AP: all that a run can have, whatever the defaults are.
EVERYTHING = {
    "head": "residual",
    "lora_rank": 4,
    "loss": "smooth_ap",
    "tau": 0.01,
    "both_directions": False,
}
# Imports torch and Lightning once; every command is a fork of that.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["equifeat.train.cli", "equifeat.evaluate", "equifeat.demo", "kornia.augmentation", "wandb"]
)


def recipe(folder: Path, views: Path, **changes: dict[str, Any]) -> Path:
    """A recipe with workers, augmentation, several epochs and a schedule; sections are updated."""
    settings: dict[str, Any] = {
        "seed_everything": 3,
        "run": {"dir": str(folder / "run"), "save_every": 3},
        "model": {
            "backbone": BACKBONE,
            "weights": "random",
            **EVERYTHING,
            "lr": 1e-3,
            "warmup_steps": 2,
            "schedule": "cosine",
        },
        "data": {
            "views": str(views),
            "num_keypoints": 60,
            "augment": True,
            "draws_per_epoch": 7,
            "num_workers": 2,
        },
        "trainer": {"max_steps": 30, "accelerator": "cpu", "devices": 1},
        "ckpt_path": "last",
    }
    for section, values in changes.items():
        settings[section].update(values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def _main(argv: list[str], log: str, folder: str, before: Callable[[], None] | None) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(folder)
    os.setsid()  # a process group of its own, as under SLURM
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for loaders: the system's default
    if before:
        before()
    from equifeat import cli

    sys.argv = ["equifeat", *argv]
    try:
        cli.main()
    finally:
        # A forked process would leave them out; wandb writes its files then.
        atexit._run_exitfuncs()


def start(
    argv: Sequence[str], log: Path, before: Callable[[], None] | None = None
) -> ForkServerProcess:
    """Start `equifeat` with these arguments in the working folder; its output goes to a file."""
    words = [str(word) for word in argv]
    process = SERVER.Process(
        target=_main, args=(words, str(log.resolve()), str(Path.cwd()), before)
    )
    process.start()
    return process


def fit(
    path: Path, *options: str, before: Callable[[], None] | None = None
) -> tuple[ForkServerProcess, Path]:
    """Start a fit; its output goes to out.log beside the recipe."""
    log = path.parent / "out.log"
    return start(["fit", "--config", str(path), *options], log, before), log


def elsewhere(function: Callable[..., None], *args: Any) -> None:
    """Call a function of a module in a process of its own, without the shape checks of pytest."""
    process = SERVER.Process(target=function, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def finish(path: Path, *options: str, before: Callable[[], None] | None = None) -> str:
    """Fit to the end; returns the output."""
    process, log = fit(path, *options, before=before)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def logged(run: Path) -> int:
    """The last step in the CSV whose loss is there, -1 for none."""
    rows = [int(row["step"]) for row in read_metrics(run) if row.get("train/loss")]
    return max(rows, default=-1)


def wait_for(what: Callable[[], bool], process: ForkServerProcess, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.is_alive() or what(), f"it ended with {process.exitcode}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def workers(process: ForkServerProcess) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if p.is_running()]


def all_gone(processes: list[psutil.Process], seconds: float = 20) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive


def results(run: Path) -> list[dict[str, str]]:
    """The log without what depends on the machine and the moment."""
    rows = read_metrics(run)
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def same(a: Any, b: Any) -> bool:
    """Equality to the bit of nested tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def assert_same_run(a: Path, b: Path, checked: bool = False) -> None:
    """The last checkpoints, the whole logs and the model folders are equal to the bit.

    Runs in this process are checked by beartype, which consumes Python's random numbers.
    """
    files = checkpoints(a / "checkpoints"), checkpoints(b / "checkpoints")
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    one, other = (read_checkpoint(found[-1]) for found in files)
    for content in (one, other):
        # How many batches of validation a progress bar has seen.
        del content["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        if checked:
            del content["callbacks"]["RandomState"]["python"]
    for key in one.keys() | other.keys():
        if key != "recipe":  # it has the run's folder
            assert same(one[key], other[key]), key
    assert results(a) == results(b)
    for name in ("head.safetensors", "adapter_model.safetensors"):
        assert (a / "model" / name).read_bytes() == (b / "model" / name).read_bytes()

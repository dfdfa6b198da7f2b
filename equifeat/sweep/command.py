"""The command `equifeat sweep`: fit every row and seed of a file, then measure them all."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from equifeat.checkpoint import HEAD_WEIGHTS
from equifeat.errors import RecipeError, suggest
from equifeat.eval.models import ModelSpec, with_controls
from equifeat.evaluate import open_suite, run_suite
from equifeat.files import InUseError, atomic_file, lock
from equifeat.model.adapter import ADAPTER_WEIGHTS
from equifeat.model.precision import Precision
from equifeat.options import OptionParser, underscored
from equifeat.progress import progress
from equifeat.recipe_files import find_recipe
from equifeat.submit import parse_recipe, submit_fits
from equifeat.sweep.engines import Ended, Fit, queued, run_here, run_on_ray
from equifeat.sweep.grid import Sweep, read_sweep
from equifeat.sweep.state import Planned, SweepState, finished

Engine = Literal["local", "ray", "slurm"]
STATE = "sweep.json"


def sweep_command(
    sweep: str,
    out: Path,
    split: str | None = None,
    rows: str | None = None,
    engine: Engine = "local",
    jobs: int = 1,
    gpus: str = "",
    address: str | None = None,
    cpus_per_fit: float = 1.0,
    gpus_per_fit: float = 0.0,
    submit: str = "",
    pictures: int = 0,
    device: str = "auto",
    precision: Precision = "float32",
    dry_run: bool = False,
) -> str | None:
    """Fit every row of a sweep with every seed, then put all into one table.

    The same command goes on: finished fits stay, interrupted ones resume, predictions are kept.

    Args:
        sweep: The sweep's file.
        out: Folder of the runs, the predictions and the tables.
        split: What to measure, one of those that the file names; its first one when left out.
        rows: Only these rows, separated by spaces; the table too has only them.
        engine: local, ray or slurm.
        jobs: Fits at a time (local).
        gpus: Numbers of GPUs that fits take turns on, such as 0,1 (local).
        address: Of the Ray cluster (ray).
        cpus_per_fit: CPU cores of a fit (ray).
        gpus_per_fit: GPUs of a fit (ray).
        submit: Options of equifeat submit, as in --submit="--time 4:00:00 --gpus 1" (slurm).
        pictures: How many of the best and of the worst items are drawn into the report.
        device: Device of the evaluation: auto, cpu, cuda, cuda:1, …
        precision: Type that models compute in there: float32, bfloat16 or float16.
        dry_run: Say what would be done.

    Returns:
        What was done: the tables, or what is still missing.

    Raises:
        RecipeError: The file, a recipe or an option is wrong, or the folder holds another sweep.
        EvalDataError: The data of the split is not there.
    """
    path = Path(sweep)
    if not path.exists():
        path = find_recipe(sweep) or path
    plan = read_sweep(path)
    chosen = split or next(iter(plan.splits))
    if chosen not in plan.splits:
        known = ", ".join(plan.splits)
        raise RecipeError(f"{path} has no split {chosen!r}, only {known}.{suggest(chosen, known)}")
    planned = _planned(plan, out, rows, path)
    if dry_run:
        SweepState(out / STATE).check(planned)
        return _said(planned, [one for one in planned if not finished(one)], chosen)
    open_suite(plan.splits[chosen], Path())  # before hours are spent
    with _alone(out):
        state = SweepState(out / STATE)
        state.check(planned)
        missing = [one for one in planned if not finished(one)]
        state.begin(planned)
        if missing and engine == "slurm":
            return _submit(missing, path.stem, out, submit, state)
        share = (cpus_per_fit, gpus_per_fit)
        failed = _fit(missing, out, engine, jobs, gpus, address, share, state)
    if failed:
        names = ", ".join(f"{end.name} (exit {end.code})" for end in failed[:5])
        raise RecipeError(
            f"{len(failed)} of {len(missing)} fits failed: {names}; see {out / 'logs'}, mend the "
            "cause and run the same command again: finished fits stay"
        )
    text = run_suite(
        plan.splits[chosen],
        _specs(planned, plan.baseline),
        Path(),
        out / chosen,
        cache=out / "predictions" / chosen,
        pictures=pictures,
        device=device,
        precision=precision,
    )
    if text is None:
        return None
    table = _fits_table(planned, state)
    with atomic_file(out / chosen / "fits.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    return f"{table}\n\n{text}\nwrote {out / chosen / 'fits.md'}"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second sweep from fitting into the same folder."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with lock(out / ".lock"):
            yield
    except InUseError as error:
        raise RecipeError(
            f"{out} is in use by another sweep ({error.holder}): wait for it, or use another --out"
        ) from error


def _planned(plan: Sweep, out: Path, rows: str | None, path: Path) -> list[Planned]:
    """Look at every recipe before the first hour is spent."""
    wanted = rows.split() if rows else [row.name for row in plan.rows]
    names = [row.name for row in plan.rows]
    for name in wanted:
        if name not in names:
            raise RecipeError(f"{path} has no row {name!r}.{suggest(name, names)}")
    planned = []
    for row in plan.rows:
        if row.name not in wanted:
            continue
        fits = [(seed, out / "runs" / row.name / f"seed_{seed}") for seed in plan.seeds]
        try:
            config = parse_recipe(row.arguments(*fits[0]))
        except RecipeError as error:
            raise RecipeError(f"row {row.name!r} of {path}: {error}") from error
        steps = config["trainer"]["max_steps"]
        if not isinstance(steps, int) or steps < 1:
            raise RecipeError(f"row {row.name!r} of {path} needs trainer.max_steps.")
        planned += [
            Planned(row, seed, folder, row.arguments(seed, folder), steps) for seed, folder in fits
        ]
    return planned


def _fit(
    missing: Sequence[Planned],
    out: Path,
    engine: Engine,
    jobs: int,
    gpus: str,
    address: str | None,
    share: tuple[float, float],
    state: SweepState,
) -> list[Ended]:
    """Run what is missing; return what failed."""
    fits = [
        Fit(one.name, one.arguments, out / "logs" / f"{one.row.name}_seed_{one.seed}.log")
        for one in missing
    ]
    if engine == "ray":
        ends = run_on_ray(fits, address, *share)
    else:
        ends = run_here(fits, jobs, [gpu for gpu in gpus.split(",") if gpu])
    failed = []
    with _closing(ends):
        for end in progress(ends, "fits", len(fits)):
            state.add(end.name, end.seconds)
            by_name = next(one for one in missing if one.name == end.name)
            if end.code or not finished(by_name):
                failed.append(end)
                sys.stderr.write(f"{end.name} failed with exit code {end.code}\n")
    return failed


@contextmanager
def _closing(ends: Iterator[Ended]) -> Iterator[None]:
    try:
        yield
    finally:
        ends.close()  # type: ignore[attr-defined]  # both engines are generators


def _submit(
    missing: Sequence[Planned], name: str, out: Path, options: str, state: SweepState
) -> str:
    """Submit what is neither finished nor in the queue."""
    parser = OptionParser(prog="--submit")
    parser.add_function_arguments(submit_fits, skip={"fits", "name", "folder", "dry_run"})
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise RecipeError(f"--submit is {options!r}: {error}") from error
    chosen = parser.parse_args([underscored(word) for word in words]).as_dict()
    waiting = [one for one in missing if queued(str(state.fit(one.name).get("job", "")) or "0")]
    left = [one for one in missing if one not in waiting]
    lines = [f"{len(waiting)} fits are in SLURM's queue already"] if waiting else []
    if left:
        job, report = submit_fits([one.arguments for one in left], name, folder=out, **chosen)
        state.submitted([one.name for one in left], job)
        lines.append(report)
    lines.append("run the same command again when they are done: it makes the table")
    return "\n".join(lines)


def _specs(planned: Sequence[Planned], baseline: str | None) -> list[ModelSpec]:
    """Rows of the table, raw and untrained ones in it once each; the baseline is the first."""
    rows: dict[str, list[str]] = {}
    for one in planned:
        rows.setdefault(one.row.name, []).append(str(one.model))
    specs = with_controls([ModelSpec(name, tuple(words)) for name, words in rows.items()])
    return sorted(specs, key=lambda spec: spec.name != baseline)


def _parameters(folder: Path) -> int:
    """Number of values of a model folder that were trained."""
    total = 0
    for name in (ADAPTER_WEIGHTS, HEAD_WEIGHTS):
        if not (folder / name).is_file():
            continue
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # safe_open is no mapping
                values = math.prod(file.get_slice(key).get_shape())
                # on a fused qkv, PEFT's B is [Bq 0; 0 0; 0 Bv]: a third of it is trained
                total += values // 3 if ".qkv.lora_B" in key else values
    return total


def _fits_table(planned: Sequence[Planned], state: SweepState) -> str:
    """What every row set, how large it is and how long it took."""
    rows: dict[str, list[Planned]] = {}
    for one in planned:
        rows.setdefault(one.row.name, []).append(one)
    lines = [
        "| row | keys | seeds | steps | trained parameters | minutes a fit |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, fits in rows.items():
        keys = " ".join(f"`{key}={json.dumps(value)}`" for key, value in fits[0].row.keys.items())
        seeds = " ".join(str(one.seed) for one in fits)
        seconds = [state.fit(one.name).get("seconds", 0.0) for one in fits]
        known = [value for value in seconds if value]
        took = f"{sum(known) / len(known) / 60:.1f}" if known else "–"
        size = _parameters(fits[0].model)
        lines.append(f"| {name} | {keys} | {seeds} | {fits[0].steps} | {size:,} | {took} |")
    return "\n".join(lines)


def _said(planned: Sequence[Planned], missing: Sequence[Planned], split: str) -> str:
    left = {one.name for one in missing}
    lines = [f"{one.name}: {'to do' if one.name in left else 'done'}" for one in planned]
    lines += [f"equifeat fit {shlex.join(one.arguments)}" for one in missing[:1]]
    return "\n".join([*lines, f"{len(left)} of {len(planned)} fits to do; then {split}"])

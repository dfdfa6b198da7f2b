"""The logs of a run: one CSV, one TensorBoard folder and one wandb run over all its starts."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from equifeat.errors import MissingExtraError
from equifeat.files import atomic_file
from equifeat.train.wandb_files import last_offline_step

METRICS = Path("logs") / "metrics.csv"
# Rows that may still get values: a callback may log a step before or after Lightning does.
_OPEN_ROWS = 2


def read_metrics(run: Path) -> list[dict[str, str]]:
    """Read the logged values of a run.

    Args:
        run: Folder of the run.

    Returns:
        One row a step with its values as text; empty where a step has none.
    """
    file = run / METRICS
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    # A line without its end was cut off by a kill.
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def losses(run: Path) -> dict[int, float]:
    """Read the training loss of a run.

    Args:
        run: Folder of the run.

    Returns:
        Loss by optimiser step, counted from 1.
    """
    rows = read_metrics(run)
    return {int(row["step"]) + 1: float(row["train/loss"]) for row in rows if row.get("train/loss")}


def cut_metrics(run: Path, start: int) -> None:
    """Remove the rows of steps that a resumed run will make again.

    Args:
        run: Folder of the run.
        start: Optimiser steps of the checkpoint; rows of steps from this one on go.
    """
    rows = read_metrics(run)
    if rows:
        _write(run / METRICS, list(rows[0]), [row for row in rows if int(row["step"]) < start])
    else:
        (run / METRICS).unlink(missing_ok=True)


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [[row.get(column, "") for column in columns] for row in rows]
    )
    return text.getvalue().encode()


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    header = {column: column for column in columns}
    with atomic_file(path) as part:
        part.write_bytes(_lines(columns, [header, *rows]))


class RunCsv(Logger):
    """One row a step in one file, written at once; it continues the file that it finds.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.path = run / METRICS
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []  # the last ones, which may still grow
        self._offset = 0  # where they start in the file

    @property
    def name(self) -> str:
        """The run's folder holds one run."""
        return ""

    @property
    def version(self) -> str:
        """There is one version."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the logs."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml beside the log has every key.

        Args:
            *args: Unused.
            **kwargs: Unused.
        """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of a step.

        Args:
            metrics: Values by name.
            step: Optimiser step, from 0.
        """
        if step is None:
            return
        if not self._columns:
            found = read_metrics(self.path.parents[1])
            self._columns = list(found[0]) if found else ["step"]
        row = next((row for row in self._rows if row["step"] == step), None)
        older = not self._rows or step < self._rows[0]["step"]
        if row is None and not older:
            row = {"step": step}
            self._rows.append(row)
            self._rows.sort(key=lambda other: int(other["step"]))
        new = [name for name in metrics if name not in self._columns]
        if new or row is None:
            self._rewrite(new, step, metrics)
            return
        row.update(metrics)
        lines = [_lines(self._columns, [row]) for row in self._rows]
        # Written before it is cut, so that a kill in between leaves whole lines.
        with self.path.open("r+b") as file:
            file.seek(self._offset)
            file.write(b"".join(lines))
            file.truncate()
        while len(self._rows) > _OPEN_ROWS:
            self._rows.pop(0)
            self._offset += len(lines.pop(0))

    def _rewrite(self, new: list[str], step: int, metrics: Mapping[str, float]) -> None:
        """Write the whole file: it gets a column, or a row that is not among the last."""
        self._columns += new
        rows: dict[int, dict[str, Any]] = {
            int(row["step"]): dict(row) for row in read_metrics(self.path.parents[1])
        }
        for row in self._rows:
            rows[row["step"]] = row
        rows.setdefault(step, {}).update({**metrics, "step": step})
        ordered = [rows[key] for key in sorted(rows)]
        _write(self.path, self._columns, ordered)
        self._rows = [{**row, "step": int(row["step"])} for row in ordered[-_OPEN_ROWS:]]
        tail = sum(len(_lines(self._columns, [row])) for row in self._rows)
        self._offset = self.path.stat().st_size - tail

    @rank_zero_only
    def commit(self, step: int) -> None:
        """Make what was logged outlive a power cut, before a checkpoint is published.

        Args:
            step: Optimiser steps of the checkpoint, unused: all rows are on their way.
        """
        if self.path.is_file():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


class RunWandb(WandbLogger):
    """One wandb run over all starts of a run, with every step once.

    A kill loses what wandb had not sent or written yet, so a resumed run first asks what is there:
    what is missing up to the checkpoint comes from the CSV, what is there already is not repeated.

    Args:
        run: Folder of the run; wandb.json there holds the id.
        project: Project of Weights & Biases.
        rows: The CSV up to the checkpoint.
    """

    def __init__(self, run: Path, project: str, rows: Sequence[Mapping[str, str]] = ()) -> None:
        file = run / "wandb.json"
        name = json.loads(file.read_text())["id"] if file.is_file() else secrets.token_hex(4)
        super().__init__(project=project, save_dir=str(run), id=name, name=run.name)
        if rank_zero_only.rank == 0 and not file.is_file():  # type: ignore[attr-defined]
            with atomic_file(file) as part:
                part.write_text(json.dumps({"id": name}) + "\n")
        self._run = run
        self._rows = rows
        self._there: int | None = None
        self._held: dict[int, dict[str, Any]] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add values to a step; they are handed over a little later, in the order of steps.

        Args:
            metrics: Values by name.
            step: Optimiser step, from 0.
        """
        if step is None:
            super().log_metrics(metrics)
            return
        self._held.setdefault(step, {}).update(metrics)
        self._hand_over(step - _OPEN_ROWS)

    @rank_zero_only
    def commit(self, step: int) -> None:
        """Hand over the steps of a checkpoint, before it is published.

        Args:
            step: Optimiser steps of the checkpoint.
        """
        self._hand_over(step - 1)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Hand over the rest; the last step of a broken run may not be complete.

        Args:
            status: Lightning's status.
        """
        if self._held:
            self._hand_over(max(self._held) - (status != "success"))
        super().finalize(status)

    def _hand_over(self, last: int) -> None:
        if self._there is None:
            self._there = (
                last_offline_step(self._run, self.experiment.id)
                if self.experiment.offline
                else int(self.experiment.step) - 1
            )
            for row in self._rows:
                values = {k: float(v) for k, v in row.items() if v and k != "step"}
                self._log(int(row["step"]), values)
        for step in sorted(step for step in self._held if step <= last):
            self._log(step, self._held.pop(step))

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._there is not None and step > self._there:
            self.experiment.log({**values, "trainer/global_step": step}, step=step)


def run_loggers(run_dir: str | Path, wandb_project: str | None = None, start: int = 0) -> list[Any]:
    """Return the CSV and TensorBoard loggers, and wandb's when a project is named.

    They continue what earlier starts of the run have logged, up to the checkpoint.

    Args:
        run_dir: Folder of the run.
        wandb_project: Project of Weights & Biases; set WANDB_MODE=offline to work without network.
        start: Optimiser steps of the checkpoint that the run goes on from.

    Returns:
        Lightning loggers.

    Raises:
        MissingExtraError: wandb is not installed.
    """
    run = Path(run_dir)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        cut_metrics(run, start)
    tensorboard = TensorBoardLogger(
        run,
        name="logs",
        version="",
        # Hides what earlier starts logged behind the checkpoint.
        purge_step=start,
        default_hp_metric=start == 0,
    )
    loggers: list[Any] = [RunCsv(run), tensorboard]
    if wandb_project:
        try:
            loggers.append(RunWandb(run, wandb_project, read_metrics(run)))
        except ModuleNotFoundError as error:
            raise MissingExtraError("wandb", "wandb", "logging to Weights & Biases") from error
    return loggers

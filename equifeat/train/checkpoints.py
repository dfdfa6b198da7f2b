"""Files of checkpoints: whole or absent, checked when read, the newest readable one."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from equifeat.errors import CheckpointError
from equifeat.files import atomic_file

_NAME = re.compile(r"step=(\d+)\.ckpt")
_KEYS = {"state_dict", "global_step", "loops", "optimizer_states", "lr_schedulers"}
# What a truncated or altered file raises in zipfile and torch.load.
_DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest last.

    Args:
        folder: ``checkpoints`` of the run's folder; it need not exist.

    Returns:
        Files ``step=N.ckpt`` in the order of their steps.
    """
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step=*.ckpt")]
    return [p for _, p in sorted((int(name[1]), path) for name, path in found if name)]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint after checking every byte of it.

    Args:
        path: The file.

    Returns:
        What Lightning saved, with its tensors on the CPU.

    Raises:
        CheckpointError: The file is truncated, damaged or no checkpoint of a run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load reads past wrong checksums.
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: give a checkpoint of a run") from error
    except _DAMAGE as error:
        why = str(error).split("\n", 1)[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is truncated or damaged ({why}): give another checkpoint"
        ) from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= _KEYS:
        raise CheckpointError(f"{path} is no checkpoint of a run: give a file step=N.ckpt")
    return checkpoint


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that can be read, and say so when it is not the newest.

    Args:
        folder: ``checkpoints`` of the run's folder.

    Returns:
        Its file and content, or None when the run has no checkpoint yet.

    Raises:
        CheckpointError: There are checkpoints and none can be read.
    """
    broken: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            content = read_checkpoint(path)
        except CheckpointError as error:
            broken.append(str(error).partition(": ")[0])
            continue
        if broken:
            sys.stderr.write(f"{'; '.join(broken)}; going on from {path.name}\n")
        return path, content
    if broken:
        raise CheckpointError(
            f"no checkpoint of the run can be read ({'; '.join(broken)}): restore one from a "
            "backup, or delete the run's folder to start anew"
        )
    return None


def set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints newer than the one that a run goes on from, so that none is taken for it.

    Args:
        folder: ``checkpoints`` of the run's folder.
        step: The step that the run goes on from.
    """
    for path in checkpoints(folder):
        if int(path.stem.partition("=")[2]) > step:
            path.replace(path.with_name(f"{path.name}.old"))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, to the disk, then renames it; reads tensors only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What Lightning made.
            path: Where to.
            storage_options: Unused.

        Raises:
            CheckpointError: The file cannot be written, for example on a full disk.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            with atomic_file(path) as part, part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            sync_folder(Path(path).parent)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {checkpoint['global_step']} cannot be written to "
                f"{Path(path).parent} ({error.strerror}): the one before is kept; make room, then "
                "the same command goes on from there"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: The file.
            map_location: Unused: Lightning moves what it loads.
            weights_only: Unused: nothing else is ever read.

        Returns:
            See `read_checkpoint`.
        """
        return read_checkpoint(path)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder outlive a power cut.

    Args:
        folder: The folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

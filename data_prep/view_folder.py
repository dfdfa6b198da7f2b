"""The folder of one rendered object: PNG files and views.json, there whole or not at all.

color is 8-bit RGB over black; depth 16-bit, z = value * depth_step, 0 = background; mask 0 or 255;
normal 8-bit RGB, n = (value - 128) / 127 in camera axes, grey 128 = background.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.renderers import Rendered
from equifeat.errors import RenderError

FORMAT = "equifeat-views"
VERSION = 1
_MAX_STEP = 1e-4
# Level 1 is five times faster than the default and 15 % larger on these pictures.
_COMPRESS_LEVEL = 1


def depth_step(max_depth: float) -> float:
    """Return the step of a 16-bit depth image.

    Args:
        max_depth: The largest depth that can occur.

    Returns:
        Object units a grey level; the quantisation error is half of it, at most 5e-5.

    Raises:
        RenderError: The camera is too far away for 16 bits.
    """
    step = max_depth / 65535
    if step > _MAX_STEP:
        raise RenderError(
            f"depths up to {max_depth:.2f} do not fit 16 bits at steps of {_MAX_STEP}; "
            f"give a --distance below {65535 * _MAX_STEP - 0.9:.1f}"
        )
    return step


class ViewFolderWriter:
    """Writes an object to a hidden folder beside its place and renames it at the end.

    Use it as a context manager: an exception or a missing :meth:`finish` leaves nothing behind.
    What a killed run left is removed by the next one on the same machine.

    Args:
        folder: Where the object shall be.
        step: Object units of one grey level of the depth images.
    """

    def __init__(self, folder: Path, step: float) -> None:
        self._folder = folder
        self._step = step
        self._cameras: list[dict[str, Any]] = []
        tag = f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._temporary = folder.parent / f".{folder.name}.{tag}.partial"

    def __enter__(self) -> ViewFolderWriter:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        self._temporary.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def add(self, view: Rendered, K: NDArray[Any], cam_from_world: NDArray[Any]) -> None:
        """Write the images of the next view.

        Args:
            view: What the renderer returned.
            K: (3, 3) intrinsics.
            cam_from_world: (4, 4) pose.
        """
        index = f"{len(self._cameras):06d}.png"
        levels = np.rint(view.depth.astype(np.float64) / self._step)
        levels = np.where(view.mask, levels.clip(1, 65535), 0).astype(np.uint16)
        images = {"color": view.color, "depth": levels, "mask": view.mask.astype(np.uint8) * 255}
        if view.normals is not None:
            images["normal"] = np.rint(view.normals * 127.0 + 128.0).astype(np.uint8)
        for kind, pixels in images.items():
            path = self._temporary / f"{kind}_{index}"
            Image.fromarray(np.ascontiguousarray(pixels)).save(path, compress_level=_COMPRESS_LEVEL)
        self._cameras.append({"K": K.tolist(), "cam_from_world": cam_from_world.tolist()})

    def finish(self, record: dict[str, Any]) -> None:
        """Write views.json and move the folder to its place, replacing what was there.

        Args:
            record: Everything of views.json but format, version, depth_step and views.
        """
        whole = {
            "format": FORMAT,
            "version": VERSION,
            **record,
            "depth_step": self._step,
            "views": self._cameras,
        }
        text = json.dumps(whole, indent=1, allow_nan=False)
        (self._temporary / "views.json").write_text(text + "\n", encoding="utf-8")
        old = self._temporary.with_suffix(".old.partial")
        if self._folder.exists():
            self._folder.rename(old)
        self._temporary.rename(self._folder)
        shutil.rmtree(old, ignore_errors=True)


def finished_record(folder: Path) -> dict[str, Any] | None:
    """Return views.json of a finished object, or None when the folder does not exist.

    Args:
        folder: The object's folder.

    Returns:
        The parsed file.

    Raises:
        RenderError: There is a folder of that name that is not a rendered object.
    """
    if not folder.exists():
        return None
    try:
        record: dict[str, Any] = json.loads((folder / "views.json").read_text(encoding="utf-8"))
        if record["format"] == FORMAT:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RenderError(f"{folder}: exists but is not a rendered object; move it away first")


def remove_leftovers(folder: Path) -> None:
    """Remove hidden folders that killed runs of this machine left for an object.

    Args:
        folder: The object's own folder.
    """
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.{re.escape(_host())}-(\d+)-\w+\.")
    for path in folder.parent.iterdir():
        found = pattern.match(path.name)
        if found and path.name.endswith(".partial") and not _alive(int(found.group(1))):
            shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

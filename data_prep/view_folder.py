"""The folder of one rendered object: PNG files and views.json, there whole or not at all.

It is made in OUT/.partial and renamed. equifeat.files.atomic_folder would leave what a killed
process wrote beside the objects, where nobody could tell it from the work of a living one.

color is 8-bit RGB over black; depth 16-bit, z = value * depth_step, 0 = background; mask 0 or 255;
normal 8-bit RGB, n = (value - 128) / 127 in camera axes, grey 128 = background.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import uuid
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.renderers import Rendered
from data_prep.stopwatch import Stopwatch
from equifeat.errors import RenderError

FORMAT = "equifeat-views"
VERSION = 1
HIDDEN = ".partial"
_LEFTOVER = re.compile(r"(?P<host>\w+)-(?P<pid>\d+)-\w+\.")
_TRIES = 100
_MAX_STEP = 1e-4
# Level 1 is twice as fast as the default and 15 % larger on these pictures. Matching runs only
# (zlib's Z_RLE) makes 8-bit pictures of objects over black 12 % smaller and masks half as large, a
# little faster still; 16-bit depth gets larger by it.
_COMPRESS_LEVEL = 1
_STRATEGY = {"uint8": zlib.Z_RLE, "uint16": zlib.Z_DEFAULT_STRATEGY}


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
    """Writes an object to a hidden folder of the same file system and renames it at the end.

    Use it as a context manager: an exception or a missing `finish` leaves nothing behind.
    What a killed run left is removed by the next one on the same machine.

    Args:
        folder: Where the object shall be.
        step: Object units of one grey level of the depth images.
        out_dir: The folder of all objects, by default the parent; the hidden one is in it.
        watch: Gets the time spent on "encode" and "write".
    """

    def __init__(
        self,
        folder: Path,
        step: float,
        out_dir: Path | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        self._folder = folder
        self._step = step
        self._cameras: list[dict[str, Any]] = []
        self._watch = watch or Stopwatch()
        self._hidden = (out_dir or folder.parent) / HIDDEN
        tag = f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._temporary = self._hidden / f"{tag}.{folder.name[:100]}"

    def __enter__(self) -> ViewFolderWriter:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._hidden.parent)
        # another worker may just have removed the empty parent
        for _ in range(_TRIES):
            try:
                self._temporary.mkdir(parents=True)
                return self
            except FileNotFoundError:
                continue
        raise RenderError(f"{self._hidden}: cannot be made")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        _remove_empty(self._hidden)

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
            with self._watch.part("encode"):
                data = encode_png(pixels)
            with self._watch.part("write"):
                (self._temporary / f"{kind}_{index}").write_bytes(data)
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
        with self._watch.part("write"):
            (self._temporary / "views.json").write_text(text + "\n", encoding="utf-8")
            old = self._temporary.with_name(f"{self._temporary.name}.old")
            if self._folder.exists():
                self._folder.rename(old)
            self._temporary.rename(self._folder)
            shutil.rmtree(old, ignore_errors=True)


def encode_png(pixels: NDArray[Any]) -> bytes:
    """Encode a picture without loss.

    Args:
        pixels: (H, W) uint8 or uint16, or (H, W, 3) uint8.

    Returns:
        The bytes of a PNG file.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    strategy = _STRATEGY[pixels.dtype.name]
    image.save(buffer, "PNG", compress_level=_COMPRESS_LEVEL, compress_type=strategy)
    return buffer.getvalue()


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


def remove_leftovers(out_dir: Path, others: bool = False) -> None:
    """Remove what killed runs left in a folder of objects.

    Args:
        out_dir: The folder of all objects.
        others: Whether to remove what processes of other machines left as well. Nobody here can
            tell whether they live, so only the one that holds the manifest may say so.
    """
    hidden = out_dir / HIDDEN
    if not hidden.is_dir():
        return
    for path in list(hidden.iterdir()):
        found = _LEFTOVER.match(path.name)
        if found is None:
            continue
        here = found["host"] == _host()
        if (here and not _alive(int(found["pid"]))) or (others and not here):
            # renamed first, so that a dying writer can neither go on nor finish
            dead = path.with_name(f"{uuid.uuid4().hex}.dead")
            try:
                path.rename(dead)
            except OSError:
                continue
            shutil.rmtree(dead, ignore_errors=True)
    for path in hidden.glob("*.dead"):
        shutil.rmtree(path, ignore_errors=True)
    _remove_empty(hidden)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


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
